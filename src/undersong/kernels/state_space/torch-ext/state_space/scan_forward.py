"""Forward kernel of the selective scan (Mamba, arXiv 2312.00752): h_t = e^{d_t A} h_{t-1} + d_t B_t u_t in registers.

One program for one sequence and one block of channels (see scan_common.py). Tiles are copied to shared memory ahead of
their use (a pipelined loop): loads into registers would share the few counters by which a warp waits for anything, and
so be waited for at once. With SAVE, the state at the start of every WINDOW steps is kept for the backward pass.
"""

import triton
import triton.language as tl

from .scan_common import (
    LOG2E,
    alive,
    lively,
    locate,
    origin,
    pin,
    place,
    read,
    read_states,
    scale,
    silu,
    step,
    step_size,
    words,
)


@triton.jit(
    do_not_specialize=[
        "length", "blocks", "su_b", "su_t", "su_c", "sd_b", "sd_t", "sd_c", "sz_b", "sz_t", "sz_c", "sm_b", "sm_t",
    ]
)  # fmt: skip
def forward(
    u_ptr, delta_ptr, A_ptr, BC_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, mask_ptr, cu_ptr,
    y_ptr, state_ptr, saved_ptr,
    length, channels, size, per_group, blocks, groups,
    su_b: tl.int64, su_t: tl.int32, su_c: tl.int32, sd_b: tl.int64, sd_t: tl.int32, sd_c: tl.int32,
    sz_b: tl.int64, sz_t: tl.int32, sz_c: tl.int32, sm_b: tl.int64, sm_t: tl.int32,
    SOFTPLUS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr,
    U: tl.constexpr, DELTA: tl.constexpr, Z: tl.constexpr, EVEN: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sequence, row, begin, end, group, c, exists = locate(cu_ptr, length, per_group, blocks, groups, BLOCK, PACKED)
    n = tl.arange(0, STATE)
    t = tl.arange(0, TILE)
    real = (n[:, None] < size) & exists[None, :]
    skip = tl.zeros((BLOCK, 1), tl.float32)
    bias = tl.zeros((BLOCK, 1), tl.float32)
    if D_ptr is not None:
        skip += tl.load(D_ptr + c, mask=exists, other=0.0)[:, None]
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=exists, other=0.0)[:, None]
    at = (sequence * channels + c[None, :]) * size + n[:, None]
    h = tl.zeros((STATE, BLOCK), tl.float32)
    if h0_ptr is not None:
        h += tl.load(h0_ptr + at, mask=real, other=0.0)
    slot = (begin // WINDOW + sequence) if PACKED else row * tl.cdiv(length, WINDOW)
    saved_ptr += (slot * channels + c[None, :]) * size + n[:, None]
    u_ptr = origin(u_ptr, row, c, su_b, su_c, U)
    delta_ptr = origin(delta_ptr, row, c, sd_b, sd_c, DELTA)
    if z_ptr is not None:
        z_ptr = origin(z_ptr, row, c, sz_b, sz_c, Z)
    BC_ptr, stride = words(BC_ptr, row, group, length, groups, STATE)
    A = tl.load(A_ptr + c[None, :, None] * STATE + n[:, None, None], mask=exists[None, :, None], other=0.0)
    A *= LOG2E
    if begin < end:
        # The step sizes of the next tile are computed while this one is scanned, and further tiles are on their way to
        # shared memory: nothing of this depends on one another.
        i = tl.minimum(begin + t, end - 1)
        live = alive(mask_ptr, row, begin + t, end, sm_b, sm_t, MASKED)
        u = lively(read(u_ptr, i, exists, su_t, U, EVEN), live, MASKED)
        d = step_size(read(delta_ptr, i, exists, sd_t, DELTA, EVEN), bias, live, SOFTPLUS)
        d, x = pin(d, d * u)
        gate = u
        if z_ptr is not None:
            gate = silu(read(z_ptr, i, exists, sz_t, Z, EVEN))
        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            i = tl.minimum(t, end - 1 - start) if PACKED else t
            b, cc = read_states(BC_ptr + tl.cast(start, tl.int64) * stride + i[None, :] * stride + n[:, None], STATE)
            b, cc = b[:, None, :], cc[:, None, :]
            i = tl.minimum(start + TILE + t, end - 1)
            next_u = read(u_ptr, i, exists, su_t, U, EVEN)
            next_delta = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
            if z_ptr is not None:
                next_z = read(z_ptr, i, exists, sz_t, Z, EVEN)
            if SAVE:  # noqa: SIM102 (one condition is known at compile time)
                if (start - begin) % WINDOW == 0:
                    tl.store(saved_ptr, h, mask=real)
                    saved_ptr += tl.cast(channels, tl.int64) * size
            decay, X = scale(d, x, A, b)
            H = X
            for k in tl.static_range(TILE):
                h = step(decay, k, TILE) * h + step(X, k, TILE)
                H = tl.where(t[None, None, :] == k, h[:, :, None], H)
            y = tl.sum(H * cc, axis=0) + skip * u
            if z_ptr is not None:
                y = lively(y * gate, live, MASKED)
            tl.store(place(y_ptr, row, start + t, c, length, channels, U), y.to(y_ptr.dtype.element_ty),
                     mask=(start + t < end)[None, :] & exists[:, None])  # fmt: skip
            live = alive(mask_ptr, row, start + TILE + t, end, sm_b, sm_t, MASKED)
            u = lively(next_u, live, MASKED)
            d = step_size(next_delta, bias, live, SOFTPLUS)
            d, x = pin(d, d * u)
            if z_ptr is not None:
                gate = silu(next_z)
    tl.store(state_ptr + at, h, mask=real)
