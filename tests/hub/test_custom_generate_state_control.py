"""The state-control repository bounds a stock Mamba-2 where undersong is not installed, as it does here."""

import importlib

import pytest
import torch
from transformers import Mamba2ForCausalLM

from undersong import FastMamba2ForCausalLM
from undersong.hub.custom_generate import export_custom_generate
from undersong.modeling.state_control import StateControlConfig, state_control

from ..generation.tiny_code_model import byte_tokenizer
from ..modeling.mamba_pairs import ids_of, make_config
from .generate_elsewhere import generate_elsewhere

NEW = {"max_new_tokens": 8, "do_sample": False}
WINDOW = {"mode": "window", "window": 8, "granularity": 4, "decay_mult": 0.1}
RESCALE = {"mode": "rescale", "decay_mult": [[0.1, 0.2, 0.3, 4.0], [0.1, 0.2, 0.3, 4.0]], "insert_mult": 2.0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model whose generation config carries a control."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(make_config("mamba2", initializer_range=0.6))
    with state_control(model, WINDOW):
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_it_runs_without_undersong_and_equals_the_block_here(model_folder, tmp_path):
    repo = str(export_custom_generate("state-control", tmp_path / "repo"))
    ids = ids_of(2, 30)
    ids[1, :5] = 0  # padding
    job = {"model": str(model_folder), "repo": repo, "ids": ids.tolist()}
    jobs = [
        {**job, "options": {**NEW, **options}, "stream": stream}
        for options, stream in (
            ({}, False),
            ({"state_control": RESCALE}, False),
            ({"prefill_chunk_size": 7}, False),
            ({"num_beams": 3}, False),
            ({"state_control": {"mode": "window"}}, False),
            ({"state_control": {"mode": "window", "window": 8, "sliding": True}}, False),
        )
    ]
    jobs[1]["ids"], jobs[1]["stream"] = jobs[1]["ids"][:1], True
    stored, given, chunks, beams, missing, unknown = generate_elsewhere(jobs, tmp_path)

    model = Mamba2ForCausalLM.from_pretrained(model_folder).eval()
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    plain = model.generate(**inputs, **NEW).tolist()
    with state_control(model, StateControlConfig(**WINDOW)):
        expected = model.generate(**inputs, **NEW).tolist()
        assert beams["ids"] == model.generate(**inputs, **NEW, num_beams=3).tolist()
    assert stored["ids"] == chunks["ids"] == expected != plain
    with state_control(model, RESCALE):
        expected = model.generate(ids[:1], **NEW).tolist()
    assert given["ids"] == expected != plain[:1]
    assert (given["tokens"], given["ended"]) == (expected[0][-8:], 1)
    assert missing["error"].startswith("ValueError: window (None) must be given for mode 'window'")
    assert unknown["error"].startswith("ValueError: unknown fields sliding; a state control has mode, decay_mult")


def test_it_also_bounds_a_model_of_an_installed_undersong(model_folder, tmp_path, monkeypatch):
    """The repository's classes are copies of ours, so it must know our models by what they are."""
    export_custom_generate("state-control", tmp_path / "state_control_repository")
    monkeypatch.syspath_prepend(tmp_path)
    exported = importlib.import_module("state_control_repository.custom_generate.generate")
    model = FastMamba2ForCausalLM.from_pretrained(model_folder).eval()
    with state_control(model):
        expected = model.generate(ids_of(1, 30), **NEW).tolist()
        with pytest.raises(RuntimeError, match="has a state control already; call remove_state_control"):
            exported.generate(ids_of(1, 30), model=model, **NEW)
    assert exported.generate(ids_of(1, 30), model=model, **NEW).tolist() == expected
    assert type(model) is FastMamba2ForCausalLM
