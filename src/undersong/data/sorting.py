"""Sorting numbers: the task of "Order Matters: Sequence to sequence for sets" (arXiv 1511.06391, sec. 4.3).

The input is a set, so its order means nothing; the answer names its elements from the smallest to the largest, by
their places in the input, from 1, and ends in 0, as pointer networks take it.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

__all__ = ["SortingDataset", "sorting"]


def sorting(batch: int, n: int, *, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets of `n` numbers, uniform in [0, 1], and the orders that sort them.

    Args:
        batch: how many sets.
        n: how many numbers each.
        generator: source of randomness; its device is where the tensors are made.

    Returns:
        `input_values` `[batch, n, 1]` float32 and `labels` `[batch, n + 1]` int64.

    Raises:
        ValueError: sets of no numbers.

    >>> values, labels = sorting(1, 4, generator=torch.Generator().manual_seed(0))
    >>> [round(v, 2) for v in values[0, labels[0, :-1] - 1, 0].tolist()]
    [0.09, 0.13, 0.5, 0.77]
    """
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1; there is nothing to sort.")
    device = generator.device if generator is not None else "cpu"
    values = torch.rand(batch, n, 1, generator=generator, device=device)
    labels = torch.nn.functional.pad(values.squeeze(-1).argsort(dim=1, stable=True) + 1, (0, 1))
    return values, labels


class SortingDataset(Dataset):
    """Rows `{"input_values": [n, 1] float32, "labels": [n + 1] int64}`, as `PointerDataCollator` takes them.

    Args:
        n_min, n_max: bounds of n, drawn with equal chance.
        size: number of rows, made once at the start.
        seed: of all draws.

    Raises:
        ValueError: bounds that are no range of positive numbers, or no rows.

    >>> row = SortingDataset(3, 5, size=10)[7]
    >>> len(row["input_values"]) == len(row["labels"]) - 1
    True
    """

    def __init__(self, n_min: int, n_max: int, size: int, seed: int = 0):
        if not 1 <= n_min <= n_max:
            raise ValueError(f"n_min ({n_min}) and n_max ({n_max}) must satisfy 1 <= n_min <= n_max; use 1 and 10.")
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1.")
        generator = torch.Generator().manual_seed(seed)
        self.counts = torch.randint(n_min, n_max + 1, (size,), generator=generator).tolist()
        self.values = torch.rand(size, n_max, 1, generator=generator)

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        values = self.values[index, : self.counts[index]]
        labels = torch.nn.functional.pad(values.squeeze(-1).argsort(stable=True) + 1, (0, 1))
        return {"input_values": values, "labels": labels}
