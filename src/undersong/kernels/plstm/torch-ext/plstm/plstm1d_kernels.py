"""Kernels of the recurrence on sequences whose transitions are numbers: forward, states, and gradients of tokens.

Inside a chunk let P_ij be the product of T_r over j < r < i, a_i that over r < i, e_j that over r > j, and t that of
all; C is the state before the chunk (pLSTM, arXiv 2506.11997, section 3):

    G_ij = m_i P_ij s_j for j < i, d_i for j = i
    y_i = scale (sum_j G_ij (q_i . k_j) v_j + m_i a_i q_i C),      C <- t C + sum_j e_j s_j k_j v_j^T

Products are scans, not differences of logarithms: T may have any sign and be zero, and has a gradient there.
"""

import triton
import triton.language as tl

# Arguments whose value must not lead to another compiled kernel.
RUNTIME = ["length", "n_chunks", "n_heads", "mask_b", "mask_t"]


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _recur(a, b, c, d):
    """x -> c (a x + b) + d, what two steps x -> a x + b make of x."""
    return a * c, c * b + d


@triton.jit
def gate(ptr, strides, row, head, place, live, other):
    """One number of each of some tokens, in float32."""
    at = ptr + row * strides[0] + place * strides[1] + head * strides[2]
    return tl.load(at, mask=live, other=other).to(tl.float32)


@triton.jit
def alive(mask_ptr, mask_b, mask_t, row, place, length):
    """Which of the positions hold a token."""
    live = (place >= 0) & (place < length)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row * mask_b + place * mask_t, mask=live, other=0) != 0)
    return live


@triton.jit
def tile(ptr, strides, row, head, place, d, live, size):
    """Rows of tokens and columns d of one head; zeros where there is no token, whatever stands there."""
    at = ptr + row * strides[0] + head * strides[2] + place[:, None] * strides[1] + d[None, :] * strides[3]
    return tl.load(at, mask=live[:, None] & (d < size)[None, :], other=0.0)


@triton.jit
def products(i, before):
    """P, [i, j] = the product of T_r over j < r < i, from before_i = T_{i-1}."""
    return tl.associative_scan(tl.where(i[:, None] - 1 > i[None, :], before[:, None], 1.0), 0, _multiply)


@triton.jit
def from_begin(before):
    """a, the product of all T_r with r < i, from before_i = T_{i-1}, which is 1 for the first."""
    return tl.associative_scan(before, 0, _multiply)


@triton.jit
def to_end(after):
    """e, the product of all T_r with r > i, from after_i = T_{i+1}, which is 1 for the last."""
    return tl.associative_scan(after, 0, _multiply, reverse=True)


@triton.jit
def state_tile(ptr, number, k, v, key_dim: tl.constexpr, value_dim: tl.constexpr):
    """Pointers to a tile of state `number` of contiguous ones, and what of it lies inside."""
    inside = (k < key_dim)[:, None] & (v < value_dim)[None, :]
    return ptr + number.to(tl.int64) * (key_dim * value_dim) + k[:, None] * value_dim + v[None, :], inside


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr, k_ptr, v_ptr, s_ptr, t_ptr, m_ptr, d_ptr, c0_ptr, mask_ptr, y_ptr, c1_ptr,
    length, n_chunks, n_heads, scale, q_strides, k_strides, v_strides, s_strides, t_strides, m_strides, d_strides,
    mask_b, mask_t, key_dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program walks the chunks of one row, head and block of value_dim, its state in registers."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks % n_heads).to(tl.int64)
    row = (pid // (n_blocks * n_heads)).to(tl.int64)
    i = tl.arange(0, CHUNK)
    k_at = tl.arange(0, BLOCK_K)
    v_at = block * BLOCK_V + tl.arange(0, BLOCK_V)
    number = row * n_heads + head
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if c0_ptr is not None:
        at, inside = state_tile(c0_ptr, number, k_at, v_at, key_dim, value_dim)
        state = tl.load(at, mask=inside, other=0.0)
    for chunk in range(n_chunks):
        place = chunk * CHUNK + i
        live = alive(mask_ptr, mask_b, mask_t, row, place, length)
        q = tile(q_ptr, q_strides, row, head, place, k_at, live, key_dim).to(DOT)
        k = tile(k_ptr, k_strides, row, head, place, k_at, live, key_dim).to(DOT)
        v = tile(v_ptr, v_strides, row, head, place, v_at, live, value_dim).to(DOT)
        source = gate(s_ptr, s_strides, row, head, place, live, 0.0)
        mark = gate(m_ptr, m_strides, row, head, place, live, 0.0) * scale
        direct = gate(d_ptr, d_strides, row, head, place, live, 0.0) * scale
        lives = alive(mask_ptr, mask_b, mask_t, row, place - 1, length) & (i > 0)
        before = gate(t_ptr, t_strides, row, head, place - 1, lives, 1.0)
        lives = alive(mask_ptr, mask_b, mask_t, row, place + 1, length) & (i < CHUNK - 1)
        end = to_end(gate(t_ptr, t_strides, row, head, place + 1, lives, 1.0))
        first = gate(t_ptr, t_strides, row, head, place, live & (i == 0), 1.0)
        total = tl.sum(tl.where(i == 0, end * first, 0.0), 0)

        weights = mark[:, None] * products(i, before) * source[None, :]
        weights = tl.where(i[:, None] > i[None, :], weights, 0.0)
        weights = tl.where(i[:, None] == i[None, :], direct[:, None], weights)
        weights *= tl.dot(q, tl.trans(k), input_precision=PRECISION)
        y = tl.dot(q, state.to(DOT), input_precision=PRECISION) * (mark * from_begin(before))[:, None]
        y = tl.dot(weights.to(DOT), v, acc=y, input_precision=PRECISION)
        written = (k.to(tl.float32) * (end * source)[:, None]).to(DOT)
        state = tl.dot(tl.trans(written), v, acc=state * total, input_precision=PRECISION)
        at = y_ptr + ((row * length + place) * n_heads + head)[:, None] * value_dim + v_at[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(place < length)[:, None] & (v_at < value_dim)[None, :])
    at, inside = state_tile(c1_ptr, number, k_at, v_at, key_dim, value_dim)
    tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def states(
    q_ptr, k_ptr, v_ptr, s_ptr, t_ptr, m_ptr, dy_ptr, c0_ptr, g1_ptr, mask_ptr, c_ptr, g_ptr, g0_ptr,
    length, n_chunks, n_heads, n_forward, scale, q_strides, k_strides, v_strides, s_strides, t_strides, m_strides,
    dy_strides, mask_b, mask_t, key_dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The states before all chunks (the first programs), or the gradients of those after them (the rest).

    The second walks back: g before a chunk = t g + sum_i scale m_i a_i q_i dy_i^T.
    """
    pid = tl.program_id(0)
    back = pid >= n_forward
    pid = pid % n_forward
    block = pid % n_blocks
    head = (pid // n_blocks % n_heads).to(tl.int64)
    row = (pid // (n_blocks * n_heads)).to(tl.int64)
    i = tl.arange(0, CHUNK)
    k_at = tl.arange(0, BLOCK_K)
    v_at = block * BLOCK_V + tl.arange(0, BLOCK_V)
    number = row * n_heads + head
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if c0_ptr is not None:  # noqa: SIM102 - a constant: no code without it
        if not back:
            at, inside = state_tile(c0_ptr, number, k_at, v_at, key_dim, value_dim)
            state = tl.load(at, mask=inside, other=0.0)
    if g1_ptr is not None:  # noqa: SIM102
        if back:
            at, inside = state_tile(g1_ptr, number, k_at, v_at, key_dim, value_dim)
            state = tl.load(at, mask=inside, other=0.0)
    for step in range(n_chunks):
        chunk = step
        if back:
            chunk = n_chunks - 1 - step
        place = chunk * CHUNK + i
        live = alive(mask_ptr, mask_b, mask_t, row, place, length)
        lives = alive(mask_ptr, mask_b, mask_t, row, place + 1, length) & (i < CHUNK - 1)
        end = to_end(gate(t_ptr, t_strides, row, head, place + 1, lives, 1.0))
        first = gate(t_ptr, t_strides, row, head, place, live & (i == 0), 1.0)
        total = tl.sum(tl.where(i == 0, end * first, 0.0), 0)
        if back:
            lives = alive(mask_ptr, mask_b, mask_t, row, place - 1, length) & (i > 0)
            begin = from_begin(gate(t_ptr, t_strides, row, head, place - 1, lives, 1.0))
            weight = gate(m_ptr, m_strides, row, head, place, live, 0.0) * begin * scale
            keys = tile(q_ptr, q_strides, row, head, place, k_at, live, key_dim).to(DOT)
            values = tile(dy_ptr, dy_strides, row, head, place, v_at, live, value_dim).to(DOT)
            into = g_ptr
        else:
            weight = gate(s_ptr, s_strides, row, head, place, live, 0.0) * end
            keys = tile(k_ptr, k_strides, row, head, place, k_at, live, key_dim).to(DOT)
            values = tile(v_ptr, v_strides, row, head, place, v_at, live, value_dim).to(DOT)
            into = c_ptr
        at, inside = state_tile(into, (row * n_chunks + chunk) * n_heads + head, k_at, v_at, key_dim, value_dim)
        tl.store(at, state.to(c_ptr.dtype.element_ty), mask=inside)
        written = (keys.to(tl.float32) * weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(written), values, acc=state * total, input_precision=PRECISION)
    if g0_ptr is not None:  # noqa: SIM102
        if back:
            at, inside = state_tile(g0_ptr, number, k_at, v_at, key_dim, value_dim)
            tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def tokens(
    q_ptr, k_ptr, v_ptr, s_ptr, t_ptr, m_ptr, d_ptr, dy_ptr, mask_ptr, c_ptr, g_ptr,
    dq_ptr, dk_ptr, dv_ptr, ds_ptr, dt_ptr, dm_ptr, dd_ptr,
    length, n_chunks, n_heads, scale, q_strides, k_strides, v_strides, s_strides, t_strides, m_strides, d_strides,
    dy_strides, mask_b, mask_t, key_dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of one chunk and head, from the state C before it and the gradient g of that after it.

    With X_ij = dP_ij + T_i X_{i+1,j}, what P_ij and everything that it is a factor of brings, T_r gets the sum of
    X_{r+1,j} P_rj over j < r; the state before the chunk is one more j, the state after it one more i.
    """
    pid = tl.program_id(0)
    head = (pid % n_heads).to(tl.int64)
    chunk = pid // n_heads % n_chunks
    row = (pid // (n_heads * n_chunks)).to(tl.int64)
    i = tl.arange(0, CHUNK)
    k_at = tl.arange(0, BLOCK_K)
    place = chunk * CHUNK + i
    live = alive(mask_ptr, mask_b, mask_t, row, place, length)
    q = tile(q_ptr, q_strides, row, head, place, k_at, live, key_dim).to(DOT)
    k = tile(k_ptr, k_strides, row, head, place, k_at, live, key_dim).to(DOT)
    source = gate(s_ptr, s_strides, row, head, place, live, 0.0)
    mark = gate(m_ptr, m_strides, row, head, place, live, 0.0)
    direct = gate(d_ptr, d_strides, row, head, place, live, 0.0)
    here = gate(t_ptr, t_strides, row, head, place, live, 1.0)
    lives = alive(mask_ptr, mask_b, mask_t, row, place - 1, length) & (i > 0)
    before = gate(t_ptr, t_strides, row, head, place - 1, lives, 1.0)
    lives = alive(mask_ptr, mask_b, mask_t, row, place - 2, length) & (i > 1)
    twice = gate(t_ptr, t_strides, row, head, place - 2, lives, 1.0)
    lives = alive(mask_ptr, mask_b, mask_t, row, place + 1, length) & (i < CHUNK - 1)
    end = to_end(gate(t_ptr, t_strides, row, head, place + 1, lives, 1.0))
    begin = from_begin(before)

    lower = i[:, None] > i[None, :]
    P = tl.where(lower, products(i, before), 0.0)
    match = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    G = tl.where(i[:, None] == i[None, :], direct[:, None], mark[:, None] * P * source[None, :])
    weights = (G * match).to(DOT)
    d_weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    through = 0.0
    number = (row * n_chunks + chunk) * n_heads + head
    kept = end * source
    cell = (row * length + place) * n_heads + head
    for block in range(n_blocks):
        v_at = block * BLOCK_V + tl.arange(0, BLOCK_V)
        v = tile(v_ptr, v_strides, row, head, place, v_at, live, value_dim).to(DOT)
        dy = tile(dy_ptr, dy_strides, row, head, place, v_at, live, value_dim).to(DOT)
        at, inside = state_tile(c_ptr, number, k_at, v_at, key_dim, value_dim)
        C = tl.load(at, mask=inside, other=0.0)
        at, inside = state_tile(g_ptr, number, k_at, v_at, key_dim, value_dim)
        g = tl.load(at, mask=inside, other=0.0)
        through += tl.sum(tl.sum(C.to(tl.float32) * g.to(tl.float32), 1), 0)
        d_weights = tl.dot(dy, tl.trans(v), acc=d_weights, input_precision=PRECISION)
        dq = tl.dot(dy, tl.trans(C), acc=dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(g), acc=dk, input_precision=PRECISION)
        dv = tl.dot(k, g, input_precision=PRECISION) * kept[:, None]
        dv = tl.dot(tl.trans(weights), dy, acc=dv, input_precision=PRECISION)
        inside = (place < length)[:, None] & (v_at < value_dim)[None, :]
        tl.store(dv_ptr + cell[:, None] * value_dim + v_at[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)

    read = tl.sum(q.to(tl.float32) * dq, 1) * scale
    wrote = tl.sum(k.to(tl.float32) * dk, 1)
    d_match = (d_weights * G * scale).to(DOT)
    dq = tl.dot(d_match, k, acc=dq * (scale * mark * begin)[:, None], input_precision=PRECISION)
    dk = tl.dot(tl.trans(d_match), q, acc=dk * kept[:, None], input_precision=PRECISION)
    inside = (place < length)[:, None] & (k_at < key_dim)[None, :]
    tl.store(dq_ptr + cell[:, None] * key_dim + k_at[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + cell[:, None] * key_dim + k_at[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside)

    dG = d_weights * match
    dd = tl.sum(tl.where(i[:, None] == i[None, :], dG, 0.0), 1)
    dG = tl.where(lower, dG, 0.0)
    dm = tl.sum(dG * P * source[None, :], 1) + begin * read
    ds = tl.sum(dG * P * mark[:, None], 0) + end * wrote
    tl.store(dm_ptr + cell, dm, mask=live)
    tl.store(ds_ptr + cell, ds, mask=live)
    tl.store(dd_ptr + cell, dd, mask=live)

    # the last row of X takes in what e_j brings, times T_last; for the state before the chunk, a and t do the same
    last = i == CHUNK - 1
    of_end = source * wrote
    dP = dG * mark[:, None] * source[None, :]
    dP += tl.where(last[:, None], here[:, None] * of_end[None, :], 0.0)
    factor = tl.where(last, 0.0, here)
    _, X = tl.associative_scan((tl.broadcast_to(factor[:, None], (CHUNK, CHUNK)), dP), 0, _recur, reverse=True)
    shorter = tl.associative_scan(tl.where(i[:, None] - 2 > i[None, :], twice[:, None], 1.0), 0, _multiply)
    d_before = tl.sum(tl.where(i[:, None] - 1 > i[None, :], X * shorter, 0.0), 1)  # row i: of T_{i-1}
    of_begin = mark * read + tl.where(last, here * through, 0.0)
    _, x = tl.associative_scan((factor, of_begin), 0, _recur, reverse=True)
    d_before += x * from_begin(twice)
    lives = alive(mask_ptr, mask_b, mask_t, row, place - 1, length) & (i > 0)
    tl.store(dt_ptr + cell - n_heads, d_before, mask=lives)
    d_last = tl.sum(tl.where(last[:, None], P * of_end[None, :], 0.0), 1) + begin * through
    tl.store(dt_ptr + cell, d_last, mask=live & last)
