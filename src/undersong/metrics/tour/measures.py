"""How good predicted round trips are. Needs numpy, nothing else.

The figures of Vinyals et al., "Pointer Networks" (arXiv 1506.03134, section 4.4), and how many predictions are round
trips at all: an unconstrained decoder may visit a city twice, or never.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def tour_ids(row: Iterable[int]) -> list[int]:
    """The cities of a row: a 0 in front is dropped, the next id below 1 ends the tour.

    >>> tour_ids([0, 1, 3, 2, 0, 0]), tour_ids([1, 3, 2, 0, -100])
    ([1, 3, 2], [1, 3, 2])
    """
    row = [int(id_) for id_ in row]
    row = row[1:] if row[:1] == [0] else row
    return row[: next((place for place, id_ in enumerate(row) if id_ < 1), len(row))]


def tour_length(points: np.ndarray, tour: Sequence[int]) -> float:
    """Length of a tour of ids from 1, the way back to its first city included.

    >>> tour_length([[0, 0], [0, 3], [4, 0]], [1, 2, 3])
    12.0
    """
    path = np.asarray(points, np.float64)[np.array(tour, int) - 1]
    return float(np.linalg.norm(path - np.roll(path, -1, 0), axis=1).sum())


def tour_scores(
    predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]], points: Sequence[np.ndarray]
) -> dict[str, float]:
    """Lengths of predicted tours and how far they are from the best ones.

    Args:
        predictions: rows of ids from 1; the 0 in front, the final 0 and padding of 0 or negative ids may be there or
            not. Tours are not closed: the way back to the first city goes without saying.
        references: the shortest tours, the same way.
        points: `[n, 2]` coordinates for each row, or `[batch, n, 2]` for all, whose padding no reference visits.

    Returns:
        `valid`: the share of predictions that visit every city of their reference once. Means over the valid ones
        (NaN without any): `length`, `optimal_length` of their references, and `gap`, the mean of length / optimal - 1.

    Raises:
        ValueError: no rows, or different numbers of rows.

    >>> square = [[0, 0], [0, 1], [1, 1], [1, 0]]
    >>> scores = tour_scores([[0, 3, 2, 1, 4, 0], [0, 1, 2, 2, 3, 0]], [[1, 2, 3, 4, 0]] * 2, [square] * 2)
    >>> scores["valid"], scores["length"], scores["gap"]
    (0.5, 4.0, 0.0)
    """
    if not len(predictions) == len(references) == len(points):
        raise ValueError(
            f"predictions ({len(predictions)}), references ({len(references)}) and points ({len(points)}) must be"
            " equally many; pass one reference and one point set per prediction."
        )
    if not len(references):
        raise ValueError("references must hold at least one row.")
    lengths = []
    for prediction, reference, place in zip(predictions, references, points, strict=True):
        tour, best = tour_ids(prediction), tour_ids(reference)
        if sorted(tour) == sorted(best):
            lengths.append((tour_length(place, tour), tour_length(place, best)))
    scores = {"valid": len(lengths) / len(references)}
    if not lengths:
        return scores | dict.fromkeys(("length", "optimal_length", "gap"), float("nan"))
    length, optimal = np.array(lengths).T
    # one city, or all in one place: nothing to go
    gap = np.where(optimal > 0, length / np.where(optimal > 0, optimal, 1), 1) - 1
    return scores | {
        "length": float(length.mean()),
        "optimal_length": float(optimal.mean()),
        "gap": float(gap.mean()),
    }
