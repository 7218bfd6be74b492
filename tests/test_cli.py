"""The command line, by its own entry point: what it prints, what it returns, and that mistakes are one line."""

import sys
import types

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import undersong
from undersong.cli import app
from undersong.hub import LocalHub

AAREN = undersong.registry.ARCHITECTURES["aaren"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint as Trainer or save_pretrained leaves it."""
    torch.manual_seed(0)
    model = AAREN.model_class("TimeSeriesClassification")(AAREN.config_class()(**AAREN.tiny, num_labels=3))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    original = constants.ENDPOINT
    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(original)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def test_list_shows_every_class_of_the_registry():
    result = call("list")
    assert result.exit_code == 0
    for row in undersong.registry.ARCHITECTURES.values():
        for text in (row.model_type, row.arxiv, *(path.partition(":")[2] for path in row.models.values())):
            assert text in result.output


def test_export_keeps_class_and_dtype(saved, tmp_path):
    result = call("export", saved, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"AarenForTimeSeriesClassification is in {tmp_path / 'out'}" in result.output
    again = AAREN.model_class("TimeSeriesClassification").from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.config.num_labels == 3


def test_export_of_a_stock_mamba_folder_gives_ours(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "stock")
    result = call("export", tmp_path / "stock", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"FastMambaForCausalLM is in {tmp_path / 'out'}" in result.output


def test_mistakes_are_one_line_and_exit_code_1(saved, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        (("export", tmp_path / "llama", tmp_path / "out"), "error: model_type (llama) of"),
        (("export", saved, tmp_path / "full"), "is not empty; pass overwrite=True"),
        (("export", tmp_path / "absent", tmp_path / "out"), "error: "),
        (("publish", tmp_path / "absent", "me/model"), "does not exist; export a model there first"),
    ]:
        result = call(*arguments)
        assert result.exit_code == 1, arguments
        before, error, line = result.stderr.partition("error: ")
        assert message in error + line
        assert len(line.strip().splitlines()) == 1
        assert all("Loading weights" in progress for progress in before.splitlines() if progress)
        assert "Traceback" not in result.output


def test_a_wrong_command_line_is_exit_code_2():
    assert call("publish", "folder-only").exit_code == 2
    assert call("sing").exit_code == 2
    assert call("list", "--loudly").exit_code == 2


def test_publish_names_files_and_needs_the_flag(saved, tmp_path, hub):
    assert call("export", saved, tmp_path / "out").exit_code == 0
    result = call("publish", tmp_path / "out", "me/digits", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would be uploaded: modeling_aaren.py" in result.output
    result = call("publish", tmp_path / "out", "me/digits", "--private")
    assert result.exit_code == 0, result.output
    assert "uploaded: model.safetensors" in result.stdout
    assert f"{hub.endpoint}/me/digits at " in result.stdout
    result = call("publish", tmp_path / "out", "me/digits")
    assert result.exit_code == 1
    assert "(--update)" in result.stderr
    result = call("publish", tmp_path / "out", "me/digits", "--update")
    assert result.exit_code == 0
    assert "nothing changed" in result.stdout


def test_doctor_prints_text_or_json(monkeypatch):
    class Report:
        def as_dict(self):
            return {"cpu": "some"}

        def __str__(self):
            return "cpu: some"

    monkeypatch.setitem(sys.modules, "undersong.diagnosis", types.SimpleNamespace(doctor=Report))
    assert call("doctor").stdout == "cpu: some\n"
    assert call("doctor", "--json").stdout == '{\n  "cpu": "some"\n}\n'


def test_demo_passes_its_options(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setitem(
        sys.modules, "undersong.demo", types.SimpleNamespace(run=lambda **options: seen.update(options))
    )
    assert call("demo", "--fast", "--output", tmp_path).exit_code == 0
    assert seen == {"output": tmp_path, "fast": True}


@pytest.fixture
def language_model(tmp_path):
    from tests.generation.tiny_code_model import byte_tokenizer, tiny_code_model

    tiny_code_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_generate_streams_what_the_config_says(language_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from undersong.generation import DecodingConfig, generate

    model = AutoModelForCausalLM.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    config = DecodingConfig(repetition_cap={"penalty": 0.0, "min_match": 2})
    plain, capped = (
        generate(model, tokenizer, "b = 2\n", c, max_new_tokens=16) + "\n" for c in (DecodingConfig(), config)
    )
    assert plain != capped
    arguments = ("generate", "--model", language_model, "--max-new-tokens", 16, "--device", "cpu")
    result = call(*arguments, "--prompt", "b = 2\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain

    file = tmp_path / "decoding_config.json"
    config.save_pretrained(tmp_path)
    assert call(*arguments, "--prompt", "b = 2\n", "--decoding", file).stdout == capped
    (tmp_path / "prompt.txt").write_text("b = 2\n")
    file.rename(language_model / file.name)
    assert call(*arguments, "--file", tmp_path / "prompt.txt").stdout == capped
    piped = CliRunner().invoke(app, [str(argument) for argument in arguments], input="b = 2\n")
    assert piped.stdout == capped


def test_generate_takes_a_seed_a_chat_and_beams(language_model, tmp_path):
    arguments = ("generate", "--model", language_model, "--max-new-tokens", 12, "--device", "cpu", "--prompt", "b = 2")
    (tmp_path / "sample.json").write_text('{"typical_mass": 0.9, "generation": {"top_k": 0, "temperature": 3.0}}')
    (tmp_path / "beams.json").write_text('{"generation": {"num_beams": 3}}')
    sample = (*arguments, "--decoding", tmp_path / "sample.json")
    first, again, other = (call(*sample, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    for options in (("--chat",), ("--decoding", tmp_path / "beams.json")):
        result = call(*arguments, *options)
        assert result.exit_code == 0, result.output
        assert len(result.stdout) == 13


def test_generate_says_what_is_wrong_in_one_line(language_model, tmp_path):
    (tmp_path / "bad.json").write_text('{"typical": 0.9}')
    (tmp_path / "file.txt").write_text("text")
    for options, message in [
        (("--prompt", "a", "--decoding", tmp_path / "bad.json"), "bad.json: unknown fields typical"),
        (("--prompt", "a", "--decoding", tmp_path / "absent.json"), "absent.json"),
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "a", "--file", tmp_path / "file.txt"), "--prompt and --file both name a prompt"),
        (("--file", tmp_path / "absent.txt"), "absent.txt"),
    ]:
        result = call("generate", "--model", language_model, "--device", "cpu", *options)
        assert result.exit_code == 1, options
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert call("generate", "--prompt", "a").exit_code == 2
