"""Backward kernel of the selective scan: with g_t the gradient of h_t,

    g_t = C_t dy_t + e^{d_{t+1} A} g_{t+1},   dC_t = sum_c dy_t h_t,   dB_t = sum_c d_t u_t g_t,
    d(d_t u_t) = sum_n B_t g_t,   d(d_t A) = g_t e^{d_t A} h_{t-1}

A program walks the tiles of one sequence and one block of channels from the last to the first. At a window's last tile
it takes the state that the forward pass saved and walks forward through the window, once, for the states at the start
of its tiles; a tile's own states are then computed again in registers. Sums over channels leave one part for each
block, sums over time one for each sequence, added up afterwards: no atomics, the same result in every run.
"""

import triton
import triton.language as tl

from .scan_common import (
    LN2,
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
    settle,
    sigmoid,
    step,
    step_size,
    words,
)


@triton.jit
def sum_channels(ptr, x, weight, start, end, stride, size, TILE: tl.constexpr, STATE: tl.constexpr,
                 BLOCK: tl.constexpr, PRODUCT: tl.constexpr):  # fmt: skip
    """Stores sum_c x[n, c, t] weight[c, t] at ptr + (start + t) * stride + n.

    As a matrix product with the weights of all t, of which each row needs one column: tensor cores are idle otherwise.
    """
    x = tl.reshape(tl.permute(x, (2, 0, 1)), (TILE * STATE, BLOCK))
    if PRODUCT == "bf16":
        every = tl.dot(x.to(tl.bfloat16), weight.to(tl.bfloat16))  # [TILE * STATE, TILE]
    else:
        every = tl.dot(x, weight, input_precision=PRODUCT)
    row = tl.arange(0, TILE * STATE)
    time = start + row // STATE
    n = row % STATE
    at = ptr + time.to(tl.int64) * stride + n
    own = (row // STATE)[:, None] == tl.arange(0, TILE)[None, :]
    own = own & ((time < end) & (n < size))[:, None]
    tl.store(tl.broadcast_to(at[:, None], (TILE * STATE, TILE)), every, mask=own)


@triton.jit(
    do_not_specialize=[
        "length", "blocks", "su_b", "su_t", "su_c", "sd_b", "sd_t", "sd_c", "sz_b", "sz_t", "sz_c", "sy_b", "sy_t",
        "sy_c", "sm_b", "sm_t",
    ]
)  # fmt: skip
def backward(
    u_ptr, delta_ptr, A_ptr, BC_ptr, D_ptr, z_ptr, bias_ptr, mask_ptr, cu_ptr, saved_ptr, dy_ptr, dstate_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dh0_ptr,
    length, channels, size, per_group, blocks, groups,
    su_b: tl.int64, su_t: tl.int32, su_c: tl.int32, sd_b: tl.int64, sd_t: tl.int32, sd_c: tl.int32,
    sz_b: tl.int64, sz_t: tl.int32, sz_c: tl.int32, sy_b: tl.int64, sy_t: tl.int32, sy_c: tl.int32,
    sm_b: tl.int64, sm_t: tl.int32,
    SOFTPLUS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    U: tl.constexpr, DELTA: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr, EVEN: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    sequence, row, begin, end, group, c, exists = locate(cu_ptr, length, per_group, blocks, groups, BLOCK, PACKED)
    PER: tl.constexpr = WINDOW // TILE
    n = tl.arange(0, STATE)
    t = tl.arange(0, TILE)
    tile = tl.arange(0, PER)[None, None, :]
    real = (n[:, None] < size) & exists[None, :]
    skip = tl.zeros((BLOCK, 1), tl.float32)
    bias = tl.zeros((BLOCK, 1), tl.float32)
    if D_ptr is not None:
        skip += tl.load(D_ptr + c, mask=exists, other=0.0)[:, None]
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=exists, other=0.0)[:, None]
    at = (sequence * channels + c[None, :]) * size + n[:, None]
    carry = tl.zeros((STATE, BLOCK), tl.float32)  # e^{d_{t+1} A} g_{t+1}
    if dstate_ptr is not None:
        carry += tl.load(dstate_ptr + at, mask=real, other=0.0)
    dA = tl.zeros((STATE, BLOCK), tl.float32)
    dD = tl.zeros((BLOCK, TILE), tl.float32)
    dbias = tl.zeros((BLOCK, TILE), tl.float32)
    slot = (begin // WINDOW + sequence) if PACKED else row * tl.cdiv(length, WINDOW)
    saved_ptr += (slot * channels + c[None, :]) * size + n[:, None]
    # Parts of dB and dC: [blocks of a group, batch, length, groups, state]
    rows = 1 if PACKED else tl.num_programs(0) // (blocks * groups)
    part = ((((tl.program_id(0) % blocks) * rows + row) * length) * groups + group) * size
    dB_ptr += part
    dC_ptr += part
    u_ptr = origin(u_ptr, row, c, su_b, su_c, U)
    delta_ptr = origin(delta_ptr, row, c, sd_b, sd_c, DELTA)
    dy_ptr = origin(dy_ptr, row, c, sy_b, sy_c, Y)
    if z_ptr is not None:
        z_ptr = origin(z_ptr, row, c, sz_b, sz_c, Z)
    BC_ptr, stride = words(BC_ptr, row, group, length, groups, STATE)
    STATES: tl.constexpr = (STATE, BLOCK, TILE)
    A = tl.load(A_ptr + c[None, :, None] * STATE + n[:, None, None], mask=exists[None, :, None], other=0.0)
    A *= LOG2E

    tiles = tl.cdiv(tl.maximum(end - begin, 0), TILE)
    starts = tl.zeros((STATE, BLOCK, PER), tl.float32)
    if tiles > 0:
        start = begin + (tiles - 1) * TILE
        i = tl.minimum(start + t, end - 1)
        u = read(u_ptr, i, exists, su_t, U, EVEN)
        delta = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
        dy = read(dy_ptr, i, exists, sy_t, Y, EVEN)
        z = u if z_ptr is None else read(z_ptr, i, exists, sz_t, Z, EVEN)
        wide = tl.arange(0, STATE if BC_ptr.dtype.element_ty == tl.int32 else 2 * STATE)[None, :]
        touched = tl.load(BC_ptr + (i.to(tl.int64) * stride)[:, None] + wide)
        touched_u, touched_delta = u, delta
        for back in range(0, tiles):
            index = tiles - 1 - back
            start = begin + index * TILE
            k = index % PER
            # What the next window's walk forward is going to read.
            i = tl.minimum(tl.maximum(start - WINDOW, begin) + t, end - 1)
            touched = tl.load(BC_ptr + (i.to(tl.int64) * stride)[:, None] + wide)
            touched_u = read(u_ptr, i, exists, su_t, U, EVEN)
            touched_delta = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
            if (k == PER - 1) | (back == 0):
                first = start - k * TILE
                h = tl.load(saved_ptr + tl.cast(index // PER, tl.int64) * channels * size, mask=real, other=0.0)
                starts = tl.where(tile == 0, h[:, :, None], 0.0)
                i = tl.minimum(first + t, end - 1)
                v = read(u_ptr, i, exists, su_t, U, EVEN)
                w = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
                for j in range(0, k):
                    at_b = BC_ptr + tl.cast(first + j * TILE, tl.int64) * stride + t[None, None, :] * stride
                    b, _ = read_states(tl.broadcast_to(at_b + n[:, None, None], STATES), STATE)
                    i = tl.minimum(first + (j + 1) * TILE + t, end - 1)
                    next_v = read(u_ptr, i, exists, su_t, U, EVEN)
                    next_w = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
                    live = alive(mask_ptr, row, first + j * TILE + t, end, sm_b, sm_t, MASKED)
                    d = step_size(w, bias, live, SOFTPLUS)
                    decay, x = scale(d, d * lively(v, live, MASKED), A, b)
                    for s in tl.static_range(TILE):
                        h = step(decay, s, TILE) * h + step(x, s, TILE)
                    starts = tl.where(tile == j + 1, h[:, :, None], starts)
                    v, w = next_v, next_w

            i = tl.minimum(t, end - 1 - start) if PACKED else t
            at_bc = BC_ptr + tl.cast(start, tl.int64) * stride + i[None, None, :] * stride + n[:, None, None]
            at_bc = tl.broadcast_to(at_bc, STATES)
            b, cc = read_states(at_bc, STATE)
            live = alive(mask_ptr, row, start + t, end, sm_b, sm_t, MASKED)
            u = lively(u, live, MASKED)
            d = step_size(delta, bias, live, SOFTPLUS)
            dy = tl.where(live[None, :], dy.to(tl.float32), 0.0)
            if z_ptr is not None:
                z = lively(z, live, MASKED)
                gate = sigmoid(z)
                dgate = dy * gate * (1 + z * (1 - gate))
                dy *= z * gate
            x2 = d * u
            d3, dy3 = pin(d, dy)
            d3, dy3 = d3[None, :, :], dy3[None, :, :]
            x3 = pin(x2, dy)[0][None, :, :]

            decay = tl.exp2(d3 * A)
            e = cc * dy3
            g = e
            for s in tl.static_range(TILE - 1, -1, -1):
                carry = step(e, s, TILE) + carry
                g = tl.where(t[None, None, :] == s, carry[:, :, None], g)
                carry = carry * step(decay, s, TILE)
            dx = tl.sum(g * b, axis=0)
            sum_channels(dB_ptr, g, x2, start, end, groups * size, size, TILE, STATE, BLOCK, PRODUCT)

            # From the cache: held until here, they would take up half of the registers.
            b, cc = read_states(at_bc, STATE)
            i = tl.minimum(tl.maximum(start - TILE, begin) + t, end - 1)
            next_u = read(u_ptr, i, exists, su_t, U, EVEN)
            next_delta = read(delta_ptr, i, exists, sd_t, DELTA, EVEN)
            next_dy = read(dy_ptr, i, exists, sy_t, Y, EVEN)
            next_z = next_u if z_ptr is None else read(z_ptr, i, exists, sz_t, Z, EVEN)
            h = tl.sum(tl.where(tile == k, starts, 0.0), axis=2)
            x = x3 * b
            kept = x  # e^{d_t A} h_{t-1}
            for s in tl.static_range(TILE):
                h = step(decay, s, TILE) * h
                kept = tl.where(t[None, None, :] == s, h[:, :, None], kept)
                h += step(x, s, TILE)
            w = g * kept
            dd = tl.sum(w * A, axis=0) * LN2 + dx * u
            dA += tl.sum(w * d3, axis=2)
            H = kept + x
            if z_ptr is not None:
                y = tl.sum(H * cc, axis=0)
            sum_channels(dC_ptr, H, dy, start, end, groups * size, size, TILE, STATE, BLOCK, PRODUCT)

            du = dx * d
            if D_ptr is not None:
                du += dy * skip
                dD += dy * u
            if SOFTPLUS:
                dd *= sigmoid(delta.to(tl.float32) + bias)
            dd = tl.where(live[None, :], dd, 0.0)
            dbias += dd
            inside = (start + t < end)[None, :] & exists[:, None]
            tl.store(
                place(du_ptr, row, start + t, c, length, channels, U), du.to(du_ptr.dtype.element_ty), mask=inside
            )
            tl.store(place(ddelta_ptr, row, start + t, c, length, channels, U),
                     dd.to(ddelta_ptr.dtype.element_ty), mask=inside)  # fmt: skip
            if z_ptr is not None:
                tl.store(place(dz_ptr, row, start + t, c, length, channels, U),
                         (dgate * (y + skip * u)).to(dz_ptr.dtype.element_ty), mask=inside)  # fmt: skip
            u, delta, dy, z = next_u, next_delta, next_dy, next_z
        settle(touched, dA_ptr, length)
        settle(touched_u, dA_ptr, length)
        settle(touched_delta, dA_ptr, length)
    tl.store(dA_ptr + at, dA, mask=real)
    if D_ptr is not None:
        tl.store(dD_ptr + sequence * channels + c, tl.sum(dD, axis=1), mask=exists)
    if bias_ptr is not None:
        tl.store(dbias_ptr + sequence * channels + c, tl.sum(dbias, axis=1), mask=exists)
    if dh0_ptr is not None:
        tl.store(dh0_ptr + at, carry, mask=real)
