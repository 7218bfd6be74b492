"""The causal backward kernels. With Q_t = q_t / U_t and all sums relative to the level of a chunk,

    dq_t = (w_t do_t) / U_t                            w_t = sum_{s<=t} E_s v_s^T
    dv_s = G_s^T E_s                                   G_s = sum_{t>=s} Q_t do_t^T
    dk_s = E_s (G_s v_s - H_s)                         H_s = sum_{t>=s} Q_t dq_t

elementwise in the channels of the keys. `queries` walks forward with w, `keys` and `values` walk back with G (and H);
a level falls on the way back, so that rescaling them never grows anything. `queries` and `keys` hold a block of the
keys' channels, `values` one of the values'.
"""

import triton
import triton.language as tl

from .common import RISE, RUNTIME, finite, head_at, level_at, line, nonzero, rise, span_of, tile, tokens_at, weights


@triton.jit(do_not_specialize=RUNTIME)
def queries(
    k_ptr, v_ptr, do_ptr, mask_ptr, cu_ptr, S0_ptr, m0_ptr, u0_ptr, dq_ptr,
    length, n_chunks, n_heads, scale, k_strides, v_strides, do_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // n_blocks) % n_heads
    sequence = pid // (n_blocks * n_heads)
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    j = tl.arange(0, CHUNK)
    c = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, VALUE_DIM)
    k_base = head_at(k_ptr, k_strides, row, head)
    v_base = head_at(v_ptr, v_strides, row, head)
    do_base = head_at(do_ptr, do_strides, row, head)
    dq_base = dq_ptr + row * length * n_heads * dim + head * dim
    state = (sequence.to(tl.int64) * n_heads + head) * dim

    m = tl.full([BLOCK], float("-inf"), tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK, VALUE_DIM], tl.float32)
    if S0_ptr is not None:
        u = tl.load(u0_ptr + state + c, mask=c < dim, other=0.0)
        m = tl.where(u > 0, tl.load(m0_ptr + state + c, mask=c < dim, other=0.0), float("-inf"))
        held = (u > 0)[:, None] & (d < value_dim)[None, :]
        w = u[:, None] * tl.load(S0_ptr + (state + c)[:, None] * value_dim + d[None, :], mask=held, other=0.0)

    for first in range(begin, end, CHUNK):
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        k = tile(k_base, k_strides, first + j, c, live, dim, float("-inf"))
        high, most = rise(m, k)
        if most <= RISE:
            v = tile(v_base, v_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            do = tile(do_base, do_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            keep, E, U = weights(m, u, high, k)
            w = keep[:, None] * w
            u = keep * u + tl.sum(E, 0)
            E = E.to(DOT)
            pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            pairs = tl.where(j[:, None] >= j[None, :], pairs, 0.0).to(DOT)
            dq = tl.dot(do, tl.trans(w.to(DOT)), input_precision=PRECISION)
            dq = tl.dot(pairs, E, acc=dq, input_precision=PRECISION)
            w = tl.dot(tl.trans(E), v, acc=w, input_precision=PRECISION)
            m = high
            at = dq_base + (first + j).to(tl.int64)[:, None] * (n_heads * dim) + c[None, :]
            inside = (first + j < end)[:, None] & (c < dim)[None, :]
            tl.store(at, (dq * scale / nonzero(U)).to(dq_ptr.dtype.element_ty), mask=inside)
        else:
            for t in range(first, tl.minimum(first + CHUNK, end)):
                key = line(k_base, k_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, float("-inf"))
                value = line(v_base, v_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                upstream = line(do_base, do_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                top = tl.maximum(m, key)
                level = finite(top)
                keep, new = tl.exp(m - level), tl.exp(key - level)
                u = keep * u + new
                w = keep[:, None] * w + new[:, None] * value[None, :]
                m = top
                dq_line = tl.sum(w * upstream[None, :], 1) * scale / nonzero(u)
                at = dq_base + tl.cast(t + 0 * c, tl.int64) * (n_heads * dim) + c
                tl.store(at, dq_line.to(dq_ptr.dtype.element_ty), mask=c < dim)


@triton.jit(do_not_specialize=RUNTIME)
def keys(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, mask_ptr, cu_ptr, levels_ptr, m1_ptr, G1_ptr, H1_ptr, m0_ptr, u0_ptr,
    dk_ptr, G0_ptr, H0_ptr,
    length, n_chunks, n_heads, scale, q_strides, k_strides, v_strides, do_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // n_blocks) % n_heads
    sequence = pid // (n_blocks * n_heads)
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    j = tl.arange(0, CHUNK)
    c = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, VALUE_DIM)
    q_base = head_at(q_ptr, q_strides, row, head)
    k_base = head_at(k_ptr, k_strides, row, head)
    v_base = head_at(v_ptr, v_strides, row, head)
    do_base = head_at(do_ptr, do_strides, row, head)
    own = row * length * n_heads * dim + head * dim  # dq and dk are ours: contiguous
    state = (sequence.to(tl.int64) * n_heads + head) * dim
    cells = (state + c)[:, None] * value_dim + d[None, :]
    in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]

    above = tl.load(m1_ptr + state + c, mask=c < dim, other=float("-inf"))  # the level of G and H
    G = tl.zeros([BLOCK, VALUE_DIM], tl.float32)
    H = tl.zeros([BLOCK], tl.float32)
    if G1_ptr is not None:
        G = tl.load(G1_ptr + cells, mask=in_cells, other=0.0)
        H = tl.load(H1_ptr + state + c, mask=c < dim, other=0.0)

    n_own = tl.cdiv(end - begin, CHUNK)
    for i in range(n_own):
        number = n_own - 1 - i
        first = begin + number * CHUNK
        levels = levels_ptr + ((chunk + number) * n_heads + head) * 2 * dim
        m = tl.load(levels + c, mask=c < dim, other=float("-inf"))
        u = tl.load(levels + dim + c, mask=c < dim, other=0.0)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        k = tile(k_base, k_strides, first + j, c, live, dim, float("-inf"))
        high, most = rise(m, k)
        if most <= RISE:
            q = tile(q_base, q_strides, first + j, c, live, dim, 0.0)
            v = tile(v_base, v_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            do = tile(do_base, do_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            at = own + (first + j).to(tl.int64)[:, None] * (n_heads * dim) + c[None, :]
            inside = (first + j < end)[:, None] & (c < dim)[None, :]
            dq = tl.load(dq_ptr + at, mask=inside, other=0.0).to(tl.float32)
            keep, E, U = weights(m, u, high, k)
            q = q / nonzero(U)
            fall = tl.exp(high - finite(above))
            G = fall[:, None] * G
            H = fall * H
            passed = q * dq
            Q = (q * scale).to(DOT)
            pairs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            pairs = tl.where(j[:, None] <= j[None, :], pairs, 0.0).to(DOT)
            dk = tl.dot(v, tl.trans(G.to(DOT)), input_precision=PRECISION)
            dk = tl.dot(pairs, Q, acc=dk, input_precision=PRECISION)
            dk = E * (dk - tl.cumsum(passed, 0, reverse=True) - H[None, :])
            tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
            G = tl.dot(tl.trans(Q), do, acc=G, input_precision=PRECISION)
            H += tl.sum(passed, 0)
            above = high
        else:
            last = tl.minimum(first + CHUNK, end)
            for back in range(first, last):
                t = last - 1 - (back - first)
                top, total = level_at(m, u, k, j, t - first)
                at = own + tl.cast(t + 0 * c, tl.int64) * (n_heads * dim) + c
                query = line(q_base, q_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, 0.0) / nonzero(total)
                key = line(k_base, k_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, float("-inf"))
                value = line(v_base, v_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                upstream = line(do_base, do_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                dq_line = tl.load(dq_ptr + at, mask=c < dim, other=0.0).to(tl.float32)
                fall = tl.exp(top - finite(above))
                G = fall[:, None] * G + (query * scale)[:, None] * upstream[None, :]
                H = fall * H + query * dq_line
                dk_line = tl.exp(key - finite(top)) * (tl.sum(G * value[None, :], 1) - H)
                tl.store(dk_ptr + at, dk_line.to(dk_ptr.dtype.element_ty), mask=c < dim)
                above = top

    if G0_ptr is not None:
        u0 = tl.load(u0_ptr + state + c, mask=c < dim, other=0.0)
        m0 = tl.where(u0 > 0, tl.load(m0_ptr + state + c, mask=c < dim, other=0.0), float("-inf"))
        fall = tl.exp(m0 - finite(above))
        tl.store(G0_ptr + cells, fall[:, None] * G, mask=in_cells)
        tl.store(H0_ptr + state + c, fall * H, mask=c < dim)


@triton.jit(do_not_specialize=RUNTIME)
def values(
    q_ptr, k_ptr, do_ptr, mask_ptr, cu_ptr, levels_ptr, m1_ptr, G1_ptr, dv_ptr,
    length, n_chunks, n_heads, scale, q_strides, k_strides, do_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // n_blocks) % n_heads
    sequence = pid // (n_blocks * n_heads)
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    j = tl.arange(0, CHUNK)
    c = tl.arange(0, DIM)
    d = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    q_base = head_at(q_ptr, q_strides, row, head)
    k_base = head_at(k_ptr, k_strides, row, head)
    do_base = head_at(do_ptr, do_strides, row, head)
    dv_base = dv_ptr + row * length * n_heads * value_dim + head * value_dim
    state = (sequence.to(tl.int64) * n_heads + head) * dim

    above = tl.load(m1_ptr + state + c, mask=c < dim, other=float("-inf"))
    G = tl.zeros([DIM, BLOCK], tl.float32)
    if G1_ptr is not None:
        in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]
        G = tl.load(G1_ptr + (state + c)[:, None] * value_dim + d[None, :], mask=in_cells, other=0.0)

    n_own = tl.cdiv(end - begin, CHUNK)
    for i in range(n_own):
        number = n_own - 1 - i
        first = begin + number * CHUNK
        levels = levels_ptr + ((chunk + number) * n_heads + head) * 2 * dim
        m = tl.load(levels + c, mask=c < dim, other=float("-inf"))
        u = tl.load(levels + dim + c, mask=c < dim, other=0.0)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        k = tile(k_base, k_strides, first + j, c, live, dim, float("-inf"))
        high, most = rise(m, k)
        if most <= RISE:
            q = tile(q_base, q_strides, first + j, c, live, dim, 0.0)
            do = tile(do_base, do_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            keep, E, U = weights(m, u, high, k)
            Q = (q * scale / nonzero(U)).to(DOT)
            E = E.to(DOT)
            G = tl.exp(high - finite(above))[:, None] * G
            pairs = tl.dot(E, tl.trans(Q), input_precision=PRECISION)
            pairs = tl.where(j[:, None] <= j[None, :], pairs, 0.0).to(DOT)
            dv = tl.dot(E, G.to(DOT), input_precision=PRECISION)
            dv = tl.dot(pairs, do, acc=dv, input_precision=PRECISION)
            G = tl.dot(tl.trans(Q), do, acc=G, input_precision=PRECISION)
            above = high
            at = dv_base + (first + j).to(tl.int64)[:, None] * (n_heads * value_dim) + d[None, :]
            inside = (first + j < end)[:, None] & (d < value_dim)[None, :]
            tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
        else:
            last = tl.minimum(first + CHUNK, end)
            for back in range(first, last):
                t = last - 1 - (back - first)
                top, total = level_at(m, u, k, j, t - first)
                query = line(q_base, q_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, 0.0) / nonzero(total)
                key = line(k_base, k_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, float("-inf"))
                upstream = line(do_base, do_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                G = tl.exp(top - finite(above))[:, None] * G + (query * scale)[:, None] * upstream[None, :]
                dv_line = tl.sum(tl.exp(key - finite(top))[:, None] * G, 0)
                at = dv_base + tl.cast(t + 0 * d, tl.int64) * (n_heads * value_dim) + d
                tl.store(at, dv_line.to(dv_ptr.dtype.element_ty), mask=d < value_dim)
                above = top
