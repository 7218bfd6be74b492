"""Both diversities by hand, their relation to rep_n, and the `evaluate` module on its own."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.metrics import rep_n
from undersong.metrics.diversity import measures
from undersong.metrics.diversity.measures import distinct_n, diversity_mean, diversity_product, diversity_scores

from .evaluate_module import compute

TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@pytest.mark.parametrize(("n", "expected"), [(1, 4 / 9), (2, 4 / 8), (3, 4 / 7), (4, 4 / 6), (9, 1.0), (10, 1.0)])
def test_distinct_n_by_hand(n, expected):
    # abcabcabd: a b c d; ab bc ca bd; abc bca cab abd; abca bcab cabc cabd
    assert distinct_n("abcabcabd", n) == expected


def test_mean_and_product_by_hand():
    assert diversity_mean("abcabcabd") == pytest.approx((4 / 9 + 4 / 8 + 4 / 7 + 4 / 6) / 4)
    assert diversity_product("abcabcabd") == pytest.approx(4 / 8 * 4 / 7 * 4 / 6)
    assert diversity_mean("aaaa", ngrams=[2]) == diversity_product("aaaa", ngrams=[2]) == 1 / 3


def test_a_text_without_repeats_has_diversity_one_and_a_loop_almost_none():
    assert diversity_mean(range(50)) == diversity_product(range(50)) == 1.0
    assert diversity_mean([7] * 1000) == pytest.approx(1e-3, rel=0.01)
    assert diversity_product([7] * 1000) == pytest.approx(1e-9, rel=0.01)


@given(TOKENS, st.integers(1, 6))
def test_distinct_n_is_one_minus_rep_n(tokens, n):
    assert distinct_n(tokens, n) == pytest.approx(1 - rep_n(tokens, n))


@given(TOKENS)
def test_the_product_never_exceeds_its_smallest_factor(tokens):
    factors = [distinct_n(tokens, n) for n in (2, 3, 4)]
    assert 0 < diversity_product(tokens) <= min(factors)
    assert min(factors) <= diversity_mean(tokens, (2, 3, 4)) <= max(factors)


def test_scores_are_means_over_texts_of_words_or_tokens():
    scores = diversity_scores([[1, 1], [1, 2]])
    assert scores == {
        "distinct_1": 0.75, "distinct_2": 1.0, "distinct_3": 1.0, "distinct_4": 1.0,
        "diversity_mean": (0.875 + 1) / 2, "diversity_product": 1.0,
    }  # fmt: skip
    assert diversity_scores(["Yes, yes, yes."])["distinct_1"] == 4 / 6  # Yes , yes .
    assert diversity_scores(["a-b-a"], tokenizer=list)["distinct_1"] == 3 / 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distinct_n([], 2), "tokens must not be empty"),
        (lambda: diversity_mean(""), "tokens must not be empty"),
        (lambda: diversity_product([]), "tokens must not be empty"),
        (lambda: distinct_n([1], 0), r"n \(0\) must be at least 1"),
        (lambda: diversity_mean([1], ngrams=()), "ngrams must name at least one n"),
        (lambda: diversity_scores(["a", "  "]), r"texts\[1\] \('  '\) must hold a token"),
        (lambda: diversity_scores([]), "texts must hold at least one text"),
    ],
)
def test_empty_texts_and_wrong_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluate_module_stands_alone(tmp_path):
    texts, ids = ["to be or not to be", "a a a"], [[1, 2, 1, 2, 1], [3, 4, 5]]
    out = compute(Path(measures.__file__).parent, [{"predictions": texts}, {"predictions": ids}], tmp_path)
    assert out == [diversity_scores(texts), diversity_scores(ids)]
