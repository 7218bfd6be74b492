"""The pointer network experiments run end to end at toy size, and tell apart what was met from what was not."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong import PointerNetworkForConditionalGeneration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("bench_pointer_networks"), importlib.import_module("publish_pointer_models")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts[0]


@pytest.fixture(scope="module")
def toy(bench):
    sizes = {"hidden_size": 16, "batch": 8, "steps": 8, "rows": 40, "test_rows": 6, "beyond_rows": 3}
    return dataclasses.replace(bench.FAST, rates=2, **sizes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def found(bench, toy, models):
    return bench.run_all(["hull", "tour"], toy, "cpu", models)


def test_every_kind_is_tried_at_every_rate_and_trained_at_the_best(bench, found, toy):
    kinds = [("hull", "lstm"), ("hull", "blend"), ("tour", "lstm"), ("tour", "transformer")]
    assert [(run["task"], run["kind"]) for run in found["runs"]] == kinds
    for run in found["runs"]:
        tried = {t["learning_rate"]: t for t in found["tried"] if all(t[k] == run[k] for k in ("task", "kind"))}
        assert set(tried) == set(bench.RATES[run["kind"]][:2])
        assert {t["steps"] for t in tried.values()} == {2}  # a quarter
        assert run["learning_rate"] == min(tried, key=lambda rate: tried[rate]["validation_loss"])
        assert run["steps"] == toy.steps
        assert [point["step"] for point in run["history"]] == list(range(1, 9))


def test_sizes_beyond_training_are_tested_where_the_model_has_words_for_them(found):
    sizes = {(run["task"], run["kind"]): [int(n) for n in run["test"]] for run in found["runs"]}
    assert sizes["hull", "blend"] == [5, 6, 7, 8, 9, 10]
    assert 20 in sizes["hull", "lstm"]
    assert max(sizes["tour", "transformer"]) == 20
    for run in found["runs"]:
        if run["task"] == "tour":
            for figures in run["test"].values():
                assert figures["rules"]["valid"] == figures["beam 5"]["valid"] == 1.0


def test_the_record_is_json_and_can_be_drawn(bench, found, toy, tmp_path):
    record = {"setting": dataclasses.asdict(toy)} | found
    record["acceptance"] = bench.acceptance(found["runs"], ["hull", "tour"])
    assert len(record["acceptance"]) == 8
    record = json.loads(json.dumps(record, allow_nan=False))
    bench.plot(record, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_acceptance_compares_means_over_seeds(bench):
    def run(kind, at_10):
        test = {str(n): {"free": {"accuracy": 0.9, "area_coverage": None}} for n in (5, 10, 20)}
        test["10"] = {"free": {"accuracy": at_10, "area_coverage": 0.995}}
        return {"task": "hull", "kind": kind, "test": test}

    runs = [run("lstm", 0.6), run("lstm", 0.8), run("blend", 0.3), run("blend", 0.5)]
    figures = bench.acceptance(runs, ["hull"])
    assert figures["hull, n=10: exact >= 0.65"] == pytest.approx(0.7)
    assert figures["hull, n=10: exact - blend >= 0.20"] == pytest.approx(0.3)
    assert figures["hull, n=10: area >= 0.99"] == pytest.approx(0.995)
    assert figures["hull, n=20: area >= 0.97"] is None  # no simple polygon among the answers


def test_time_ends_a_training_as_steps_do(bench, toy, tmp_path):
    bench.make_instances(["hull"], toy, tmp_path)
    job = bench.Job("hull", "lstm", 0, 1e-3, "cpu", str(tmp_path))
    _, facts = bench.train(job, dataclasses.replace(toy, steps=10**6, seconds=0.3))
    assert facts["steps"] < 10**4
    assert facts["seconds"] == pytest.approx(0.3, abs=0.3)


def test_training_test_and_validation_share_no_instance(bench):
    sets = [bench.ConvexHullDataset(5, 5, 100, seed=s).points for s in (bench.TRAIN, bench.VALIDATION, bench.TEST)]
    points = torch.cat(sets).flatten(1)
    assert len(points.unique(dim=0)) == 300
    assert bench.TRAIN + bench.GPU.parts <= bench.VALIDATION


def test_published_models_load_with_their_task_and_cards_have_the_figures(scripts, found, models, toy, tmp_path):
    record = {"hardware": {"device": "Toy"}, "versions": dict.fromkeys(("python", "torch", "transformers"), "1")}
    record |= {"command": "python bench.py", "setting": dataclasses.asdict(toy)} | found
    for run in record["runs"]:
        for ways in run["test"].values():
            for figures in ways.values():
                figures.update({key: 0.5 for key, value in figures.items() if value is None})  # models of eight steps
    hull, tsp = scripts[1].publish(models, record, tmp_path)
    assert PointerNetworkForConditionalGeneration.from_pretrained(hull).generation_config.task == "hull"
    model = PointerNetworkForConditionalGeneration.from_pretrained(tsp)
    assert model.generation_config.task == "tour"
    tours = model.generate(torch.rand(2, 7, 2))[:, 1:8]
    assert tours.sort(1).values.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 2
    (facts,) = (run for run in found["runs"] if run["kind"] == "transformer")
    card = ModelCard.load(tsp / "README.md")
    values = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    gap = facts["test"]["10"]["rules"]["gap"]
    assert values["10 random points", "length / shortest - 1, greedy"] == pytest.approx(gap, abs=1e-4)
    assert len(values) == 6
    assert not any(math.isnan(value) for value in values.values())
    assert "40 instances of each size. 8 steps of Adam with batches of 8" in card.content


@pytest.mark.slow
def test_hulls_of_five_points_are_learned(bench, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", [5])
    setting = dataclasses.replace(bench.CPU, hidden_size=64, steps=4_000, rows=40_000, parts=1, jobs=1)
    bench.make_instances(["hull"], setting, tmp_path)
    job = bench.Job("hull", "lstm", 0, 8e-3, "cpu", str(tmp_path))
    start = bench.validation_loss(bench.build("hull", "lstm", setting).eval(), "hull", 500)
    model, facts = bench.train(job, setting)
    assert facts["validation_loss"] < 0.6 * start
    # the way of greedy decoding, not only of teacher forcing
    assert bench.evaluate(model, "hull", 5, 500)["free"]["accuracy"] > 0.5
