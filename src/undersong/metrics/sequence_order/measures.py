"""How close predicted orders are to the right ones. Plain Python, no imports beyond the standard library.

Kendall's tau, the perfect match ratio and the position accuracy are what papers on sentence ordering report, such as
Logeswaran et al., "Sentence Ordering and Coherence Modeling using Recurrent Neural Networks", AAAI 2018 (arXiv
1611.02654). An order is a row of item ids >= 1; rows of `generate()` and of labels may be passed as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def order_ids(row: Iterable[int]) -> list[int]:
    """The item ids of a row: a 0 in front (the decoder's start) is dropped, the next id below 1 ends the order.

    >>> order_ids([0, 3, 1, 2, 0, 0]), order_ids([3, 1, 2, 0, -100])
    ([3, 1, 2], [3, 1, 2])
    """
    row = [int(item) for item in row]
    row = row[1:] if row[:1] == [0] else row
    return row[: next((place for place, item in enumerate(row) if item < 1), len(row))]


def kendall_tau(prediction: Iterable[int], reference: Iterable[int]) -> float:
    """(pairs in the right order - pairs in the wrong order) / all pairs of the reference, in [-1, 1].

    A pair with an item that the prediction lacks counts as neither; of a repeated item its first place counts. One
    item alone gives 1 if it was found, else 0.

    Raises:
        ValueError: the reference is empty or repeats an item.

    >>> kendall_tau([1, 2, 4, 3], [1, 2, 3, 4])  # 5 pairs of 6 are right
    0.666...
    """
    reference = _checked(order_ids(reference))
    place: dict[int, int] = {}
    for position, item in enumerate(order_ids(prediction)):
        place.setdefault(item, position)
    if len(reference) == 1:
        return float(reference[0] in place)
    balance = 0
    for index, first in enumerate(reference):
        for second in reference[index + 1 :]:
            if first in place and second in place:
                balance += 1 if place[first] < place[second] else -1
    return balance / (len(reference) * (len(reference) - 1) / 2)


def position_accuracy(prediction: Iterable[int], reference: Iterable[int]) -> float:
    """Share of the reference's places at which the prediction has the same item.

    Raises:
        ValueError: the reference is empty or repeats an item.

    >>> position_accuracy([1, 2, 4, 3], [1, 2, 3, 4])
    0.5
    """
    reference = _checked(order_ids(reference))
    return sum(a == b for a, b in zip(order_ids(prediction), reference, strict=False)) / len(reference)


def sequence_order_scores(
    predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]]
) -> dict[str, float]:
    """All measures, each the mean over rows.

    Args:
        predictions, references: orders, one a row: ids >= 1, with or without the 0 in front, the 0 at the end and
            the padding behind it (0 or negative).

    Returns:
        `kendall_tau`; `perfect_match`, the share of rows that are right as a whole; `position_accuracy`; `valid`, the
        share of rows that hold each item of the reference once and nothing else.

    Raises:
        ValueError: no rows, different numbers of rows, or a reference that is empty or repeats an item.

    >>> scores = sequence_order_scores([[0, 1, 2, 3, 0], [0, 2, 2, 0, 0]], [[1, 2, 3, 0], [2, 1, 0, -100]])
    >>> scores["kendall_tau"], scores["perfect_match"], scores["position_accuracy"], scores["valid"]
    (0.5, 0.5, 0.75, 0.5)
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions ({len(predictions)}) and references ({len(references)}) must be equally many; "
            "pass one reference per prediction."
        )
    if not len(references):
        raise ValueError("references must hold at least one row.")
    rows = [(order_ids(p), order_ids(r)) for p, r in zip(predictions, references, strict=True)]
    return {
        "kendall_tau": sum(kendall_tau(p, r) for p, r in rows) / len(rows),
        "perfect_match": sum(p == r for p, r in rows) / len(rows),
        "position_accuracy": sum(position_accuracy(p, r) for p, r in rows) / len(rows),
        "valid": sum(sorted(p) == sorted(r) for p, r in rows) / len(rows),
    }


def _checked(reference: list[int]) -> list[int]:
    if not reference:
        raise ValueError("a reference must hold at least one id >= 1; drop empty rows.")
    if len(set(reference)) < len(reference):
        raise ValueError(f"a reference ({reference}) must hold each id once, or there is no right order of them.")
    return reference
