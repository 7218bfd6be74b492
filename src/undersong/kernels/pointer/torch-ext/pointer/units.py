"""The hidden units z = tanh(a + d) of a tile of steps and positions.

With c the largest d of the tile's steps, a' = a + c and d' = d - c,

    z = w / (w + 2),      w = e^{2(a' + d')} - 1 = (e^{2a'} - 1) e^{2d'} + (e^{2d'} - 1)

whose exponentials belong to a position or to a step, so that a unit costs a multiply-add and a division: as many calls
of the special-function unit as the hardware's own tanh, of which float32 inputs would keep 11 bits. As d' <= 0, the
terms of w are no larger than w + 2, and small where a' and d' are: z is as precise as tanh(a + d). Where a' must be
cut off lest its exponential overflow, z is 1 either way, unless some d' lies so far below 0 that it matters; such a
tile takes an exponential for each unit.
"""

import triton
import triton.language as tl

CUT = tl.constexpr(80.0)  # of 2a': its exponential, and w + 2, are numbers that a division takes
FAR = tl.constexpr(-60.0)  # of 2d': tanh((CUT + FAR) / 2) is 1


@triton.jit
def expm1(y):
    """e^y - 1 for y cut off at CUT, relatively precise at any y; NaN stays."""
    y = tl.where(y > CUT, CUT, y)
    s = tl.where(tl.abs(y) < 0.5, y, 0.0)
    p = 1 / 40320.0 + s * (1 / 362880.0)
    p = 1 / 5040.0 + s * p
    p = 1 / 720.0 + s * p
    p = 1 / 120.0 + s * p
    p = 1 / 24.0 + s * p
    p = 1 / 6.0 + s * p
    p = 0.5 + s * p
    return tl.where(tl.abs(y) < 0.5, s + s * s * p, tl.exp(y) - 1)


@triton.jit
def hidden_units(a, d):
    """a [positions, units], d [steps, units] -> [steps, positions, units]."""
    c = tl.max(d, 0)
    low = 2 * (d - c[None, :])
    if tl.min(tl.min((low > FAR).to(tl.int32), 1), 0) == 1:  # NaN is not
        high = expm1(2 * (a + c[None, :]))
        w = high[None, :, :] * tl.exp(low)[:, None, :] + expm1(low)[:, None, :]
    else:
        w = expm1(2 * (a[None, :, :] + d[:, None, :]))
    return w / (w + 2)
