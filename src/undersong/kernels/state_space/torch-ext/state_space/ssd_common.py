"""What the SSD kernels share: where a program works, tiles of tokens, step sizes, states between runs.

A sequence is cut in chunks; all chunks of the batch, or of a packed row, are numbered through. Inside a chunk, a_t is
the running sum of the log decays dt A (to base 2), so that exp2(a_i - a_j) is the decay from token j to token i.
Chunks are walked in order, a run of them in each program. Where a few heads would leave the device empty, a sequence
is cut in several runs, whose sums are made by a pass of their own and added up at the start of each run.
"""

import triton
import triton.language as tl

# Arguments whose value must not lead to another compiled kernel.
RUNTIME = [
    "length", "n_chunks", "n_runs", "run_chunks", "n_heads", "group_heads", "part_heads", "n_parts", "n_forward",
    "summing", "dt_b", "dt_t", "dt_h", "mask_b", "mask_t",
]  # fmt: skip


@triton.jit
def run_at(run, n_chunks, n_runs, run_chunks):
    """A run's place in its row, the number of the row's first run, and its first and last + 1 chunk."""
    row = run // n_runs
    place = run % n_runs
    first = row * n_chunks + place * run_chunks
    return place, run - place, first, tl.minimum(first + run_chunks, (row + 1) * n_chunks)


@triton.jit
def chunk_at(chunk, table_ptr, length, n_chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """A chunk's batch row, first and last + 1 token, sequence, and whether the sequence begins and ends in it."""
    if PACKED:
        row = chunk * 0
        begin = tl.load(table_ptr + chunk * 4)
        end = tl.load(table_ptr + chunk * 4 + 1)
        sequence = tl.load(table_ptr + chunk * 4 + 2)
        edges = tl.load(table_ptr + chunk * 4 + 3)
        begins = (edges & 1) != 0
        ends = (edges & 2) != 0
    else:
        row = chunk // n_chunks
        place = chunk % n_chunks
        begin = place * CHUNK
        end = tl.minimum(begin + CHUNK, length)
        sequence = row
        begins = place == 0
        ends = place == n_chunks - 1
    return row.to(tl.int64), begin.to(tl.int64), end, sequence.to(tl.int64), begins, ends


@triton.jit
def tokens_at(mask_ptr, stride_b, stride_t, row, begin, end, t):
    """Which of the positions begin + t hold a token."""
    live = begin + t < end
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row * stride_b + (begin + t) * stride_t, mask=live, other=0) != 0)
    return live


@triton.jit
def tile(ptr, strides, row, begin, head, t, d, live, size):
    """Rows `t` and columns `d` of one head (or group); zeros where there is no token, whatever stands there."""
    base = ptr + row * strides[0] + begin * strides[1] + head.to(tl.int64) * strides[2]
    return tl.load(
        base + t[:, None] * strides[1] + d[None, :] * strides[3], mask=live[:, None] & (d < size)[None, :], other=0.0
    )


@triton.jit
def steps_at(steps_ptr, place, t, CHUNK: tl.constexpr):
    """dt, the running sum a, and its last value, of chunk and head number `place`, as the kernel `steps` left them."""
    base = steps_ptr + place.to(tl.int64) * (2 * CHUNK)
    return tl.load(base + t), tl.load(base + CHUNK + t), tl.load(base + 2 * CHUNK - 1)


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def state_tile(ptr, row, p, n, head_dim: tl.constexpr, n_state: tl.constexpr, when=None):
    """Pointers to one head's [head_dim, state] in a contiguous tensor of them; what of it lies inside, if `when`."""
    height = head_dim
    if when is not None:
        height = tl.where(when, head_dim, 0)
    inside = (p < height)[:, None] & (n < n_state)[None, :]
    return ptr + row.to(tl.int64) * (head_dim * n_state) + (p[:, None] * n_state + n[None, :]), inside


@triton.jit
def start_state(
    ptr, row, p, n, head_dim: tl.constexpr, n_state: tl.constexpr, when, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The state a sequence starts with, if `when`; zeros where there is none."""
    if ptr is None:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    else:
        at, inside = state_tile(ptr, row, p, n, head_dim, n_state, when)
        state = tl.load(at, mask=inside, other=0.0)
    return state


@triton.jit
def add_run(state, sums_ptr, decays_ptr, row, p, n, head_dim: tl.constexpr, n_state: tl.constexpr):
    """The state behind a run, from the one before it."""
    keep = tl.exp2(tl.load(decays_ptr + row))  # 0: a sequence began in between
    at, inside = state_tile(sums_ptr, row, p, n, head_dim, n_state)
    return tl.where(keep > 0, keep * state, 0.0) + tl.load(at, mask=inside, other=0.0)
