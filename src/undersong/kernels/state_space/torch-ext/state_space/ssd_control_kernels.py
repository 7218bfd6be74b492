"""Kernels of the controlled SSD scan: where granules lie, states passed from granule to granule, one token.

A granule is what a sequence reads from one control of its state to the next; the last one of a sequence is unfinished
and may be empty. Other kernels sum up what each granule leaves, all at once; these then walk from granule to granule
and put the state before each into memory, from which all outputs are computed at once.
"""

import triton
import triton.language as tl

from .ssd_common import silu, state_tile
from .update_kernels import softplus

# Arguments whose value must not lead to another compiled kernel.
RUNTIME = [
    "length", "n_rows", "granularity", "n_heads", "group_heads", "size", "per", "dt_b", "dt_h", "D_h", "D_p", "mask_b",
]  # fmt: skip


@triton.jit
def row_at(cu_ptr, position_ptr, row, length, granularity, real):
    """A sequence's first token, tokens, granules, and the tokens of its first granule that came earlier."""
    if cu_ptr is None:
        begin = row * length
        count = tl.where(real, length, 0)
    else:
        begin = tl.load(cu_ptr + row, mask=real, other=0)
        count = tl.maximum(tl.load(cu_ptr + row + 1, mask=real, other=0), begin) - begin
    seen = row * 0
    if position_ptr is not None:
        seen = (tl.load(position_ptr + row, mask=real, other=0) % granularity).to(tl.int32)
    return begin, count, tl.where(real, (seen + count) // granularity + 1, 0), seen


@triton.jit(do_not_specialize=RUNTIME)
def granules(
    cu_ptr, position_ptr, table_ptr, firsts_ptr, length, n_rows, granularity, per,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunks as the other kernels read them, `per` to a granule, which is their sequence; each row's first granule."""
    row = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    _, _, numbers, _ = row_at(cu_ptr, position_ptr, rows, length, granularity, rows < n_rows)
    first = tl.sum(tl.where(rows < row, numbers, 0), 0)
    begin, count, number, seen = row_at(cu_ptr, position_ptr, row, length, granularity, row < n_rows)
    tl.store(firsts_ptr + row * 2, first)
    tl.store(firsts_ptr + row * 2 + 1, number)
    for start in range(0, number * per, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        granule, place = chunk // per, chunk % per
        low = granule * granularity - seen + place * CHUNK
        high = granule * granularity - seen + tl.minimum((place + 1) * CHUNK, granularity)
        at = table_ptr + (first * per + chunk) * 4
        inside = chunk < number * per
        tl.store(at, begin + tl.minimum(tl.maximum(low, 0), count), mask=inside)
        tl.store(at + 1, begin + tl.minimum(tl.maximum(high, 0), count), mask=inside)
        tl.store(at + 2, first + granule, mask=inside)
        tl.store(at + 3, (place == 0).to(tl.int32), mask=inside)


@triton.jit
def granule_decay(steps_ptr, granule, head, n_heads, per, CHUNK: tl.constexpr):
    """Decay over all chunks of a granule."""
    total = tl.full([], 0.0, tl.float32)
    for i in range(per):
        chunk = (granule * per + i).to(tl.int64)
        total += tl.load(steps_ptr + (chunk * n_heads + head) * (2 * CHUNK) + 2 * CHUNK - 1)
    return tl.exp2(total)


@triton.jit(do_not_specialize=RUNTIME)
def limit_states(
    states_ptr, steps_ptr, firsts_ptr, threshold_ptr, h0_ptr, h1_ptr, n_heads, per,
    head_dim: tl.constexpr, n_state: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h <- d h + E, scaled down to its threshold where a granule is finished; each E is replaced by the h before it.

    The next E is on its way while this one is added: a head has only one program.
    """
    row = tl.program_id(0) // n_heads
    head = tl.program_id(0) % n_heads
    first = tl.load(firsts_ptr + row * 2)
    last = first + tl.load(firsts_ptr + row * 2 + 1) - 1
    threshold = tl.load(threshold_ptr + head).to(tl.float32)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    h = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if h0_ptr is not None:
        at, inside = state_tile(h0_ptr, row * n_heads + head, p, n, head_dim, n_state)
        h = tl.load(at, mask=inside, other=0.0)
    at, inside = state_tile(states_ptr, first * n_heads + head, p, n, head_dim, n_state)
    left = tl.load(at, mask=inside, other=0.0)
    decay = granule_decay(steps_ptr, first, head, n_heads, per, CHUNK)
    for i in range(last - first):
        granule = first + i
        to, inside = state_tile(states_ptr, (granule + 1) * n_heads + head, p, n, head_dim, n_state)
        next_left = tl.load(to, mask=inside, other=0.0)
        next_decay = granule_decay(steps_ptr, granule + 1, head, n_heads, per, CHUNK)
        at, inside = state_tile(states_ptr, granule * n_heads + head, p, n, head_dim, n_state)
        tl.debug_barrier()  # all threads have read what is overwritten now
        tl.store(at, h, mask=inside)
        h = decay * h + left
        norm = tl.sqrt(tl.sum(tl.sum(h * h, 1), 0))
        h *= tl.where(norm > threshold, threshold / norm, 1.0)
        left = next_left
        decay = next_decay
    at, inside = state_tile(states_ptr, last * n_heads + head, p, n, head_dim, n_state)
    tl.debug_barrier()
    tl.store(at, h, mask=inside)
    at, inside = state_tile(h1_ptr, row * n_heads + head, p, n, head_dim, n_state)
    tl.store(at, decay * h + left, mask=inside)


@triton.jit
def granule_at(
    k, left_ptr, steps_ptr, ring_ptr, decays_ptr, first, seen, local, local_decay, in_ring, head, size, n_heads, per,
    e, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What granule k of a row left and its decay (k < 0: of the ring); then both without what came before the call."""
    now = k >= 0
    granule = first + tl.maximum(k, 0)
    at = left_ptr + (granule.to(tl.int64) * n_heads + head) * WIDTH + e
    new = tl.load(at, mask=e < tl.where(now, WIDTH, 0), other=0.0)
    new_decay = granule_decay(steps_ptr, granule, head, n_heads, per, CHUNK)
    left = tl.where(k == 0, new + new_decay * local, new)
    decay = tl.where(k == 0, new_decay * local_decay, new_decay)
    if ring_ptr is None:
        decay = tl.where(now, decay, 1.0)
    else:
        slot = in_ring + ((seen + k + size) % size) * n_heads
        left += tl.load(ring_ptr + slot * WIDTH + e, mask=e < tl.where(now, 0, WIDTH), other=0.0)
        decay = tl.where(now, decay, tl.load(decays_ptr + slot))
    return left, decay, new, new_decay


@triton.jit(do_not_specialize=RUNTIME)
def window_states(
    left_ptr, states_ptr, steps_ptr, firsts_ptr, position_ptr, h0_ptr, local0_ptr, decay0_ptr, ring0_ptr, decays0_ptr,
    h1_ptr, local1_ptr, decay1_ptr, ring1_ptr, decays1_ptr, n_rows, granularity, size, n_heads, per,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The state before each granule: what the `size` granules before it left.

    Each program takes `size` granules of a row. The older part of their windows lies in the `size` granules before
    them: sums from each of these to the last one are made first, and wait where the state is going to be that they
    belong to. The newer part is summed up on the way.
    """
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = (pid // BLOCKS) % n_heads
    part = pid // (BLOCKS * n_heads)
    rows = tl.arange(0, ROWS)
    number = tl.load(firsts_ptr + rows * 2 + 1, mask=rows < n_rows, other=0)
    behind = tl.cumsum(tl.cdiv(number, size), 0)  # parts of all rows up to each
    row = tl.sum(tl.where((behind <= part) & (rows < n_rows), 1, 0), 0)
    base = (part - tl.max(tl.where(behind <= part, behind, 0), 0)) * size
    e = block * BLOCK + tl.arange(0, BLOCK)
    real = row < n_rows  # there may be fewer parts than programs
    inside = e < tl.where(real, WIDTH, 0)
    own = (row * n_heads + head).to(tl.int64)  # of tensors [rows, heads, WIDTH]
    in_ring = (row * size * n_heads + head).to(tl.int64)  # of tensors [rows, size, heads, WIDTH]
    first = tl.load(firsts_ptr + row * 2, mask=real, other=0)
    number = tl.load(firsts_ptr + row * 2 + 1, mask=real, other=0)
    seen = tl.full([], 0, tl.int64)  # granules
    if position_ptr is not None:
        seen = tl.load(position_ptr + row, mask=real, other=0) // granularity
    h = tl.zeros([BLOCK], tl.float32)
    local = tl.zeros([BLOCK], tl.float32)
    local_decay = tl.full([], 1.0, tl.float32)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + own * WIDTH + e, mask=inside, other=0.0)
        local = tl.load(local0_ptr + own * WIDTH + e, mask=inside, other=0.0)
        local_decay = tl.load(decay0_ptr + own, mask=real, other=1.0)
    state_base = states_ptr + (first.to(tl.int64) * n_heads + head) * WIDTH + e
    stride = (n_heads * WIDTH).to(tl.int64)

    if real:
        total = tl.zeros([BLOCK], tl.float32)
        keep = tl.full([], 1.0, tl.float32)
        for i in range(size):
            k = base - 1 - i
            left, decay, new, new_decay = granule_at(
                k, left_ptr, steps_ptr, ring0_ptr, decays0_ptr, first, seen, local, local_decay, in_ring, head, size,
                n_heads, per, e, WIDTH, CHUNK,
            )  # fmt: skip
            total += keep * left
            keep *= decay
            tl.store(state_base + (k + size) * stride, total, mask=e < tl.where(k + size < number, WIDTH, 0))
        tl.debug_barrier()

        newer = tl.zeros([BLOCK], tl.float32)
        keep = tl.full([], 1.0, tl.float32)
        start = h
        left = h
        decay = local_decay
        new = h
        new_decay = local_decay
        for i in range(tl.minimum(size, number - base)):
            k = base + i
            older = tl.load(state_base + k * stride, mask=inside, other=0.0)
            start = tl.where(k == 0, h, newer + keep * older)
            tl.store(state_base + k * stride, start, mask=inside)
            left, decay, new, new_decay = granule_at(
                k, left_ptr, steps_ptr, ring0_ptr, decays0_ptr, first, seen, local, local_decay, in_ring, head, size,
                n_heads, per, e, WIDTH, CHUNK,
            )  # fmt: skip
            newer = decay * newer + left
            keep *= decay

        if base + size >= number:  # the last granule is unfinished
            tl.store(h1_ptr + own * WIDTH + e, new_decay * start + new, mask=inside)
            tl.store(local1_ptr + own * WIDTH + e, left, mask=inside)
            tl.store(decay1_ptr + own, decay)
            for i in range(size):
                k = number - 1 - size + i
                left, decay, new, new_decay = granule_at(
                    k, left_ptr, steps_ptr, ring0_ptr, decays0_ptr, first, seen, local, local_decay, in_ring, head,
                    size, n_heads, per, e, WIDTH, CHUNK,
                )  # fmt: skip
                slot = in_ring + ((seen + k + size) % size) * n_heads
                tl.store(ring1_ptr + slot * WIDTH + e, left, mask=inside)
                tl.store(decays1_ptr + slot, decay)


@triton.jit(do_not_specialize=RUNTIME)
def step(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, mask_ptr, position_ptr, threshold_ptr,
    h_ptr, local_ptr, decay_ptr, ring_ptr, decays_ptr, y_ptr,
    low, high, granularity, size, n_heads, group_heads,
    x_b, x_h, x_p, z_b, z_h, z_p, dt_b, dt_h, B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_p, mask_b,
    head_dim: tl.constexpr, n_state: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token of one head; the states are overwritten. Only what reaches a boundary touches the ring."""
    row = (tl.program_id(0) // n_heads).to(tl.int64)
    head = tl.program_id(0) % n_heads
    group = head // group_heads
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    is_p = p < head_dim
    is_n = n < n_state
    own = row * n_heads + head
    y_at = y_ptr + own * head_dim + p
    live = row >= 0
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row * mask_b) != 0
    if live:
        dt = tl.load(dt_ptr + row * dt_b + head * dt_h).to(tl.float32)
        if bias_ptr is not None:
            dt += tl.load(bias_ptr + head).to(tl.float32)
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.minimum(tl.maximum(dt, low), high)
        decay = tl.exp(dt * tl.load(A_ptr + head).to(tl.float32))
        x = tl.load(x_ptr + row * x_b + head * x_h + p * x_p, mask=is_p, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * B_b + group * B_g + n * B_n, mask=is_n, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + row * C_b + group * C_g + n * C_n, mask=is_n, other=0.0).to(tl.float32)
        new = (dt * x)[:, None] * B[None, :]
        h_at, inside = state_tile(h_ptr, own, p, n, head_dim, n_state)
        h = decay * tl.load(h_at, mask=inside, other=0.0) + new
        y = tl.sum(h * C[None, :], 1)
        if D_ptr is not None:
            y += tl.load(D_ptr + head * D_h + p * D_p, mask=is_p, other=0.0).to(tl.float32) * x
        if z_ptr is not None:
            y *= silu(tl.load(z_ptr + row * z_b + head * z_h + p * z_p, mask=is_p, other=0.0).to(tl.float32))
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=is_p)
        count = tl.load(position_ptr + row) + 1
        ends = count % granularity == 0
        if ring_ptr is None:
            if ends:
                threshold = tl.load(threshold_ptr + head).to(tl.float32)
                norm = tl.sqrt(tl.sum(tl.sum(h * h, 1), 0))
                h *= tl.where(norm > threshold, threshold / norm, 1.0)
        else:
            local_at, inside = state_tile(local_ptr, own, p, n, head_dim, n_state)
            local = decay * tl.load(local_at, mask=inside, other=0.0) + new
            decay *= tl.load(decay_ptr + own)
            if ends:
                newest = count // granularity - 1
                h = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
                for i in range(size - 1):  # the oldest first
                    place = (row * size + (newest + 1 + i) % size) * n_heads + head
                    at, inside = state_tile(ring_ptr, place, p, n, head_dim, n_state)
                    h = tl.load(decays_ptr + place) * h + tl.load(at, mask=inside, other=0.0)
                h = decay * h + local
                place = (row * size + newest % size) * n_heads + head
                at, inside = state_tile(ring_ptr, place, p, n, head_dim, n_state)
                tl.store(at, local, mask=inside)
                tl.store(decays_ptr + place, decay)
                local = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
                decay = tl.full([], 1.0, tl.float32)
            tl.debug_barrier()  # all threads have read what is overwritten now
            tl.store(local_at, local, mask=inside)
            tl.store(decay_ptr + own, decay)
        tl.debug_barrier()
        tl.store(h_at, h, mask=inside)
    else:
        tl.store(y_at, tl.zeros([BLOCK_P], y_ptr.dtype.element_ty), mask=is_p)
