"""Hand-computed values; order never matters; the `evaluate` module gives the functions' figures alone."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.metrics.evaluate_module import compute
from undersong.metrics.set_match import measures
from undersong.metrics.set_match.measures import set_match_scores, split_elements

ELEMENTS = st.lists(st.integers(0, 4), max_size=6)


@pytest.mark.parametrize(
    ("got", "want", "scores"),
    [
        ([1, 2, 3], [3, 2, 1], (1, 1, 1, 1)),
        ([1, 2], [1, 2, 3], (0, 1, 2 / 3, 4 / 5)),
        ([1, 2, 3, 4], [1, 5], (0, 1 / 4, 1 / 2, 1 / 3)),
        ([1, 1, 2], [1, 2, 2], (0, 2 / 3, 2 / 3, 2 / 3)),  # once too often, and once too few
        ([1], [1, 1], (0, 1, 1 / 2, 2 / 3)),
        ([], [], (1, 1, 1, 1)),
        ([], [1], (0, 0, 0, 0)),
        ([1], [], (0, 0, 0, 0)),
        (["a", ("b", 1)], [("b", 1), "a"], (1, 1, 1, 1)),
    ],
)
def test_one_row(got, want, scores):
    expected = dict(zip(("exact_match", "precision", "recall", "f1"), scores, strict=True))
    assert set_match_scores([got], [want]) == pytest.approx(expected)


@given(st.lists(st.tuples(ELEMENTS, ELEMENTS), min_size=1, max_size=4), st.randoms())
def test_order_does_not_matter_and_rows_are_averaged(rows, random):
    got, want = zip(*rows, strict=True)
    scores = set_match_scores(got, want)
    assert set_match_scores([random.sample(row, len(row)) for row in got], want) == scores
    singles = [set_match_scores([a], [b]) for a, b in rows]
    for name, value in scores.items():
        assert value == pytest.approx(sum(single[name] for single in singles) / len(singles))
        assert 0 <= value <= 1
    swapped = set_match_scores(want, got)
    assert (swapped["precision"], swapped["f1"]) == (scores["recall"], scores["f1"])


def test_texts_are_split_and_stripped():
    assert split_elements(" red,green apple ,, blue,", ",") == ["red", "green apple", "blue"]
    assert set_match_scores(["red, blue"], [" blue ,red"], separator=",")["exact_match"] == 1
    assert set_match_scores(["red blue"], ["blue red"], separator=",")["f1"] == 0
    assert set_match_scores(["", " , "], ["", ""], separator=",")["exact_match"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: set_match_scores([[1]], [[1], [2]]), r"predictions \(1\) and references \(2\) must be equally many"),
        (lambda: set_match_scores([], []), "predictions must hold at least one set"),
        (lambda: set_match_scores(["a"], [["a"]]), r"predictions\[0\] \('a'\) needs a separator to be split at"),
        (lambda: set_match_scores(["a"], [["a"]], ","), r"references\[0\] \(\['a'\]\) needs to be texts; drop"),
        (lambda: set_match_scores(["a"], ["a"], ""), r"separator \(''\) must hold at least one character"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluate_module_needs_nothing_of_undersong(tmp_path):
    calls = [
        {"predictions": [["a", "b"]], "references": [["b", "a"]]},
        {"predictions": [[1, 2], [3]], "references": [[2, 1], [4]]},
        {"predictions": ["a; b"], "references": ["b; c"], "separator": ";"},
    ]
    got = compute(Path(measures.__file__).parent, calls, tmp_path)
    assert got == [set_match_scores(**call) for call in calls]
