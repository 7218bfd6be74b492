"""The two kernels on top of the search: one writes the filtered scores, one draws a token from them."""

import triton
import triton.language as tl

from .common import ATTEMPTS, BEST, COLUMNS, ROUNDS, draw, last_to_arrive, read
from .search import UNIT, search

WIDTH = tl.constexpr(1024)  # tokens that are written at a time


@triton.jit
def setting(ptr, value, row, PER_ROW: tl.constexpr):
    if PER_ROW:
        value = tl.load(ptr + row)
    return value


@triton.jit
def target_of(mass_ptr, mass, row, PER_ROW: tl.constexpr):
    """Units of probability to reach; more than there are: no filter."""
    mass = tl.cast(setting(mass_ptr, mass, row, PER_ROW), tl.float64)
    return tl.where(mass >= 1.0, 2 * UNIT, mass * UNIT)


@triton.jit(do_not_specialize=["need", "chunks"])
def mask_kernel(
    x_ptr, out_ptr, ws_ptr, mass_ptr, need_ptr, mass, need, fill, n, stride_x, chunks,
    TYPICAL: tl.constexpr, PER_ROW_MASS: tl.constexpr, PER_ROW_NEED: tl.constexpr,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, words = draw(ws_ptr, chunks)
    x_ptr += row * stride_x
    target = target_of(mass_ptr, mass, row, PER_ROW_MASS)
    need = setting(need_ptr, need, row, PER_ROW_NEED)
    x_lo, x_hi, _ = search(x_ptr, words, chunk, chunks, target, need, n, 1.0, TYPICAL, COUNT, False, GROUPS, BLOCK)
    out_ptr += row * n
    for i in tl.range(0, BLOCK, WIDTH):
        v = chunk.to(tl.int32) * BLOCK + i + tl.arange(0, WIDTH)
        raw = tl.load(x_ptr + v, mask=v < n, other=0.0)
        x = raw.to(tl.float32)
        removed = ((x < x_lo) | (x > x_hi)) & (x > float("-inf"))
        tl.store(out_ptr + v, tl.where(removed, fill, raw).to(out_ptr.dtype.element_ty), mask=v < n)


@triton.jit
def gumbel(seed, offsets):
    """-log(-log(1 - u)) with u uniform in (0, 1), fine near 0, which is where the largest values come from."""
    u = (tl.randint(seed, offsets).to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25))), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["need", "chunks"])
def sample_kernel(
    x_ptr, out_ptr, ws_ptr, seed_ptr, mass_ptr, need_ptr, temperature_ptr, mass, need, temperature,
    n, stride_x, chunks,
    PER_ROW_MASS: tl.constexpr, PER_ROW_NEED: tl.constexpr, PER_ROW_TEMPERATURE: tl.constexpr,
    COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, words = draw(ws_ptr, chunks)
    x_ptr += row * stride_x
    temperature = tl.cast(setting(temperature_ptr, temperature, row, PER_ROW_TEMPERATURE), tl.float32)
    target = target_of(mass_ptr, mass, row, PER_ROW_MASS)
    need = setting(need_ptr, need, row, PER_ROW_NEED)
    x_lo, x_hi, valid = search(
        x_ptr, words, chunk, chunks, target, need, n, temperature, True, COUNT, True, GROUPS, BLOCK
    )
    seed = tl.load(seed_ptr)
    v = chunk.to(tl.int32) * BLOCK + tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    token = v
    for i in tl.range(0, BLOCK, COLUMNS):
        x = read(x_ptr, v + i, n, temperature, True)
        score = tl.where(
            (x >= x_lo) & (x <= x_hi) & (x > float("-inf")), x + gumbel(seed, (row * n).to(tl.int32) + v + i), best
        )
        token = tl.where(score > best, v + i, token)
        best = tl.maximum(best, score)
    top = tl.where(valid, tl.max(best, 0), float("-inf"))
    token = tl.min(tl.where(best == top, token, n), 0)
    # In the order of (score, -token), and never 0
    bits = top.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    if top > float("-inf"):
        tl.atomic_max(words + BEST, (order << 31) | (0x7FFFFFFF - token), sem="relaxed")
    if last_to_arrive(words, 1 + ATTEMPTS * (ROUNDS + 1), chunks):
        winner = tl.load(words + BEST, volatile=True)
        tl.store(out_ptr + row, tl.where(winner == 0, -1, 0x7FFFFFFF - (winner & 0x7FFFFFFF)))
