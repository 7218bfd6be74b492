"""Attention within a band, with the first token of every sequence seen by all and, if asked, seeing all.

The pattern of Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1) with one global token, as Recformer
(arXiv 2305.13731) uses it: cost and memory grow with length x window. Sequences lie behind each other in one row
(`cu_seqlens`) or beside each other with padding (`mask`).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_rows, check_shape, computing_dtype, describe

BLOCK = 64  # queries that share one gathered run of keys


def band_attention(
    q,
    k,
    v,
    q_global=None,
    k_global=None,
    v_global=None,
    *,
    window,
    mask=None,
    cu_seqlens=None,
    scale=None,
    dropout_p=0.0,
    backend="auto",
):
    """Softmax attention of every position to its neighbours and to the first position of its sequence.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(scale q_i . k_j)   over valid j with |i - j| <= window / 2 or j = 0,
    o_0 = sum_j p_j v'_j,   p = softmax_j(scale q' . k'_j)     over all valid j, if q', k', v' (`*_global`) are given

    Args:
        q, k, v: `[batch, length, heads, dim]`, any float dtype.
        q_global: `[batch, heads, dim]` (`[sequences, heads, dim]` with `cu_seqlens`), the first position's query.
        k_global, v_global: `[batch, length, heads, dim]`; the three are given together or not at all.
        window: even number of neighbours, half on each side.
        mask: `[batch, length]` bool; False positions are not attended to and give 0. "The first position" is position
            0; where it is masked, nobody sees it and it gives 0.
        cu_seqlens: `[sequences + 1]` int32 offsets of sequences behind each other, batch 1.
        scale: None for `dim ** -0.5`.
        dropout_p: probability of dropping an attention weight.
        backend: "auto", "reference" or "torch"; there is no kernel. `undersong.ops.explain()` says which one ran.

    Returns:
        `[batch, length, heads, dim]` in the dtype of `q`; softmax in float32 (float64 if any input is).

    Raises:
        ValueError: shapes, dtypes or devices disagree, `window` is odd or not positive, an unknown backend.
        RuntimeError: backend="triton", which this op does not have.

    >>> q = k = torch.zeros(1, 4, 1, 1)
    >>> v = torch.tensor([4.0, 1.0, 2.0, 3.0]).view(1, 4, 1, 1)
    >>> band_attention(q, k, v, window=2).flatten()  # position 3 sees 0, 2 and 3
    tensor([2.5000, 2.3333, 2.5000, 3.0000])
    """
    _validate(q, k, v, q_global, k_global, v_global, window, mask, cu_seqlens, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return run(
        OP, backend, q, k, v, q_global, k_global, v_global, int(window), mask, cu_seqlens, scale, float(dropout_p)
    )


def reference(
    q,
    k,
    v,
    q_global=None,
    k_global=None,
    v_global=None,
    window=2,
    mask=None,
    cu_seqlens=None,
    scale=1.0,
    dropout_p=0.0,
):
    """The definition: a dense masked softmax, one sequence after the other."""
    wide = computing_dtype(q, k, v)
    rows, spans = _spans(q, mask, cu_seqlens)
    output = torch.zeros(q.shape, dtype=wide, device=q.device)
    for sequence, (row, begin, end) in enumerate(spans):
        n = end - begin
        valid = rows[row, begin:end]
        i = torch.arange(n, device=q.device)
        seen = (((i[:, None] - i).abs() <= window // 2) | (i == 0)) & valid  # [n, n], the diagonal is always in
        q_s, k_s, v_s = (x[row, begin:end].to(wide) for x in (q, k, v))
        scores = torch.einsum("ihd,jhd->hij", q_s, k_s) * scale
        o = torch.einsum("hij,jhd->ihd", _softmax(scores, seen, dropout_p), v_s)
        if q_global is not None and n:
            k_s, v_s = (x[row, begin:end].to(wide) for x in (k_global, v_global))
            scores = torch.einsum("hd,jhd->hj", q_global[sequence].to(wide), k_s) * scale
            first = torch.einsum("hj,jhd->hd", _softmax(scores, valid, dropout_p), v_s)
            o = torch.cat([first[None], o[1:]])
        output[row, begin:end] = o * valid[:, None, None]
    return output.to(q.dtype)


def _spans(q, mask, cu_seqlens):
    """Which positions count, `[batch, length]`, and (row, begin, end) of every sequence."""
    batch, length = q.shape[:2]
    rows = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
    if cu_seqlens is None:
        return rows, [(row, 0, length) for row in range(batch)]
    offsets = cu_seqlens.tolist()
    return rows, [(0, begin, end) for begin, end in zip(offsets, offsets[1:], strict=False)]


def _softmax(scores, seen, dropout_p):
    """Rows that see nothing give zeros."""
    p = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    return F.dropout(p, dropout_p) if dropout_p else p


def torch_band(
    q,
    k,
    v,
    q_global=None,
    k_global=None,
    v_global=None,
    window=2,
    mask=None,
    cu_seqlens=None,
    scale=1.0,
    dropout_p=0.0,
):
    """Blocks of queries that each lie in one sequence, against their own run of keys and the first one."""
    (batch, length, heads, dim), device = q.shape, q.device
    if cu_seqlens is None:
        starts = torch.arange(batch, device=device) * length
        lengths = torch.full_like(starts, length)
    else:
        offsets = cu_seqlens.to(device, torch.int64)
        starts, lengths = offsets[:-1], offsets.diff()
    valid = None if mask is None else mask.flatten()
    blocks = _Blocks(starts, lengths, window // 2, valid)
    q_b, k_b, v_b = (
        # rows of all heads at once: their gradients are added up by rows as well
        x.reshape(-1, heads * dim).index_select(0, index.flatten()).view(*index.shape, heads, dim).transpose(1, 2)
        for x, index in ((q, blocks.queries), (k, blocks.keys), (v, blocks.keys))
    )
    o = F.scaled_dot_product_attention(q_b, k_b, v_b, blocks.seen[:, None], dropout_p, scale=scale)
    output = o.transpose(1, 2).reshape(-1, heads * dim).index_select(0, blocks.owned).view(-1, heads, dim)
    if q_global is not None:
        some = lengths > 0
        first = _first_rows(q_global, k_global, v_global, starts, lengths, valid, scale, dropout_p)
        output = output.index_copy(0, starts[some], first[some].to(output.dtype))
    if valid is not None:
        output = output.masked_fill(~valid[:, None, None], 0.0)
    return output.view(batch, length, heads, dim)


class _Blocks:
    """Index tables of the blocks: a sequence has ceil(length / block) of them.

    queries `[blocks, block]` and keys `[blocks, 1 + block + window]` are positions in the flattened rows, the first
    key that of the sequence; `seen` `[blocks, block, keys]` says which pairs count; `owned` are the block positions
    that hold a token, in the order of the tokens.
    """

    def __init__(self, starts, lengths, half, valid):
        device = starts.device
        block = min(BLOCK, max(8, int(lengths.max())))
        counts = (lengths + block - 1) // block
        of = torch.repeat_interleave(torch.arange(len(starts), device=device), counts)  # the sequence of each block
        begin = (torch.arange(len(of), device=device) - (counts.cumsum(0) - counts)[of]) * block
        start, length = starts[of, None], lengths[of, None]

        at = begin[:, None] + torch.arange(block, device=device)
        self.owned = (at < length).flatten().nonzero().squeeze(1)
        self.queries = start + torch.minimum(at, length - 1)
        near = begin[:, None] + torch.arange(-half, block + half, device=device)
        self.keys = start + torch.cat([torch.zeros_like(start), near.clamp(min=0).minimum(length - 1)], 1)
        # the first key has a column of its own, so the band leaves it out
        inside = (near > 0) & (near < length)
        if valid is not None:
            inside = inside & valid[self.keys[:, 1:]]
        seen = ((near[:, None] - at[:, :, None]).abs() <= half) & inside[:, None]
        first = torch.ones_like(start, dtype=torch.bool) if valid is None else valid[start]
        first = first[:, :, None].expand(-1, block, 1)
        # a row that sees nothing would be NaN; it sees the first key instead, and is zeroed later
        first = first | ~seen.any(-1, keepdim=True)
        self.seen = torch.cat([first, seen], -1)


def _first_rows(q_global, k_global, v_global, starts, lengths, valid, scale, dropout_p):
    """Attention of every sequence's first position to all of it, `[sequences, heads, dim]`."""
    at = torch.arange(int(lengths.max()), device=starts.device)
    inside = at < lengths[:, None]
    index = (starts[:, None] + at).clamp(max=k_global.shape[0] * k_global.shape[1] - 1)
    if valid is not None:
        inside = inside & valid[index]
    k_s, v_s = (x.flatten(0, 1)[index].transpose(1, 2) for x in (k_global, v_global))
    scores = (q_global[:, :, None].to(k_s.dtype) @ k_s.transpose(-1, -2))[:, :, 0]
    scores = scores.to(computing_dtype(k_global)) * scale
    p = _softmax(scores, inside[:, None], dropout_p).to(v_s.dtype)
    return (p[:, :, None] @ v_s)[:, :, 0]


def _validate(q, k, v, q_global, k_global, v_global, window, mask, cu_seqlens, dropout_p):
    check_layout("q", q, "batch, length, heads, dim")
    because = f"q is {describe(q)}"
    check_shape("k", k, "batch, length, heads, dim", q.shape, because)
    check_shape("v", v, "batch, length, heads, dim", q.shape, because)
    if window != int(window) or window < 2 or window % 2:
        raise ValueError(f"window ({window}) must be an even number of at least 2, half on each side; use 64.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p ({dropout_p}) must lie in [0, 1); use 0.0 outside training.")
    sequences, what = check_rows("q", q, mask, cu_seqlens)
    given = {"q_global": q_global, "k_global": k_global, "v_global": v_global}
    if any(x is not None for x in given.values()):
        if missing := [name for name, x in given.items() if x is None]:
            raise ValueError(
                f"{missing[0]} (None) must be given with {', '.join(n for n in given if n not in missing)};"
                " pass all three, or none for a first position that sees only its band."
            )
        check_shape("q_global", q_global, f"{what}, heads, dim", (sequences, *q.shape[2:]), because)
        check_shape("k_global", k_global, "batch, length, heads, dim", q.shape, because)
        check_shape("v_global", v_global, "batch, length, heads, dim", q.shape, because)
    check_devices("q", q, {"k": k, "v": v, "mask": mask, **given})


OP = register(Op(name="band_attention", reference=reference, torch=torch_band))
