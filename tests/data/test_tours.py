"""Held-Karp against all permutations, LKH against Held-Karp, and the form of a tour."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.data.tours import MAX_CITIES, held_karp, lkh_tour, normal_tours, tour_lengths


def brute_force(points):
    """The shortest of all tours from city 1, the first in the order of ids."""
    n = len(points)
    tours = np.array([[1, *rest] for rest in itertools.permutations(range(2, n + 1))])
    lengths = tour_lengths(np.broadcast_to(points, (len(tours), n, 2)), tours)
    return tours[lengths < lengths.min() + 1e-9][0], lengths.min()


@pytest.mark.parametrize("n", range(1, 9))
def test_held_karp_equals_all_permutations(n):
    points = np.random.default_rng(n).random((7, n, 2))
    tours, lengths = held_karp(points)
    for place, tour, length in zip(points, tours, lengths, strict=True):
        expected, shortest = brute_force(place)
        assert tour.tolist() == expected.tolist()  # of two directions the one with second < last comes first there
        assert length == pytest.approx(shortest, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5, MAX_CITIES])
def test_tours_begin_in_city_1_and_go_in_the_direction_of_the_smaller_neighbour(n):
    tours, _ = held_karp(np.random.default_rng(0).random((60, n, 2)))
    assert (np.sort(tours, 1) == np.arange(1, n + 1)).all()
    assert (tours[:, 0] == 1).all()
    assert (tours[:, 1 % n] <= tours[:, -1]).all()


def test_a_batch_equals_its_instances_however_it_is_cut_into_blocks():
    points = np.random.default_rng(0).random((100, 10, 2))  # blocks of 113, 51 and 23 instances for n = 10, 11, 12
    for n in (10, MAX_CITIES):
        more = np.concatenate([points, points[:, : n - 10]], 1) if n > 10 else points
        more = more + np.random.default_rng(1).random(more.shape) / 10
        tours, lengths = held_karp(more)
        for index in (0, 22, 23, 99):
            tour, length = held_karp(more[index])
            assert tour.tolist() == tours[index].tolist()
            assert length == lengths[index]


def test_cities_on_a_circle_are_visited_round_the_circle():
    order = np.random.default_rng(0).permutation(11)
    angle = 2 * np.pi * order / 11
    tour, length = held_karp(np.stack([np.cos(angle), np.sin(angle)], 1))
    steps = np.diff(order[np.append(tour, tour[0]) - 1]) % 11
    assert set(steps.tolist()) in ({1}, {10})
    assert length == pytest.approx(22 * np.sin(np.pi / 11))


def test_cities_in_one_place_and_on_a_line():
    assert held_karp(np.ones((4, 2)))[1] == 0
    assert held_karp(np.arange(12).reshape(6, 2).astype(float))[1] == pytest.approx(2 * np.hypot(10, 10))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_lkh_finds_the_tours_of_held_karp(n):
    for place in np.random.default_rng(n).random((10, n, 2)):
        tour, length = lkh_tour(place)
        expected, shortest = held_karp(place)
        assert abs(length - shortest) <= 1e-5 * shortest
        assert tour.tolist() == expected.tolist()


def test_lkh_goes_beyond_held_karp():
    points = np.random.default_rng(0).random((30, 2))
    tour, length = lkh_tour(points)
    assert sorted(tour) == list(range(1, 31))
    assert tour[0] == 1
    assert tour[1] < tour[-1]
    # no two crossing ways: exchanging two of them never helps
    for i in range(1, 29):
        for j in range(i + 1, 30):
            other = np.concatenate([tour[:i], tour[i : j + 1][::-1], tour[j + 1 :]])
            assert tour_lengths(points[None], other[None])[0] >= length * (1 - 1e-6)


def test_lkh_with_all_cities_in_one_place():
    tour, length = lkh_tour(np.ones((5, 2)))
    assert sorted(tour) == [1, 2, 3, 4, 5]
    assert length == 0


@settings(max_examples=40)
@given(st.permutations(range(1, 7)), st.integers(0, 5), st.booleans())
def test_rotations_and_directions_of_a_tour_have_one_form(tour, start, backwards):
    other = tour[start:] + tour[:start]
    other = other[::-1] if backwards else other
    form = normal_tours(np.array([tour]))[0].tolist()
    assert normal_tours(np.array([other]))[0].tolist() == form
    assert form[0] == 1
    assert form[1] < form[-1]


@pytest.mark.parametrize("n", [0, 13])
def test_held_karp_refuses_other_sizes(n):
    with pytest.raises(ValueError, match=rf"points hold {n} cities, but held_karp takes 1 to 12; use lkh_tour beyond"):
        held_karp(np.zeros((2, n, 2)))


def test_without_elkai_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "elkai", None)
    with pytest.raises(ImportError, match=r"pip install 'undersong\[geometry\]' .* stay at 12 cities"):
        lkh_tour(np.zeros((5, 2)))
