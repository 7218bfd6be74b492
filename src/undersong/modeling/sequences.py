"""Padding and packing: the one place where a model's inputs become what the recurrent ops take.

A batch is either padded (`mask`) or packed (several sequences behind each other, state reset between them). Packing
can be said in several ways (`position_ids` that restart, `seq_idx`, `cu_seq_lens_q`); here they become one set of
offsets.
"""

from dataclasses import dataclass

import torch
from transformers.utils import is_tracing


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie, once its valid tokens are laid behind each other.

    Attributes:
        cu_seqlens: `[sequences + 1]` int32 offsets into the valid tokens.
        index: `[tokens]` int64 positions of the valid tokens in the flattened `[batch * length]`; None when all are.
    """

    cu_seqlens: torch.Tensor
    index: torch.Tensor | None

    def pack(self, x):
        """`[batch, length, ...]` -> `[1, tokens, ...]`."""
        x = x.flatten(0, 1)
        return (x if self.index is None else x[self.index]).unsqueeze(0)

    def unpack(self, x, shape):
        """`[1, tokens, ...]` -> `[batch, length, ...]` for `shape = (batch, length)`; zeros at the padding."""
        x = x.squeeze(0)
        if self.index is not None:
            x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, shape)


def local_mask(attention_mask, length):
    """The part of a 2D `attention_mask` that belongs to the current `length` positions, as bool, or None.

    `generate()` and chunked prefill pass the mask of everything so far; only its end concerns this forward.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions, but a recurrent model takes [batch, length] with 1"
            " for tokens and 0 for padding; a custom attention pattern cannot be applied to a recurrence."
        )
    if attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions but the input has {length}; pass one entry per"
            " token (of the whole sequence, or of this chunk)."
        )
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


def is_all_valid(mask):
    """Whether a mask hides nothing, where that is known without waiting for a device or breaking a traced graph."""
    return mask.device.type == "cpu" and not is_tracing(mask) and bool(mask.all())


def find_packing(shape, *, mask=None, position_ids=None, seq_idx=None, cu_seqlens=None):
    """Reads how a batch is packed, if it is.

    Args:
        shape: `(batch, length)`.
        mask: `[batch, length]` bool, False for padding.
        position_ids: `[batch, length]`; a valid token at position 0 that follows another valid token of its row starts
            a new sequence (what `DataCollatorWithFlattening` makes).
        seq_idx: `[batch, length]` integers; a new sequence starts where the number changes.
        cu_seqlens: `[sequences + 1]` offsets into a batch of one row.

    Returns:
        A `Packing`, or None when every row is one sequence.

    Raises:
        ValueError: offsets for more than one row, or `position_ids` that jump back to something other than 0.
    """
    batch, length = shape
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q describes one packed row but batch is {batch}; lay the sequences behind each other in"
                " batch 1, or give position_ids that restart at 0."
            )
        if mask is not None:
            raise ValueError(
                "attention_mask and cu_seq_lens_q exclude each other; packed rows have no padding, drop one."
            )
        return Packing(cu_seqlens.to(torch.int32), None)
    if length < 2 or (position_ids is None and seq_idx is None):
        return None
    marks = seq_idx if seq_idx is not None else position_ids
    if is_tracing(marks):  # the answer depends on the data; a traced graph takes cu_seq_lens_q instead
        return None
    marks = marks.expand(batch, length)
    valid = torch.ones(shape, dtype=torch.bool, device=marks.device) if mask is None else mask
    index = valid.flatten().nonzero().squeeze(1)
    tokens = marks.flatten()[index]
    row = torch.div(index, length, rounding_mode="floor")
    same_row = row[1:] == row[:-1]
    if seq_idx is not None:
        restart = same_row & (tokens[1:] != tokens[:-1])
    else:
        restart = same_row & (tokens[1:] == 0)
        back = same_row & ~restart & (tokens[1:] <= tokens[:-1])
        if back.any():
            at = int(back.nonzero()[0])
            raise ValueError(
                f"position_ids go from {int(tokens[at])} to {int(tokens[at + 1])} inside a row: neither the next"
                " position nor a new sequence; restart packed sequences at 0."
            )
    if not restart.any():
        return None
    starts = torch.cat(
        [index.new_zeros(1), (restart | ~same_row).nonzero().squeeze(1) + 1, index.new_tensor([len(index)])]
    )
    return Packing(starts.to(torch.int32), None if len(index) == batch * length else index)


def positions_of(shape, *, mask=None, packing=None, past=None, device=None):
    """Position of every token in its own sequence: padding does not count, packed sequences restart at 0.

    Args:
        past: `[batch]` valid tokens before this chunk, or None.

    Returns:
        `[batch, length]` int64 (`[1, length]` when the rows agree); padded positions hold an arbitrary valid number.
    """
    batch, length = shape
    if packing is not None:
        lengths = packing.cu_seqlens.long().diff()
        positions = torch.arange(int(packing.cu_seqlens[-1]), device=device) - packing.cu_seqlens[:-1].long().to(
            device
        ).repeat_interleave(lengths.to(device))
        return packing.unpack(positions.unsqueeze(0), shape)
    if mask is None:
        positions = torch.arange(length, device=device).unsqueeze(0)
    else:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return positions if past is None else positions + past.unsqueeze(1)


__all__ = ["Packing", "find_packing", "is_all_valid", "local_mask", "positions_of"]
