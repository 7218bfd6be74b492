"""How the programs of a row work together.

A row is cut in chunks, one program each; a program reads its chunk again in every phase, from the cache, so that it
holds few registers and many programs fit on the device. Where the programs of a row need a common number, each stores
its part in device memory, and they meet: each adds one to a counter and waits until all have. Chunks are handed out by
a ticket, row after row, so all rows in flight are complete but the newest, and that one gets its missing programs as
soon as another row is done.
"""

import triton
import triton.language as tl

CUTS = tl.constexpr(8)  # distances that one round of bracketing tries
ROUNDS = tl.constexpr(3)  # of bracketing before the tokens left are collected
ATTEMPTS = tl.constexpr(3)  # at collecting no more than CAPACITY tokens
CAPACITY = tl.constexpr(1024)
# Words are 64 bits wide and 0 at first. The first HEADER words hold the ticket. A row has FIXED words, then float32s:
# a chunk's moments and masses and counts within CUTS distances, in two sets that rounds use in turn; collected scores.
HEADER = tl.constexpr(16)
MEETINGS = tl.constexpr(0)  # counters: 1 + ATTEMPTS * (ROUNDS + 1) + 1
COLLECTED = tl.constexpr(16)  # how many tokens, for each attempt
VERDICT = tl.constexpr(20)  # of each attempt: GO_ON or FOUND
BEST = tl.constexpr(24)
FIXED = tl.constexpr(26)
CHUNK_WORDS = tl.constexpr(20)  # 8 + 2 * 2 * CUTS float32s
COLUMNS = tl.constexpr(256)  # tokens that are read at a time, one a thread
GO_ON = tl.constexpr(1)
FOUND = tl.constexpr(2)


@triton.jit
def draw(ws_ptr, chunks):
    """The row and the chunk of this program, and the row's words."""
    ticket = tl.atomic_add(ws_ptr, 1, sem="relaxed")
    row = ticket // chunks
    return row, ticket - row * chunks, ws_ptr + HEADER + row * (FIXED + CAPACITY // 2 + chunks * CHUNK_WORDS)


@triton.jit
def floats(words):
    """The row's float32s."""
    return (words + FIXED).to(tl.pointer_type(tl.float32))


@triton.jit
def last_to_arrive(words, meeting, chunks):
    """Whether all other programs of the row were here before; then everything they stored is visible."""
    tl.debug_barrier()
    return tl.atomic_add(words + MEETINGS + meeting, 1, sem="acq_rel") == chunks - 1


@triton.jit
def meet(words, meeting, chunks):
    """Wait for all programs of the row."""
    tl.debug_barrier()
    tl.atomic_add(words + MEETINGS + meeting, 1, sem="acq_rel")
    here = tl.load(words + MEETINGS + meeting, volatile=True)
    while here < chunks:
        here = tl.load(words + MEETINGS + meeting, volatile=True)


@triton.jit
def read(x_ptr, v, n, temperature, TEMPERED: tl.constexpr):
    x = tl.load(x_ptr + v, mask=v < n, other=float("-inf")).to(tl.float32)
    if TEMPERED:
        x = x / temperature
    return x


@triton.jit
def sum4(a, b, c, d):
    """Four sums at once, as a vector."""
    return tl.sum(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COLUMNS, 4]), 0)


@triton.jit
def sum8(a, b, c, d, e, f, g, h):
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.sum(tl.reshape(tl.join(even, odd), [COLUMNS, 8]), 0)


@triton.jit
def verdict(words, attempt):
    word = tl.load(words + VERDICT + attempt, volatile=True)
    while word == 0:
        word = tl.load(words + VERDICT + attempt, volatile=True)
    return word
