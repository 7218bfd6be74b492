"""The run-length recurrence against counting copies one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.generation.grammar_units import Unit
from undersong.generation.periods import TokenPeriods, best_period

ITEMS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def copies_by_hand(items, period):
    """How many equal stretches of `period` items stand at the end."""
    last, copies = items[len(items) - period :], 1
    while (start := len(items) - period * (copies + 1)) >= 0 and items[start : start + period] == last:
        copies += 1
    return copies


def best_by_hand(items, max_period, min_copies):
    found = [(r, copies_by_hand(items, r)) for r in range(1, min(max_period, len(items)) + 1)]
    found = [(r * n, -r) for r, n in found if n >= min_copies]
    if not found:
        return None
    cover, period = max(found)
    return -period, cover // -period


def unit_runs(items, max_period):
    unit = None
    for item in items:
        unit = Unit(item, 0, 0, False, None, unit, max_period)
    return unit.runs


def token_periods(items, max_period):
    periods, ids = TokenPeriods(max_period), np.array(items)
    for length in range(1, len(ids) + 1):
        periods.append(ids, length)
    return periods


@given(ITEMS, st.integers(1, 9), st.integers(2, 4))
def test_units_and_tokens_agree_with_counting(items, max_period, min_copies):
    want = best_by_hand(items, max_period, min_copies)
    assert best_period(unit_runs(items, max_period), min_copies) == want
    assert token_periods(items, max_period).best(min_copies) == want


@given(ITEMS, st.integers(1, 9), st.data())
def test_going_back_is_as_if_the_rest_had_never_been(items, max_period, data):
    length = data.draw(st.integers(0, len(items)))
    periods = token_periods(items, max_period)
    periods.restart(np.array(items), length)
    fresh = TokenPeriods(max_period)
    fresh.restart(np.array(items), length)
    want = best_by_hand(items[:length], max_period, 2) if length else None
    assert periods.best(2) == fresh.best(2) == want
    changed = [*items[:length], 7, 7, 7]
    for end in range(length + 1, len(changed) + 1):
        periods.append(np.array(changed), end)
    assert periods.best(2) == best_by_hand(changed, max_period, 2)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("abcabcdabcabcd", (7, 2)),  # 7 does not divide a text with anything before it
        ("xabcdabcdabcd", (4, 3)),
        ("xyzabcab", None),
        ("aabab", (2, 2)),  # not the 5 items as a whole
        ("ababababa", (2, 4)),
        ("aaaa", (1, 4)),  # 2 covers as much, the smallest wins
    ],
)
def test_patterns_that_do_not_divide_the_length_are_found(items, expected):
    items = [ord(item) for item in items]
    assert best_period(unit_runs(items, 8), 2) == expected
    assert token_periods(items, 8).best(2) == expected


def test_periods_up_to_256_tokens():
    pattern = list(range(256))
    assert token_periods(pattern * 3, 256).best(2) == (256, 3)
    assert token_periods([*range(257)] * 3, 256).best(2) is None
    fresh = TokenPeriods()
    fresh.restart(np.array(pattern * 3), 768)
    assert fresh.best(3) == (256, 3)
