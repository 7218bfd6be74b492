"""The pointer-decoding repository: a pointer network beside it is constrained by default, without undersong too."""

import pytest
import torch

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.generation.pointer_generate import generate_pointers
from undersong.hub import export
from undersong.hub.custom_generate import export_custom_generate

from .generate_elsewhere import generate_elsewhere


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # weights that tell items apart; those of the paper's start do not
    config = PointerNetworkConfig(hidden_size=8, initializer_range=2.0)
    model = PointerNetworkForConditionalGeneration(config).eval()
    model.generation_config.task = "tour"
    return model


@pytest.fixture(scope="module")
def inputs():
    points = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(0))
    return {"input_values": points, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()}


def test_a_model_repository_decodes_constrained_and_gives_what_undersong_gives(model, inputs, tmp_path):
    folder = export(model, tmp_path / "model")
    export_custom_generate("pointer-decoding", folder)
    job = {
        "model": str(folder),
        "seq2seq": True,
        "trust": True,
        "inputs": {name: value.tolist() for name, value in inputs.items()},
    }
    hull = {"task": "hull", "strict_geometry": True}
    jobs = [
        {**job, "options": {}},
        {**job, "options": {"num_beams": 3}},
        {**job, "options": hull},
        {**job, "options": {"task": "tsp"}},
    ]
    tours, beams, hulls, unknown = generate_elsewhere(jobs, tmp_path)
    assert tours["ids"] == generate_pointers(model, **inputs).tolist()
    assert [sorted(filter(None, row)) for row in tours["ids"]] == [list(range(1, n + 1)) for n in (7, 4, 1)]
    assert beams["ids"] == generate_pointers(model, **inputs, num_beams=3).tolist()
    assert hulls["ids"] == generate_pointers(model, **inputs, **hull).tolist() != tours["ids"]
    assert unknown["error"].startswith("ValueError: task ('tsp') must be one of tour, permutation")


def test_the_repository_works_by_name_with_any_pointer_network(model, inputs, tmp_path):
    repo = str(export_custom_generate("pointer-decoding", tmp_path / "repo"))
    rules = {"custom_generate": repo, "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, **rules), generate_pointers(model, **inputs))
    assert torch.equal(
        model.generate(inputs["input_values"], attention_mask=inputs["attention_mask"], task="hull", **rules),
        generate_pointers(model, **inputs, task="hull"),
    )
