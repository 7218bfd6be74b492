"""Kernels for Y = (G * Q K^T / sqrt(key_dim)) V, with nothing of Q K^T in memory, and its gradients.

Q, K, V and Y are [batch, nodes, heads, dim] with any strides, G [batch heads, nodes, nodes] in float32. Products add
up in float32; those of float32 inputs keep its precision, by three TF32 terms each.
"""

import triton
import triton.language as tl


@triton.jit
def rows(ptr, n, c, nodes, stride, DIM: tl.constexpr, DOT: tl.constexpr):
    """Some nodes' vectors as rows of a matrix to multiply, zeros outside."""
    inside = (n < nodes)[:, None] & (c < DIM)[None, :]
    return tl.load(ptr + n[:, None] * stride + c[None, :], mask=inside, other=0.0).to(DOT)


@triton.jit
def tile(ptr, p, s, nodes):
    """Part of a [nodes, nodes] matrix, zeros outside."""
    inside = (p < nodes)[:, None] & (s < nodes)[None, :]
    return tl.load(ptr + p[:, None].to(tl.int64) * nodes + s[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b, total):
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def place(heads, nodes, BLOCK: tl.constexpr):
    """Batch, head, both in one, and the nodes of this program."""
    blocks = tl.cdiv(nodes, BLOCK)
    both = (tl.program_id(0) // blocks).to(tl.int64)
    return both // heads, both % heads, both, (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def apply(
    q_ptr, k_ptr, v_ptr, G_ptr, y_ptr, scale, heads, nodes, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    DOT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, h, both, p = place(heads, nodes, BLOCK_P)
    ck, cv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    q = rows(q_ptr + b * q_b + h * q_h, p, ck, nodes, q_n, DK, DOT)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    G_ptr += both * nodes * nodes
    y = tl.zeros([BLOCK_P, BLOCK_DV], tl.float32)
    for begin in range(0, nodes, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        k, v = rows(k_ptr, s, ck, nodes, k_n, DK, DOT), rows(v_ptr, s, cv, nodes, v_n, DV, DOT)
        weights = tile(G_ptr, p, s, nodes) * product(q, tl.trans(k), tl.zeros([BLOCK_P, BLOCK_S], tl.float32)) * scale
        y = product(weights.to(DOT), v, y)
    at = y_ptr + ((b * nodes + p[:, None]) * heads + h) * DV + cv[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(p < nodes)[:, None] & (cv < DV)[None, :])


@triton.jit
def apply_backward_sources(
    q_ptr, k_ptr, v_ptr, G_ptr, dy_ptr, dk_ptr, dv_ptr, dG_ptr, scale, heads, nodes,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    DOT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dK, dV and dG, for some sources s and all readers p in turn; matrices are transposed, [s, p]."""
    b, h, both, s = place(heads, nodes, BLOCK_S)
    ck, cv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    k, v = (
        rows(k_ptr + b * k_b + h * k_h, s, ck, nodes, k_n, DK, DOT),
        rows(v_ptr + b * v_b + h * v_h, s, cv, nodes, v_n, DV, DOT),
    )
    q_ptr += b * q_b + h * q_h
    dy_ptr += (b * nodes * heads + h) * DV
    G_ptr += both * nodes * nodes
    dG_ptr += both * nodes * nodes
    dk, dv = tl.zeros([BLOCK_S, BLOCK_DK], tl.float32), tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    zero = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    for begin in range(0, nodes, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        q, dy = rows(q_ptr, p, ck, nodes, q_n, DK, DOT), rows(dy_ptr, p, cv, nodes, heads * DV, DV, DOT)
        G = tl.trans(tile(G_ptr, p, s, nodes))
        likeness = product(k, tl.trans(q), zero) * scale
        d_weights = product(v, tl.trans(dy), zero)
        dv = product((G * likeness).to(DOT), dy, dv)
        dk = product((G * d_weights).to(DOT), q, dk)
        inside = (p < nodes)[None, :] & (s < nodes)[:, None]
        tl.store(dG_ptr + p[None, :].to(tl.int64) * nodes + s[:, None], d_weights * likeness, mask=inside)
    at = (b * nodes + s[:, None]) * heads + h
    tl.store(dk_ptr + at * DK + ck[None, :], (dk * scale).to(dk_ptr.dtype.element_ty),
             mask=(s < nodes)[:, None] & (ck < DK)[None, :])  # fmt: skip
    tl.store(dv_ptr + at * DV + cv[None, :], dv.to(dv_ptr.dtype.element_ty),
             mask=(s < nodes)[:, None] & (cv < DV)[None, :])  # fmt: skip


@triton.jit
def apply_backward_readers(
    k_ptr, v_ptr, G_ptr, dy_ptr, dq_ptr, scale, heads, nodes, k_b, k_n, k_h, v_b, v_n, v_h,
    DOT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, h, both, p = place(heads, nodes, BLOCK_P)
    ck, cv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    dy = rows(dy_ptr + (b * nodes * heads + h) * DV, p, cv, nodes, heads * DV, DV, DOT)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    G_ptr += both * nodes * nodes
    dq = tl.zeros([BLOCK_P, BLOCK_DK], tl.float32)
    for begin in range(0, nodes, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        k, v = rows(k_ptr, s, ck, nodes, k_n, DK, DOT), rows(v_ptr, s, cv, nodes, v_n, DV, DOT)
        d_weights = product(dy, tl.trans(v), tl.zeros([BLOCK_P, BLOCK_S], tl.float32))
        dq = product((tile(G_ptr, p, s, nodes) * d_weights).to(DOT), k, dq)
    at = dq_ptr + ((b * nodes + p[:, None]) * heads + h) * DK + ck[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(p < nodes)[:, None] & (ck < DK)[None, :])
