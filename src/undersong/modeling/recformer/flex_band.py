"""The band and first-token pattern as a block mask of FlexAttention, the fused kernel that torch itself brings."""

import functools
import warnings

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def flex_band(q, k, v, block_mask, dropout_p=0.0):
    """Attention under a block mask by FlexAttention: compiled on a GPU, its dense definition on a CPU.

    Args:
        q, k, v: `[1, tokens, heads, dim]`.
        block_mask: what `band_block_mask` returned.
        dropout_p: must be 0, because FlexAttention has no dropout.

    Returns:
        `[1, tokens, heads, dim]`.

    Raises:
        ValueError: `dropout_p` is not 0.

    >>> x, mask = torch.ones(1, 5, 1, 16), band_block_mask(torch.tensor([0, 5], dtype=torch.int32), 5, half=1)
    >>> flex_band(x, x, x, mask).shape
    torch.Size([1, 5, 1, 16])
    """
    if dropout_p:
        raise ValueError(
            f"dropout_p ({dropout_p}) must be 0 because FlexAttention drops no weights; set"
            " attention_probs_dropout_prob=0.0 or attn_implementation='sdpa_band'."
        )
    flex = _compiled() if q.device.type == "cuda" else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def band_block_mask(cu_seqlens, tokens, half):
    """The `BlockMask` of packed sequences, none of them empty: `half` neighbours on each side, and the first token.

    It is made from the offsets alone, without a table of tokens x tokens. A block of queries meets the neighbouring
    blocks and the block that holds the first token of the sequence with which it begins; later sequences of the block
    begin inside it.
    """
    offsets, at = cu_seqlens.to(torch.int64), torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(offsets[1:], at, right=True)
    first = offsets[sequence]

    def mask_mod(b, h, i, j):
        near = (i - j).abs() <= half
        return (sequence[i] == sequence[j]) & (near | (j == first[i]))

    blocks = -(-tokens // BLOCK)
    number, reach = torch.arange(blocks, device=at.device), -(-half // BLOCK)
    wanted = (number[:, None] - number).abs() <= reach
    wanted = wanted | (number == (first[::BLOCK] // BLOCK)[:, None])
    order = wanted.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        wanted.sum(-1, dtype=torch.int32)[None, None],
        order[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )
