"""Batches for pointer networks: rows with different numbers of items, and labels that point at these items.

A row's vocabulary is its own input: id 0 ends a sequence, ids 1..n are the positions of its n items. So padding an
input and padding a label sequence are different things: padded items are hidden by `attention_mask`, padded labels
are -100, and 0 is never a sign of padding in labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

__all__ = ["PointerDataCollator"]

_INPUTS = ("input_values", "inputs_embeds", "input_ids")


@dataclass(frozen=True)
class PointerDataCollator:
    """Pads rows `{"input_values": [n, size], "labels": [length]}` on the right into a batch.

    Instead of `input_values`, rows may hold `inputs_embeds` `[n, size]` or `input_ids` `[n]` (one id per item).
    Tensors, arrays and lists are taken; `labels` may be missing from all rows. Padded items are 0.

    Args:
        pad_to_multiple_of: rounds the number of items up, so that compiled code sees fewer shapes. Steps of `labels`
            are not rounded.

    Returns:
        When called with a list of rows: a dict with the inputs `[batch, n_max, ...]`, `attention_mask`
        `[batch, n_max]` int64 (1 for items) and `labels` `[batch, length_max]` int64, padded with -100.

    Raises:
        ValueError: when called: rows with different keys or item sizes, a row without items, labels that do not end
            in 0 or point beyond their row.

    >>> rows = [{"input_values": [[0.1, 0.2], [0.3, 0.4]], "labels": [2, 1, 0]},
    ...         {"input_values": [[0.5, 0.6]], "labels": [1, 0]}]
    >>> batch = PointerDataCollator()(rows)
    >>> batch["input_values"].shape, batch["attention_mask"].tolist(), batch["labels"].tolist()
    (torch.Size([2, 2, 2]), [[1, 1], [1, 0]], [[2, 1, 0], [1, 0, -100]])
    """

    pad_to_multiple_of: int = 1

    def __post_init__(self):
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of ({self.pad_to_multiple_of}) must be at least 1.")

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        name = _input_name(rows)
        items = [torch.as_tensor(row[name]) for row in rows]
        _check_items(name, items)
        counts = torch.tensor([len(row) for row in items])
        inputs = pad_sequence(items, batch_first=True)
        extra = -inputs.shape[1] % self.pad_to_multiple_of
        if extra:
            inputs = torch.cat([inputs, inputs.new_zeros(len(rows), extra, *inputs.shape[2:])], 1)
        mask = (torch.arange(inputs.shape[1]) < counts.unsqueeze(1)).long()
        batch = {name: inputs, "attention_mask": mask}
        if "labels" in rows[0]:
            labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
            _check_labels(labels, batch["labels"], counts)
        return batch


def _input_name(rows):
    keys = set(rows[0])
    names = [name for name in _INPUTS if name in keys]
    if len(names) != 1 or keys - {*names, "labels"}:
        raise ValueError(
            f"rows hold {', '.join(sorted(keys))}, but a row holds one of {', '.join(_INPUTS)}, and labels."
        )
    for index, row in enumerate(rows):
        if set(row) != keys:
            raise ValueError(
                f"rows[{index}] holds {', '.join(sorted(row))} but rows[0] {', '.join(sorted(keys))}; rows of a batch"
                " must hold the same."
            )
    return names[0]


def _check_items(name, items):
    for index, row in enumerate(items):
        if row.ndim == 0 or len(row) == 0:
            raise ValueError(f"rows[{index}]: {name} {list(row.shape)} must hold at least one item; drop the row.")
        if row.shape[1:] != items[0].shape[1:]:
            raise ValueError(
                f"rows[{index}]: items of {name} have shape {list(row.shape[1:])} but those of rows[0]"
                f" {list(items[0].shape[1:])}; all items of a batch must have one size."
            )


def _check_labels(rows, padded, counts):
    for index, row in enumerate(rows):
        if len(row) == 0 or row[-1] != 0:
            raise ValueError(f"rows[{index}]: labels ({row.tolist()}) must end in 0, the id that ends a sequence.")
    highest = padded.amax(1)
    if (highest > counts).any():
        index = int((highest > counts).nonzero()[0])
        raise ValueError(
            f"rows[{index}]: labels point at item {int(highest[index])} but the row has {int(counts[index])} items;"
            " ids count from 1."
        )
