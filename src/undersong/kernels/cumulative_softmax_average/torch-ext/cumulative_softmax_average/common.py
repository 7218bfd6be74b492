"""What the forward and backward kernels share: where a program works, how it hands its sum on, safe arithmetic.

A sequence is cut in chunks, one program each, that run in parallel in a single launch: a program sums up its chunk,
publishes the sum in a slot of device memory, waits for the sums of the chunks that come before it in scan order, and
then walks its own chunk (now in the cache) with the right carry. A program's place in scan order is a ticket drawn
when it starts, so that it only ever waits for programs that started before it. To bound what it reads, every GROUP-th
program also publishes the whole sum up to and including itself.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)
LOG2E = tl.constexpr(1.4426950408889634)
HEADER = tl.constexpr(16)  # words in front of the slots; the first is the ticket counter
TAIL = tl.constexpr(2)  # words of a slot behind its BLOCK_D: two scalars
EMPTY = tl.constexpr(-1)  # bits of a word not written yet: a NaN that no arithmetic on the device gives


@triton.jit
def finite(level):
    """A level to subtract: e^{-inf - finite(-inf)} is 0 where e^{-inf - -inf} would be NaN."""
    return tl.where(level == float("-inf"), 0.0, level)


@triton.jit
def level(z):
    """z to subtract from: an empty prefix (-inf) has no part in any output, e^{x - inf} = 0."""
    return tl.where(z == float("-inf"), float("inf"), z)


@triton.jit
def locate(slots_ptr, cu_ptr, length, n_chunks, n_units, n_heads, n_blocks, PACKED: tl.constexpr):
    """This program's step in scan order and unit (sequence, head, block of dim); the batch row, begin and end of its
    sequence. Units of one step share cache lines of a token: blocks of dim run fastest, then heads."""
    pid = tl.program_id(0)
    if n_chunks > 1:
        pid = tl.atomic_add(slots_ptr, 1) + 1
    step = pid // n_units
    unit = pid % n_units
    block = unit % n_blocks
    head = (unit // n_blocks) % n_heads
    sequence = unit // (n_blocks * n_heads)
    if PACKED:  # whatever the offsets are, nothing outside the row is touched
        row = sequence * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), length)
        end = tl.minimum(tl.load(cu_ptr + sequence + 1), length)
    else:
        row = sequence
        begin = sequence * 0
        end = begin + length
    return step, unit, block, head, sequence, row.to(tl.int64), begin, end


@triton.jit
def tokens(mask_ptr, row, time, last, stride_b, stride_t, MASKED: tl.constexpr):
    """Which of the positions `time` hold a token."""
    live = time < last
    if MASKED:
        live = live & (
            tl.load(mask_ptr + row * stride_b + tl.cast(time, tl.int64) * stride_t, mask=live, other=0) != 0
        )
    return live


@triton.jit
def slot_base(slots_ptr, unit, n_chunks, BLOCK_D: tl.constexpr):
    """A unit's slots: one for each step, then one for each group's whole sum."""
    return slots_ptr + HEADER + tl.cast(unit, tl.int64) * (n_chunks + n_chunks // GROUP + 1) * (BLOCK_D + TAIL)


@triton.jit
def publish(base, slot, first, second, vector, BLOCK_D: tl.constexpr):
    ptr = base + slot * (BLOCK_D + TAIL)
    tl.store(ptr + tl.arange(0, BLOCK_D), vector.to(tl.int32, bitcast=True))
    tl.store(ptr + BLOCK_D, first.to(tl.int32, bitcast=True))
    tl.store(ptr + BLOCK_D + 1, second.to(tl.int32, bitcast=True))


@triton.jit
def wait(ptr, needed):
    """Values at `ptr` where they are needed (others: 0), as soon as all of them are there."""
    bits = tl.load(ptr, mask=needed, other=0, volatile=True)
    while tl.max((bits == EMPTY).to(tl.int32)) > 0:
        bits = tl.load(ptr, mask=needed, other=0, volatile=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def collect(base, step, n_chunks, BLOCK_D: tl.constexpr):
    """The sums of all steps before this one: up to GROUP slots (which of them count, two scalars, vector)."""
    k = tl.arange(0, GROUP)
    group = step // GROUP
    # 0 is the whole sum of the groups before, k step k - 1 of this group
    needed = (k < tl.minimum(group, 1)) | ((k > 0) & (k <= step % GROUP))
    slot = tl.where(k == 0, n_chunks + group - 1, group * GROUP + k - 1)
    ptr = base + slot * (BLOCK_D + TAIL)
    vector = wait(ptr[:, None] + tl.arange(0, BLOCK_D)[None, :], needed[:, None])
    return needed, wait(ptr + BLOCK_D, needed), wait(ptr + BLOCK_D + 1, needed), vector
