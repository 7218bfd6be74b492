"""Forward and backward kernel, one launch each.

Forward: a program has a tile of steps and positions of one row, walks the hidden units in blocks, and sums products
with v in a register for each (step, position, unit) until the end. Backward: a program has a block of hidden units and
a chunk of steps of one row, and walks tiles. With d_tjh = g_tj (1 - z_tjh^2), of which v_h is still to be multiplied,

    dWd_t = sum_j d_tj      dWe_j = sum_t d_tj      dv = sum_tj g_tj z_tj

dWd is summed over a step's tiles in registers, dWe in the program's own part of device memory. No sum depends on the
order in which programs run.
"""

import triton
import triton.language as tl

from .units import hidden_units

_LENGTHS = ["n_steps", "n_positions", "stride_we_b", "stride_wd_b", "stride_m_b"]


@triton.jit
def positions(mask_ptr, row, j, n_positions, stride_b, stride_n, MASKED: tl.constexpr):
    """Which of the positions j there are."""
    live = j < n_positions
    if MASKED:
        live = live & (tl.load(mask_ptr + row * stride_b + j * stride_n, mask=live, other=0) != 0)
    return live


@triton.jit
def read(ptr, at, h, stride_n, stride_h, live, in_hidden):
    """Rows `at` of a [rows, hidden] matrix in float32, zeros where not live."""
    tile = ptr + at.to(tl.int64)[:, None] * stride_n + h[None, :] * stride_h
    return tl.load(tile, mask=live[:, None] & in_hidden[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_LENGTHS)
def forward(
    we_ptr, wd_ptr, v_ptr, mask_ptr, scores_ptr,
    n_steps, n_positions, n_hidden,
    stride_we_b, stride_we_n, stride_we_h, stride_wd_b, stride_wd_t, stride_wd_h, stride_v, stride_m_b, stride_m_n,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_t = tl.cdiv(n_positions, BLOCK_N), tl.cdiv(n_steps, BLOCK_T)
    pid = tl.program_id(0)
    j = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (pid // tiles_n % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = (pid // (tiles_n * tiles_t)).to(tl.int64)
    live = positions(mask_ptr, row, j, n_positions, stride_m_b, stride_m_n, MASKED)
    known = tl.minimum(t, n_steps - 1)  # a step behind the last one must not widen the tile's range
    sums = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_H], tl.float32)
    for begin in range(0, n_hidden, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        in_hidden = h < n_hidden
        a = read(we_ptr + row * stride_we_b, j, h, stride_we_n, stride_we_h, live, in_hidden)
        d = read(wd_ptr + row * stride_wd_b, known, h, stride_wd_t, stride_wd_h, known >= 0, in_hidden)
        v = tl.load(v_ptr + h * stride_v, mask=in_hidden, other=0.0).to(tl.float32)
        sums += hidden_units(a, d) * v[None, None, :]
    scores = tl.where(live[None, :], tl.sum(sums, 2), float("-inf"))
    at = (row * n_steps + t[:, None]) * n_positions + j[None, :]
    tl.store(scores_ptr + at, scores, mask=(t < n_steps)[:, None] & (j < n_positions)[None, :])


@triton.jit(do_not_specialize=[*_LENGTHS, "n_rows"])
def backward(
    we_ptr, wd_ptr, v_ptr, mask_ptr, g_ptr, dwe_ptr, dwd_ptr, dv_ptr,
    n_steps, n_positions, n_hidden, n_rows,
    stride_we_b, stride_we_n, stride_we_h, stride_wd_b, stride_wd_t, stride_wd_h, stride_v, stride_m_b, stride_m_n,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    blocks_h = tl.cdiv(n_hidden, BLOCK_H)
    pid = tl.program_id(0)
    h = (pid % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    part = (pid // blocks_h).to(tl.int64)  # of dwe [chunks, rows, positions, hidden] and dv [chunks, rows, hidden]
    row = part % n_rows
    first = (part // n_rows).to(tl.int32) * CHUNK
    in_hidden = h < n_hidden
    we_ptr += row * stride_we_b
    wd_ptr += row * stride_wd_b
    dwe_ptr += part * n_positions * n_hidden
    dwd_ptr += row * n_steps * n_hidden
    v = tl.load(v_ptr + h * stride_v, mask=in_hidden, other=0.0).to(tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for begin in range(first, tl.minimum(first + CHUNK, n_steps), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        known = tl.minimum(t, n_steps - 1)
        d = read(wd_ptr, known, h, stride_wd_t, stride_wd_h, known >= 0, in_hidden)
        dwd = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_H], tl.float32)
        for begin_n in range(0, n_positions, BLOCK_N):
            j = begin_n + tl.arange(0, BLOCK_N)
            live = positions(mask_ptr, row, j, n_positions, stride_m_b, stride_m_n, MASKED)
            a = read(we_ptr, j, h, stride_we_n, stride_we_h, live, in_hidden)
            g = tl.load(
                g_ptr + (row * n_steps + t[:, None]) * n_positions + j[None, :],
                mask=(t < n_steps)[:, None] & live[None, :], other=0.0,
            ).to(tl.float32)[:, :, None]  # fmt: skip
            z = hidden_units(a, d)
            dv += tl.sum(g * z, 0)
            inner = g * (1 - z * z)
            dwd += inner
            dwe = dwe_ptr + j[:, None] * n_hidden + h[None, :]
            here = (j < n_positions)[:, None] & in_hidden[None, :]
            before = tl.load(dwe, mask=here & (0 * j + begin > first)[:, None], other=0.0)
            tl.store(dwe, before + tl.sum(inner, 0) * v[None, :], mask=here)
        tl.store(
            dwd_ptr + t.to(tl.int64)[:, None] * n_hidden + h[None, :],
            (tl.sum(dwd, 1) * v[None, :]).to(dwd_ptr.dtype.element_ty),
            mask=(t < n_steps)[:, None] & in_hidden[None, :],
        )
        tl.debug_barrier()  # the next tile's threads read the sums of dWe that other threads wrote
    tl.store(dv_ptr + part * n_hidden + h, tl.sum(dv, 0), mask=in_hidden)
