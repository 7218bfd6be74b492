"""Convex hulls, Delaunay triangulations and round trips of random points, with exact labels.

The tasks of Vinyals et al., "Pointer Networks" (arXiv 1506.03134, section 4), in the paper's target conventions. A
label sequence names points by their place in the input, from 1, and ends in 0:

- hull: counter-clockwise from the point of lowest index, that index again at the end.
- triangulation: triples, each ascending, sorted by the x and then the y of their incenters.
- tour: from city 1, not closed; of the two directions the one whose second city is below the last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .hulls import convex_hulls
from .tours import MAX_CITIES, held_karp, lkh_tour, normal_tours
from .triangles import delaunay_triangles, incenter_order

__all__ = ["ConvexHullDataset", "DelaunayDataset", "PtrNetTextDataset", "TSPDataset"]

_CHUNK = 2048  # instances made at once, from a random stream of their own


class PointSetDataset(Dataset):
    """Point sets and the ids their labels point at, row by row as `Trainer` and `PointerDataCollator` take them.

    Attributes:
        points: `[size, n_max, 2]` float32, 0 behind a row's points.
        counts: `[size]` int64, points of each row.
        targets: `[size, length_max]` int16, label sequences as the module describes them, then -100.
    """

    def __init__(self, points: torch.Tensor, counts: torch.Tensor, targets: torch.Tensor):
        self.points, self.counts, self.targets = points, counts, targets
        self._sizes = list(zip(counts.tolist(), (targets != -100).sum(1).tolist(), strict=True))

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`{"input_values": [n, 2] float32, "labels": [length] int64 ending in 0}`."""
        count, length = self._sizes[index]
        return {"input_values": self.points[index, :count], "labels": self.targets[index, :length].long()}


class _RandomPoints(PointSetDataset):
    """Points uniform in the unit square, `n_min` to `n_max` of them with equal chance; made once, at the start."""

    task: str
    fewest: int  # points that the task makes sense of

    def __init__(self, n_min: int, n_max: int, size: int, seed: int = 0):
        if not self.fewest <= n_min <= n_max:
            raise ValueError(
                f"n_min ({n_min}) and n_max ({n_max}) must satisfy {self.fewest} <= n_min <= n_max; a {self.task} has"
                f" at least {self.fewest} points."
            )
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1.")
        chunks = [
            self._chunk(n_min, n_max, seed, begin, min(_CHUNK, size - begin)) for begin in range(0, size, _CHUNK)
        ]
        super().__init__(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*chunks, strict=True)))

    def _chunk(self, n_min, n_max, seed, begin, size):
        """Rows begin, begin + 1, ...: the same ones whatever the size of the data set."""
        counts = np.random.default_rng([seed, begin]).integers(n_min, n_max + 1, _CHUNK)[:size]
        points = np.zeros((size, n_max, 2), np.float32)
        absent = np.arange(n_max) >= counts[:, None]
        targets, open_, attempt = None, np.arange(size), 1
        while len(open_):
            drawn = np.random.default_rng([seed, begin, attempt]).random((_CHUNK, n_max, 2), np.float32)
            points[open_] = np.where(absent[open_, :, None], np.float32(0), drawn[open_])
            labels, certain = self._labels(points[open_], counts[open_])
            if targets is None:
                targets = np.empty(labels.shape, np.int16)
            targets[open_] = labels
            open_, attempt = open_[~certain], attempt + 1
        return points, counts, targets

    def save(self, path: str | Path) -> None:
        """Writes the instances to a safetensors file."""
        tensors = {"points": self.points, "counts": self.counts, "targets": self.targets}
        save_file(tensors, path, metadata={"task": self.task})

    @classmethod
    def load(cls, path: str | Path):
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds another task.
        """
        with safe_open(path, "pt") as file:
            task = (file.metadata() or {}).get("task")
            if task != cls.task:
                raise ValueError(f"{Path(path).name} holds the task {task!r}, but {cls.__name__} is {cls.task!r}.")
            data = cls.__new__(cls)
            PointSetDataset.__init__(data, *(file.get_tensor(name) for name in ("points", "counts", "targets")))
        return data

    @staticmethod
    def _labels(points, counts):
        """Labels `[batch, length_max]`, and where they are beyond doubt."""
        raise NotImplementedError


class ConvexHullDataset(_RandomPoints):
    """Convex hulls of random points. Instances with three points on a line along the hull are drawn again.

    A million instances of 5 to 10 points take some seconds.

    Args:
        n_min, n_max: points of an instance, each number with equal chance; at least 3.
        size: instances.
        seed: the same seed gives the same instances; a larger `size` continues a smaller one.

    Raises:
        ValueError: numbers out of range.

    >>> data = ConvexHullDataset(5, 10, size=100)
    >>> data[0]["input_values"].shape, data[0]["labels"]
    (torch.Size([10, 2]), tensor([1, 3, 9, 2, 7, 8, 5, 1, 0]))
    """

    task, fewest = "hull", 3

    @staticmethod
    def _labels(points, counts):
        return convex_hulls(points, counts)


class DelaunayDataset(_RandomPoints):
    """Delaunay triangulations of random points, by scipy. Instances with more than one of them are drawn again.

    Args:
        n_min, n_max: points of an instance, each number with equal chance; at least 3.
        size: instances; some thousand take a second.
        seed: the same seed gives the same instances; a larger `size` continues a smaller one.

    Raises:
        ValueError: numbers out of range.
        ImportError: scipy is missing.

    >>> labels = DelaunayDataset(4, 4, size=1)[0]["labels"]
    >>> len(labels) % 3, labels[-1]
    (1, tensor(0))
    """

    task, fewest = "triangulation", 3

    @staticmethod
    def _labels(points, counts):
        return delaunay_triangles(points, counts)


class TSPDataset(_RandomPoints):
    """Shortest round trips through random points: exact up to 12 of them (`held_karp`), by LKH beyond.

    Ten thousand instances of 10 cities take about a second, as many of 20 cities a minute.

    Args:
        n_min, n_max: points of an instance, each number with equal chance.
        size: instances.
        seed: the same seed gives the same instances; a larger `size` continues a smaller one.

    Raises:
        ValueError: numbers out of range.
        ImportError: more than 12 points and elkai is missing.

    >>> data = TSPDataset(5, 5, size=3)
    >>> sorted(data[2]["labels"].tolist())
    [0, 1, 2, 3, 4, 5]
    """

    task, fewest = "tour", 1

    @staticmethod
    def _labels(points, counts):
        labels = np.full((len(points), points.shape[1] + 1), -100)
        for n in np.unique(counts):
            rows = (counts == n).nonzero()[0]
            sets = points[rows, :n]
            tours = held_karp(sets)[0] if n <= MAX_CITIES else np.stack([lkh_tour(cities)[0] for cities in sets])
            labels[rows, :n] = tours
            labels[rows, n] = 0
        # a city twice: any order of the two is as good
        places = np.where(np.arange(points.shape[1])[:, None] < counts[:, None, None], points, np.nan)
        places = np.sort(places.astype(np.float64).view(np.complex128)[..., 0], 1)
        twice = (places[:, 1:] == places[:, :-1]).any(1)
        return labels, ~twice


class PtrNetTextDataset(PointSetDataset):
    """The text files that the authors of "Pointer Networks" released: a line `x1 y1 ... xn yn output i1 i2 ...`.

    Args:
        path: the file; ids in it count from 1.
        task: "hull", "triangulation" or "tour" brings the targets into the conventions of this module (released tours
            return to city 1, for one thing). None takes them as they stand, with a 0 at the end.

    Raises:
        ValueError: an unknown task, a file without lines, or a line that cannot be read; with its number.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    ...     _ = file.write("0.1 0.1 0.9 0.2 0.5 0.8 output 1 3 2 1\\n")
    ...     file.flush()
    ...     data = PtrNetTextDataset(file.name, task="tour")
    >>> data[0]["input_values"].shape, data[0]["labels"]
    (torch.Size([3, 2]), tensor([1, 2, 3, 0]))
    """

    def __init__(self, path: str | Path, task: str | None = None):
        if task not in (None, *_CONVENTIONS):
            raise ValueError(f"task ({task!r}) must be None or one of {', '.join(_CONVENTIONS)}.")
        path, points, targets = Path(path), [], []
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row, ids = _parse(line)
                        ids = ids if task is None else _CONVENTIONS[task](row, ids)
                    except ValueError as error:
                        raise ValueError(f"{path.name}, line {number}: {error}") from None
                    points.append(row)
                    targets.append(np.append(ids, 0))
        if not points:
            raise ValueError(f"{path.name} holds no instances; a line is 'x1 y1 ... xn yn output i1 i2 ...'.")
        super().__init__(
            pad_sequence([torch.from_numpy(row) for row in points], batch_first=True),
            torch.tensor([len(row) for row in points]),
            pad_sequence([torch.from_numpy(ids).short() for ids in targets], batch_first=True, padding_value=-100),
        )


def _parse(line):
    coordinates, word, ids = line.partition("output")
    if not word:
        raise ValueError("the word 'output' must stand between coordinates and ids.")
    points = np.array([float(number) for number in coordinates.split()], np.float32)
    if len(points) == 0 or len(points) % 2:
        raise ValueError(f"{len(points)} coordinates, but points have an x and a y each.")
    points = points.reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not finite.")
    ids = np.array([int(number) for number in ids.split()])
    if len(ids) == 0:
        raise ValueError("no ids after 'output'.")
    if ids.min() < 1 or ids.max() > len(points):
        wrong = ids[(ids < 1) | (ids > len(points))][0]
        raise ValueError(f"id {wrong} must lie in 1..{len(points)}, the line's points.")
    return points, ids


def _as_hull(points, ids):
    corners = ids[:-1] if ids[0] == ids[-1] else ids
    x, y = points[corners - 1].astype(np.float64).T
    if x @ np.roll(y, -1) < y @ np.roll(x, -1):  # clockwise: the area by the shoelace formula is negative
        corners = corners[::-1]
    corners = np.roll(corners, -corners.argmin())
    return np.append(corners, corners[0])


def _as_triangles(points, ids):
    if len(ids) % 3:
        raise ValueError(f"{len(ids)} ids after 'output', but triangles have 3 each.")
    triangles = np.sort(ids.reshape(-1, 3), 1)
    order = incenter_order(points[None], triangles[None] - 1, np.ones((1, len(triangles)), bool))
    return triangles[order[0]].reshape(-1)


def _as_tour(points, ids):
    cities = ids[:-1] if len(ids) == len(points) + 1 and ids[0] == ids[-1] else ids
    if len(set(cities.tolist())) != len(cities) or len(cities) != len(points):
        raise ValueError(f"the {len(cities)} ids after 'output' do not visit the {len(points)} cities once each.")
    return normal_tours(cities[None])[0]


_CONVENTIONS = {"hull": _as_hull, "triangulation": _as_triangles, "tour": _as_tour}
