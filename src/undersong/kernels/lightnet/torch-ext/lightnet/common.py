"""What the LightNet kernels share: where a program works, tiles of tokens, and how far a level rises.

With a level m no smaller than the keys so far, E_s = e^{k_s - m} and U_t = sum_{s<=t} E_s make it plain linear
attention with queries q_t / U_t and keys E_s. A program walks the chunks of one sequence and head with the state in
registers, m being the running maximum. A chunk in which some channel rises by more than RISE has no level that serves
all of its tokens; it is walked token by token, each with a level of its own. Levels only rise, so such chunks are few.
"""

import triton
import triton.language as tl

RISE = tl.constexpr(30.0)  # e^{2 RISE}, met in gradients, fits float32
RUNTIME = ["length", "n_chunks", "n_heads", "mask_b", "mask_t"]  # must not lead to another compiled kernel


@triton.jit
def finite(level):
    """A level to subtract: e^{-inf - finite(-inf)} is 0 where e^{-inf - -inf} would be NaN."""
    return tl.where(level == float("-inf"), 0.0, level)


@triton.jit
def nonzero(u):
    """A sum to divide by; nothing was written where it is 0, so that any number will do."""
    return tl.where(u > 0, u, 1.0)


@triton.jit
def span_of(cu_ptr, sequence, length, n_chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """A sequence's batch row, first and last + 1 token, and the number of its first chunk. Whatever the offsets are,
    nothing outside the row is touched."""
    if PACKED:
        row = sequence * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), length)
        end = tl.maximum(tl.minimum(tl.load(cu_ptr + sequence + 1), length), begin)
        chunk = begin // CHUNK + sequence
    else:
        row = sequence
        begin = sequence * 0
        end = begin + length
        chunk = sequence * n_chunks
    return row.to(tl.int64), begin, end, chunk.to(tl.int64)


@triton.jit
def tokens_at(mask_ptr, mask_b, mask_t, row, time, end):
    """Which of the positions `time` hold a token."""
    live = time < end
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row * mask_b + tl.cast(time, tl.int64) * mask_t, mask=live, other=0) != 0)
    return live


@triton.jit
def head_at(ptr, strides, row, head):
    return ptr + row * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def tile(base, strides, time, d, live, size, other):
    """Rows `time` and columns `d` of one head in float32; `other` where there is no token, whatever stands there."""
    at = base + tl.cast(time, tl.int64)[:, None] * strides[1] + d[None, :] * strides[3]
    return tl.load(at, mask=live[:, None] & (d < size)[None, :], other=other).to(tl.float32)


@triton.jit
def line(base, strides, mask_ptr, mask_b, mask_t, row, time, end, d, size, other):
    """Token `time` of one head in float32; `other` where it is no token."""
    live = tokens_at(mask_ptr, mask_b, mask_t, row, time + 0 * d, end)
    at = base + tl.cast(time + 0 * d, tl.int64) * strides[1] + d * strides[3]
    return tl.load(at, mask=live & (d < size), other=other).to(tl.float32)


@triton.jit
def rise(m, k):
    """The level behind a chunk of keys, and a bound of how far any channel rises to it from its first token on."""
    high = tl.maximum(m, tl.max(k, 0))
    low = tl.maximum(m, tl.min(tl.where(k == float("-inf"), float("inf"), k), 0))
    return high, tl.max(tl.where(low < high, high - low, 0.0), 0)


@triton.jit
def weights(m, u, high, k):
    """E and U of a chunk behind the state (m, u), relative to the level `high`; and what is left of the state."""
    level = finite(high)
    keep = tl.exp(m - level)
    E = tl.exp(k - level[None, :])
    return keep, E, tl.cumsum(E, 0) + (keep * u)[None, :]


@triton.jit
def level_at(m, u, k, j, t):
    """(m, u) behind token `t` of a chunk of keys `k`, given the state before it."""
    k = tl.where((j <= t)[:, None], k, float("-inf"))
    top = tl.maximum(m, tl.max(k, 0))
    level = finite(top)
    return top, tl.exp(m - level) * u + tl.sum(tl.exp(k - level[None, :]), 0)
