"""What the forward and backward kernels of the selective scan share: where a program works, tiles, softplus.

A program walks one sequence for one block of channels, TILE time steps at a time. Tiles [state, channels, TILE] have
all time steps of a (state, channel) in one thread, so that taking a step out of a tile (`step`) costs nothing and the
recurrence runs in registers. Tiles [channels, TILE] are read and finished in the layout that suits memory, where every
element has one thread, and change layout once (`pin`, `scale`). Which layout the compiler gives to what lies between
follows from the order of the loads: that of A comes first, those of [channels, TILE] last.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# How a [batch, length, channels] tensor lies in memory. The compiler must know which stride is 1 to read sectors.
STRIDED = tl.constexpr(0)
TIME_LAST = tl.constexpr(1)
CHANNELS_LAST = tl.constexpr(2)  # the other strides are multiples of ALIGN, in units of which they are handed over
ALIGN = tl.constexpr(8)
PAD = tl.constexpr(16)  # rows of zeros behind each row of B and C, so that a tile may be read past its end


@triton.jit
def locate(cu_ptr, length, per_group, blocks, groups, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """This program's sequence, batch row, begin, end, group, channels [BLOCK] and which of them exist."""
    pid = tl.program_id(0)
    block = pid % blocks
    group = (pid // blocks) % groups
    sequence = (pid // (blocks * groups)).to(tl.int64)
    row = sequence
    begin = length * 0
    end = length
    if PACKED:  # whatever the offsets are, nothing outside the row is touched
        row = sequence * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), length)
        end = tl.minimum(tl.load(cu_ptr + sequence + 1), length)
    inner = block * BLOCK + tl.arange(0, BLOCK)
    return sequence, row, begin, end, group, group * per_group + inner, inner < per_group


@triton.jit
def origin(ptr, row, channel, stride_b, stride_c, LAYOUT: tl.constexpr):
    """Pointers [channels, 1] to the first time step of a row of a [batch, length, channels] tensor."""
    if LAYOUT == CHANNELS_LAST:
        return ptr + row * stride_b * ALIGN + channel[:, None]
    return ptr + row * stride_b + channel.to(tl.int64)[:, None] * stride_c


@triton.jit
def read(base, time, exists, stride_t, LAYOUT: tl.constexpr, EVEN: tl.constexpr):
    """[channels, time] tile; `base` from `origin`."""
    if LAYOUT == CHANNELS_LAST:
        at = base + (time.to(tl.int64) * stride_t * ALIGN)[None, :]
    elif LAYOUT == TIME_LAST:
        at = base + time[None, :]
    else:
        at = base + (time.to(tl.int64) * stride_t)[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=exists[:, None], other=0.0)


@triton.jit
def words(base, row, group, length, groups, STATE: tl.constexpr):
    """Where `gather` wrote a row and group, and the distance between its time steps."""
    size: tl.constexpr = STATE if base.dtype.element_ty == tl.int32 else 2 * STATE
    return base + (row * (length + PAD) * groups + group) * size, groups * size


@triton.jit
def read_states(at, STATE: tl.constexpr):
    """Tiles of B and C in float32; `at` points into what `gather` wrote."""
    if at.dtype.element_ty == tl.int32:
        both = tl.load(at)
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    return tl.load(at).to(tl.float32), tl.load(at + STATE).to(tl.float32)


@triton.jit
def settle(touched, ptr, length):
    """For what was read only to have it in the cache: never stores it (length >= 0), but the compiler cannot know."""
    tl.store(tl.broadcast_to(ptr, touched.shape), touched, mask=tl.zeros(touched.shape, tl.int32) + length < 0)


@triton.jit
def scale(d, x, A, b):
    """e^{d A} and x b: [channels, time] times [state, channels, 1] and [state, 1, time]; A in units of log2(e).

    Written as one product of pairs, so that d and x change layout together.
    """
    A, b = tl.broadcast(A, b)
    decay, x = tl.split(tl.join(d, x)[None, :, :, :] * tl.join(A, b))
    return tl.exp2(decay), x


@triton.jit
def place(ptr, row, time, channel, length, channels, LAYOUT: tl.constexpr):
    """Pointers to a [channels, time] tile of an output, which lies in memory as u does."""
    time = time.to(tl.int64)[None, :]
    if LAYOUT == TIME_LAST:
        return ptr + (row * channels + channel.to(tl.int64)[:, None]) * length + time
    return ptr + (row * length + time) * channels + channel[:, None]


@triton.jit
def alive(mask_ptr, row, time, end, stride_b, stride_t, MASKED: tl.constexpr):
    """Which positions of a tile hold a token. `time` may pass `end`, by less than a tile."""
    live = time < end
    if MASKED:
        live = live & (tl.load(mask_ptr + row * stride_b + tl.minimum(time, end - 1).to(tl.int64) * stride_t) != 0)
    return live


@triton.jit
def step_size(delta, bias, live, SOFTPLUS: tl.constexpr):
    """d_t = softplus(delta_t + bias), 0 where there is no token."""
    d = delta.to(tl.float32) + bias
    if SOFTPLUS:
        d = softplus(d, delta.dtype == tl.float32)
    return tl.where(live[None, :], d, 0.0)


@triton.jit
def lively(x, live, MASKED: tl.constexpr):
    """Float32 x, 0 where the mask hides a token, whatever is there. (Past the end x repeats the last token.)"""
    if MASKED:
        return tl.where(live[None, :], x.to(tl.float32), 0.0)
    return x.to(tl.float32)


@triton.jit
def pin(x, y):
    """x and y themselves. Tied together, the compiler computes them once, in the layout they were read in, where it
    would rather convert half precision inputs and compute them many times over in the layout of their readers."""
    return tl.split(tl.join(x, y))


@triton.jit
def step(x, t, TILE: tl.constexpr):
    """x[..., t] of a [..., TILE] tile, t known at compile time: a choice of registers, once zeros are folded away."""
    chosen = tl.arange(0, TILE)[None, None, :] == t
    return tl.sum(tl.where(chosen, x.to(tl.int32, bitcast=True), 0), axis=2).to(tl.float32, bitcast=True)


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), log1p(e) / e on [0, 1] by a polynomial, however small it is.

    Its relative error is 1e-7; 1e-5 will do for inputs that were rounded to half precision.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if EXACT:
        p = -0.0032563784848882193 * e + 0.01990716097750889
        p = p * e - 0.0570642008529433
        p = p * e + 0.10614264695755053
        p = p * e - 0.1531186310697868
        p = p * e + 0.19678117257867664
        p = p * e - 0.2495455887134854
        p = p * e + 0.33330004035244165
        p = p * e - 0.4999990399276468
        p = p * e + 0.9999999953848524
    else:
        p = -0.02397957257926464 * e + 0.10150004923343658
        p = p * e - 0.2102936953306198
        p = p * e + 0.3252951502799988
        p = p * e - 0.49937260150909424
        p = p * e + 0.9999918341636658
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def silu(x):
    x = x.to(tl.float32)
    return x * sigmoid(x)


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)  # at most 1
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit(
    do_not_specialize=[
        "length",
        "rows",
        "sB_b",
        "sB_t",
        "sB_g",
        "sB_n",
        "sC_b",
        "sC_t",
        "sC_g",
        "sC_n",
        "sm_b",
        "sm_t",
    ]
)
def gather(
    B_ptr, C_ptr, mask_ptr, out_ptr, length, rows, groups, size,
    sB_b: tl.int64, sB_t: tl.int32, sB_g: tl.int32, sB_n: tl.int32,
    sC_b: tl.int64, sC_t: tl.int32, sC_g: tl.int32, sC_n: tl.int32, sm_b: tl.int64, sm_t: tl.int32,
    MASKED: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """B and C side by side for the kernels, [batch, length + PAD, groups, ...], 0 where there is no token or no state:
    two bfloat16 in one int32 [STATE], so that one instruction makes a float32 of either, or float32 [2, STATE].
    """
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of (batch, time, group)
    n = tl.arange(0, STATE)[None, :]
    group = index % groups
    time = (index // groups) % (length + PAD)
    row = (index // groups // (length + PAD)).to(tl.int64)
    live = (index < rows) & (time < length)
    if MASKED:
        live = live & (tl.load(mask_ptr + row * sm_b + time.to(tl.int64) * sm_t, mask=live, other=0) != 0)
    inside = live[:, None] & (n < size)
    time = time.to(tl.int64)
    B = tl.load(B_ptr + (row * sB_b + time * sB_t + group * sB_g)[:, None] + n * sB_n, mask=inside, other=0.0)
    C = tl.load(C_ptr + (row * sC_b + time * sC_t + group * sC_g)[:, None] + n * sC_n, mask=inside, other=0.0)
    every = (index < rows)[:, None]
    if out_ptr.dtype.element_ty == tl.int32:
        low = B.to(tl.int16, bitcast=True).to(tl.int32) & 65535
        high = C.to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(out_ptr + index.to(tl.int64)[:, None] * STATE + n, low | high, mask=every)
    else:
        at = out_ptr + index.to(tl.int64)[:, None] * (2 * STATE) + n
        tl.store(at, B.to(out_ptr.dtype.element_ty), mask=every)
        tl.store(at + STATE, C.to(out_ptr.dtype.element_ty), mask=every)
