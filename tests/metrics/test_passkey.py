"""Passkey scores by hand, their `evaluate` module, and models whose recall is known."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.common.cases import RECURRENT, build, name
from tests.metrics.evaluate_module import compute
from undersong.data.passkey import PasskeyTask
from undersong.metrics.passkey import measures
from undersong.metrics.passkey.measures import passkey_scores, t_recall
from undersong.metrics.state_capacity import (
    fit_recall_length,
    fit_train_length,
    measure_state_capacity,
    plot_capacity,
    plot_recall,
    recommended_train_length,
    state_size,
)
from undersong.registry import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = {
    "predictions": ["It is 00042.", "42", " 12345", "54321", "99999 or 00000", ""],
    "references": ["00042", "00042", "12345", "12345", "00000", "11111"],
    "lengths": [100, 100, 200, 200, 400, 400],
    "depths": [0.0, 0.5, 0.25, 1.0, 0.49, 0.51],
}


def test_scores_by_hand():
    scores = passkey_scores(**ANSWERS, bins=2, threshold=0.5)
    assert scores == {
        "accuracy": 3 / 6,
        "lengths": [100, 200, 400],
        "accuracy_by_length": [1 / 2, 1 / 2, 1 / 2],
        "t_recall": 400,
        "grid": [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]],
    }
    assert passkey_scores(**ANSWERS)["t_recall"] == 0
    assert "grid" not in passkey_scores(**ANSWERS | {"depths": None})
    assert passkey_scores(**ANSWERS, bins=3)["grid"][0] == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([1, 1, 1, 1], 800), ([1, 1, 0.9, 1], 200), ([0.94, 1, 1, 1], 0), ([0.95, 0.95, 0.95, 0.949], 400)],
)
def test_recall_ends_at_the_first_length_that_fails(accuracies, expected):
    assert t_recall([100, 200, 400, 800], accuracies) == expected
    assert t_recall([800, 400, 200, 100], accuracies[::-1]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": ["1"]}, r"references \(1\) must be as many as predictions \(6\)"),
        ({"lengths": [1, 2]}, r"lengths \(2\) must be as many as predictions \(6\)"),
        ({"depths": [0.5]}, r"depths \(1\) must be as many as predictions \(6\)"),
        ({"depths": [0, 0, 0, 0, 0, 1.5]}, r"depths must lie in \[0, 1\], but one is 1.5"),
        ({"threshold": 0.0}, r"threshold \(0.0\) must lie in \(0, 1\]"),
        ({"bins": 0}, r"bins \(0\) must be at least 1"),
        ({key: [] for key in ANSWERS}, "predictions must hold at least one answer"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        passkey_scores(**ANSWERS | changes)


@pytest.mark.slow  # a fresh process that imports evaluate
def test_the_evaluate_module_gives_the_same_and_stands_alone(tmp_path):
    got = compute(Path(measures.__file__).parent, [ANSWERS | {"bins": 2}], tmp_path)
    assert got == [json.loads(json.dumps(passkey_scores(**ANSWERS, bins=2)))]


# models


class Bytes:
    """A tokenizer of transformers as far as passkeys need it: ids are bytes."""

    def __call__(self, text, **options):
        ids = list(text.encode())
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}

    def convert_tokens_to_ids(self, token):
        return ord(token)

    def batch_decode(self, rows, **options):
        return [bytes(row.tolist()).decode(errors="replace") for row in rows]


class Reader:
    """Reads the number where it stands, if that is among the last `memory` tokens."""

    device = "cpu"

    def __init__(self, memory):
        self.memory, self.calls = memory, []

    def generate(self, ids, max_new_tokens, do_sample, num_beams, attention_mask, **options):
        assert (do_sample, num_beams) == (False, 1)
        self.calls.append((tuple(ids.shape), options))
        texts = [bytes(row[-self.memory :].tolist()).decode().split("is ") for row in ids]
        said = [next((part[:5] for part in text[1:] if part[:5].isdecimal()), "?????") for text in texts]
        new = torch.tensor([list(text.encode()) + [32] * (max_new_tokens - 5) for text in said])
        return torch.cat([ids, new], 1)

    def __call__(self, **inputs):
        state = SimpleNamespace(states={"conv": torch.zeros(3), "ssm": torch.zeros(2, 5)})
        return SimpleNamespace(past_key_values=SimpleNamespace(layers=[state, state]))


def test_recall_is_measured_up_to_the_memory_of_a_model():
    task = PasskeyTask(Bytes(), prefix="a. ", filler="b b b b b b b b. ", key_block="it is {key} ok. ", suffix="so")
    reader = Reader(memory=600)
    scores = measure_state_capacity(reader, Bytes(), [250, 500, 1000], n=20, task=task, prefill_chunk=400)
    assert scores["accuracy_by_length"][:2] == [1.0, 1.0]
    assert scores["accuracy_by_length"][2] == pytest.approx(0.6, abs=0.051)
    assert scores["grid"][2] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert scores["t_recall"] == 500
    assert scores["state_size"] == 20
    assert {shape[0] for shape, _ in reader.calls} == {8, 4}
    assert all(options == ({"prefill_chunk_size": 400} if shape[1] > 400 else {}) for shape, options in reader.calls)
    with pytest.raises(ValueError, match="lengths must hold at least one length"):
        measure_state_capacity(reader, Bytes(), [])


def test_a_long_prompt_in_chunks_says_the_same():
    model = build(ARCHITECTURES["mamba2"], "AutoModelForCausalLM", vocab_size=256)
    task = PasskeyTask(Bytes(), prefix="a. ", filler="b b b. ", key_block="it is {key}. ", suffix="so")
    model.generate, seen, generate = None, [], model.generate

    def watch(*inputs, **options):
        seen.append(generate(*inputs, **options))
        return seen[-1]

    model.generate = watch
    for chunk in (7, 1000):
        measure_state_capacity(model, Bytes(), [60], n=3, task=task, prefill_chunk=chunk)
    assert torch.equal(*seen)


@pytest.mark.parametrize("row", RECURRENT, ids=name)
def test_the_size_of_a_state_is_that_of_its_layers(row):
    if "AutoModelForCausalLM" not in row.models:
        pytest.fail(f"{row.model_type} has no language model")
    model = build(row, "AutoModelForCausalLM")
    cache = model(input_ids=torch.ones(1, 9, dtype=torch.long), use_cache=True).past_key_values
    sizes = [state.numel() for layer in cache.layers for key, state in layer.states.items() if key != "conv"]
    assert state_size(model) == sum(sizes) > 0


def test_mamba2_has_layers_times_heads_times_head_dim_times_state():
    row = ARCHITECTURES["mamba2"]
    config = row.config_class()(**row.tiny)
    want = config.num_hidden_layers * config.num_heads * config.head_dim * config.state_size
    assert state_size(build(row, "AutoModelForCausalLM")) == want

    stock = type("Stock", (), {"device": "cpu", "__call__": lambda self, **_: SimpleNamespace(past_key_values=None)})()
    with pytest.raises(ValueError, match=r"model \(Stock\) keeps no recurrent state to measure"):
        state_size(stock)


# laws


def test_a_line_is_found_and_used():
    fit = fit_train_length([1000, 2000, 5000], [150, 250, 550])
    assert (fit["a"], fit["b"], fit["r2"]) == pytest.approx((0.1, 50, 1))
    assert recommended_train_length(10_000, fit["a"], fit["b"]) == pytest.approx(1050)
    noisy = fit_train_length([1, 2, 3], [1.0, 3.0, 2.0])
    assert (noisy["a"], noisy["b"], noisy["r2"]) == pytest.approx((0.5, 1.0, 0.25))


def test_an_exponential_is_found():
    sizes = [100, 200, 400, 800]
    fit = fit_recall_length(sizes, [20 * math.exp(0.004 * size) for size in sizes])
    assert (fit["a"], math.exp(fit["b"]), fit["r2"]) == pytest.approx((0.004, 20, 1))


def test_laws_refuse_what_they_cannot_fit():
    with pytest.raises(ValueError, match=r"state_sizes \(\[5, 5\]\) must hold at least two different sizes"):
        fit_train_length([5, 5], [1, 2])
    with pytest.raises(ValueError, match=r"lengths \(1\) must be as many as state_sizes \(2\)"):
        fit_train_length([5, 6], [1])
    with pytest.raises(ValueError, match="lengths must be above 0, but one is 0"):
        fit_recall_length([5, 6], [0, 3])
    with pytest.raises(ValueError, match=r"state_size \(0\) must be above 0"):
        recommended_train_length(0, 1, 1)
    with pytest.raises(ValueError, match=r"state_size \(10\) with a \(1\) and b \(-20\) gives a length of -10"):
        recommended_train_length(10, 1, -20)


def test_plots_show_what_was_measured(tmp_path):
    scores = passkey_scores(**ANSWERS, bins=2)
    figure = plot_recall(scores, tmp_path / "map.png")
    image = figure.axes[0].images[0].get_array()
    assert image.tolist() == [[1, 1, 1], [0, 0, 0]]  # shallow keys in the first row
    curves = plot_recall({"small": scores, "large": scores}).axes[0].lines
    assert [curve.get_label() for curve in curves] == ["small", "large"]
    assert curves[0].get_ydata().tolist() == [0.5, 0.5, 0.5]
    fit = fit_recall_length([10, 20], [100, 400])
    figure = plot_capacity([10, 20], [100, 400], fit, tmp_path / "fit.svg", exponential=True)
    assert figure.axes[0].lines[1].get_ydata()[[0, -1]].tolist() == pytest.approx([100, 400])
    assert (tmp_path / "map.png").stat().st_size > 0 < (tmp_path / "fit.svg").stat().st_size
