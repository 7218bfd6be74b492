"""Labels sort the numbers; rows have the sizes that were asked for and depend on the seed alone."""

import pytest
import torch

from undersong.data.pointer_collator import PointerDataCollator
from undersong.data.sorting import SortingDataset, sorting


def is_sorted(values, labels):
    places = labels[:-1] - 1
    return sorted(places.tolist()) == list(range(len(values))) and (values[places, 0].diff() >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 9])
def test_labels_sort(n):
    values, labels = sorting(20, n, generator=torch.Generator().manual_seed(0))
    assert values.shape == (20, n, 1)
    assert labels.shape == (20, n + 1)
    assert (labels[:, -1] == 0).all()
    assert all(is_sorted(*row) for row in zip(values, labels, strict=True))
    assert 0 <= values.min() <= values.max() < 1


def test_rows_of_a_dataset():
    data = SortingDataset(2, 5, size=200, seed=3)
    rows = [data[index] for index in range(len(data))]
    assert {len(row["input_values"]) for row in rows} == {2, 3, 4, 5}
    assert all(is_sorted(row["input_values"], row["labels"]) and row["labels"][-1] == 0 for row in rows)
    assert torch.equal(SortingDataset(2, 5, size=200, seed=3).values, data.values)
    assert not torch.equal(SortingDataset(2, 5, size=200, seed=4).values, data.values)
    batch = PointerDataCollator()(rows[:8])
    assert (batch["labels"] == 0).sum(1).tolist() == [1] * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sorting(2, 0), r"n \(0\) must be at least 1"),
        (lambda: SortingDataset(0, 3, 5), r"n_min \(0\) and n_max \(3\) must satisfy 1 <= n_min <= n_max"),
        (lambda: SortingDataset(4, 3, 5), r"n_min \(4\) and n_max \(3\)"),
        (lambda: SortingDataset(1, 3, 0), r"size \(0\) must be at least 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
