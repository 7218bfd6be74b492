"""Hand-computed values, invariants of permutations; the `evaluate` module gives the functions' figures."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from undersong.metrics.sequence_order import measures
from undersong.metrics.sequence_order.measures import kendall_tau, order_ids, position_accuracy, sequence_order_scores

from .evaluate_module import compute

ORDERS = st.permutations(range(1, 7))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([3, 1, 2], [3, 1, 2]),
        ([3, 1, 2, 0, -100, -100], [3, 1, 2]),  # labels
        ([0, 3, 1, 2, 0, 0], [3, 1, 2]),  # generate(): start, order, end, padding
        ([0, 0, 0], []),  # ended at once
        ([0], []),
        ([], []),
        ([2, -100], [2]),
        (np.array([0, 2, 1, 0]), [2, 1]),
    ],
)
def test_a_row_is_read_up_to_its_end(row, expected):
    assert order_ids(row) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "tau", "accuracy"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0),
        ([4, 3, 2, 1], [1, 2, 3, 4], -1.0, 0.0),
        ([2, 1, 4, 3], [1, 2, 3, 4], 2 / 6, 0.0),  # wrong: 12, 34
        ([3, 1, 2], [3, 2, 1], 1 / 3, 1 / 3),
        ([1, 2], [1, 2, 3], 1 / 3, 2 / 3),  # 3 is missing: only the pair 12 counts
        ([2, 2, 1], [1, 2], -1.0, 0.5),  # the first 2 counts for tau
        ([9, 1, 2], [1, 2], 1.0, 0.0),  # strangers take a place, but are in no pair
        ([5], [5], 1.0, 1.0),
        ([], [5], 0.0, 0.0),
        ([], [1, 2], 0.0, 0.0),
    ],
)
def test_measures_by_hand(prediction, reference, tau, accuracy):
    assert kendall_tau(prediction, reference) == pytest.approx(tau)
    assert position_accuracy(prediction, reference) == pytest.approx(accuracy)


@given(ORDERS, ORDERS)
def test_tau_is_scipys_and_symmetric(first, second):
    want = kendalltau([first.index(item) for item in range(1, 7)], [second.index(item) for item in range(1, 7)])
    assert kendall_tau(first, second) == pytest.approx(want.statistic)
    assert kendall_tau(second, first) == pytest.approx(kendall_tau(first, second))


@given(ORDERS)
def test_reversing_negates_tau_and_swapping_neighbours_moves_one_pair(order):
    right = sorted(order)
    assert kendall_tau(order[::-1], right) == pytest.approx(-kendall_tau(order, right))
    swapped = [order[1], order[0], *order[2:]]
    pairs = len(list(combinations(order, 2)))
    assert abs(kendall_tau(swapped, right) - kendall_tau(order, right)) == pytest.approx(2 / pairs)


def test_scores_are_means_over_rows_of_any_form():
    predictions = np.array([[0, 2, 1, 3, 0], [0, 1, 2, 0, 0], [0, 1, 1, 0, 0]])
    references = [[2, 1, 3, 0], [2, 1, 0, -100], [1, 2, 0, -100]]
    assert sequence_order_scores(predictions, references) == {
        "kendall_tau": pytest.approx((1 - 1 + 0) / 3),
        "perfect_match": pytest.approx(1 / 3),
        "position_accuracy": pytest.approx((1 + 0 + 0.5) / 3),
        "valid": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_order_scores([[1]], [[1], [1]]), r"predictions \(1\) and references \(2\) must be equally"),
        (lambda: sequence_order_scores([], []), "references must hold at least one row"),
        (lambda: sequence_order_scores([[1]], [[0, 0]]), "a reference must hold at least one id >= 1"),
        (lambda: kendall_tau([1], [1, 2, 1]), r"a reference \(\[1, 2, 1\]\) must hold each id once"),
        (lambda: position_accuracy([1], []), "a reference must hold at least one id >= 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluate_module_needs_nothing_of_undersong(tmp_path):
    call = {"predictions": [[0, 1, 2, 4, 3, 0], [2, 1]], "references": [[1, 2, 3, 4, 0, -100], [2, 1, 0]]}
    (scores,) = compute(Path(measures.__file__).parent, [call], tmp_path)
    assert scores == sequence_order_scores(**call)
