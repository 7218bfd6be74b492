"""Hulls, triangulations and tours by hand; points on a line; the exact labels score full marks; the modules alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undersong.data.geometry import ConvexHullDataset, DelaunayDataset, TSPDataset
from undersong.metrics.hull import measures as hull_measures
from undersong.metrics.hull.measures import hull_scores, is_simple, polygon_area, polygon_ids, same_polygon
from undersong.metrics.tour import measures as tour_measures
from undersong.metrics.tour.measures import tour_ids, tour_length, tour_scores
from undersong.metrics.triangulation import measures as triangulation_measures
from undersong.metrics.triangulation.measures import triangles, triangulation_scores

from .evaluate_module import compute_all

SQUARE = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]]


def padded(rows, start=True):
    """Rows as `generate()` gives them: a 0 in front, 0 as padding."""
    rows = [[0] * start + list(row) for row in rows]
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.mark.parametrize(
    "row", [[2, 3, 1, 2, 0], [0, 2, 3, 1, 2, 0, 0, 0], [2, 3, 1], [2, 3, 1, 0, -100, -100], [2, 3, 1, 2, 0, 3, 3]]
)
def test_rows_are_read_with_and_without_start_end_and_padding(row):
    for form in (list, np.array, torch.tensor):
        assert polygon_ids(form(row)) == [2, 3, 1]
        closed = [2, 3, 1, 2] if row.count(2) == 2 else [2, 3, 1]
        assert tour_ids(form(row)) == closed
        assert triangles(form(row)) == ([(1, 2, 3)], len(closed) - 3)


def test_empty_answers_are_read():
    assert polygon_ids([0, 0, 0]) == polygon_ids([]) == tour_ids([0]) == []
    assert polygon_ids([4, 0]) == polygon_ids([4, 4, 0]) == [4]
    assert triangles([0, 0]) == ([], 0)


@given(st.permutations(range(1, 7)), st.integers(0, 5), st.booleans())
def test_a_polygon_is_the_same_from_every_corner_in_both_directions(corners, start, backwards):
    other = corners[start:] + corners[:start]
    assert same_polygon(other[::-1] if backwards else other, corners)
    other[0], other[1] = other[1], other[0]
    assert not same_polygon(other, corners)
    assert not same_polygon(corners[:-1], corners)


@pytest.mark.parametrize(
    ("corners", "area", "simple"),
    [
        ([[0, 0], [2, 0], [2, 1], [0, 1]], 2, True),
        ([[0, 0], [0, 1], [2, 1], [2, 0]], -2, True),  # clockwise
        ([[0, 0], [4, 0], [4, 4], [3, 1]], 4, True),  # not convex
        ([[0, 0], [2, 2], [2, 0], [0, 2]], 0, False),  # crosses itself in the middle
        ([[0, 0], [2, 0], [1, 0]], 0, False),  # on a line
        ([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]], 0, False),
        ([[0, 0], [4, 0], [4, 4], [2, 0], [0, 4]], 8, False),  # a corner on an edge
        ([[0, 0], [2, 0], [4, 0], [4, 4]], 8, True),  # a corner with a straight angle is allowed
        ([[0, 0], [4, 0], [2, 0], [4, 4]], 4, False),  # an edge that runs back
        ([[0, 0], [2, 0], [2, 2], [0, 0], [2, 4], [0, 2]], 4, False),  # one corner twice
        ([[0, 0], [0, 0], [1, 0], [1, 1]], 0.5, False),  # the same corner twice in a row
        ([[0, 0], [1, 1]], 0, False),
        ([[1, 1]], 0, False),
        ([], 0, False),
    ],
)
def test_areas_and_simple_polygons_by_hand(corners, area, simple):
    assert polygon_area(corners) == pytest.approx(area)
    for turn in range(max(len(corners), 1)):
        turned = corners[turn:] + corners[:turn]
        assert is_simple(turned) == is_simple(turned[::-1]) == simple


def test_hull_scores_by_hand():
    reference = [1, 2, 3, 4, 1, 0]
    predictions = padded(
        [
            [3, 2, 1, 4, 3],  # right, from another corner, clockwise
            [1, 2, 3, 1],  # half of it
            [1, 2, 3, 4, 5, 1],  # a corner too many: 0.75 of the area
            [1, 3, 2, 4, 1],  # crosses itself
            [2, 3, 2],  # two corners
        ]
    )
    scores = hull_scores(predictions, [reference] * 5, torch.tensor([SQUARE] * 5))
    assert scores == {
        "accuracy": 1 / 5, "area_coverage": pytest.approx((1 + 0.5 + 0.75) / 3), "simple": 3 / 5, "area_fail": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("wrong", "fail"), [(0, 0.0), (2, 0.0), (3, 1.0)])
def test_more_than_one_percent_of_crossing_polygons_fail(wrong, fail):
    predictions = [[1, 3, 2, 4, 1]] * wrong + [[1, 2, 3, 4, 1]] * (200 - wrong)
    scores = hull_scores(predictions, [[1, 2, 3, 4, 1]] * 200, [SQUARE] * 200)
    assert scores["area_fail"] == fail
    assert scores["area_coverage"] == 1.0


def test_hulls_of_points_on_a_line_are_scored_without_a_crash():
    line = [[0, 0], [1, 1], [2, 2], [3, 3]]
    scores = hull_scores([[1, 4, 1, 0], [1, 2, 3, 1, 0]], [[1, 4, 1, 0]] * 2, [line] * 2)
    assert scores.pop("area_coverage") != scores.get("area_coverage")
    assert scores == {"accuracy": 0.5, "simple": 0.0, "area_fail": 1.0}
    # a triangle whose reference has no area
    scores = hull_scores([[1, 2, 3, 1]], [[1, 2, 1]], [[[0, 0], [1, 0], [0, 1]]])
    assert scores["area_coverage"] == 1.0


def test_ids_beyond_the_points_make_no_polygon():
    scores = hull_scores([[1, 2, 9, 1]], [[1, 2, 3, 4, 1]], [SQUARE])
    assert scores["simple"] == scores["accuracy"] == 0


def test_triangulation_scores_by_hand():
    reference = [1, 2, 3, 1, 3, 4, 0, -100]
    predictions = padded(
        [
            [4, 1, 3, 2, 1, 3],  # right in another order
            [1, 2, 3],  # half of it
            [1, 2, 3, 1, 3, 4, 2, 3, 4],  # one too many
            [1, 2, 3, 1, 3, 4, 1],  # an id left over
            [1, 2, 3, 3, 2, 1],  # one of them twice
            [],
        ]
    )
    scores = triangulation_scores(predictions, [reference] * 6)
    assert scores == {"accuracy": 1 / 6, "triangle_coverage": pytest.approx((1 + 0.5 + 1 + 1 + 0.5 + 0) / 6)}


def test_tour_scores_by_hand():
    around, across = 4.0, 2 + 2 * math.sqrt(2)
    predictions = padded(
        [
            [2, 3, 4, 1],  # the best one from another city
            [1, 3, 2, 4],  # both diagonals
            [1, 2, 3],  # a city is missing
            [1, 2, 3, 3],  # a city twice
            [1, 2, 3, 4, 1],  # closed: a tour of this module is not
        ]
    )
    points = torch.tensor([SQUARE[:4] + [[9.0, 9.0]]] * 5)  # padding that no reference visits
    scores = tour_scores(predictions, [[1, 2, 3, 4, 0]] * 5, points)
    assert scores == {
        "valid": 2 / 5,
        "length": pytest.approx((around + across) / 2),
        "optimal_length": around,
        "gap": pytest.approx((across / around - 1) / 2),
    }
    assert tour_length(SQUARE, [1, 3, 2, 4]) == pytest.approx(across)


def test_tours_without_a_way_have_no_gap_and_no_valid_tour_no_length():
    scores = tour_scores([[1, 0], [2, 1, 0]], [[1, 0], [1, 2, 0]], [[[3, 3]], [[1, 1], [1, 1]]])
    assert scores == {"valid": 1.0, "length": 0.0, "optimal_length": 0.0, "gap": 0.0}
    scores = tour_scores([[1, 1, 0]], [[1, 2, 0]], [[[0, 0], [1, 1]]])
    assert scores["valid"] == 0
    assert all(math.isnan(scores[name]) for name in ("length", "optimal_length", "gap"))


def test_exact_labels_are_perfect_answers():
    hulls, tours = ConvexHullDataset(3, 9, 50), TSPDataset(3, 9, 50)
    labels = [row["labels"] for row in hulls]
    scores = hull_scores(labels, labels, [row["input_values"] for row in hulls])
    assert scores == {"accuracy": 1.0, "area_coverage": 1.0, "simple": 1.0, "area_fail": 0.0}
    labels = [row["labels"] for row in tours]
    scores = tour_scores(labels, labels, tours.points)  # padded to 9 points
    assert (scores["valid"], scores["gap"]) == (1.0, 0.0)
    assert scores["length"] == scores["optimal_length"] > 0
    labels = [row["labels"] for row in DelaunayDataset(3, 9, 50)]
    assert triangulation_scores(labels, labels) == {"accuracy": 1.0, "triangle_coverage": 1.0}


def test_no_polygon_inside_covers_more_than_the_hull():
    data = ConvexHullDataset(5, 9, 100)
    inner = [row["labels"][[0, 1, -2, -1]] for row in data]  # the first two corners and back: two corners only
    triangles_ = [row["labels"][[0, 1, 2, 0, -1]] for row in data]  # the first three corners
    points, labels = [row["input_values"] for row in data], [row["labels"] for row in data]
    assert hull_scores(inner, labels, points)["simple"] == 0
    scores = hull_scores(triangles_, labels, points)
    assert scores["simple"] == 1.0
    assert 0 < scores["area_coverage"] < 1
    assert scores["accuracy"] == np.mean([len(row) == 5 for row in labels])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hull_scores([[1]], [], []), r"predictions \(1\), references \(0\) and points \(0\) must be equally"),
        (
            lambda: tour_scores([[1]], [[1]], []),
            r"predictions \(1\), references \(1\) and points \(0\) must be equally",
        ),
        (lambda: triangulation_scores([[1]], []), r"predictions \(1\) and references \(0\) must be equally many"),
        (lambda: hull_scores([], [], []), "references must hold at least one row"),
        (lambda: tour_scores([], [], []), "references must hold at least one row"),
        (lambda: triangulation_scores([], []), "references must hold at least one row"),
        (
            lambda: triangulation_scores([[1]], [[1, 2, 3, 4]]),
            r"references\[0\] holds 4 ids, but must hold 3 for each",
        ),
        (lambda: triangulation_scores([[1]], [[0]]), r"references\[0\] holds 0 ids"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ROWS = {"predictions": [[0, 1, 2, 3, 4, 0], [3, 1, 2, 0]], "references": [[1, 2, 3, 4, 0], [1, 2, 3, 4, 0]]}
TRIPLES = {"predictions": [[0, 3, 2, 1, 0], [1, 3, 4]], "references": [[1, 2, 3, 0], [1, 2, 3, 1, 3, 4, 0]]}
PLACES = [SQUARE[:4], SQUARE[:4]]


def test_evaluate_modules_stand_alone(tmp_path):
    cases = [
        (hull_measures, ROWS | {"points": PLACES}, hull_scores(*ROWS.values(), PLACES)),
        (tour_measures, ROWS | {"points": PLACES}, tour_scores(*ROWS.values(), PLACES)),
        (triangulation_measures, TRIPLES, triangulation_scores(*TRIPLES.values())),
    ]
    jobs = [(Path(module.__file__).parent, [call]) for module, call, _ in cases]
    assert compute_all(jobs, tmp_path) == [[pytest.approx(expected)] for _, _, expected in cases]
