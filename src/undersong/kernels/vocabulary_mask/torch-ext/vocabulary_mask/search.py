"""Finds, for each row of scores, the interval of scores to keep.

Typical and top-p filtering are one search. With p the softmax of a row x and H its entropy, H + log p_v equals
x_v - sum_u p_u x_u: typical sampling keeps the tokens nearest to the mean score, top-p those nearest to the largest.
Both keep {v : |x_v - centre| <= e} with the smallest e that holds `mass` probability and `need` tokens. Rounds that
sum up the probability within CUTS distances bracket e; the few tokens left in the bracket are collected, and one
program finds the last one needed.

Float sums run in a fixed order, and what is in no order is added as whole numbers: a row's result depends neither on
its neighbours nor on which program came first.
"""

import triton
import triton.language as tl

from .common import (
    ATTEMPTS,
    CAPACITY,
    COLLECTED,
    COLUMNS,
    CUTS,
    FOUND,
    GO_ON,
    ROUNDS,
    VERDICT,
    floats,
    last_to_arrive,
    meet,
    read,
    sum4,
    sum8,
    verdict,
)

# An entry of a token: its units of probability, 2^40 of which are 1, and 2^42 for the token itself.
UNIT = tl.constexpr(1099511627776.0)
ONE_TOKEN = tl.constexpr(4398046511104.0)
MARGIN = tl.constexpr(1e-5)  # of probability: more than float32 sums are off by


@triton.jit
def moments(
    x_ptr, parts, words, chunk, chunks, tail, n, temperature,
    TYPICAL: tl.constexpr, TEMPERED: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row: largest score m, sum of e^{x - m}, centre, a distance within which all but `tail` of the probability
    lies, and whether there is a distribution: all scores finite or -inf, at least one finite."""
    v = chunk.to(tl.int32) * BLOCK + tl.arange(0, COLUMNS)
    m = tl.full([COLUMNS], float("-inf"), tl.float32)
    for i in tl.range(0, BLOCK, COLUMNS, loop_unroll_factor=8):
        x = read(x_ptr, v + i, n, temperature, TEMPERED)
        m = tl.maximum(m, tl.where(x < float("inf"), x, float("-inf")))  # the second sum finds what is left out here
    m = tl.max(m, 0)
    level = tl.where(m == float("-inf"), 0.0, m)
    s = tl.zeros([COLUMNS], tl.float32)
    first = tl.zeros([COLUMNS], tl.float32)
    second = tl.zeros([COLUMNS], tl.float32)
    for i in tl.range(0, BLOCK, COLUMNS, loop_unroll_factor=8):
        x = read(x_ptr, v + i, n, temperature, TEMPERED)
        y = tl.where(x == float("-inf"), 0.0, tl.where(x < float("inf"), x - level, 0.0))
        e = tl.where(x == float("-inf"), 0.0, tl.exp(y))
        s += tl.where(x < float("inf"), e, float("nan"))
        first += e * y
        second += e * y * y
    tl.store(parts + 8 * chunk + tl.arange(0, 4), sum4(s, first, second, s))
    tl.store(parts + 8 * chunk + 4, m)
    meet(words, 0, chunks)

    k = tl.arange(0, GROUPS)
    m = tl.load(parts + 8 * k + 4, mask=k < chunks, other=float("-inf"), volatile=True)
    s = tl.load(parts + 8 * k, mask=k < chunks, other=0.0, volatile=True)
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    drop = tl.where(m == float("-inf"), 0.0, m - top)
    share = tl.exp(drop)
    here = k < chunks
    total = tl.sum(tl.where(here, share * s, 0.0), 0)
    valid = total > 0  # not so for NaN
    total = tl.where(valid, total, 1.0)
    centre = top
    if TYPICAL:
        first = tl.load(parts + 8 * k + 1, mask=k < chunks, other=0.0, volatile=True)
        second = tl.load(parts + 8 * k + 2, mask=k < chunks, other=0.0, volatile=True)
        # The choice keeps products out of the sum's multiply-adds. Lanes add up in pairs, each its own number first:
        # with one product exact and the other rounded the two would differ, and with them the centres of the lanes.
        mean = tl.sum(tl.where(here, share * (first + s * drop), 0.0), 0)
        square = tl.sum(tl.where(here, share * (second + 2 * drop * first + s * drop * drop), 0.0), 0)
        mean = tl.where(valid, mean / total, 0.0)
        square = tl.where(valid, square / total, 0.0)
        centre += mean
        # Chebyshev: the probability farther away than r is at most variance / r^2.
        radius = tl.sqrt(tl.maximum(square - mean * mean, 0.0) / tail)
    else:
        radius = tl.log(n / (total * tail))  # n tokens of less than tail / n have less than tail
    return top, total, centre, tl.maximum(radius, 1e-4), valid


@triton.jit
def store_within(
    ptr, x_ptr, chunk, top, centre, lo, step, n, temperature,
    WEIGHED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight e^{x - top}, or the number, of the tokens nearer than lo + step, lo + 2 step, ..., lo + CUTS step."""
    v = chunk.to(tl.int32) * BLOCK + tl.arange(0, COLUMNS)
    s0 = tl.zeros([COLUMNS], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for i in tl.range(0, BLOCK, COLUMNS, loop_unroll_factor=8):
        x = read(x_ptr, v + i, n, temperature, TEMPERED)
        d = tl.abs(x - centre)
        weight = tl.exp(x - top) if WEIGHED else tl.where(x > float("-inf"), 1.0, 0.0)
        s0 += tl.where(d < lo + step, weight, 0.0)
        s1 += tl.where(d < lo + step * 2, weight, 0.0)
        s2 += tl.where(d < lo + step * 3, weight, 0.0)
        s3 += tl.where(d < lo + step * 4, weight, 0.0)
        s4 += tl.where(d < lo + step * 5, weight, 0.0)
        s5 += tl.where(d < lo + step * 6, weight, 0.0)
        s6 += tl.where(d < lo + step * 7, weight, 0.0)
        s7 += tl.where(d < lo + step * 8, weight, 0.0)
    tl.store(ptr + tl.arange(0, CUTS), sum8(s0, s1, s2, s3, s4, s5, s6, s7))


@triton.jit
def collect(
    scores, counter, x_ptr, chunk, centre, lo, hi, n, temperature, TEMPERED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Appends the scores of the tokens from lo up to hi, in whatever order, as far as there is room; counts them."""
    v = chunk.to(tl.int32) * BLOCK + tl.arange(0, COLUMNS)
    crowd = tl.zeros([COLUMNS], tl.int32)
    for i in tl.range(0, BLOCK, COLUMNS, loop_unroll_factor=8):
        x = read(x_ptr, v + i, n, temperature, TEMPERED)
        d = tl.abs(x - centre)
        crowd += ((x > float("-inf")) & (d >= lo) & (d < hi)).to(tl.int32)
    total = tl.sum(crowd, 0)
    if total > CAPACITY:
        tl.atomic_add(counter, total, sem="relaxed")
    elif total > 0:
        for i in tl.range(0, BLOCK, COLUMNS):
            x = read(x_ptr, v + i, n, temperature, TEMPERED)
            d = tl.abs(x - centre)
            inside = (x > float("-inf")) & (d >= lo) & (d < hi)
            place = tl.atomic_add(counter + v * 0, v * 0 + 1, mask=inside, sem="relaxed")
            tl.store(scores + place, x, mask=inside & (place < CAPACITY))


@triton.jit
def below(f):
    """The next smaller float32."""
    bits = f.to(tl.int32, bitcast=True)
    bits = tl.where(f > 0, bits - 1, tl.where(f < 0, bits + 1, -2147483647))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def interval(centre, reach, lo_ptr):
    """Stores the least and the largest float32 at most `reach` away."""
    first, last = centre.to(tl.float64) - reach, centre.to(tl.float64) + reach
    x_lo, x_hi = first.to(tl.float32), last.to(tl.float32)
    tl.store(lo_ptr, tl.where(x_lo.to(tl.float64) < first, -below(-x_lo), x_lo))
    tl.store(lo_ptr + 1, tl.where(x_hi.to(tl.float64) > last, below(x_hi), x_hi))


@triton.jit
def last_needed(scores, collected, top, scale, centre, lo, target, need):
    """Distance of the last token needed among those collected, in float64, to reach the units of probability `target`
    and `need` tokens. Sums of entries are whole numbers below 2^53, exact in any order."""
    i = tl.arange(0, CAPACITY)
    live = i < collected
    x = tl.load(scores + i, mask=live, other=0.0, volatile=True)
    d = tl.where(live, tl.abs(x.to(tl.float64) - centre.to(tl.float64)), 0.0)
    key = d.to(tl.int64, bitcast=True)  # in the order of d, as it is >= 0
    units = tl.floor(tl.exp(x - top).to(tl.float64) * scale + 0.5)
    entry = tl.where(live, units + ONE_TOKEN, 0.0)
    farthest = tl.max(d, 0)
    end = farthest.to(tl.int64, bitcast=True) + 1
    begin = tl.min(tl.where(live, d, farthest), 0).to(tl.int64, bitcast=True)
    before = farthest * 0.0
    within = tl.sum(entry, 0)
    # bisection until one token, or tied ones, are left between begin and end
    while (end - begin > 1) & (within - before >= 2 * ONE_TOKEN):
        middle = begin + (end - begin) // 2
        inner = tl.sum(tl.where(key < middle, entry, 0.0), 0)
        count = tl.floor(inner / ONE_TOKEN)
        if (inner - count * ONE_TOKEN < target) | (count < need):
            begin = middle
            before = inner
        else:
            end = middle
            within = inner
    return tl.maximum(tl.max(tl.where(key < end, d, 0.0), 0), lo.to(tl.float64))


@triton.jit
def search(
    x_ptr, words, chunk, chunks, target, need, n, temperature,
    TYPICAL: tl.constexpr, COUNT: tl.constexpr, TEMPERED: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least and largest score to keep, and whether the row has a distribution; if not, everything is kept."""
    if not COUNT:
        need = 0  # one token is there anyway
    parts = floats(words)
    scores = parts + chunks * (8 + 4 * CUTS)
    tau = (target / UNIT).to(tl.float32)
    top, total, centre, radius, valid = moments(
        x_ptr, parts, words, chunk, chunks, tl.maximum(1.0 - tau, 1e-6), n, temperature,
        TYPICAL, TEMPERED, GROUPS, BLOCK,
    )  # fmt: skip
    x_lo = centre * 0.0 + float("-inf")
    x_hi = centre * 0.0 + float("inf")
    done = (target > UNIT) | (valid == 0)
    lo = radius * 0.0
    hi = x_hi
    step = radius / CUTS
    nearer = lo.to(tl.float64)
    nearer_count = lo
    attempt = tl.zeros([], tl.int32)
    k = tl.arange(0, GROUPS)
    i = tl.arange(0, CUTS)
    here = (k < chunks)[:, None] & (i >= 0)[None, :]
    while done == 0:
        margin = tl.where(attempt < ATTEMPTS - 1, MARGIN, 0.0)
        for turn in range(ROUNDS):
            masses = parts + (8 + (turn % 2) * 2 * CUTS) * chunks
            own = masses + chunk * (2 * CUTS)
            store_within(own, x_ptr, chunk, top, centre, lo, step, n, temperature, True, TEMPERED, BLOCK)
            if COUNT:
                store_within(own + CUTS, x_ptr, chunk, top, centre, lo, step, n, temperature, False, TEMPERED, BLOCK)
            meet(words, 1 + attempt * (ROUNDS + 1) + turn, chunks)
            at = masses + k[:, None] * (2 * CUTS) + i[None, :]
            mass = tl.sum(tl.load(at, mask=here, other=0.0, volatile=True).to(tl.float64), 0)
            short = mass < (tau - margin) * total
            enough = mass >= (tau + margin) * total
            if COUNT:
                count = tl.sum(tl.load(at + CUTS, mask=here, other=0.0, volatile=True), 0)
                short = short | (count < need)
                enough = enough & (count >= need)
                nearer_count = tl.maximum(nearer_count, tl.max(tl.where(short, count, 0.0), 0))
            nearer = tl.maximum(nearer, tl.max(tl.where(short, mass, 0.0), 0))
            cut = lo + step * (i + 1).to(tl.float32)
            lo = tl.maximum(lo, tl.max(tl.where(short, cut, 0.0), 0))
            hi = tl.minimum(hi, tl.min(tl.where(enough, cut, float("inf")), 0))
            step = tl.where(hi < float("inf"), (hi - lo) / CUTS, radius)

        counter = (words + COLLECTED + attempt).to(tl.pointer_type(tl.int32))
        collect(scores, counter, x_ptr, chunk, centre, lo, hi, n, temperature, TEMPERED, BLOCK)
        if last_to_arrive(words, 1 + attempt * (ROUNDS + 1) + ROUNDS, chunks):
            collected = tl.load(counter, volatile=True)
            result = tl.full([], FOUND, tl.int64)
            found = parts + 2 * attempt  # where moments were, which all have read
            if collected <= CAPACITY:
                scale = UNIT / total.to(tl.float64)
                rest = target - nearer * scale
                reach = last_needed(scores, collected, top, scale, centre, lo, rest, need - nearer_count)
                interval(centre, reach, found)
            elif attempt < ATTEMPTS - 1:
                result = tl.full([], GO_ON, tl.int64)
            else:  # more tokens than that at one distance, by all that float32 can tell: they stay together
                interval(centre, hi.to(tl.float64) * (1.0 - 2.9802322387695312e-08), found)
            tl.debug_barrier()
            tl.atomic_xchg(words + VERDICT + attempt, result, sem="release")
        if verdict(words, attempt) == FOUND:
            x_lo = tl.load(parts + 2 * attempt, volatile=True)
            x_hi = tl.load(parts + 2 * attempt + 1, volatile=True)
            done = done | True
        attempt += 1
    return x_lo, x_hi, valid
