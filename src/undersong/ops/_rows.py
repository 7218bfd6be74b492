"""Padded and packed sequences as rows that end together, for ops that take whole rows of equal length.

In front of a row stand zeros; a convolution, and a recurrence that starts from zero, do not see them. So rows aligned
to the right give exactly what each sequence alone gives, and their last column holds every sequence's last token.
"""

from __future__ import annotations

import torch


def align_right(x, mask):
    """Moves the tokens of every row that are not masked to its end, in their order.

    Args:
        x: `[batch, length, channels]`, zero at masked positions.
        mask: `[batch, length]` bool.

    Returns:
        x rearranged, and `[batch, length]` int64, where each position went; `take` brings outputs back.
    """
    hidden = ~mask
    places = torch.where(mask, hidden.sum(1, keepdim=True) + mask.cumsum(1), hidden.cumsum(1)) - 1
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(places)
    return take(x, torch.empty_like(places).scatter_(1, places, positions)), places


def take(x, index):
    """x `[batch, length, channels]` at `[batch, positions]`."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def packed_rows(cu_seqlens, device):
    """The sequences of a packed row as rows aligned to the right, sequences of similar length together.

    Lengths of a group lie between two powers of two, so that padding at most doubles the work.

    Returns:
        [(sequences `[rows]`, index `[rows, width]`, valid `[rows, width]`)]: which sequences a group holds, which
        token each place takes, and whether it takes one. Empty sequences are in no group.
    """
    offsets = cu_seqlens.tolist()
    groups = {}
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if begin < end:
            groups.setdefault((end - begin - 1).bit_length(), []).append((n, begin, end))
    rows = []
    for _, members in sorted(groups.items()):
        width = max(end - begin for _, begin, end in members)
        sequences, begin, end = torch.tensor(members, device=device).unbind(1)
        index = end[:, None] - width + torch.arange(width, device=device)
        rows.append((sequences, index.clamp(min=0), index >= begin[:, None]))
    return rows
