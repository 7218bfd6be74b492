"""Exact labels of convex hulls, for whole batches of point sets at once.

The hull is wrapped like a gift: from a point on it, the next one is the point that has all others on its left. Every
edge is then checked against every point, so an answer is either a certain hull or declared degenerate.
"""

from __future__ import annotations

import numpy as np

__all__ = ["convex_hulls"]

# Twice the area of a triangle that counts as flat: about what float32 coordinates in [0, 1] can still tell apart.
_FLAT = 1e-7


def convex_hulls(points: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The hull of every point set: counter-clockwise, from its point of lowest index, the first index again, then 0.

    Args:
        points: `[batch, n_max, 2]`, coordinates of the order of 1.
        counts: `[batch]` points of each set, at least 3; the rest of a row is ignored. None: all of them.

    Returns:
        Labels `[batch, n_max + 2]` int64: ids from 1, a 0 at the end, then -100. And `[batch]` bool, False where the
        hull is degenerate (a triangle of doubled area below 1e-7 along it, e.g. points on a line); such labels mean
        nothing.

    >>> square = np.array([[[0.5, 0.5], [0, 0], [1, 0], [0, 1], [1, 1]]])
    >>> labels, certain = convex_hulls(square)
    >>> labels.tolist(), certain.tolist()
    ([[2, 3, 5, 4, 2, 0, -100]], [True])
    """
    points = np.asarray(points, np.float64)
    batch, n, _ = points.shape
    rows = np.arange(batch)
    x, y = points[..., 0], points[..., 1]
    absent = np.zeros((batch, n), bool) if counts is None else np.arange(n) >= np.asarray(counts)[:, None]

    # The lowest point is on the hull, and seen from it along the x-axis everything lies on the left.
    start = np.where(absent, np.inf, y).argmin(1)
    wrapped = np.zeros((batch, n + 1), np.int64)
    size = np.zeros(batch, np.int64)
    certain = np.ones(batch, bool)
    open_ = np.ones(batch, bool)
    here, direction = start, np.stack([np.ones(batch), np.zeros(batch)])
    for step in range(n):
        wrapped[:, step] = here
        dx, dy = x - x[rows, here][:, None], y - y[rows, here][:, None]
        along = direction[0][:, None] * dx + direction[1][:, None] * dy
        left = direction[0][:, None] * dy - direction[1][:, None] * dx
        # falls from 1 to -1 while the angle to the direction grows from 0 to pi; cheaper than the angle
        with np.errstate(invalid="ignore"):
            turn = along / (np.abs(along) + np.abs(left))
        turn[absent] = -np.inf
        turn[rows, here] = -np.inf
        np.nan_to_num(turn, copy=False, nan=-np.inf)  # a point twice
        there = turn.argmax(1)
        direction = np.stack([dx[rows, there], dy[rows, there]])
        beside = direction[0][:, None] * dy - direction[1][:, None] * dx
        beside[absent] = np.inf
        beside[rows, here] = np.inf
        beside[rows, there] = np.inf
        certain &= ~open_ | (beside.min(1) > _FLAT)
        here = np.where(open_, there, here)
        size += open_
        open_ &= here != start
        if not open_.any():
            break
    return _labels(wrapped, size), certain & ~open_


def _labels(wrapped, size):
    """Rotates every hull to its point of lowest index, closes it and ends it."""
    batch, width = wrapped.shape  # n + 1
    steps = np.arange(width + 1)
    inside = steps[:width] < size[:, None]
    first = np.where(inside, wrapped, width).argmin(1)
    index = (first[:, None] + steps) % size[:, None]
    labels = np.take_along_axis(wrapped, index, 1) + 1
    labels[steps > size[:, None]] = -100
    labels[np.arange(batch), size + 1] = 0
    return labels
