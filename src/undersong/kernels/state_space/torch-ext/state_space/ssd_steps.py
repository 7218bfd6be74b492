"""SSD step kernels: from dt to step sizes and decays before the other kernels, and its gradient behind them.

One program takes one chunk and a block of heads, so that dt is read and written along heads. Step sizes and running
sums go to [chunks, heads, 2, CHUNK]: each program of the other kernels then reads two short rows.
"""

import triton
import triton.language as tl

from .ssd_common import RUNTIME, chunk_at, tokens_at

LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of it is 0 in float32. A token's log decay stops here, or a far lower one would round off its neighbours'.
LOWEST = tl.constexpr(-150.0)


@triton.jit
def step_sizes(
    ptr, stride_b, stride_t, stride_h, bias_ptr, row, begin, t, heads, is_head, live, low, high, SOFTPLUS: tl.constexpr
):
    """dt and its slope over what came in; both 0 without a token."""
    live = live[:, None] & is_head[None, :]
    base = ptr + row * stride_b + begin * stride_t
    dt = tl.load(base + t[:, None] * stride_t + heads[None, :] * stride_h, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + heads, mask=is_head, other=0.0).to(tl.float32)[None, :]
    slope = tl.where(live, 1.0, 0.0)
    if SOFTPLUS:  # max(dt, 0) + log(1 + u); the quotient makes good what 1 + u rounds off
        u = tl.exp(-tl.abs(dt))
        above = 1.0 + u
        slope *= tl.where(dt >= 0, 1.0, u) / above
        dt = tl.maximum(dt, 0.0) + tl.where(above > 1.0, tl.log(above) * (u / tl.maximum(above - 1.0, 1e-9)), u)
    slope = tl.where((dt >= low) & (dt <= high), slope, 0.0)
    return tl.where(live, tl.minimum(tl.maximum(dt, low), high), 0.0), slope


@triton.jit(do_not_specialize=RUNTIME)
def steps(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, table_ptr, steps_ptr,
    length, n_chunks, low, high, dt_b, dt_t, dt_h, mask_b, mask_t,
    n_heads, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) // tl.cdiv(n_heads, HEADS)
    heads = tl.program_id(0) % tl.cdiv(n_heads, HEADS) * HEADS + tl.arange(0, HEADS)
    row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
    t = tl.arange(0, CHUNK)
    is_head = heads < n_heads
    live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
    dt, slope = step_sizes(
        dt_ptr, dt_b, dt_t, dt_h, bias_ptr, row, begin, t, heads, is_head, live, low, high, SOFTPLUS
    )
    rate = tl.load(A_ptr + heads, mask=is_head, other=0.0).to(tl.float32) * LOG2E
    a = tl.cumsum(tl.maximum(dt * rate[None, :], LOWEST), 0)
    at = steps_ptr + (chunk.to(tl.int64) * n_heads + heads)[None, :] * (2 * CHUNK) + t[:, None]
    tl.store(at, dt, mask=is_head[None, :])
    tl.store(at + CHUNK, a, mask=is_head[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def steps_backward(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, table_ptr, dsteps_ptr, ddt_ptr, sums_ptr,
    length, n_chunks, low, high, dt_b, dt_t, dt_h, mask_b, mask_t,
    n_heads, n_blocks: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Reads what each head and block of head_dim left in [chunks, heads, blocks, 4 * CHUNK + 2].

    The log decay of token t gets what passes over it: `later` of tokens from t on, `kept` of those before, pairs
    `over` it, and the state `through` the chunk; the step size also gets `direct`. Each chunk's sums for A, dt_bias
    and D stay apart.
    """
    chunk = tl.program_id(0) // tl.cdiv(n_heads, HEADS)
    heads = tl.program_id(0) % tl.cdiv(n_heads, HEADS) * HEADS + tl.arange(0, HEADS)
    row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
    t = tl.arange(0, CHUNK)
    is_head = heads < n_heads
    live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
    dt, slope = step_sizes(
        dt_ptr, dt_b, dt_t, dt_h, bias_ptr, row, begin, t, heads, is_head, live, low, high, SOFTPLUS
    )
    direct = tl.zeros([CHUNK, HEADS], tl.float32)
    kept = tl.zeros([CHUNK, HEADS], tl.float32)
    later = tl.zeros([CHUNK, HEADS], tl.float32)
    over = tl.zeros([CHUNK, HEADS], tl.float32)
    through = tl.zeros([HEADS], tl.float32)
    skip = tl.zeros([HEADS], tl.float32)
    for block in range(n_blocks):
        base = dsteps_ptr + ((chunk.to(tl.int64) * n_heads + heads) * n_blocks + block) * (4 * CHUNK + 2)
        at = base[None, :] + t[:, None]
        direct += tl.load(at, mask=is_head[None, :], other=0.0)
        kept += tl.load(at + CHUNK, mask=is_head[None, :], other=0.0)
        later += tl.load(at + 2 * CHUNK, mask=is_head[None, :], other=0.0)
        over += tl.load(at + 3 * CHUNK, mask=is_head[None, :], other=0.0)
        through += tl.load(base + 4 * CHUNK, mask=is_head, other=0.0)
        skip += tl.load(base + 4 * CHUNK + 1, mask=is_head, other=0.0)
    da = through[None, :] + over + tl.cumsum(later, 0, reverse=True) + (tl.cumsum(kept, 0) - kept)
    rate = tl.load(A_ptr + heads, mask=is_head, other=0.0).to(tl.float32)
    ddt = slope * (direct + rate[None, :] * da)
    of_token = ddt_ptr + ((row * length + begin + t) * n_heads)[:, None] + heads[None, :]
    tl.store(of_token, ddt.to(ddt_ptr.dtype.element_ty), mask=(begin + t < end)[:, None] & is_head[None, :])
    of_chunk = sums_ptr + chunk.to(tl.int64) * 3 * n_heads + heads
    tl.store(of_chunk, tl.sum(da * dt, 0), mask=is_head)
    tl.store(of_chunk + n_heads, tl.sum(ddt, 0), mask=is_head)
    tl.store(of_chunk + 2 * n_heads, skip, mask=is_head)
