"""The valid tokens of a padded batch behind each other, so that no layer of an encoder computes padding."""

import torch
from torch.nn import functional as F

from ..sequences import Packing, is_all_valid
from .flex_band import band_block_mask


class PackedRows:
    """How a padded batch of histories becomes one packed row, and back.

    Args:
        mask: `[batch, length]`, nonzero for tokens, wherever they stand; None for no padding. A row without tokens
            keeps its first position, so that every row has a first token.
        shape: `(batch, length)`.
        device: where the tables go.

    Attributes:
        packing: `Packing` whose sequences are the rows.
        starts: `[batch]` int64, the first token of every row among the packed ones.
        grid, inside: `[batch, longest]`, the packed positions of every row's tokens, and which entries are tokens;
            `grid` is None where the packed tokens are such a grid already.

    >>> rows = PackedRows(torch.tensor([[1, 1, 0], [0, 1, 0]]), (2, 3), "cpu")
    >>> rows.packing.cu_seqlens.tolist(), rows.packing.index.tolist(), rows.grid.tolist()
    ([0, 2, 3], [0, 1, 4], [[0, 1], [2, 2]])
    """

    def __init__(self, mask, shape, device):
        (batch, length), index, longest = shape, None, shape[1]
        lengths = torch.full((batch,), length, device=device)
        if mask is not None and not is_all_valid(mask.bool()):
            mask = mask.bool()
            mask = torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], 1)
            lengths, index = mask.sum(1), mask.flatten().nonzero().squeeze(1)
            longest = int(lengths.max())
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        self.packing, self.starts = Packing(offsets.int(), index), offsets[:-1]
        at = torch.arange(longest, device=device)
        self.inside = at < lengths[:, None]
        self.grid = None if index is None else (self.starts[:, None] + at).clamp(max=len(index) - 1)

        self._block_masks = {}

    def block_mask(self, half):
        """FlexAttention's mask for `half` neighbours on each side, made once for all layers."""
        if half not in self._block_masks:
            tokens = self.inside.numel() if self.packing.index is None else len(self.packing.index)
            self._block_masks[half] = band_block_mask(self.packing.cu_seqlens, tokens, half)
        return self._block_masks[half]

    def spread(self, packed):
        """`[1, tokens, dim]` -> `[batch, longest, dim]`; what is not `inside` is another row's."""
        packed = packed.squeeze(0)
        return packed.view(*self.inside.shape, -1) if self.grid is None else packed[self.grid]
