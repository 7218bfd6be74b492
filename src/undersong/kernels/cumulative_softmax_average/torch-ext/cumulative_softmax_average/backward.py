"""Backward kernel: the same programs and chunks, last one first.

With r_i = do_i . o_i, and E_ji = e^{s_j - z_i} for i >= j (no exponent is positive, as z_i >= s_j):

    dv_j = sum_i E_ji do_i          ds_j = v_j . dv_j - sum_i E_ji r_i

What lies behind a tile is carried as R = sum_i e^{zc - z_i} do_i and the same sum over r, relative to zc, the z of the
first position behind it: its share is e^{s_j - zc} R. The gradient of the final state (m', u', w') enters as
R = u' dw' and -u' du' behind the last position; what is left before the first one is the initial state's gradient.
Everything is a sum over dim, so a block of dim gives its part of ds, and the parts are added.
"""

import triton
import triton.language as tl

from .common import GROUP, collect, level, locate, publish, slot_base, tokens


@triton.jit
def weighted_sum(weights, x, start, PRODUCT: tl.constexpr):
    """start + weights @ x in float32. "split": half x goes through the tensor cores twice, weights = high + low, so
    that the weights keep at least 16 bits; "half": once; otherwise in float32, at that precision of `tl.dot`."""
    if PRODUCT == "split":
        high = weights.to(x.dtype)
        low = (weights - high.to(tl.float32)).to(x.dtype)
        product = tl.dot(low, x, acc=tl.dot(high, x, acc=start))
    elif PRODUCT == "half":
        product = tl.dot(weights.to(x.dtype), x, acc=start)
    else:
        product = tl.dot(weights, x.to(tl.float32), acc=start, input_precision=PRODUCT)
    return product


@triton.jit
def gathered(zf, zc, carry, carry_r, z, do, r):
    """The carry in front of a tile: relative to zf, the z of its first position (-inf: nothing is before it)."""
    near, far = tl.exp(zf - z), tl.exp(zf - zc)
    return far * carry + tl.sum(near[:, None] * do, 0), far * carry_r + tl.sum(near * r, 0)


@triton.jit(do_not_specialize=["length", "n_chunks", "n_units", "stride_s_b", "stride_mask_b"])
def backward(
    s_ptr, v_ptr, mask_ptr, cu_ptr, m0_ptr, u0_ptr, slots_ptr, o_ptr, z_ptr, u_ptr, do_ptr, du_ptr, dw_ptr,
    ds_ptr, dv_ptr, du0_ptr, dw0_ptr,
    length, n_chunks, n_units, n_heads, dim, n_blocks,
    stride_s_b, stride_s_t, stride_s_h, stride_v_b, stride_v_t, stride_v_h, stride_v_d, stride_mask_b, stride_mask_t,
    stride_do_b, stride_do_t, stride_do_h, stride_do_d,
    HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr, SUM_T: tl.constexpr, SUM_STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    step, unit, block, head, sequence, row, begin, end = locate(
        slots_ptr, cu_ptr, length, n_chunks, n_units, n_heads, n_blocks, PACKED
    )
    # Sequences of any length end in step n_chunks - 1 of the scan; a short one joins late, at step `start`.
    chunk = n_chunks - 1 - step
    start = n_chunks - tl.maximum(tl.cdiv(end - begin, CHUNK), 1)
    first = begin + chunk * CHUNK
    last = tl.minimum(first + CHUNK, end)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    state = tl.cast(sequence, tl.int64) * n_heads + head
    s_base = s_ptr + row * stride_s_b + head * stride_s_h
    v_base = v_ptr + row * stride_v_b + head * stride_v_h
    z_base = z_ptr + ((row * n_heads + head) * n_blocks + block) * length
    o_base = o_ptr + (row * length * n_heads + head) * dim
    dv_base = dv_ptr + (row * length * n_heads + head) * dim
    do_base = do_ptr + row * stride_do_b + head * stride_do_h
    s_step, v_step = tl.cast(stride_s_t, tl.int64), tl.cast(stride_v_t, tl.int64)
    do_step, o_step = tl.cast(stride_do_t, tl.int64), tl.cast(n_heads * dim, tl.int64)

    carry = tl.zeros([BLOCK_D], tl.float32)
    carry_r = tl.full([], 0.0, tl.float32)
    z_end = level(tl.load(z_base + end - 1, mask=end > begin, other=float("-inf")))
    zc = z_end
    if HAS_FINAL:  # noqa: SIM102 - a constant: without it the pointers are None
        if step - start < GROUP:
            u = tl.load(u_ptr + state)
            carry = u * tl.load(dw_ptr + state * dim + d, mask=in_dim, other=0.0)
            carry_r = tl.where(block == 0, -u * tl.load(du_ptr + state), 0.0)
    if (n_chunks > 1) & (first < end):
        z_first = tl.load(z_base + first)
        own = tl.zeros([BLOCK_D], tl.float32)
        own_r = tl.full([], 0.0, tl.float32)
        j = tl.arange(0, SUM_T)
        for t in tl.range(first, last, SUM_T, num_stages=SUM_STAGES):
            counts = (
                tokens(mask_ptr, row, t + j, last, stride_mask_b, stride_mask_t, MASKED)[:, None] & in_dim[None, :]
            )
            zj = level(tl.load(z_base + t + j, mask=t + j < last, other=float("inf")))
            oj = tl.load(o_base + t * o_step + j[:, None] * (n_heads * dim) + d[None, :], mask=counts, other=0.0)
            doj = tl.load(do_base + t * do_step + j[:, None] * stride_do_t + d[None, :] * stride_do_d,
                          mask=counts, other=0.0).to(tl.float32)  # fmt: skip
            rj = tl.sum(doj * oj.to(tl.float32), 1)
            own, own_r = gathered(z_first, level(z_first), own, own_r, zj, doj, rj)
        base = slot_base(slots_ptr, unit, n_chunks, BLOCK_D)
        publish(base, step - start, z_first, own_r, own, BLOCK_D)
        needed, zs, rs, dos = collect(base, step - start, n_chunks, BLOCK_D)
        zc = tl.load(z_base + last, mask=last < end, other=z_end)
        # zc = inf: everything behind is empty, and so are all of its sums
        reference = tl.where(zc == float("inf"), 0.0, zc)
        carry, carry_r = gathered(reference, z_end, carry, carry_r, tl.where(needed, level(zs), float("inf")), dos, rs)
        zc = level(zc)
        if (step - start) % GROUP == GROUP - 1:
            old = tl.exp(z_first - zc)
            publish(
                base, n_chunks + (step - start) // GROUP, z_first, own_r + old * carry_r, own + old * carry, BLOCK_D
            )

    i = tl.arange(0, BLOCK_T)
    ds_base = ds_ptr + (row * length * n_heads + head) * n_blocks + block
    v_tile = i[:, None] * stride_v_t + d[None, :] * stride_v_d
    do_tile = i[:, None] * stride_do_t + d[None, :] * stride_do_d
    o_tile = i[:, None] * (n_heads * dim) + d[None, :]
    ds_step = tl.cast(n_heads * n_blocks, tl.int64)
    n_tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_T)
    for tile in range(n_tiles):
        t = first + (n_tiles - 1 - tile) * BLOCK_T
        inside = t + i < last
        live = tokens(mask_ptr, row, t + i, last, stride_mask_b, stride_mask_t, MASKED)
        load = live[:, None] & in_dim[None, :]
        s = tl.load(s_base + t * s_step + i * stride_s_t, mask=live, other=float("-inf")).to(tl.float32)
        z = level(tl.load(z_base + t + i, mask=inside, other=float("inf")))
        zf = tl.load(z_base + t)
        v = tl.load(v_base + t * v_step + v_tile, mask=load, other=0.0)
        o = tl.load(o_base + t * o_step + o_tile, mask=load, other=0.0)
        do = tl.load(do_base + t * do_step + do_tile, mask=load, other=0.0)
        r = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        weights = tl.exp(tl.where(i[None, :] >= i[:, None], s[:, None] - z[None, :], float("-inf")))
        far = tl.exp(s - zc)
        dv = weighted_sum(weights, do, far[:, None] * carry[None, :], PRODUCT)
        ds = tl.sum(v.to(tl.float32) * dv, 1) - tl.sum(weights * r[None, :], 1) - far * carry_r
        tl.store(dv_base + t * o_step + o_tile, dv.to(dv_ptr.dtype.element_ty),
                 mask=inside[:, None] & in_dim[None, :])  # fmt: skip
        tl.store(ds_base + t * ds_step + i * (n_heads * n_blocks), ds, mask=inside)
        carry, carry_r = gathered(zf, zc, carry, carry_r, z, do.to(tl.float32), r)
        zc = level(zf)

    if HAS_STATE:  # noqa: SIM102
        if chunk == 0:
            u0 = tl.load(u0_ptr + state)
            scale = tl.exp(tl.where(u0 > 0, tl.load(m0_ptr + state), float("-inf")) - zc)
            du0 = -scale * carry_r
            dw0 = scale * carry
            if HAS_FINAL:  # noqa: SIM102
                if begin >= end:  # no token at all: the state passed through
                    du0 = tl.where((u0 > 0) & (block == 0), tl.load(du_ptr + state), 0.0)
                    dw0 = tl.where(u0 > 0, tl.load(dw_ptr + state * dim + d, mask=in_dim, other=0.0), 0.0)
            tl.store(du0_ptr + state * n_blocks + block, du0)
            tl.store(dw0_ptr + state * dim + d, dw0, mask=in_dim)
