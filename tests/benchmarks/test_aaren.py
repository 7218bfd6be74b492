"""The experiments with Aaren are fair to the Transformer, choose on validation data, and write cards that are true."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong.modeling.aaren.modeling_aaren_events import AarenForEventForecasting

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("aaren_training", "bench_aaren_events", "bench_aaren_forecasting", "bench_aaren_streaming", "bench_mqar")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))


def pair(scripts, name="bench_aaren_events"):
    """Aaren and the Transformer of an experiment."""
    bench = scripts[name]
    if name == "bench_aaren_events":
        config = bench.config(bench.FULL, torch.tensor([[0.0, 1.0, 3.0]]))
        head = bench.AarenForEventForecasting
    else:
        config, head = bench.config(bench.FULL), bench.AarenForPrediction
    return [scripts["aaren_training"].build(kind, head, config, 0, "cpu").eval() for kind in ("aaren", "transformer")]


@pytest.mark.parametrize("name", ["bench_aaren_events", "bench_aaren_forecasting"])
def test_the_models_differ_by_the_learned_queries_alone(scripts, name):
    aaren, transformer = pair(scripts, name)
    size = scripts["aaren_training"].size
    layers, width = aaren.config.num_hidden_layers, aaren.config.hidden_size
    assert size(aaren) - size(transformer) == layers * width
    heads = [key for key in aaren.state_dict() if not key.startswith("model.")]
    assert heads == [key for key in transformer.state_dict() if not key.startswith("model.")]


def test_the_transformer_is_causal_and_sees_the_past(scripts):
    _, transformer = pair(scripts)
    times = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    types = torch.zeros(1, 8, dtype=torch.long)
    other = types.clone()
    other[0, 4] = 1
    before, after = (transformer(times, x).gap_parameters for x in (types, other))
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-6)
    assert ((after - before)[:, 4:].abs().amax(-1) > 1e-5).all()


def test_the_rate_is_chosen_on_validation_figures_and_the_test_is_of_that_rate(scripts):
    def one(rate, seed, validation, test):
        return {"learning_rate": rate, "seed": seed, "validation": {"nll": validation}, "test": {"nll": test}}

    runs = [one(1e-3, 0, 1.0, 5.0), one(1e-3, 1, 3.0, 7.0), one(2e-3, 0, 2.5, 0.1), one(2e-3, 1, 2.5, 0.1)]
    found = scripts["aaren_training"].choose(runs, "nll")
    assert found["learning_rate"] == 1e-3
    assert found["test"] == {"nll": 6.0}
    assert found["validation_mean"] == {1e-3: 2.0, 2e-3: 2.5}


@pytest.mark.parametrize("kind", ["aaren", "transformer"])
def test_training_on_events_and_on_series_lowers_the_error(scripts, kind, one_thread):
    for name, score in (("bench_aaren_events", "nll"), ("bench_aaren_forecasting", "mse")):
        bench = scripts[name]
        setting = dataclasses.replace(bench.FAST, steps=1)
        untrained = bench.run(kind, 2e-3, 0, setting, "cpu")
        trained = bench.run(kind, 2e-3, 0, dataclasses.replace(setting, steps=40), "cpu")
        figures = [(x if isinstance(x, dict) else x[0])["test"][score] for x in (untrained, trained)]
        assert figures[1] < figures[0] - 0.1


def test_splits_are_disjoint_and_always_the_same(scripts):
    bench = scripts["bench_aaren_events"]
    first, again = bench.streams(bench.FAST), bench.streams(bench.FAST)
    assert all(torch.equal(first[key][0], again[key][0]) for key in first)
    rows = torch.cat([first[key][0] for key in first])
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_checkpoint_reaches_the_figures_of_its_card(scripts, tmp_path, monkeypatch, one_thread):
    bench = scripts["bench_aaren_events"]
    monkeypatch.setattr(bench, "CHECKPOINT", tmp_path)
    record = {"truth": 0.9, "constant_rate": 1.7, "hardware": {"cpu": "some CPU"}}
    record["versions"] = {"python": "3", "torch": "2", "transformers": "5"}
    bench.write_checkpoint(2e-3, bench.FAST, "python some_script.py", record)
    model = AarenForEventForecasting.from_pretrained(tmp_path).eval()
    found = bench.evaluate(model, bench.streams(bench.FAST)["test"], "cpu")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.metric_type for result in results} == set(found)
    for result in results:
        assert result.metric_value == pytest.approx(found[result.metric_type], abs=1e-3)


def test_the_cached_transformer_equals_its_layers_over_the_whole_sequence(scripts):
    bench = scripts["bench_aaren_streaming"]
    torch.manual_seed(0)
    model = bench.CachedTransformer(bench.FAST).eval()
    x = torch.randn(1, 9, bench.FAST.hidden_size)
    got = torch.cat([model.update(token) for token in x.split(1, 1)], 1)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    want = x
    with torch.no_grad():
        for layer in model.layers:
            want = layer(want, src_mask=future)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert model.held() == 2 * bench.FAST.layers * 9 * bench.FAST.hidden_size * 4


def test_a_stream_of_aaren_holds_the_same_after_any_number_of_tokens(scripts):
    bench = scripts["bench_aaren_streaming"]
    config = bench.AarenConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    stream = bench.Stream(bench.AarenModel(config, add_token_embeddings=False))
    found = bench.run(stream, torch.randn(60, 1, 1, 16), bench.FAST)
    assert len(set(found["state_bytes_by_block"])) == 1
    assert stream.state[3].item() == 60


def test_an_interval_of_three_seeds_by_hand(scripts):
    found = scripts["bench_mqar"].interval([0.4, 0.5, 0.6])
    assert found["mean"] == pytest.approx(0.5)
    half = 4.303 * 0.1 / 3**0.5
    assert (found["low"], found["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert scripts["bench_mqar"].interval([1.0, 1.0, 1.0])["high"] == 1.0


def test_recall_rows_ask_for_pairs_of_their_own(scripts):
    bench = scripts["bench_mqar"]
    ids, labels = bench.draw(4, 50, bench.FAST, torch.Generator().manual_seed(0))
    for row, label in zip(ids, labels, strict=True):
        pairs = dict(zip(row[:8:2].tolist(), row[1:8:2].tolist(), strict=True))
        at = (label != -100).nonzero().flatten()
        assert len(at) == 2
        assert all(pairs[row[i - 1].item()] == label[i].item() == row[i].item() for i in at)


def test_recall_of_a_model_that_knows_is_one_and_of_one_that_guesses_is_chance(scripts, one_thread):
    bench = scripts["bench_mqar"]
    setting = dataclasses.replace(bench.FAST, rows=400)

    class Knows(torch.nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 2 + setting.keys + setting.values)
            for row, tokens in enumerate(ids.tolist()):
                known = {}
                for i, token in enumerate(tokens[:-1]):
                    if 2 <= token < 2 + setting.keys:
                        known.setdefault(token, tokens[i + 1])
                        logits[row, i, known[token]] = 1.0
            return type("Output", (), {"logits": logits})

    assert set(bench.accuracy(Knows(), setting, 0, "cpu").values()) == {1.0}
    guess = bench.build("aaren", setting, 0, "cpu").eval()
    assert max(bench.accuracy(guess, setting, 0, "cpu").values()) < 0.3
