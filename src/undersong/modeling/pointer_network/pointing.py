"""What a pointer network's decoder does with its memory, and what may be pointed at.

One additive attention serves as the output distribution, as a glimpse at the memory before pointing, and as the
attention of the baseline that has a fixed output dictionary (arXiv 1506.03134, sections 2.2 and 2.3).
"""

import torch
from torch import nn
from transformers.utils import is_tracing

from ..._compat import use_kernel_forward_from_hub
from ...ops.additive_pointer_attention import additive_pointer_attention


@use_kernel_forward_from_hub("AdditivePointerAttention")
class AdditivePointerAttention(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(self, We, Wd, v, mask=None):
        return additive_pointer_attention(We, Wd, v, mask=mask)


class PointerAttention(nn.Module):
    """u_j = v . tanh(W1 e_j + W2 d), over the memory e for every query d."""

    def __init__(self, config):
        super().__init__()
        self.key_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # W1
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # W2
        self.v = nn.Parameter(torch.empty(config.hidden_size))
        self.scores = AdditivePointerAttention()

    def forward(self, keys, queries, mask):
        """keys `[batch, n, hidden]` (`key_proj` of the memory), queries `[batch, T, hidden]` -> `[batch, T, n]`."""
        return self.scores(keys, self.query_proj(queries), self.v, mask)

    def read(self, keys, memory, queries, mask):
        """What the attention mixes from the memory `[batch, T, hidden]`, and its weights `[batch, T, n]`."""
        weights = self(keys, queries, mask).softmax(-1)
        return weights.to(memory.dtype) @ memory, weights


class Glimpse(nn.Module):
    """d' = W [d ; sum_j a_j e_j]: looks at the memory before it points ("Order Matters", arXiv 1511.06391)."""

    def __init__(self, config):
        super().__init__()
        self.attention = PointerAttention(config)
        self.out_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, keys, memory, queries, mask):
        content, weights = self.attention.read(keys, memory, queries, mask)
        return self.out_proj(torch.cat([queries, content], -1)), weights


def shape_of(encoder_outputs, *forms):
    """`(batch, n)` of the items, whichever form they come in."""
    if encoder_outputs is not None:
        if getattr(encoder_outputs, "final_state", None) is None:
            raise ValueError(
                f"encoder_outputs ({type(encoder_outputs).__name__}) must hold final_state and item_values; pass what"
                " model.get_encoder()(...) returned."
            )
        return encoder_outputs.last_hidden_state.shape[:2]
    given = [items for items in forms if items is not None]
    if not given:
        raise ValueError("items are missing; pass one of input_values, input_ids and inputs_embeds.")
    if given[0].ndim < 2:
        raise ValueError(f"items have shape {list(given[0].shape)}; pass [batch, n, ...], one entry per item.")
    return given[0].shape[:2]


def check_mask(attention_mask, shape):
    """`[batch, n]` bool from an attention mask without holes, or None if it hides nothing.

    Raises:
        ValueError: another shape, or padding between valid items.
    """
    if attention_mask is None:
        return None
    _check_mask_shape(attention_mask, shape)
    mask = attention_mask.bool()
    if is_tracing(mask):  # values cannot be looked at in a traced graph, nor while a CUDA graph is recorded
        return mask
    seen = mask.cpu()  # the one time that a device is waited for
    begins = seen & ~seen.roll(1, 1)
    begins[:, 0] = seen[:, 0]
    if (holes := begins.sum(1) > 1).any():
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask (row {row} is {seen[row].int().tolist()}) has padding between items; move it to the"
            " beginning or the end of the row."
        )
    return None if seen.all() else mask


def may_point(attention_mask, shape, device):
    """`[batch, 1 + n]` bool: the end (id 0) and every valid item (id = its column + 1)."""
    if attention_mask is None:
        return torch.ones(shape[0], 1 + shape[1], dtype=torch.bool, device=device)
    _check_mask_shape(attention_mask, shape)
    mask = attention_mask.bool()
    return torch.cat([mask.new_ones(len(mask), 1), mask], 1)


def _check_mask_shape(attention_mask, shape):
    if attention_mask.shape != torch.Size(shape):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} but the items are [batch, n] = {list(shape)};"
            " pass 1 for every item and 0 for padding."
        )


def check_ids(name, ids, valid, ignored=None):
    """Every id `[batch, T]` points at something `valid [batch, 1 + n]` (or is `ignored`); ValueError names the first
    that does not."""
    batch, size = valid.shape
    if ids.ndim != 2 or len(ids) != batch or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} ({ids.dtype}, shape {list(ids.shape)}) must be integers [batch, T] with batch {batch}; pass one"
            " row of ids for every set of items."
        )
    if is_tracing(ids):
        return
    good = (ids >= 0) & (ids < size) & valid.gather(1, ids.clamp(0, size - 1).long())
    if ignored is not None:
        good |= ids == ignored
    if not good.all():
        row, step = (~good).nonzero()[0].tolist()
        there = (valid[row].nonzero().flatten()).tolist()[1:]
        span = f"{there[0]} to {there[-1]} for its items" if there else "none, for it has no items"
        raise ValueError(
            f"{name} (row {row} has {int(ids[row, step])} at step {step}) must be ids of that row: {span}, 0 for the"
            f" end{'' if ignored is None else f', {ignored} after it'}; count items from 1."
        )


def visited_before(decoder_input_ids, size):
    """`[batch, T, size]` bool: the items (never the end) that were pointed at up to the input of every step."""
    seen = torch.nn.functional.one_hot(decoder_input_ids.long(), size).cumsum(1) > 0
    seen[..., 0] = False
    return seen


__all__ = [
    "AdditivePointerAttention",
    "Glimpse",
    "PointerAttention",
    "check_ids",
    "check_mask",
    "may_point",
    "shape_of",
    "visited_before",
]
