"""Forward: attention over the table. Backward: logits once more, a program for each block of the table.

With z_ti = scale h_t . E_i + b_i, lse_t the log-sum-exp over i, y_t the label, s the smoothing and g_t the gradient of
token t's loss,

    d loss_t / d h_t / scale = sum_i exp(z_ti - lse_t) E_i - (1 - s) E_y_t - s mean_i E_i
    d z_ti = g_t (exp(z_ti - lse_t) - (1 - s) [i = y_t] - s / N)
    dE_i = scale sum_t d z_ti h_t,     db_i = sum_t d z_ti

The first sum is what attention with values E puts out: the forward pass keeps it beside the running maximum and mass.
Every sum is made in one order, so the gradients are bit-identical from run to run.
"""

import triton
import triton.language as tl

from .common import product, rows_of, vector_of

_SIZES = ["n_tokens", "n_items", "n_each"]


@triton.jit(do_not_specialize=[*_SIZES, "scale"])
def attend(
    h_ptr, e_ptr, bias_ptr, top_ptr, mass_ptr, mixed_ptr, n_tokens, n_items, n_each, scale,
    stride_h_n, stride_h_d, stride_e_n, stride_e_d, stride_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, MIX: tl.constexpr,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of n_each items: top and mass [parts, tokens], and with MIX sum_i exp(z - top) E_i, mixed [parts, tokens, D]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h = rows_of(h_ptr, token, n_tokens, stride_h_n, stride_h_d, D, BLOCK_D, WIDE)
    top = tl.full([TOKENS], -3.4028234e38, tl.float32)  # finite: a bias may be -inf throughout a block
    mass = tl.zeros([TOKENS], tl.float32)
    mixed = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    first = tl.program_id(1) * n_each
    end = tl.minimum(first + n_each, n_items)
    for begin in tl.range(first, end, ITEMS, num_stages=STAGES):
        item = begin + tl.arange(0, ITEMS)
        e = rows_of(e_ptr, item, end, stride_e_n, stride_e_d, D, BLOCK_D, WIDE)
        z = product(h, tl.trans(e)) * scale
        if BIAS:
            z += vector_of(bias_ptr, item, end, stride_bias)[None, :]
        z = tl.where((item < end)[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        weights = tl.exp(z - higher[:, None])
        shrink = tl.exp(top - higher)
        mass = mass * shrink + tl.sum(weights, 1)
        if MIX:
            mixed = mixed * shrink[:, None] + product(weights.to(e.dtype), e)
        top = higher
    at = tl.program_id(1).to(tl.int64) * n_tokens + token
    tl.store(top_ptr + at, top, mask=token < n_tokens)
    tl.store(mass_ptr + at, mass, mask=token < n_tokens)
    if MIX:
        d = tl.arange(0, BLOCK_D)
        tl.store(mixed_ptr + at[:, None] * D + d[None, :], mixed, mask=(token < n_tokens)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=[*_SIZES, "scale", "kept", "spread"])
def table_gradient(
    h_ptr, e_ptr, bias_ptr, labels_ptr, lse_ptr, g_ptr, de_ptr, db_ptr, n_tokens, n_items, scale, kept, spread,
    stride_h_n, stride_h_d, stride_e_n, stride_e_d, stride_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    e = rows_of(e_ptr, item, n_items, stride_e_n, stride_e_d, D, BLOCK_D, WIDE)
    bias = tl.zeros([ITEMS], tl.float32)
    if BIAS:
        bias = vector_of(bias_ptr, item, n_items, stride_bias)
    de = tl.zeros([ITEMS, BLOCK_D], tl.float32)
    db = tl.zeros([ITEMS], tl.float32)
    for begin in tl.range(0, n_tokens, TOKENS, num_stages=STAGES):
        token = begin + tl.arange(0, TOKENS)
        h = rows_of(h_ptr, token, n_tokens, stride_h_n, stride_h_d, D, BLOCK_D, WIDE)
        lse = tl.load(lse_ptr + token, mask=token < n_tokens, other=float("inf"))
        g = tl.load(g_ptr + token, mask=token < n_tokens, other=0.0)
        label = tl.load(labels_ptr + token, mask=token < n_tokens, other=-1)
        z = product(e, tl.trans(h)) * scale + bias[:, None]
        p = tl.exp(z - lse[None, :]) - spread
        p = tl.where(item[:, None] == label[None, :], p - kept, p) * g[None, :]
        de += product(p.to(h.dtype), h)
        if BIAS:
            db += tl.sum(p, 1)
    d = tl.arange(0, BLOCK_D)
    at = item.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(de_ptr + at, (de * scale).to(de_ptr.dtype.element_ty), mask=(item < n_items)[:, None] & (d < D)[None, :])
    if BIAS:
        tl.store(db_ptr + item, db.to(db_ptr.dtype.element_ty), mask=item < n_items)
