"""The line through exact power laws and hand-made counts; what the tail does; the `evaluate` module on its own."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.metrics.zipf import measures
from undersong.metrics.zipf.measures import zipf_fit, zipf_scores

from .evaluate_module import compute


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_an_exact_power_law_gives_its_exponent(exponent):
    fit = zipf_fit([1e6 * rank**-exponent for rank in range(1, 200)])
    assert fit["zipf"] == pytest.approx(exponent)
    assert fit["r_squared"] == pytest.approx(1.0)
    assert fit["types"] == 199


def test_two_types_by_hand():
    # ranks 1, 2; counts 4, 2: the line falls by log 2 over log 2
    assert zipf_scores([[7, 7, 7], [7, 9, 9]]) == {"zipf": pytest.approx(1.0), "r_squared": 1.0, "types": 2}


def test_three_types_by_hand():
    # log ranks 0, l, k (l = log 2, k = log 3), log counts 2l, l, l
    l, k = math.log(2), math.log(3)  # noqa: E741
    x, y = [0, l, k], [2 * l, l, l]
    mx, my = sum(x) / 3, sum(y) / 3
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    xx, yy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    fit = zipf_fit([2, 4, 2])
    assert fit["zipf"] == pytest.approx(-xy / xx)
    assert fit["r_squared"] == pytest.approx(xy**2 / xx / yy)


def test_min_count_cuts_the_tail_after_ranking():
    counts = [60, 30, 20, 15, 12] + [1] * 40
    assert zipf_fit(counts, min_count=2)["zipf"] == pytest.approx(1.0)
    assert zipf_fit(counts, min_count=2)["types"] == 5
    assert zipf_fit(counts)["types"] == 45
    assert zipf_fit(counts)["r_squared"] < 0.95


def test_equal_counts_lie_on_a_flat_line():
    assert zipf_fit([3, 3, 3]) == {"zipf": 0.0, "r_squared": 1.0, "types": 3}


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=30), st.integers(2, 9))
def test_order_and_scale_of_counts_do_not_matter(counts, factor):
    fit = zipf_fit(counts)
    assert fit["zipf"] >= 0
    assert 0 <= fit["r_squared"] <= 1
    assert zipf_fit(reversed(counts)) == fit
    assert zipf_fit([factor * count for count in counts])["zipf"] == pytest.approx(fit["zipf"], abs=1e-9)


def test_texts_are_pooled_and_lower_cased_unless_a_tokenizer_says_otherwise():
    texts = ["The cat and the dog.", "the end"]
    assert zipf_scores(texts) == zipf_scores([" ".join(texts)])
    assert zipf_scores(texts)["types"] == 6  # the cat and dog . end
    assert zipf_scores(texts, tokenizer=str.split)["types"] == 6  # The cat and the dog. end


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zipf_scores([]), "texts must hold at least one text"),
        (lambda: zipf_scores(["a b", " "]), r"texts\[1\] \(' '\) must hold a token"),
        (lambda: zipf_scores(["a a"]), "2 types that occur 1 times or more .* but there are 1"),
        (lambda: zipf_scores(["a a b c"], min_count=2), "2 types that occur 2 times or more .* but there are 1"),
        (lambda: zipf_fit([1, 2], min_count=0), r"min_count \(0\) must be at least 1"),
    ],
)
def test_too_little_text_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluate_module_stands_alone(tmp_path):
    texts, ids = ["a a a a b b c", "a c"], [[1, 1, 2], [1, 3]]
    calls = [{"predictions": texts}, {"predictions": texts, "min_count": 2}, {"predictions": ids}]
    out = compute(Path(measures.__file__).parent, calls, tmp_path)
    assert out == [zipf_scores(texts), zipf_scores(texts, min_count=2), zipf_scores(ids)]
