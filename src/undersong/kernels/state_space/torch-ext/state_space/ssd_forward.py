"""SSD forward kernel: one program walks a run of chunks of one head and block of head_dim, its state in registers.

With S_ij = (C_i . B_j) exp2(a_i - a_j) dt_j for j <= i, and h the state before the chunk
(Transformers are SSMs, arXiv 2405.21060, section 6):

    y_i = sum_j S_ij x_j + exp2(a_i) h C_i + D x_i
    h <- exp2(a_end) h + sum_j exp2(a_end - a_j) dt_j x_j B_j^T

x is read once and y written once; nothing else reaches memory.
"""

import triton
import triton.language as tl

from .ssd_common import RUNTIME, add_run, chunk_at, run_at, silu, start_state, state_tile, steps_at, tile, tokens_at


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    x_ptr, steps_ptr, B_ptr, C_ptr, D_ptr, z_ptr, h0_ptr, mask_ptr, table_ptr,
    sums_ptr, decays_ptr, y_ptr, h1_ptr,
    length, n_chunks, n_runs, run_chunks,
    n_heads, group_heads, head_dim: tl.constexpr, n_state: tl.constexpr,
    n_blocks: tl.constexpr,
    x_strides, B_strides, C_strides, D_strides, z_strides, mask_b, mask_t,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % n_blocks
    head = (pid // n_blocks) % n_heads
    run = pid // (n_blocks * n_heads)
    place, row_run, first, last = run_at(run, n_chunks, n_runs, run_chunks)
    t = tl.arange(0, CHUNK)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = head // group_heads
    h = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for other in range(row_run, run):
        h = add_run(h, sums_ptr, decays_ptr, other * n_heads + head, p, n, head_dim, n_state)
    if not PACKED:
        row, begin, end, sequence, begins, ends = chunk_at(first, table_ptr, length, n_chunks, CHUNK, PACKED)
        h += start_state(h0_ptr, sequence * n_heads + head, p, n, head_dim, n_state, begins, BLOCK_P, BLOCK_N)
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=p < head_dim, other=0.0).to(tl.float32)

    for chunk in tl.range(first, last, num_stages=STAGES):
        row, begin, end, sequence, begins, ends = chunk_at(chunk, table_ptr, length, n_chunks, CHUNK, PACKED)
        live = tokens_at(mask_ptr, mask_b, mask_t, row, begin, end, t)
        x = tile(x_ptr, x_strides, row, begin, head, t, p, live, head_dim)
        B = tile(B_ptr, B_strides, row, begin, group, t, n, live, n_state).to(DOT)
        C = tile(C_ptr, C_strides, row, begin, group, t, n, live, n_state).to(DOT)
        dt, a, total = steps_at(steps_ptr, chunk * n_heads + head, t, CHUNK)
        if PACKED:
            new = start_state(h0_ptr, sequence * n_heads + head, p, n, head_dim, n_state, begins, BLOCK_P, BLOCK_N)
            h = tl.where(begins, new, h)
        weights = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        decay = tl.exp2(tl.where(t[:, None] >= t[None, :], a[:, None] - a[None, :], float("-inf")))
        weights = weights * decay * dt[None, :]
        y = tl.dot(C, tl.trans(h.to(DOT)), input_precision=PRECISION) * tl.exp2(a)[:, None]
        y = tl.dot(weights.to(DOT), x.to(DOT), acc=y, input_precision=PRECISION)
        written = (x.to(tl.float32) * (dt * tl.exp2(total - a))[:, None]).to(DOT)
        h = tl.dot(tl.trans(written), B, acc=h * tl.exp2(total), input_precision=PRECISION)
        if D_ptr is not None:
            y += D[None, :] * x.to(tl.float32)
        if z_ptr is not None:
            y *= silu(tile(z_ptr, z_strides, row, begin, head, t, p, live, head_dim).to(tl.float32))
        y_base = y_ptr + ((row * length + begin) * n_heads + head) * head_dim
        tl.store(
            y_base + t[:, None] * (n_heads * head_dim) + p[None, :], y.to(y_ptr.dtype.element_ty),
            mask=(begin + t < end)[:, None] & (p < head_dim)[None, :],
        )  # fmt: skip
        if PACKED:
            at, inside = state_tile(h1_ptr, sequence * n_heads + head, p, n, head_dim, n_state, ends)
            tl.store(at, h, mask=inside)
    if not PACKED:  # noqa: SIM102 - a constant: no code without it
        if last % n_chunks == 0:
            at, inside = state_tile(h1_ptr, (first // n_chunks) * n_heads + head, p, n, head_dim, n_state)
            tl.store(at, h, mask=inside)
