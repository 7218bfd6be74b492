"""The causal forward kernel: with w = sum_s E_s v_s^T of all tokens before a chunk, relative to its level,

    o_t = (q_t / U_t) . (w + sum_{s<=t} E_s v_s^T)

A program holds w for one head and one block of the values' channels.
"""

import triton
import triton.language as tl

from .common import RISE, RUNTIME, finite, head_at, line, nonzero, rise, span_of, tile, tokens_at, weights


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, S0_ptr, m0_ptr, u0_ptr, o_ptr, levels_ptr, S1_ptr, m1_ptr, u1_ptr,
    length, n_chunks, n_heads, scale, q_strides, k_strides, v_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks) % n_heads
    sequence = pid // (n_blocks * n_heads)
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    j = tl.arange(0, CHUNK)
    c = tl.arange(0, DIM)
    d = block * BLOCK + tl.arange(0, BLOCK)
    q_base = head_at(q_ptr, q_strides, row, head)
    k_base = head_at(k_ptr, k_strides, row, head)
    v_base = head_at(v_ptr, v_strides, row, head)
    o_base = o_ptr + row * length * n_heads * value_dim + head * value_dim
    state = (sequence.to(tl.int64) * n_heads + head) * dim
    cells = (state + c)[:, None] * value_dim + d[None, :]
    in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]

    m = tl.full([DIM], float("-inf"), tl.float32)
    u = tl.zeros([DIM], tl.float32)
    w = tl.zeros([DIM, BLOCK], tl.float32)
    if S0_ptr is not None:
        u = tl.load(u0_ptr + state + c, mask=c < dim, other=0.0)
        m = tl.where(u > 0, tl.load(m0_ptr + state + c, mask=c < dim, other=0.0), float("-inf"))
        held = in_cells & (u > 0)[:, None]
        w = u[:, None] * tl.load(S0_ptr + cells, mask=held, other=0.0)

    for first in range(begin, end, CHUNK):
        if block == 0:
            levels = levels_ptr + (chunk * n_heads + head) * 2 * dim
            tl.store(levels + c, m, mask=c < dim)
            tl.store(levels + dim + c, u, mask=c < dim)
        chunk += 1
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        k = tile(k_base, k_strides, first + j, c, live, dim, float("-inf"))
        high, most = rise(m, k)
        if most <= RISE:
            q = tile(q_base, q_strides, first + j, c, live, dim, 0.0)
            v = tile(v_base, v_strides, first + j, d, live, value_dim, 0.0).to(DOT)
            keep, E, U = weights(m, u, high, k)
            Q = (q * scale / nonzero(U)).to(DOT)
            w = keep[:, None] * w
            u = keep * u + tl.sum(E, 0)
            E = E.to(DOT)
            pairs = tl.dot(Q, tl.trans(E), input_precision=PRECISION)
            pairs = tl.where(j[:, None] >= j[None, :], pairs, 0.0).to(DOT)
            o = tl.dot(Q, w.to(DOT), input_precision=PRECISION)
            o = tl.dot(pairs, v, acc=o, input_precision=PRECISION)
            w = tl.dot(tl.trans(E), v, acc=w, input_precision=PRECISION)
            m = high
            at = o_base + (first + j).to(tl.int64)[:, None] * (n_heads * value_dim) + d[None, :]
            inside = (first + j < end)[:, None] & (d < value_dim)[None, :]
            tl.store(at, o.to(o_ptr.dtype.element_ty), mask=inside)
        else:
            for t in range(first, tl.minimum(first + CHUNK, end)):
                key = line(k_base, k_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, float("-inf"))
                query = line(q_base, q_strides, mask_ptr, mask_b, mask_t, row, t, end, c, dim, 0.0)
                value = line(v_base, v_strides, mask_ptr, mask_b, mask_t, row, t, end, d, value_dim, 0.0)
                top = tl.maximum(m, key)
                level = finite(top)
                keep, new = tl.exp(m - level), tl.exp(key - level)
                u = keep * u + new
                w = keep[:, None] * w + new[:, None] * value[None, :]
                m = top
                o_line = tl.sum((query * scale / nonzero(u))[:, None] * w, 0)
                at = o_base + tl.cast(t + 0 * d, tl.int64) * (n_heads * value_dim) + d
                tl.store(at, o_line.to(o_ptr.dtype.element_ty), mask=d < value_dim)

    tl.store(S1_ptr + cells, w / nonzero(u)[:, None], mask=in_cells)
    if block == 0:
        tl.store(m1_ptr + state + c, m, mask=c < dim)
        tl.store(u1_ptr + state + c, u, mask=c < dim)
