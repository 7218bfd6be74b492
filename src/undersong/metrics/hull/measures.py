"""How good predicted convex hulls are. Needs numpy, nothing else.

Accuracy and area coverage as in Vinyals et al., "Pointer Networks" (arXiv 1506.03134, section 4.2): a prediction is
right if it is the same polygon, wherever it begins and whichever way it goes; a polygon that crosses itself covers
nothing that could be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def polygon_ids(row: Iterable[int]) -> list[int]:
    """The corners that a row names: without the 0 in front, what follows the next id below 1, and the last repetition
    of the first corner.

    >>> polygon_ids([0, 2, 4, 3, 2, 0, 0]), polygon_ids([2, 4, 3, 2, 0, -100])
    ([2, 4, 3], [2, 4, 3])
    """
    row = [int(id_) for id_ in row]
    row = row[1:] if row[:1] == [0] else row
    row = row[: next((place for place, id_ in enumerate(row) if id_ < 1), len(row))]
    return row[:-1] if len(row) > 1 and row[0] == row[-1] else row


def same_polygon(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two lists of corners (as `polygon_ids` gives them) go round the same polygon.

    >>> same_polygon([1, 2, 3, 4], [3, 2, 1, 4]), same_polygon([1, 2, 3, 4], [1, 3, 2, 4])
    (True, False)
    """
    one, other = list(one), list(other)
    if len(one) != len(other):
        return False
    turns = [other[i:] + other[:i] for i in range(len(other))] or [[]]
    return one in turns or one[::-1] in turns


def polygon_area(corners: np.ndarray) -> float:
    """Area by the shoelace formula: positive counter-clockwise.

    >>> polygon_area([[0, 0], [2, 0], [2, 1], [0, 1]])
    2.0
    """
    corners = np.asarray(corners, np.float64)
    if len(corners) == 0:
        return 0.0
    x, y = (corners - corners[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def is_simple(corners: np.ndarray) -> bool:
    """Whether a polygon has three corners at least and its edges meet nowhere but at the corner they share.

    >>> is_simple([[0, 0], [1, 0], [1, 1], [0, 1]]), is_simple([[0, 0], [1, 1], [1, 0], [0, 1]])
    (True, False)
    """
    start = np.asarray(corners, np.float64)
    size = len(start)
    if size < 3:
        return False
    end, following = np.roll(start, -1, 0), np.roll(start, -2, 0)
    back, on = start - end, following - end
    if ((_cross(back, on) == 0) & ((back * on).sum(1) >= 0)).any():  # an edge runs back over the one before
        return False
    i, j = np.triu_indices(size, 2)
    apart = (i > 0) | (j < size - 1)  # the last edge and the first share a corner
    i, j = i[apart], j[apart]
    a, b, c, d = start[i], end[i], start[j], end[j]
    # each edge has the other's ends on both sides of its line; for edges on one line the boxes decide
    meet = np.sign(_cross(b - a, c - a)) * np.sign(_cross(b - a, d - a)) <= 0
    meet &= np.sign(_cross(d - c, a - c)) * np.sign(_cross(d - c, b - c)) <= 0
    meet &= ((np.minimum(a, b) <= np.maximum(c, d)) & (np.minimum(c, d) <= np.maximum(a, b))).all(1)
    return not meet.any()


def hull_scores(
    predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]], points: Sequence[np.ndarray]
) -> dict[str, float]:
    """Accuracy and area coverage of predicted hulls.

    Args:
        predictions: rows of ids from 1, as `generate()` writes them: the 0 in front, the final 0, padding of 0 or
            negative ids and the repetition of the first corner may be there or not.
        references: rows of labels, the same way.
        points: `[n, 2]` coordinates for each row, or `[batch, n, 2]` for all.

    Returns:
        `accuracy`: the share of rows that are the right polygon, up to its beginning and direction. `area_coverage`:
        area of the predicted polygon over that of the hull, the mean over simple polygons (NaN without any; a hull
        without area counts as covered). `simple`: the share of rows that are simple polygons. `area_fail`: 1.0 if more
        than 1 % of them are not, where the paper prints FAIL in place of the coverage.

    Raises:
        ValueError: no rows, or different numbers of rows.

    >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]])
    >>> scores = hull_scores([[0, 3, 2, 1, 4, 3, 0], [0, 1, 2, 3, 1, 0]], [[1, 2, 3, 4, 1, 0]] * 2, [square] * 2)
    >>> scores["accuracy"], scores["area_coverage"], scores["simple"], scores["area_fail"]
    (0.5, 0.75, 1.0, 0.0)
    """
    if not len(predictions) == len(references) == len(points):
        raise ValueError(
            f"predictions ({len(predictions)}), references ({len(references)}) and points ({len(points)}) must be"
            " equally many; pass one reference and one point set per prediction."
        )
    if not len(references):
        raise ValueError("references must hold at least one row.")
    right, covered = 0, []
    for prediction, reference, place in zip(predictions, references, points, strict=True):
        place = np.asarray(place, np.float64)
        corners, hull = polygon_ids(prediction), polygon_ids(reference)
        right += same_polygon(corners, hull)
        if all(id_ <= len(place) for id_ in corners):
            corners = place[np.array(corners, int) - 1]
            if is_simple(corners):
                area = abs(polygon_area(place[np.array(hull, int) - 1]))
                covered.append(abs(polygon_area(corners)) / area if area else 1.0)
    rows = len(references)
    return {
        "accuracy": right / rows,
        "area_coverage": float(np.mean(covered)) if covered else float("nan"),
        "simple": len(covered) / rows,
        "area_fail": float(rows - len(covered) > 0.01 * rows),
    }


def _cross(u, v):
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
