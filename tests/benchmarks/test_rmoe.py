"""The RMoE experiments run end to end at toy size, are fair to all routers, and publish a sign whatever it is."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from undersong import load_recurrent_router

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = 1_000_000


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("bench_rmoe", "rmoe_training", "rmoe_checkpoints", "rmoe_speed", "library_bytes")
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def bench(scripts, monkeypatch, one_thread):
    """All trainings in this process."""
    training = scripts["rmoe_training"]
    alone = lambda jobs, size, device: [training.train_alone(job, size) for job in jobs]  # noqa: E731
    monkeypatch.setattr(scripts["bench_rmoe"], "train_all", alone)
    return scripts["bench_rmoe"]


def test_the_text_is_split_by_file_and_always_the_same(scripts):
    parts, fingerprint = scripts["library_bytes"].library_bytes(TEXT)
    assert scripts["library_bytes"].library_bytes(TEXT)[1] == fingerprint
    assert TEXT <= sum(map(len, parts.values())) < 1.5 * TEXT
    files = {name: set(bytes(part.tolist()).split(b"\0")) - {b""} for name, part in parts.items()}
    assert all(files.values())
    assert not files["train"] & files["test"]
    assert not files["train"] & files["validation"]
    assert not files["validation"] & files["test"]


def test_routers_are_of_one_size_and_only_the_linear_one_is_smaller(scripts):
    training = scripts["rmoe_training"]
    size = scripts["bench_rmoe"].GPU.lm
    counts = {
        kind: training.router_parameters(training.build(training.Job(kind, 0, 1e-3, 1), size))
        for kind in scripts["bench_rmoe"].KINDS
    }
    assert counts["rmoe"] == counts["detach"] == 8 * 64 * (256 + 16) + 6 * 64**2 + 6 * 64
    assert counts["mlp"] == pytest.approx(counts["rmoe"], rel=0.01)
    assert counts["linear"] == 8 * 256 * 16


def test_the_published_base_is_small_enough(scripts):
    training = scripts["rmoe_training"]
    model = training.build(training.Job("base", 0, 1e-3, 1), scripts["bench_rmoe"].GPU.retrofit)
    assert 2 * sum(p.numel() for p in model.parameters()) < 0.95 * scripts["rmoe_checkpoints"].LARGEST


def test_the_balancing_loss_is_transformers_own(scripts):
    logits = tuple(torch.randn(20, 8, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    got = scripts["rmoe_training"].balancing_loss(logits, 2)
    torch.testing.assert_close(got, load_balancing_loss_func(logits, 8, 2))


def test_every_kind_sees_the_same_bytes_in_the_same_order(scripts):
    training = scripts["rmoe_training"]
    size = scripts["bench_rmoe"].FAST.lm
    runs = [training.Training(training.Job(kind, 3, 1e-3, 5), size, "cpu") for kind in ("rmoe", "linear", "base")]
    assert all(torch.equal(run.starts, runs[0].starts) for run in runs)
    other = training.Training(training.Job("rmoe", 4, 1e-3, 5), size, "cpu")
    assert not torch.equal(other.starts, runs[0].starts)


def test_the_loss_counts_every_byte_and_falls(scripts, one_thread):
    training = scripts["rmoe_training"]
    run = training.Training(training.Job("rmoe", 0, 1e-2, 60), scripts["bench_rmoe"].FAST.lm, "cpu")
    before = run.evaluate("test")[0]
    assert before == pytest.approx(8, abs=0.5), "bits of a byte that is anybody's guess"
    for _ in range(60):
        run.step()
    assert run.done.item() == 60
    assert run.losses.all()
    assert run.evaluate("test")[0] < before - 1


def test_learning_rates_rise_and_fall(scripts):
    rates = scripts["rmoe_training"].learning_rates(1.0, 100)
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3


def test_differences_are_paired_and_have_their_t_interval(scripts):
    bench = scripts["bench_rmoe"]
    runs = [{"kind": "a", "test": value} for value in (1.0, 2.0, 3.0)]
    runs += [{"kind": "b", "test": value} for value in (1.2, 2.1, 3.3)]
    found = bench.versus(runs, "a", "b")
    assert found["mean"] == pytest.approx(-0.2)
    assert found["half_width"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    tried = [{"kind": "a", "rate": rate, "validation": loss} for rate, loss in ((1, 3.0), (2, 2.0), (3, 2.5))]
    assert bench.best_rates(tried, (1, 2, 3)) == {"a": 2}
    assert bench.edge({"a": 2, "b": 3}, (1, 2, 3)) == ["b"]


def test_a_reversed_sign_is_published(scripts):
    worse = {"mean": 0.02, "half_width": 0.01}
    table = scripts["bench_rmoe"].acceptance({"lm": {"rmoe_minus": {"linear": worse, "mlp": worse, "detach": worse}}})
    assert len(table) == 2
    assert table["lm: RMoE minus linear, bits a byte"] == {
        "goal": "< 0",
        "measured": 0.02,
        "half_width": 0.01,
        "met": False,
        "clear": True,
    }


def test_byte_models_end_to_end(bench, tmp_path):
    toy = dataclasses.replace(bench.FAST, lm_steps=4, seeds=2)
    found = bench.byte_models(toy, "cpu")
    assert set(found["rmoe_minus"]) == {"detach", "linear", "mlp"}
    assert {(run["kind"], run["seed"]) for run in found["runs"]} == {(k, s) for k in bench.KINDS for s in (0, 1)}
    record = json.loads(json.dumps({"lm": found}))
    pytest.importorskip("matplotlib")
    bench.plot(record, tmp_path / "rmoe.json")
    assert (tmp_path / "rmoe_lm.png").stat().st_size > 0


def test_retrofit_end_to_end_and_what_it_publishes(bench, scripts, tmp_path):
    """The base is frozen: base and router, as published, give the figures of the card."""
    trained, target = tmp_path / "trained", tmp_path / "hub"
    trained.mkdir()
    found = bench.retrofit(bench.FAST, "cpu", trained)
    facts = {
        "hardware": {"device": "a machine"},
        "command": "python x",
        "versions": {"torch": "1", "transformers": "2"},
    }
    checkpoints = scripts["rmoe_checkpoints"]
    measured = checkpoints.write_checkpoints(target, trained, found, bench.FAST, facts, "cpu")
    base, router = target / "rmoe-retrofit-base", target / "rmoe-retrofit-router"
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "OlmoeForCausalLM"
    before = model(ids).logits
    assert not torch.equal(load_recurrent_router(model, router)(ids).logits, before)
    for folder in (base, router):
        card = ModelCard.load(folder / "README.md")
        assert f"{measured['attached']:.4f}" in card.text
        assert f"{measured['base']:.4f}" in card.text
    assert card.data.base_model == json.loads((router / "recurrent_router.json").read_text())["base"]["name_or_path"]
    by_kind = {run["kind"]: run["test"] for run in found["runs"]}
    assert measured["base"] == pytest.approx(by_kind["base"], abs=0.02)
    assert measured["attached"] == pytest.approx(by_kind["attached"], abs=0.02)
    pytest.importorskip("matplotlib")
    bench.plot(json.loads(json.dumps({"retrofit": found})), tmp_path / "rmoe.json")
    assert (tmp_path / "rmoe_retrofit.png").stat().st_size > 0


def test_goals_of_speed(scripts):
    """The op's are of a GPU, where torch.compile takes part; the experts' of a CPU."""
    speed = scripts["rmoe_speed"]
    small = {"eager": {"ms": 0.3}, "torch.compile": {"ms": 0.2}, "torch": {"ms": 0.2}, "triton": {"ms": 0.05}}
    large = {"eager": {"ms": 3.0}, "torch.compile": {"ms": 1.0}, "triton": {"ms": 1.25}}
    router = {"64, 2 of 16, 16 tokens, forward": small, "64, 2 of 16, 8192 tokens, forward+backward": large}
    experts = {1: {"auto": {"speedup": 1.0}, "eager": {"speedup": 0.4}, "grouped_mm": {"speedup": 0.8}}}
    steps = {"called": {"rmoe": {"speedup": 0.95}, "linear": {"speedup": 1.0}}}
    found = speed.acceptance({"router": router, "experts": experts, "steps": steps})
    assert [(round(row["measured"], 3), row["met"]) for row in found.values()] == [
        (6.0, True),
        (0.8, False),
        (1.053, True),
        (2.5, True),
        (1.25, True),
    ]
    for rows in router.values():
        del rows["torch.compile"]
    assert not any("router," in what for what in speed.acceptance({"router": router}))
