"""Forward kernel: one program for one chunk of one sequence, one head and one block of dim (see common.py).

A scan over the chunk's scores gives z_i = log sum_{j <= i} e^{s_j}, over everything up to i. Then, tile by tile,

    o_i = e^{zc - z_i} o_c + sum_j P_ij v_j        P_ij = e^{s_j - z_i} for j <= i in the tile

with c the last position before the tile. As z_i >= s_j and z_i >= zc, no exponent is positive: an outlier anywhere in
the tile is exact. o_c is kept as a tile of equal rows, the layout in which the matrix product leaves it. The state
(m, u, w) is summed up in float32 on its own. Saved for the backward pass: o and z.
"""

import triton
import triton.language as tl

from .common import GROUP, LOG2E, collect, finite, level, locate, publish, slot_base, tokens, weighted_sum


@triton.jit
def add_masses(m1, u1, m2, u2):
    """(m, u) of two runs of tokens, u = sum e^{s - m}."""
    m = tl.maximum(m1, m2)
    return m, u1 * tl.exp(m1 - finite(m)) + u2 * tl.exp(m2 - finite(m))


@triton.jit(do_not_specialize=["length", "n_chunks", "n_units", "stride_s_b", "stride_mask_b"])
def forward(
    s_ptr, v_ptr, mask_ptr, cu_ptr, m0_ptr, u0_ptr, w0_ptr, slots_ptr, o_ptr, z_ptr, m_ptr, u_ptr, w_ptr,
    length, n_chunks, n_units, n_heads, dim, n_blocks,
    stride_s_b, stride_s_t, stride_s_h, stride_v_b, stride_v_t, stride_v_h, stride_v_d, stride_mask_b, stride_mask_t,
    HAS_STATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr, SUM_T: tl.constexpr, SUM_STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    step, unit, block, head, sequence, row, begin, end = locate(
        slots_ptr, cu_ptr, length, n_chunks, n_units, n_heads, n_blocks, PACKED
    )
    first = begin + step * CHUNK
    last = tl.minimum(first + CHUNK, end)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    state = tl.cast(sequence, tl.int64) * n_heads + head
    s_step, v_step = tl.cast(stride_s_t, tl.int64), tl.cast(stride_v_t, tl.int64)
    s_base = s_ptr + row * stride_s_b + head * stride_s_h + first * s_step
    v_base = v_ptr + row * stride_v_b + head * stride_v_h + first * v_step
    o_base = o_ptr + ((row * length + first) * n_heads + head) * dim
    z_base = z_ptr + ((row * n_heads + head) * n_blocks + block) * length + first  # each block of dim has its own
    n_tokens = last - first

    # The chunk alone: (m, u) at every position, and the state after it.
    k = tl.arange(0, CHUNK)
    live = tokens(mask_ptr, row, first + k, last, stride_mask_b, stride_mask_t, MASKED)
    s = tl.load(s_base + k * stride_s_t, mask=live, other=float("-inf")).to(tl.float32)
    ms, us = tl.associative_scan((s, tl.where(live, 1.0, 0.0)), 0, add_masses)
    own_m = tl.max(s, 0)
    own_u = tl.sum(tl.where(k == CHUNK - 1, us, 0.0), 0)
    j = tl.arange(0, SUM_T)
    sums = tl.zeros([SUM_T, BLOCK_D], tl.float32)
    for t in tl.range(0, n_tokens, SUM_T, num_stages=SUM_STAGES):
        counts = tokens(mask_ptr, row, first + t + j, last, stride_mask_b, stride_mask_t, MASKED)
        sj = tl.load(s_base + t * s_step + j * stride_s_t, mask=counts, other=float("-inf")).to(tl.float32)
        vj = tl.load(v_base + t * v_step + j[:, None] * stride_v_t + d[None, :] * stride_v_d,
                     mask=counts[:, None] & in_dim[None, :], other=0.0)  # fmt: skip
        sums += tl.exp(sj - finite(own_m))[:, None] * vj.to(tl.float32)
    own_w = tl.sum(sums, 0)

    # The state before it.
    m = tl.full([], float("-inf"), tl.float32)
    u = tl.full([], 0.0, tl.float32)
    w = tl.zeros([BLOCK_D], tl.float32)
    if HAS_STATE:  # noqa: SIM102 - a constant: without it the pointers are None
        if step < GROUP:
            u = tl.load(u0_ptr + state)
            m = tl.where(u > 0, tl.load(m0_ptr + state), float("-inf"))
            w = tl.where(u > 0, tl.load(w0_ptr + state * dim + d, mask=in_dim, other=0.0), 0.0)
    base = slot_base(slots_ptr, unit, n_chunks, BLOCK_D)
    if (n_chunks > 1) & (first < end):
        publish(base, step, own_m, own_u, own_w, BLOCK_D)
        needed, slot_m, slot_u, slot_w = collect(base, step, n_chunks, BLOCK_D)
        slot_m = tl.where(needed, slot_m, float("-inf"))
        before = tl.maximum(m, tl.max(slot_m, 0))
        keep, add = tl.exp(m - finite(before)), tl.exp(slot_m - finite(before))
        u = keep * u + tl.sum(add * slot_u, 0)
        w = keep * w + tl.sum(add[:, None] * slot_w, 0)
        m = before
    after = tl.maximum(m, own_m)
    old, new = tl.exp(m - finite(after)), tl.exp(own_m - finite(after))
    after_u, after_w = old * u + new * own_u, old * w + new * own_w
    if (n_chunks > 1) & (step % GROUP == GROUP - 1):
        publish(base, n_chunks + step // GROUP, after, after_u, after_w, BLOCK_D)
    if (last == end) & ((first < end) | (step == 0)):  # the chunk in which the sequence ends
        tl.store(w_ptr + state * dim + d, after_w, mask=in_dim)
        if block == 0:
            tl.store(m_ptr + state, after)
            tl.store(u_ptr + state, after_u)

    # The walk. Levels are relative to `after` and in base 2 here: near 0 where it matters, so no bits are lost.
    top, mass = add_masses(ms, us, m, u)
    log_mass = tl.log2(tl.where(mass > 0, mass, 1.0))
    ref = finite(after)
    z_here = first + k < last
    tl.store(z_base + k, (top - ref) * LOG2E + log_mass, mask=z_here)
    tl.debug_barrier()  # the tiles below read z back
    held = tl.where(u > 0, u, 1.0)
    zc = (m - ref) * LOG2E + tl.log2(held)
    oc = (w / held)[None, :] + tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    i = tl.arange(0, BLOCK_T)
    v_tile = i[:, None] * stride_v_t + d[None, :] * stride_v_d
    o_tile = i[:, None] * (n_heads * dim) + d[None, :]
    o_step = tl.cast(n_heads * dim, tl.int64)
    for t in range(0, n_tokens, BLOCK_T):
        inside = t + i < n_tokens
        alive = tokens(mask_ptr, row, first + t + i, last, stride_mask_b, stride_mask_t, MASKED)
        si = tl.load(s_base + t * s_step + i * stride_s_t, mask=alive, other=float("-inf")).to(tl.float32)
        si = (si - ref) * LOG2E
        zi = level(tl.load(z_base + t + i, mask=alive, other=float("inf")))
        z_last = tl.load(z_base + tl.minimum(t + BLOCK_T, n_tokens) - 1)
        v = tl.load(v_base + t * v_step + v_tile, mask=alive[:, None] & in_dim[None, :], other=0.0)
        weights = tl.exp2(tl.where(i[None, :] <= i[:, None], si[None, :] - zi[:, None], float("-inf")))
        o = weighted_sum(weights, v, tl.exp2(zc - zi)[:, None] * oc, PRODUCT)
        tl.store(o_base + t * o_step + o_tile, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & in_dim[None, :])
        oc = tl.exp2(zc - level(z_last)) * oc
        weights_c = tl.exp2(si - level(z_last))
        if PRODUCT == "ieee":
            oc += tl.sum(weights_c[:, None] * v.to(tl.float32), 0)[None, :]
        else:
            oc = weighted_sum(weights_c[None, :] + tl.zeros([BLOCK_T, BLOCK_T], tl.float32), v, oc, PRODUCT)
        zc = z_last
    tl.debug_barrier()
    tl.store(z_base + k, top + log_mass / LOG2E, mask=z_here)
