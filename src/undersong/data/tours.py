"""Shortest round trips: an exact dynamic program for up to 12 cities, Lin-Kernighan-Helsgaun through elkai beyond.

Held and Karp (1962): with C(S, j) the shortest way from city 1 through all cities of S that ends in j of S,
C(S, j) = min over k in S - {j} of C(S - {j}, k) + d(k, j), in O(2^n n^2). It runs here over a batch of instances at a
time. Tours are written as the label sequences are: ids from 1, city 1 first, the second city below the last.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

__all__ = ["MAX_CITIES", "held_karp", "lkh_tour", "normal_tours", "tour_lengths"]

MAX_CITIES = 12  # for held_karp: the table of one instance has 2^(n-1) (n-1) entries
_BLOCK = 1 << 19  # entries of the table of one block of instances, 4 MiB: what caches hold


def held_karp(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shortest tour of every instance.

    Args:
        points: `[batch, n, 2]` or, for one instance, `[n, 2]`; n at most 12.

    Returns:
        Tours `[batch, n]` int64, ids from 1: city 1 first and, as a tour has two directions, the second city below
        the last. And their lengths `[batch]` float64, the way back included. Without the batch for one instance.

    Raises:
        ValueError: more than 12 cities, or none.

    >>> tour, length = held_karp(np.array([[0, 0], [1, 1], [1, 0], [0, 1]]))
    >>> tour.tolist(), float(length)
    ([1, 3, 2, 4], 4.0)
    """
    points = np.asarray(points, np.float64)
    if points.ndim == 2:
        tours, lengths = held_karp(points[None])
        return tours[0], lengths[0]
    batch, n, _ = points.shape
    if not 1 <= n <= MAX_CITIES:
        raise ValueError(f"points hold {n} cities, but held_karp takes 1 to {MAX_CITIES}; use lkh_tour beyond.")
    if n <= 3:  # one tour
        tours = np.broadcast_to(np.arange(1, n + 1), (batch, n)).copy()
        return tours, tour_lengths(points, tours)
    tours = np.empty((batch, n), np.int64)
    block = max(1, _BLOCK // ((n - 1) << (n - 1)))
    for begin in range(0, batch, block):
        part = slice(begin, begin + block)
        tours[part] = _solve(points[part])
    return tours, tour_lengths(points, tours)


def _solve(points):
    # City n is the origin of the table and city 1 turned to the front at the end; the batch is the last axis.
    batch, n, _ = points.shape
    m = n - 1
    distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1).transpose(1, 2, 0).copy()
    between, home = distance[:m, :m], distance[m, :m]
    cost = np.full((1 << m, m, batch), np.inf)
    for j in range(m):
        cost[1 << j, j] = home[j]
    for size in range(2, m + 1):
        for j in range(m):
            others = [k for k in range(m) if k != j]
            before = np.array([sum(1 << k for k in set_) for set_ in combinations(others, size - 1)])
            cost[before | 1 << j, j] = (cost[before] + between[j]).min(1)

    # Backwards: whichever k gave the minimum came before.
    everything = (1 << m) - 1
    instance = np.arange(batch)
    last = (cost[everything] + home).argmin(0)
    order = np.empty((n, batch), np.int64)
    order[0], order[1] = m, last
    left = np.full(batch, everything)
    for step in range(2, n):
        left &= ~(1 << last)
        last = (cost[left, :, instance] + between[last, :, instance]).argmin(1)
        order[step] = last
    return normal_tours(order.T + 1)


def normal_tours(tours: np.ndarray) -> np.ndarray:
    """The same tours `[batch, n]` from city 1 on, in the direction in which the second city is below the last.

    >>> normal_tours(np.array([[3, 1, 4, 2]]))
    array([[1, 3, 2, 4]])
    """
    n = tours.shape[1]
    start = tours.argmin(1)[:, None]
    forward = np.take_along_axis(tours, (start + np.arange(n)) % n, 1)
    backward = np.take_along_axis(tours, (start - np.arange(n)) % n, 1)
    return np.where((forward[:, 1] <= backward[:, 1])[:, None], forward, backward) if n > 2 else forward


def lkh_tour(points: np.ndarray, *, runs: int = 10) -> tuple[np.ndarray, float]:
    """A tour by LKH-3 through the package elkai: the optimum in practice, and no proof of it.

    elkai's licence allows non-commercial use only, as that of LKH does.

    Args:
        points: `[n, 2]`.
        runs: restarts of LKH; more of them find the optimum more surely.

    Returns:
        The tour `[n]` and its length, as `held_karp` gives them.

    Raises:
        ImportError: elkai is missing.
    """
    try:
        import elkai
    except ImportError:
        raise ImportError(
            "elkai solves round trips of many cities; pip install 'undersong[geometry]' (non-commercial use), or stay"
            f" at {MAX_CITIES} cities, which held_karp solves."
        ) from None
    points = np.asarray(points, np.float64)
    if len(points) <= 3:
        return held_karp(points)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    # LKH counts in integers: six digits of the longest way
    matrix = np.rint(distance * (1e6 / max(distance.max(), 1e-300))).astype(int).tolist()
    tour = np.array(elkai.DistanceMatrix(matrix).solve_tsp(runs)[:-1]) + 1  # it comes closed and from 0
    tour = normal_tours(tour[None])
    return tour[0], float(tour_lengths(points[None], tour)[0])


def tour_lengths(points: np.ndarray, tours: np.ndarray) -> np.ndarray:
    """Lengths `[batch]` of closed tours `[batch, n]` (ids from 1) through points `[batch, n, 2]`.

    >>> tour_lengths(np.array([[[0, 0], [0, 3], [4, 0]]]), np.array([[1, 2, 3]]))
    array([12.])
    """
    path = np.take_along_axis(np.asarray(points, np.float64), np.asarray(tours)[..., None] - 1, 1)
    return np.linalg.norm(path - np.roll(path, -1, 1), axis=-1).sum(1)
