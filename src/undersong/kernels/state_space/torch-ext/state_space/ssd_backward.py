"""SSD backward kernels: gradients of tokens, one program for a chunk and head; and of B and C, some heads a program.

With h the state before the chunk, g the gradient of the state after it, e_i = exp2(a_i), f_j = exp2(a_end - a_j),
L_ij = exp2(a_i - a_j) for j <= i, and written tokens w_j = dt_j x_j:

    dw_j = sum_i (C_i . B_j) L_ij dy_i + f_j g B_j             dx_j = dt_j dw_j + D dy_j
    dB_j = sum_i m_ij C_i + f_j g^T w_j                         dC_i = sum_j m_ij B_j + e_i h^T dy_i
    m_ij = sum over heads of (dy_i . w_j) L_ij

The log decay of token t gets everything that passes over it: pairs j < t <= i, reads of h by i >= t, what j < t keep
for the chunk's end, and h itself; `steps_backward` adds these up. Heads share m, so that dB and dC take two matrix
products with it a program. Matrices over pairs are laid out [j, i], as dw and dB need them.
"""

import triton
import triton.language as tl

from .ssd_common import RUNTIME, chunk_at, silu, state_tile, steps_at, tile, tokens_at


@triton.jit
def diagonal(matrix, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    return tl.sum(tl.where(i[:, None] == i[None, :], matrix, 0.0), 1)


@triton.jit
def decays(a, t):
    """L, [j, i]: from token j to token i."""
    return tl.exp2(tl.where(t[:, None] <= t[None, :], a[None, :] - a[:, None], float("-inf")))


@triton.jit(do_not_specialize=RUNTIME)
def backward_tokens(
    x_ptr, steps_ptr, B_ptr, C_ptr, D_ptr, z_ptr, mask_ptr, table_ptr, h_ptr, g_ptr, dy_ptr,
    dx_ptr, dsteps_ptr, dz_ptr, dD_ptr,
    length, n_chunks, x_strides, B_strides, C_strides, D_strides, z_strides, mask_b, mask_t, dy_strides,
    n_heads, group_heads, head_dim: tl.constexpr, n_state: tl.constexpr,
    n_blocks: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = tl.bfloat16 if tl.float16 == DOT else DOT  # float16 could overflow
    pid = tl.program_id(0)
    head = (pid // n_blocks) % n_heads
    chunk = pid // (n_blocks * n_heads)
    row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
    t = tl.arange(0, CHUNK)
    p = (pid % n_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
    B = tile(B_ptr, B_strides, row, begin, head // group_heads, t, n, live, n_state).to(DOT)
    C = tile(C_ptr, C_strides, row, begin, head // group_heads, t, n, live, n_state).to(DOT)
    x = tile(x_ptr, x_strides, row, begin, head, t, p, live, head_dim).to(DOT)
    dy = tile(dy_ptr, dy_strides, row, begin, head, t, p, live, head_dim)
    h_at, in_state = state_tile(h_ptr, chunk * n_heads + head, p, n, head_dim, n_state)
    g_at, in_state = state_tile(g_ptr, chunk * n_heads + head, p, n, head_dim, n_state)
    h = tl.load(h_at, mask=in_state, other=0.0)
    g = tl.load(g_at, mask=in_state, other=0.0)
    dt, a, total = steps_at(steps_ptr, chunk * n_heads + head, t, CHUNK)
    tile_base = ((row * length + begin) * n_heads + head) * head_dim
    cells = t[:, None] * (n_heads * head_dim) + p[None, :]
    in_cells = (begin + t < end)[:, None] & (p < head_dim)[None, :]
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=p < head_dim, other=0.0).to(tl.float32)

    # One product after the other, each used up before the next: registers are scarce.
    through = tl.sum(diagonal(tl.dot(h, tl.trans(g), input_precision=PRECISION), BLOCK_P), 0)
    of_steps = dsteps_ptr + pid.to(tl.int64) * (4 * CHUNK + 2)
    tl.store(of_steps + 4 * CHUNK, tl.exp2(total) * through)
    read = tl.dot(C, tl.trans(h), input_precision=PRECISION) * tl.exp2(a)[:, None]  # of h, by each token
    if z_ptr is not None:
        z = tile(z_ptr, z_strides, row, begin, head, t, p, live, head_dim).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-z))
        weights = tl.dot(B, tl.trans(C), input_precision=PRECISION) * decays(a, t) * dt[:, None]
        y = tl.dot(tl.trans(weights.to(DOT)), x, acc=read, input_precision=PRECISION)
        if D_ptr is not None:
            y += D[None, :] * x.to(tl.float32)
        dz = dy.to(tl.float32) * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + tile_base + cells, dz.to(dz_ptr.dtype.element_ty), mask=in_cells)
        dy = (dy.to(tl.float32) * z * gate).to(DOT)
    later = tl.sum(dy.to(tl.float32) * read, 1)
    dy = dy.to(DOT)
    weights = tl.dot(B, tl.trans(C), input_precision=PRECISION) * decays(a, t)
    pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
    if D_ptr is not None:
        tl.store(of_steps + 4 * CHUNK + 1, tl.sum(diagonal(pairs, CHUNK), 0))
    pairs *= weights
    direct = tl.sum(pairs, 1)
    # Pairs j < t <= i pass over token t. Summed up as they are: row sums less column sums would leave rounding behind.
    earlier = tl.where(t[:, None] > t[None, :], 1.0, 0.0).to(PAIRS)
    over = tl.dot(earlier, (pairs * dt[:, None]).to(PAIRS), input_precision=PRECISION)
    over = tl.sum(tl.where(t[:, None] <= t[None, :], over, 0.0), 1)
    dw = tl.dot(B, tl.trans(g), input_precision=PRECISION) * tl.exp2(total - a)[:, None]
    kept = tl.sum(x.to(tl.float32) * dw, 1)
    dw = tl.dot(weights.to(DOT), dy, acc=dw, input_precision=PRECISION)
    dx = dt[:, None] * dw
    if D_ptr is not None:
        dx += D[None, :] * dy.to(tl.float32)
    if dD_ptr is not None:  # D has a value for each of head_dim
        dD = diagonal(tl.dot(tl.trans(dy), x, input_precision=PRECISION), BLOCK_P)
        tl.store(dD_ptr + (chunk.to(tl.int64) * n_heads + head) * head_dim + p, dD, mask=p < head_dim)
    tl.store(dx_ptr + tile_base + cells, dx.to(dx_ptr.dtype.element_ty), mask=in_cells)
    tl.store(of_steps + t, direct + kept)
    tl.store(of_steps + CHUNK + t, dt * kept)
    tl.store(of_steps + 2 * CHUNK + t, later)
    tl.store(of_steps + 3 * CHUNK + t, over)


@triton.jit(do_not_specialize=RUNTIME)
def backward_groups(
    x_ptr, steps_ptr, B_ptr, C_ptr, z_ptr, mask_ptr, table_ptr, h_ptr, g_ptr, dy_ptr, dB_ptr, dC_ptr,
    length, n_chunks, part_heads, n_parts, x_strides, B_strides, C_strides, z_strides, mask_b, mask_t, dy_strides,
    n_heads, group_heads, head_dim: tl.constexpr, n_state: tl.constexpr,
    n_blocks: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_groups = n_heads // group_heads
    part = pid % n_parts
    group = (pid // n_parts) % n_groups
    chunk = pid // (n_parts * n_groups)
    row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
    t = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
    match = tl.zeros([CHUNK, CHUNK], tl.float32)
    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    first = group * group_heads + part * part_heads
    last = tl.minimum(first + part_heads, (group + 1) * group_heads)
    for unit in tl.range(first * n_blocks, last * n_blocks, num_stages=STAGES):
        head = unit // n_blocks
        p = (unit % n_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
        x = tile(x_ptr, x_strides, row, begin, head, t, p, live, head_dim)
        dy = tile(dy_ptr, dy_strides, row, begin, head, t, p, live, head_dim)
        if z_ptr is not None:
            z = tile(z_ptr, z_strides, row, begin, head, t, p, live, head_dim).to(tl.float32)
            dy = (dy.to(tl.float32) * silu(z)).to(DOT)
        h_at, in_state = state_tile(h_ptr, chunk * n_heads + head, p, n, head_dim, n_state)
        g_at, in_state = state_tile(g_ptr, chunk * n_heads + head, p, n, head_dim, n_state)
        h = tl.load(h_at, mask=in_state, other=0.0)
        g = tl.load(g_at, mask=in_state, other=0.0)
        dt, a, total = steps_at(steps_ptr, chunk * n_heads + head, t, CHUNK)
        pairs = tl.dot(x.to(DOT), tl.trans(dy.to(DOT)), input_precision=PRECISION)
        match += pairs * decays(a, t) * dt[:, None]
        written = (x.to(tl.float32) * (dt * tl.exp2(total - a))[:, None]).to(DOT)
        dB = tl.dot(written, g, acc=dB, input_precision=PRECISION)
        read = (dy.to(tl.float32) * tl.exp2(a)[:, None]).to(DOT)
        dC = tl.dot(read, h, acc=dC, input_precision=PRECISION)

    B = tile(B_ptr, B_strides, row, begin, group, t, n, live, n_state).to(DOT)
    C = tile(C_ptr, C_strides, row, begin, group, t, n, live, n_state).to(DOT)
    match = match.to(DOT)
    dB = tl.dot(match, C, acc=dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(match), B, acc=dC, input_precision=PRECISION)
    base = (((row * length + begin) * n_groups + group) * n_parts + part) * n_state
    cells = t[:, None] * (n_groups * n_parts * n_state) + n[None, :]
    in_cells = (begin + t < end)[:, None] & (n < n_state)[None, :]
    tl.store(dB_ptr + base + cells, dB, mask=in_cells)
    tl.store(dC_ptr + base + cells, dC, mask=in_cells)
