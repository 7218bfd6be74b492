"""Labels against scipy, by hand, and in the paper's conventions; determinism, degenerate points, files."""

import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.spatial import ConvexHull, Delaunay

from undersong.data import geometry, hulls
from undersong.data.geometry import ConvexHullDataset, DelaunayDataset, PtrNetTextDataset, TSPDataset
from undersong.data.hulls import convex_hulls
from undersong.data.tours import held_karp
from undersong.data.triangles import delaunay_triangles

KINDS = [(ConvexHullDataset, 3, 9), (DelaunayDataset, 3, 9), (TSPDataset, 1, 9)]
NAMES = ["hull", "triangulation", "tour"]


def ids_of(row):
    """The ids of a label row, whose 0 is the last."""
    row = [int(id_) for id_ in row if id_ != -100]
    assert row[-1] == 0
    assert 0 not in row[:-1]
    return row[:-1]


def scipy_hull(points):
    corners = (ConvexHull(points).vertices + 1).tolist()  # counter-clockwise in the plane
    start = corners.index(min(corners))
    corners = corners[start:] + corners[:start]
    return [*corners, corners[0]]


def scipy_triangles(points):
    """Triples sorted by incenter, one by one."""

    def incenter(triple):
        a, b, c = points[np.array(triple) - 1]
        sides = [np.linalg.norm(b - c), np.linalg.norm(a - c), np.linalg.norm(a - b)]
        return tuple((sides[0] * a + sides[1] * b + sides[2] * c) / sum(sides))

    return sorted((tuple(sorted(t + 1)) for t in Delaunay(points).simplices), key=incenter)


@pytest.mark.parametrize("n", [3, 4, 5, 10, 50, 300])
def test_hulls_equal_scipys(n):
    points = np.random.default_rng(n).random((40, n, 2), np.float32)
    labels, certain = convex_hulls(points)
    assert certain.mean() >= 0.9
    for place, row in zip(points[certain], labels[certain], strict=True):
        assert ids_of(row) == scipy_hull(place.astype(float))


def test_hulls_of_different_sizes_in_one_batch_ignore_the_padding():
    rng = np.random.default_rng(0)
    counts = rng.integers(3, 20, 50)
    points = rng.random((50, 20, 2))
    points[np.arange(20) >= counts[:, None]] = 7.0  # outside of everything
    labels, certain = convex_hulls(points, counts)
    assert certain.all()
    assert [ids_of(row) for row in labels] == [scipy_hull(p[:n]) for p, n in zip(points, counts, strict=True)]


@pytest.mark.parametrize("n", [3, 4, 6, 10, 50])
def test_triangulations_equal_scipys_in_the_order_of_incenters(n):
    points = np.random.default_rng(n).random((30, n, 2), np.float32)
    labels, certain = delaunay_triangles(points)
    assert certain.mean() >= 0.9
    for place, row in zip(points[certain].astype(float), labels[certain], strict=True):
        assert ids_of(row) == [id_ for triple in scipy_triangles(place) for id_ in triple]


# a pentagon with a point inside: the hull begins at its lowest index, 1 (not 3, which lies lower), and closes there
PENTAGON = np.array([[1.0, 0.9], [0.5, 0.6], [0.7, 0.1], [0.0, 0.5], [0.4, 1.2], [0.2, 0.0]])


def test_the_paper_convention_for_hulls_by_hand():
    labels, certain = convex_hulls(PENTAGON[None])
    assert certain.all()
    assert labels.tolist() == [[1, 5, 4, 6, 3, 1, 0, -100]]


def test_the_paper_convention_for_triangulations_by_hand():
    # 4 sits in the triangle 1 2 3, nearest to its left side: incenters from left to right
    points = np.array([[[0.0, 0.0], [1.0, 0.1], [0.4, 1.0], [0.3, 0.3]]])
    labels, certain = delaunay_triangles(points)
    assert certain.all()
    assert labels.tolist() == [[1, 3, 4, 1, 2, 4, 2, 3, 4, 0]]


def test_every_triangle_has_an_empty_circumcircle():
    points = np.random.default_rng(5).random((20, 12, 2))
    labels, certain = delaunay_triangles(points)
    assert certain.all()
    for place, row in zip(points, labels, strict=True):
        for triple in np.array(ids_of(row)).reshape(-1, 3):
            a, b, c = place[triple - 1]
            center = np.linalg.solve(2 * np.stack([b - a, c - a]), [b @ b - a @ a, c @ c - a @ a])
            radius = np.linalg.norm(a - center)
            assert (np.linalg.norm(place - center, axis=1) >= radius * (1 - 1e-9)).all()


LINE = np.stack([np.linspace(0, 1, 6)] * 2, 1)
SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.4, 0.3], [0.6, 0.8]])


@pytest.mark.parametrize(
    ("points", "hull", "triangles"),
    [
        (PENTAGON, True, True),
        (LINE, False, False),
        (np.ones((6, 2)), False, False),
        (np.concatenate([PENTAGON[:5], PENTAGON[:1]]), False, False),  # a corner twice
        (np.concatenate([SQUARE[:4], [[0.5, 0.0], [0.5, 0.5]]]), False, False),  # a point on an edge of the hull
        (np.concatenate([SQUARE[:5], SQUARE[4:5]]), True, False),  # an inner point twice
        (np.concatenate([SQUARE, [[2.0, 0.0]]]), False, False),  # three corners on a line
        (np.concatenate([SQUARE[:4], [[3, 0.1], [3.5, 0.4]]]), True, False),  # four corners on a circle
    ],
)
def test_degenerate_points_are_declared(points, hull, triangles):
    assert convex_hulls(points[None])[1].tolist() == [hull]
    assert delaunay_triangles(points[None])[1].tolist() == [triangles]


@pytest.mark.parametrize(("kind", "n_min", "n_max"), KINDS, ids=NAMES)
def test_rows_are_what_the_labels_functions_give(kind, n_min, n_max):
    data = kind(n_min, n_max, size=60, seed=3)
    assert len(data) == 60
    assert {len(row["input_values"]) for row in data} == set(range(n_min, n_max + 1))
    for row in data:
        points, labels = row["input_values"], row["labels"]
        assert (points.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert points.shape[1] == 2
        assert points.min() >= 0
        assert points.max() < 1
        place, ids = points.numpy().astype(float), ids_of(labels)
        if kind is ConvexHullDataset:
            assert ids == scipy_hull(place)
        elif kind is DelaunayDataset:
            assert ids == [id_ for triple in scipy_triangles(place) for id_ in triple]
        else:
            assert ids == held_karp(place)[0].tolist()


@pytest.mark.parametrize(("kind", "n_min", "n_max"), KINDS, ids=NAMES)
def test_a_seed_gives_the_same_rows_and_a_larger_size_continues_a_smaller_one(kind, n_min, n_max, monkeypatch):
    monkeypatch.setattr(geometry, "_CHUNK", 16)
    large, again, small = (
        kind(n_min, n_max, 50, seed=1),
        kind(n_min, n_max, 50, seed=1),
        kind(n_min, n_max, 37, seed=1),
    )
    for index in range(50):
        for key, value in large[index].items():
            assert torch.equal(again[index][key], value)
            assert index >= 37 or torch.equal(small[index][key], value)
    other = kind(n_min, n_max, 50, seed=2)
    assert not torch.equal(other.points, large.points)
    assert len({row["input_values"][0, 0].item() for row in large}) == 50  # chunks do not repeat each other


def test_twenty_cities_come_from_lkh():
    for row in TSPDataset(13, 20, size=5, seed=0):
        ids = ids_of(row["labels"])
        assert sorted(ids) == list(range(1, len(row["input_values"]) + 1))
        assert ids[0] == 1
        assert ids[1] < ids[-1]


@pytest.mark.parametrize(("kind", "n"), [(ConvexHullDataset, 5), (DelaunayDataset, 5), (TSPDataset, 5)], ids=NAMES)
def test_degenerate_instances_are_drawn_again(kind, n, monkeypatch):
    """The first draw of every chunk is on a line (or, for tours, has a city twice); the second is not."""
    make = np.random.default_rng
    attempts = []

    class Degenerate:
        def __init__(self, seed):
            self.seed, self.rng = seed, make(seed)

        def integers(self, *args):
            return self.rng.integers(*args)

        def random(self, shape, dtype):
            attempts.append(self.seed[-1])
            points = self.rng.random(shape, dtype)
            if self.seed[-1] == 1:
                points[::2, :, 1] = points[::2, :, 0]
                points[::2, 1] = points[::2, 0]
            return points

    monkeypatch.setattr(np.random, "default_rng", Degenerate)
    data = kind(n, n, size=10, seed=0)
    assert attempts == [1, 2]
    for row in data:
        x, y = row["input_values"].T
        assert not torch.equal(x, y)


def test_hulls_are_wrapped_in_large_batches():
    calls = []
    original = hulls.convex_hulls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "convex_hulls", lambda *args: calls.append(1) or original(*args))
        ConvexHullDataset(5, 10, size=10_000)
    assert len(calls) == 5


@pytest.mark.parametrize(("kind", "n_min", "n_max"), KINDS, ids=NAMES)
def test_a_saved_data_set_comes_back(kind, n_min, n_max, tmp_path):
    data = kind(n_min, n_max, size=20)
    data.save(tmp_path / "data.safetensors")
    back = kind.load(tmp_path / "data.safetensors")
    assert type(back) is kind
    assert len(back) == 20
    for ours, theirs in zip(data, back, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("input_values", "labels"))
    with safe_open(tmp_path / "data.safetensors", "pt") as file:
        assert set(file.keys()) == {"points", "counts", "targets"}


def test_a_file_of_another_task_is_refused(tmp_path):
    TSPDataset(5, 5, size=2).save(tmp_path / "tours.safetensors")
    with pytest.raises(ValueError, match=r"tours.safetensors holds the task 'tour', but ConvexHullDataset is 'hull'"):
        ConvexHullDataset.load(tmp_path / "tours.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvexHullDataset(2, 5, 10), r"n_min \(2\) and n_max \(5\) must satisfy 3 <= n_min <= n_max; a hull"),
        (lambda: DelaunayDataset(6, 5, 10), r"n_min \(6\) and n_max \(5\) must satisfy 3 <= n_min <= n_max; a triang"),
        (lambda: TSPDataset(0, 5, 10), r"n_min \(0\) and n_max \(5\) must satisfy 1 <= n_min <= n_max; a tour"),
        (lambda: TSPDataset(5, 5, 0), r"size \(0\) must be at least 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "call"), [("scipy.spatial", lambda: DelaunayDataset(5, 5, 1)), ("elkai", lambda: TSPDataset(13, 13, 1))]
)
def test_without_the_extra_the_error_says_what_to_install(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'undersong\[geometry\]'"):
        call()


def test_hulls_and_short_tours_need_neither_scipy_nor_elkai(monkeypatch):
    for module in ("scipy", "scipy.spatial", "elkai"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(ConvexHullDataset(3, 50, 3)) == len(TSPDataset(1, 12, 3)) == 3


# --- the authors' text files

HULL_LINE = " ".join(f"{x} {y}" for x, y in PENTAGON) + " output 1 5 4 6 3 1 \n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "data.txt"
        path.write_text(text)
        return path

    return write


def test_lines_are_read_as_they_stand(file):
    data = PtrNetTextDataset(file(HULL_LINE + "\n0.5 0.25 1 0 output 2 1\n"))
    assert len(data) == 2
    torch.testing.assert_close(data[0]["input_values"].double(), torch.from_numpy(PENTAGON), atol=1e-7, rtol=0)
    assert data[0]["labels"].tolist() == [1, 5, 4, 6, 3, 1, 0]
    assert data[1]["input_values"].tolist() == [[0.5, 0.25], [1, 0]]
    assert data[1]["labels"].tolist() == [2, 1, 0]
    assert data[1]["labels"].dtype == torch.int64


@pytest.mark.parametrize("ids", ["1 5 4 6 3 1", "1 5 4 6 3", "3 6 4 5 1 3", "4 6 3 1 5 4"])
def test_hulls_are_brought_into_the_convention(ids, file):
    line = HULL_LINE.replace("1 5 4 6 3 1", ids)
    assert PtrNetTextDataset(file(line), "hull")[0]["labels"].tolist() == [1, 5, 4, 6, 3, 1, 0]


@pytest.mark.parametrize("ids", ["1 4 2 3 1", "1 4 2 3", "3 2 4 1", "4 1 3 2 4"])
def test_tours_are_brought_into_the_convention(ids, file):
    assert PtrNetTextDataset(file(f"0 0 0 1 1 1 1 0 output {ids}"), "tour")[0]["labels"].tolist() == [1, 3, 2, 4, 0]


def test_triangulations_are_brought_into_the_convention(file):
    line = "0 0 1 0.1 0.4 1 0.3 0.3 output 4 3 2 4 2 1 3 1 4"
    assert PtrNetTextDataset(file(line), "triangulation")[0]["labels"].tolist() == [1, 3, 4, 1, 2, 4, 2, 3, 4, 0]


@pytest.mark.parametrize(("kind", "n_min", "n_max"), KINDS, ids=NAMES)
def test_written_data_sets_come_back_in_the_same_convention(kind, n_min, n_max, file):
    data = kind(max(n_min, 3), n_max, size=10)
    lines = [
        " ".join(map(repr, row["input_values"].double().flatten().tolist()))
        + " output "
        + " ".join(map(str, row["labels"].tolist()[:-1]))
        for row in data
    ]
    for ours, theirs in zip(data, PtrNetTextDataset(file("\n".join(lines)), kind.task), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("input_values", "labels"))


GOOD = "0 0 1 1 output 1 2\n"


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        (GOOD + "0 0 1 1 1 2\n", None, "data.txt, line 2: the word 'output' must stand between"),
        (GOOD + "\n0 0 1 output 1\n", None, "data.txt, line 3: 3 coordinates, but points have an x and a y each"),
        ("output 1\n", None, "data.txt, line 1: 0 coordinates, but"),
        ("0 x output 1\n", None, "data.txt, line 1: could not convert string to float: 'x'"),
        ("0 nan output 1\n", None, "data.txt, line 1: a coordinate is not finite"),
        ("0 0 output\n", None, "data.txt, line 1: no ids after 'output'"),
        ("0 0 output 1.5\n", None, r"data.txt, line 1: invalid literal for int\(\) with base 10: '1.5'"),
        (GOOD * 2 + "0 0 1 1 output 1 3\n", None, "data.txt, line 3: id 3 must lie in 1..2, the line's points"),
        ("0 0 1 1 output 0 1\n", None, "data.txt, line 1: id 0 must lie in 1..2"),
        ("0 0 1 1 0 1 output 1 2 3 1\n", "triangulation", "data.txt, line 1: 4 ids after 'output', but triangles"),
        ("0 0 1 1 0 1 output 1 2 1\n", "tour", "data.txt, line 1: the 3 ids after 'output' do not visit the 3 cities"),
        ("0 0 1 1 0 1 output 1 2\n", "tour", "data.txt, line 1: the 2 ids after 'output' do not visit the 3 cities"),
        ("\n", None, "data.txt holds no instances; a line is 'x1 y1"),
        (GOOD, "tsp", r"task \('tsp'\) must be None or one of hull, triangulation, tour"),
    ],
)
def test_lines_that_cannot_be_read_are_named(text, task, message, file):
    with pytest.raises(ValueError, match=message):
        PtrNetTextDataset(file(text), task)
