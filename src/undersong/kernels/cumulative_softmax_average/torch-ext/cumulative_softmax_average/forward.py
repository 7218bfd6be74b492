"""Forward kernel: one program for one chunk of one sequence, one head and one block of dim (see common.py).

A chunk is ROWS runs of CHUNK / ROWS tokens, walked side by side, one token of each at a time. A first walk sums up the
runs. The sums and those of the chunks before give each run its carry, and a scan over the scores gives each position
its share b_i = e^{s_i} / sum_{j <= i} e^{s_j}, over everything up to i. The second walk is then the recurrence

    o_i = (1 - b_i) o_{i-1} + b_i v_i

As no exponent is positive and shares lie in [0, 1], an outlier anywhere is harmless. Values and sums are float32. The
state (m, u, w) is summed up on its own. Saved for the backward pass: o and z_i = log sum_{j <= i} e^{s_j}.
"""

import triton
import triton.language as tl

from .common import GROUP, collect, finite, locate, publish, slot_base, tokens

NO_TOKEN = tl.constexpr(-1.0)  # in place of a weight


@triton.jit
def add_masses(m1, u1, m2, u2):
    """(m, u) of two runs of tokens, u = sum e^{s - m}."""
    m = tl.maximum(m1, m2)
    return m, u1 * tl.exp(m1 - finite(m)) + u2 * tl.exp(m2 - finite(m))


@triton.jit
def read(weight_ptr, v_ptr, stride, left, in_dim, MASKED: tl.constexpr, BATCH: tl.constexpr):
    """The next BATCH weights and rows of values of each run, `left` of them tokens. All are read before the first is
    used, and so before any store: the compiler cannot know that stores do not touch what is read."""
    weights = ()
    values = ()
    for i in tl.static_range(BATCH):
        weight = tl.load(weight_ptr + i, mask=i < left, other=0.0)
        live = i < left
        if MASKED:
            live = live & (weight != NO_TOKEN)
        weights = weights + (weight,)
        values = values + (tl.load(v_ptr + i * stride, mask=live[:, None] & in_dim[None, :], other=0.0),)
    return weights, values


@triton.jit(do_not_specialize=["length", "n_chunks", "n_units", "stride_s_b", "stride_mask_b"])
def forward(
    s_ptr, v_ptr, mask_ptr, cu_ptr, m0_ptr, u0_ptr, w0_ptr, slots_ptr, o_ptr, z_ptr, m_ptr, u_ptr, w_ptr,
    length, n_chunks, n_units, n_heads, dim, n_blocks,
    stride_s_b, stride_s_t, stride_s_h, stride_v_b, stride_v_t, stride_v_h, stride_v_d, stride_mask_b, stride_mask_t,
    HAS_STATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    RUN: tl.constexpr = CHUNK // ROWS
    step, unit, block, head, sequence, row, begin, end = locate(
        slots_ptr, cu_ptr, length, n_chunks, n_units, n_heads, n_blocks, PACKED
    )
    first = begin + step * CHUNK
    last = tl.minimum(first + CHUNK, end)
    n_tokens = last - first
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    state = tl.cast(sequence, tl.int64) * n_heads + head
    z_base = z_ptr + ((row * n_heads + head) * n_blocks + block) * length + first  # each block of dim has its own
    r = tl.arange(0, ROWS)

    v_step, o_step = tl.cast(stride_v_t, tl.int64), tl.cast(n_heads * dim, tl.int64)
    v_rows = v_ptr + row * stride_v_b + head * stride_v_h + (first + r * RUN).to(tl.int64) * v_step
    v_tile = v_rows[:, None] + d[None, :] * stride_v_d
    o_rows = o_ptr + ((row * length + first + r * RUN) * n_heads + head) * dim
    o_tile = o_rows[:, None] + d[None, :]
    z_rows = z_base + r * RUN
    left = n_tokens - r * RUN  # tokens of each run
    n_steps = tl.cdiv(tl.minimum(tl.maximum(n_tokens, 0), RUN), BATCH)

    # Each run alone: (m, u) at every position, and the state after it.
    k = r[:, None] * RUN + tl.arange(0, RUN)[None, :]
    here = first + k < last
    live = tokens(mask_ptr, row, first + k, last, stride_mask_b, stride_mask_t, MASKED)
    s = tl.load(
        s_ptr + row * stride_s_b + head * stride_s_h + (first + k).to(tl.int64) * stride_s_t,
        mask=live, other=float("-inf"),
    ).to(tl.float32)  # fmt: skip
    ms, us = tl.associative_scan((s, tl.where(live, 1.0, 0.0)), 1, add_masses)
    run_m = tl.max(s, 1)
    share = tl.exp(s - finite(run_m)[:, None])
    run_u = tl.sum(share, 1)
    # z's memory lends itself to the weights, which the walks read back one by one
    tl.store(z_base + k, tl.where(live, share, NO_TOKEN), mask=here)
    tl.debug_barrier()
    run_w = tl.zeros([ROWS, BLOCK_D], tl.float32)
    z_next, v_next, left_next = z_rows, v_tile, left
    for _ in range(n_steps):
        weights, values = read(z_next, v_next, stride_v_t, left_next, in_dim, MASKED, BATCH)
        for i in tl.static_range(BATCH):
            run_w += weights[i][:, None] * values[i].to(tl.float32)
        z_next, v_next, left_next = z_next + BATCH, v_next + BATCH * v_step, left_next - BATCH
    own_m = tl.max(run_m, 0)
    own = tl.exp(run_m - finite(own_m))
    own_u = tl.sum(own * run_u, 0)
    own_w = tl.sum(own[:, None] * run_w, 0)

    # The state before the chunk.
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

    # The state before each run, and the shares.
    earlier = tl.where(r[None, :] < r[:, None], run_m[None, :], float("-inf"))
    top = tl.maximum(m, tl.max(earlier, 1))
    keep, add = tl.exp(m - finite(top)), tl.exp(earlier - finite(top)[:, None])
    mass = keep * u + tl.sum(add * run_u[None, :], 1)
    o = keep[:, None] * w[None, :] + tl.sum(add[:, :, None] * run_w[None, :, :], 1)
    o = o / tl.where(mass > 0, mass, 1.0)[:, None]
    top, mass = add_masses(ms, us, top[:, None], mass[:, None])
    mass = tl.where(mass > 0, mass, 1.0)
    share = tl.exp(s - finite(top)) / mass
    tl.debug_barrier()
    tl.store(z_base + k, tl.where(live, share, NO_TOKEN), mask=here)
    tl.debug_barrier()
    z_next, v_next, left_next = z_rows, v_tile, left
    for _ in range(n_steps):
        shares, values = read(z_next, v_next, stride_v_t, left_next, in_dim, MASKED, BATCH)
        for i in tl.static_range(BATCH):
            b = shares[i]
            if MASKED:
                b = tl.maximum(b, 0.0)
            o = (1 - b)[:, None] * o + b[:, None] * values[i].to(tl.float32)
            out = o
            if MASKED:
                out = tl.where((shares[i] == NO_TOKEN)[:, None], 0.0, o)
            tl.store(o_tile + i * (n_heads * dim), out.to(o_ptr.dtype.element_ty),
                     mask=(i < left_next)[:, None] & in_dim[None, :])  # fmt: skip
        z_next, v_next, left_next = z_next + BATCH, v_next + BATCH * v_step, left_next - BATCH
        o_tile += BATCH * o_step
    tl.debug_barrier()
    tl.store(z_base + k, top + tl.log(mass), mask=here)
