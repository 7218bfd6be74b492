"""The kernels without causal order. khat is the softmax of the keys over all positions of a sequence, and

    S = sum_s khat_s v_s^T        o_t = S^T q_t        dS = sum_t q_t do_t^T
    dq_t = S do_t                 dv_s = dS^T khat_s   dk_s = khat_s (dS v_s - r),  r = rows of (dS * S), summed

`gather` makes S with an online softmax (one read of k and v), or dS; `read` and `spread` then work tile by tile.
"""

import triton
import triton.language as tl

from .common import RUNTIME, finite, head_at, nonzero, span_of, tile, tokens_at


@triton.jit(do_not_specialize=RUNTIME)
def gather(
    a_ptr, b_ptr, mask_ptr, cu_ptr, S_ptr, m_ptr, u_ptr,
    length, n_chunks, n_heads, scale, a_strides, b_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr, n_blocks: tl.constexpr, SOFTMAX: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`SOFTMAX`: S, m and u of keys a and values b; else scale sum_t a_t b_t^T."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks) % n_heads
    sequence = pid // (n_blocks * n_heads)
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    j = tl.arange(0, CHUNK)
    c = tl.arange(0, DIM)
    d = block * BLOCK + tl.arange(0, BLOCK)
    a_base = head_at(a_ptr, a_strides, row, head)
    b_base = head_at(b_ptr, b_strides, row, head)
    nothing = float("-inf") if SOFTMAX else 0.0
    m = tl.full([DIM], float("-inf"), tl.float32)
    u = tl.zeros([DIM], tl.float32)
    w = tl.zeros([DIM, BLOCK], tl.float32)
    for first in range(begin, end, CHUNK):
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        a = tile(a_base, a_strides, first + j, c, live, dim, nothing)
        b = tile(b_base, b_strides, first + j, d, live, value_dim, 0.0).to(DOT)
        if SOFTMAX:
            high = tl.maximum(m, tl.max(a, 0))
            level = finite(high)
            keep = tl.exp(m - level)
            a = tl.exp(a - level[None, :])
            u = keep * u + tl.sum(a, 0)
            w = keep[:, None] * w
            m = high
        w = tl.dot(tl.trans(a.to(DOT)), b, acc=w, input_precision=PRECISION)
    state = (sequence.to(tl.int64) * n_heads + head) * dim
    w = w / nonzero(u)[:, None] if SOFTMAX else w * scale
    in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]
    tl.store(S_ptr + (state + c)[:, None] * value_dim + d[None, :], w, mask=in_cells)
    if SOFTMAX:  # noqa: SIM102
        if block == 0:
            tl.store(m_ptr + state + c, m, mask=c < dim)
            tl.store(u_ptr + state + c, u, mask=c < dim)


@triton.jit(do_not_specialize=RUNTIME)
def read(
    q_ptr, S_ptr, mask_ptr, cu_ptr, o_ptr,
    length, n_chunks, n_heads, scale, q_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % n_heads
    sequence = pid // n_heads // n_chunks
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    first = begin + (pid // n_heads % n_chunks) * CHUNK
    if first < end:
        j = tl.arange(0, CHUNK)
        c = tl.arange(0, DIM)
        d = tl.arange(0, VALUE_DIM)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        q = tile(head_at(q_ptr, q_strides, row, head), q_strides, first + j, c, live, dim, 0.0).to(DOT)
        state = (sequence.to(tl.int64) * n_heads + head) * dim
        in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]
        S = tl.load(S_ptr + (state + c)[:, None] * value_dim + d[None, :], mask=in_cells, other=0.0)
        o = tl.dot(q, S.to(DOT), input_precision=PRECISION) * scale
        at = ((row * length + first + j)[:, None] * n_heads + head) * value_dim + d[None, :]
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=(first + j < end)[:, None] & (d < value_dim)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def spread(
    k_ptr, v_ptr, do_ptr, mask_ptr, cu_ptr, S_ptr, m_ptr, u_ptr, dS_ptr, r_ptr, dq_ptr, dk_ptr, dv_ptr,
    length, n_chunks, n_heads, scale, k_strides, v_strides, do_strides, mask_b, mask_t,
    dim: tl.constexpr, value_dim: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % n_heads
    sequence = pid // n_heads // n_chunks
    row, begin, end, chunk = span_of(cu_ptr, sequence, length, n_chunks, CHUNK, PACKED)
    first = begin + (pid // n_heads % n_chunks) * CHUNK
    if first < end:
        j = tl.arange(0, CHUNK)
        c = tl.arange(0, DIM)
        d = tl.arange(0, VALUE_DIM)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, first + j, end)
        inside = first + j < end
        token = (row * length + first + j)[:, None] * n_heads + head
        state = (sequence.to(tl.int64) * n_heads + head) * dim
        cells = (state + c)[:, None] * value_dim + d[None, :]
        in_cells = (c < dim)[:, None] & (d < value_dim)[None, :]

        S = tl.load(S_ptr + cells, mask=in_cells, other=0.0).to(DOT)
        do = tile(head_at(do_ptr, do_strides, row, head), do_strides, first + j, d, live, value_dim, 0.0).to(DOT)
        dq = tl.dot(do, tl.trans(S), input_precision=PRECISION) * scale
        in_keys = inside[:, None] & (c < dim)[None, :]
        tl.store(dq_ptr + token * dim + c[None, :], dq.to(dq_ptr.dtype.element_ty), mask=in_keys)

        dS = tl.load(dS_ptr + cells, mask=in_cells, other=0.0).to(DOT)
        m = finite(tl.load(m_ptr + state + c, mask=c < dim, other=0.0))
        u = nonzero(tl.load(u_ptr + state + c, mask=c < dim, other=0.0))
        r = tl.load(r_ptr + state + c, mask=c < dim, other=0.0)
        k = tile(head_at(k_ptr, k_strides, row, head), k_strides, first + j, c, live, dim, float("-inf"))
        khat = tl.exp(k - m[None, :]) / u[None, :]
        v = tile(head_at(v_ptr, v_strides, row, head), v_strides, first + j, d, live, value_dim, 0.0).to(DOT)
        dk = khat * (tl.dot(v, tl.trans(dS), input_precision=PRECISION) - r[None, :])
        tl.store(dk_ptr + token * dim + c[None, :], dk.to(dk_ptr.dtype.element_ty), mask=in_keys)
        dv = tl.dot(khat.to(DOT), dS, input_precision=PRECISION)
        in_values = inside[:, None] & (d < value_dim)[None, :]
        tl.store(dv_ptr + token * value_dim + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=in_values)
