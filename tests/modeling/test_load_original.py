"""The Mamba authors' folders, made here in their layout, equal transformers' layout of the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from undersong import (
    FastMamba2ForCausalLM,
    FastMamba2ForSequenceClassification,
    FastMambaForCausalLM,
    FastMambaModel,
    load_original,
)

from .mamba_pairs import ids_of, pair

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = {"d_model": 16, "n_layer": 2, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
SSM = {
    "mamba": {"d_state": 8, "dt_rank": 3},
    "mamba2": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 1, "chunk_size": 8},
}
KINDS = pytest.mark.parametrize("kind", SSM)
CLASSES = {"mamba": FastMambaForCausalLM, "mamba2": FastMamba2ForCausalLM}


def write(folder, kind, model, *, vocab_size=35, weights="pytorch_model.bin", drop=(), **changes):
    """A folder as the authors publish it: the configuration has the vocabulary's size before padding."""
    config = {**BASE, "vocab_size": vocab_size, "pad_vocab_size_multiple": 37, "ssm_cfg": SSM[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key.replace("embeddings.", "embedding."): value.clone() for key, value in model.state_dict().items()}
    tensors = {key: value for key, value in tensors.items() if key not in drop}
    if weights == "pytorch_model.bin":
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)


def stock_of(kind):
    return pair(kind, tie_word_embeddings=True)[0]


@KINDS
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@torch.no_grad()
def test_the_authors_layout_equals_transformers_layout(kind, weights, tmp_path):
    stock = stock_of(kind)
    write(tmp_path, kind, stock, weights=weights)
    model = load_original(tmp_path)
    assert type(model) is CLASSES[kind]
    assert not model.training
    assert model.config.vocab_size == 37
    assert {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert (model(ids_of(2, 9)).logits - stock(ids_of(2, 9)).logits).abs().max() < 1e-5
    assert model.lm_head.weight is model.backbone.embeddings.weight

    model.save_pretrained(tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert type(again) is type(stock)
    assert (again.eval()(ids_of(2, 9)).logits - stock(ids_of(2, 9)).logits).abs().max() < 1e-5


def test_other_heads_and_a_file_without_the_tied_head(tmp_path):
    stock = stock_of("mamba")
    write(tmp_path, "mamba", stock, drop=("lm_head.weight",))
    assert torch.equal(load_original(tmp_path).lm_head.weight, stock.backbone.embeddings.weight)
    backbone = load_original(tmp_path, head=FastMambaModel)
    assert torch.equal(backbone.embeddings.weight, stock.backbone.embeddings.weight)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two", "mamba2", stock_of("mamba2"))
    model = load_original(tmp_path / "two", head=FastMamba2ForSequenceClassification)
    assert model(ids_of(2, 5)).logits.shape == (2, 2)


def test_a_name_that_is_no_folder_is_asked_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    write(tmp_path, "mamba", stock_of("mamba"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert type(load_original("state-spaces/mamba-130m")) is FastMambaForCausalLM
    assert asked["repo_id"] == "state-spaces/mamba-130m"
    assert asked["allow_patterns"] == ["config.json", "model.safetensors", "pytorch_model.bin"]


def test_half_precision_weights_stay_half(tmp_path):
    stock = stock_of("mamba").to(torch.bfloat16)
    write(tmp_path, "mamba", stock)
    model = load_original(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_defaults_are_the_authors_not_transformers(tmp_path):
    """mamba_ssm's Mamba2: head_dim 64, state 128, one group; a plain Mamba has ssm_cfg {}."""
    from undersong.modeling.load_original import _config

    config = _config({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}})
    assert (config.num_heads, config.head_dim, config.state_size, config.n_groups) == (24, 64, 128, 1)
    assert config.tie_word_embeddings
    harmless = {"layer": "Mamba1", "use_fast_path": False, "conv_init": None}
    for ssm in ({}, harmless, None):
        config = _config({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": ssm})
        assert (config.state_size, config.time_step_rank, config.intermediate_size) == (16, 48, 1536)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg.layer \('Mamba3'\) must be 'Mamba1' or 'Mamba2'"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \(\[1\]\) must be empty"),
        ({"d_intermediate": 32}, r"d_intermediate \(32\) must be empty"),
        ({"rms_norm": False}, r"rms_norm \(False\) must be True"),
        ({"ssm_cfg": {"d_ssm": 8}}, r"ssm_cfg has \['d_ssm'\], which transformers' Mamba1 does not know"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, r"ssm_cfg has \['norm_before_gate'\], which tr"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_expressed_is_refused(changes, message, tmp_path):
    write(tmp_path, "mamba", stock_of("mamba"), **changes)
    with pytest.raises(ValueError, match=message):
        load_original(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_original(tmp_path)
    write(tmp_path, "mamba", stock_of("mamba"), drop=("backbone.norm_f.weight",))
    with pytest.raises(ValueError, match=r"missing \['backbone.norm_f.weight'\]"):
        load_original(tmp_path)
    write(tmp_path, "mamba", stock_of("mamba"), drop=("backbone.embedding.weight",))
    with pytest.raises(ValueError, match="has no token table: its weights lack 'backbone.embedding.weight'"):
        load_original(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        load_original(tmp_path)


def test_a_pickle_that_is_more_than_tensors_is_not_executed(tmp_path):
    import pickle

    write(tmp_path, "mamba", stock_of("mamba"))

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"backbone.embedding.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_original(tmp_path)
    assert not (tmp_path / "executed").exists()
