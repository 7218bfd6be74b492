"""SSD state kernel: the state before each chunk, and the gradient of the state after it, in one launch.

With g the gradient of the state after a chunk, the second is the first one's recurrence backwards in time:

    h <- exp2(a_end) h + sum_j exp2(a_end - a_j) dt_j x_j B_j^T
    g <- exp2(a_end) g + sum_i exp2(a_i) dy_i C_i^T

One half of the programs walks forwards, the other backwards. With `summing`, nothing but each run's own sum and log
decay is kept, from which the runs start that follow.
"""

import triton
import triton.language as tl

from .ssd_common import RUNTIME, add_run, chunk_at, run_at, silu, start_state, state_tile, steps_at, tile, tokens_at


@triton.jit
def walk(
    run, head, block, x_ptr, x_strides, B_ptr, B_strides, z_ptr, z_strides, start_ptr, states_ptr, finish_ptr,
    sums_ptr, decays_ptr,
    steps_ptr, mask_ptr, table_ptr, mask_b, mask_t,
    summing, length, n_chunks, n_runs, run_chunks,
    n_heads, group_heads, head_dim: tl.constexpr, n_state: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place, row_run, first, last = run_at(run, n_chunks, n_runs, run_chunks)
    t = tl.arange(0, CHUNK)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = head // group_heads
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    before = n_runs - 1 - place if REVERSE else place
    for i in range(before * (1 - summing)):
        other = row_run + n_runs - 1 - i if REVERSE else row_run + i
        state = add_run(state, sums_ptr, decays_ptr, other * n_heads + head, p, n, head_dim, n_state)
    if not PACKED:
        row, begin, end, sequence, begins, ends = chunk_at(
            last - 1 if REVERSE else first, table_ptr, length, n_chunks, CHUNK, PACKED
        )
        starts = ends if REVERSE else begins
        state += start_state(start_ptr, sequence * n_heads + head, p, n, head_dim, n_state, starts, BLOCK_P, BLOCK_N)
    all_decay = tl.full([], 0.0, tl.float32)

    for i in tl.range(0, last - first, num_stages=STAGES):
        chunk = last - 1 - i if REVERSE else first + i
        row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
        x = tile(x_ptr, x_strides, row, begin, head, t, p, live, head_dim).to(tl.float32)
        B = tile(B_ptr, B_strides, row, begin, group, t, n, live, n_state).to(DOT)
        dt, a, total = steps_at(steps_ptr, chunk * n_heads + head, t, CHUNK)
        if PACKED:
            starts = ends if REVERSE else begins
            new = start_state(start_ptr, sequence * n_heads + head, p, n, head_dim, n_state, starts, BLOCK_P, BLOCK_N)
            state = tl.where(starts, new, state)
            all_decay = tl.where(starts, float("-inf"), all_decay)
        at, inside = state_tile(states_ptr, chunk * n_heads + head, p, n, head_dim, n_state, summing == 0)
        tl.store(at, state.to(states_ptr.dtype.element_ty), mask=inside)
        if REVERSE:
            weight = tl.exp2(a)
            if z_ptr is not None:
                x *= silu(tile(z_ptr, z_strides, row, begin, head, t, p, live, head_dim).to(tl.float32))
        else:
            weight = dt * tl.exp2(total - a)
        written = (x * weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(written), B, acc=state * tl.exp2(total), input_precision=PRECISION)
        all_decay += total
        if finish_ptr is not None:  # noqa: SIM102 - a constant: no code without it
            if PACKED:
                finishes = (begins if REVERSE else ends) & (summing == 0)
                at, inside = state_tile(finish_ptr, sequence * n_heads + head, p, n, head_dim, n_state, finishes)
                tl.store(at, state, mask=inside)
    if summing:
        at, inside = state_tile(sums_ptr, run * n_heads + head, p, n, head_dim, n_state)
        tl.store(at, state, mask=inside)
        tl.store(decays_ptr + run * n_heads + head, all_decay)
    if finish_ptr is not None:  # noqa: SIM102
        if not PACKED:
            finishes = (first % n_chunks == 0 if REVERSE else last % n_chunks == 0) & (summing == 0)
            row = (first // n_chunks) * n_heads + head
            at, inside = state_tile(finish_ptr, row, p, n, head_dim, n_state, finishes)
            tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def states(
    x_ptr, dy_ptr, B_ptr, C_ptr, z_ptr, h0_ptr, g1_ptr, h_ptr, g_ptr, g0_ptr, h_sums_ptr, g_sums_ptr, h_decays_ptr,
    g_decays_ptr, steps_ptr, mask_ptr, table_ptr,
    n_forward, summing, length, n_chunks, n_runs, run_chunks,
    n_heads, group_heads, head_dim: tl.constexpr, n_state: tl.constexpr,
    n_blocks: tl.constexpr,
    x_strides, dy_strides, B_strides, C_strides, z_strides, mask_b, mask_t,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks) % n_heads
    run = pid // (n_blocks * n_heads)
    if run < n_forward:
        walk(
            run, head, block, x_ptr, x_strides, B_ptr, B_strides, None, z_strides, h0_ptr, h_ptr, None,
            h_sums_ptr, h_decays_ptr,
            steps_ptr, mask_ptr, table_ptr, mask_b, mask_t,
            summing, length, n_chunks, n_runs, run_chunks, n_heads, group_heads, head_dim, n_state,
            False, PACKED, DOT, PRECISION, CHUNK, BLOCK_P, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        walk(
            run - n_forward, head, block, dy_ptr, dy_strides, C_ptr, C_strides, z_ptr, z_strides, g1_ptr, g_ptr,
            g0_ptr, g_sums_ptr, g_decays_ptr,
            steps_ptr, mask_ptr, table_ptr, mask_b, mask_t,
            summing, length, n_chunks, n_runs, run_chunks, n_heads, group_heads, head_dim, n_state,
            True, PACKED, DOT, PRECISION, CHUNK, BLOCK_P, BLOCK_N, STAGES,
        )  # fmt: skip
