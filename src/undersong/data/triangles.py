"""Exact labels of Delaunay triangulations: triangles by scipy, everything about them for whole batches at once.

A triangulation is Delaunay if no point lies in the circumcircle of a triangle, which holds everywhere if it holds
across every edge; it is the only one unless four points lie on a circle. Both are checked here.
"""

from __future__ import annotations

import numpy as np

from .hulls import convex_hulls

__all__ = ["delaunay_triangles", "incenter_order"]

_ON_CIRCLE = 1e-12  # in-circle determinants below it do not tell inside from outside


def delaunay_triangles(points: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The Delaunay triangulation of every point set: triples of ids, each ascending, sorted by incenter, then 0.

    Args:
        points: `[batch, n_max, 2]`, coordinates of the order of 1.
        counts: `[batch]` points of each set, at least 3; the rest of a row is ignored. None: all of them.

    Returns:
        Labels `[batch, 3 * (2 n_max - 5) + 1]` int64: ids from 1, a 0 at the end, then -100. And `[batch]` bool, False
        where the triangulation is degenerate (three points on the hull on a line, four on a circle); such labels mean
        nothing.

    Raises:
        ImportError: scipy is missing.

    >>> kite = np.array([[[0.5, 0.0], [0, 1], [1, 1], [0.5, 2.5]]])
    >>> labels, certain = delaunay_triangles(kite)
    >>> labels.tolist(), certain.tolist()
    ([[1, 2, 3, 2, 3, 4, 0, -100, -100, -100]], [True])
    """
    try:
        from scipy.spatial import Delaunay
    except ImportError:
        raise ImportError("scipy triangulates; pip install 'undersong[geometry]'.") from None
    points = np.asarray(points, np.float64)
    batch, n, _ = points.shape
    counts = np.full(batch, n) if counts is None else np.asarray(counts)
    hulls, certain = convex_hulls(points, counts)
    # by Euler's formula; the corners of a hull that is not certain are anything
    expected = np.where(certain, 2 * counts - 2 - ((hulls > 0).sum(1) - 1), 1)

    most = 2 * n - 5
    triangles = np.zeros((batch, most, 3), np.int64)
    neighbours = np.full((batch, most, 3), -1)
    for row in certain.nonzero()[0]:
        found = Delaunay(points[row, : counts[row]])
        size = len(found.simplices)
        certain[row] = size == expected[row]
        if certain[row]:
            triangles[row, :size] = found.simplices
            neighbours[row, :size] = found.neighbors
    certain &= _is_delaunay(points, triangles, neighbours)

    present = np.arange(most) < expected[:, None]
    order = incenter_order(points, triangles, present)
    triangles = np.sort(np.take_along_axis(triangles, order[..., None], 1), -1) + 1
    labels = np.full((batch, 3 * most + 1), -100)
    labels[:, :-1] = np.where(present[..., None], triangles, -100).reshape(batch, -1)
    labels[np.arange(batch), 3 * expected] = 0
    return labels, certain


def incenter_order(points: np.ndarray, triangles: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The order of triangles by the x and then the y of their incenters (a A + b B + c C) / (a + b + c).

    Args:
        points: `[batch, n, 2]`.
        triangles: `[batch, m, 3]` indices from 0.
        present: `[batch, m]` bool; the others come last.

    Returns:
        `[batch, m]` indices into the triangles.
    """
    corners = _corners(points, triangles)  # [batch, m, 3, 2]
    opposite = np.linalg.norm(np.roll(corners, -1, 2) - np.roll(corners, 1, 2), axis=-1, keepdims=True)
    # a triangle that is not there may be one point three times
    center = (opposite * corners).sum(2) / np.maximum(opposite.sum(2), 1e-300)
    return np.lexsort((center[..., 1], center[..., 0], ~present))


def _is_delaunay(points, triangles, neighbours):
    """Whether, across every inner edge, the neighbour's corner lies outside the circumcircle, by a margin."""
    batch = len(triangles)
    # the corners of two neighbours differ in one: that of the other triangle is its sum minus the edge's
    edge = triangles.sum(2, keepdims=True) - triangles
    inner = neighbours >= 0
    sums = np.take_along_axis(triangles.sum(2), neighbours.clip(0).reshape(batch, -1), 1).reshape(edge.shape)
    beyond = np.where(inner, sums - edge, triangles)
    a, b, c = np.moveaxis(_corners(points, triangles)[:, :, None] - _corners(points, beyond)[..., None, :], 3, 0)
    square = [(v**2).sum(-1) for v in (a, b, c)]
    inside = square[0] * _cross(b, c) + square[1] * _cross(c, a) + square[2] * _cross(a, b)
    inside *= np.sign(_cross(b - a, c - a))  # positive inside whatever way round the corners are named
    return (~inner | (inside < -_ON_CIRCLE)).all((1, 2))


def _corners(points, triangles):
    return points[np.arange(len(points))[:, None, None], triangles]


def _cross(u, v):
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
