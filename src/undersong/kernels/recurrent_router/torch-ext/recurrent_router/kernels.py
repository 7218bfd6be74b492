"""The kernels: a step of the cell, the choice of experts, and the pointwise parts of their gradients.

`step` has a tile of tokens and of the cell's channels in a program and sums the products of all gates over the router
size; `choose` has all experts of a few tokens. In the backward pass `choose_backward` gives the gradient of the
scores, and `step_backward` sums the gates again and gives the gradients of what goes into them; products with
weights, which come before and after, are torch's. Matrices are contiguous, and SIZE, the router size, is the width
of all but the scores. Products of three TF32 terms keep float32's precision on tensor cores.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(32)  # of W2 that are read at a time


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def read(ptr, rows, columns, n_rows, n_columns):
    """A tile of a contiguous matrix in float32, zeros outside."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + rows[:, None] * n_columns + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_product(total, x, w_ptr, rows, k, n_rows, SIZE: tl.constexpr):
    """total + x W^T, for some rows and columns k of W."""
    inside = (k < SIZE)[:, None] & (rows < n_rows)[None, :]
    w = tl.load(w_ptr + rows[None, :] * SIZE + k[:, None], mask=inside, other=0.0).to(tl.float32)
    return tl.dot(x, w, total, input_precision="tf32x3")


@triton.jit
def add_side(
    r, z, n, x_ptr, w_ptr, bias_ptr, t, c, tokens, SIZE: tl.constexpr, GRU: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Adds W x + bias, of the input's or of the state's side, to the sums of the gates; an Elman cell has only n."""
    for begin in range(0, SIZE, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = read(x_ptr, t, k, tokens, SIZE)
        if GRU:
            r = add_product(r, x, w_ptr, c, k, SIZE, SIZE)
            z = add_product(z, x, w_ptr + SIZE * SIZE, c, k, SIZE, SIZE)
            n = add_product(n, x, w_ptr + 2 * SIZE * SIZE, c, k, SIZE, SIZE)
        else:
            n = add_product(n, x, w_ptr, c, k, SIZE, SIZE)
    return add_bias(r, z, n, bias_ptr, c, SIZE, GRU)


@triton.jit
def add_bias(r, z, n, bias_ptr, c, SIZE: tl.constexpr, GRU: tl.constexpr):
    if GRU:
        r += tl.load(bias_ptr + c, mask=c < SIZE, other=0.0).to(tl.float32)[None, :]
        z += tl.load(bias_ptr + SIZE + c, mask=c < SIZE, other=0.0).to(tl.float32)[None, :]
        bias_ptr += 2 * SIZE
    n += tl.load(bias_ptr + c, mask=c < SIZE, other=0.0).to(tl.float32)[None, :]
    return r, z, n


@triton.jit
def sums(
    u_ptr, h_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, t, c, tokens,
    SIZE: tl.constexpr, GRU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What r and z are sigmoids of, and the two sides of what n is a hyperbolic tangent of."""
    zeros = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    r, z, n = add_side(zeros, zeros, zeros, u_ptr, weight_ih_ptr, bias_ih_ptr, t, c, tokens, SIZE, GRU, BLOCK_K)
    if h_ptr is None:
        r, z, state = add_bias(r, z, zeros, bias_hh_ptr, c, SIZE, GRU)
    else:
        r, z, state = add_side(r, z, zeros, h_ptr, weight_hh_ptr, bias_hh_ptr, t, c, tokens, SIZE, GRU, BLOCK_K)
    return r, z, n, state


@triton.jit
def place(tokens, SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tokens and channels of this program; programs of the same tokens are neighbours."""
    tiles = tl.cdiv(SIZE, BLOCK_C)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return t, c, t[:, None] * SIZE + c[None, :], (t < tokens)[:, None] & (c < SIZE)[None, :]


@triton.jit(do_not_specialize=["tokens"])
def step(
    u_ptr, h_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, new_ptr, tokens,
    SIZE: tl.constexpr, GRU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t, c, at, inside = place(tokens, SIZE, BLOCK_T, BLOCK_C)
    r, z, n, state = sums(
        u_ptr, h_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, t, c, tokens,
        SIZE, GRU, BLOCK_T, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    if GRU:
        new = tanh(n + sigmoid(r) * state)
        if h_ptr is None:
            new -= sigmoid(z) * new
        else:
            new += sigmoid(z) * (tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32) - new)
    else:
        new = tanh(n + state)
    tl.store(new_ptr + at, new, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def step_backward(
    u_ptr, h_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, g_ptr, d_input_ptr, d_state_ptr, dh_ptr,
    tokens,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a GRU, from the gradient g of its new state: gradients of both sides' sums, and z g, the part of the old
    state's gradient that goes past the gates."""
    t, c, at, inside = place(tokens, SIZE, BLOCK_T, BLOCK_C)
    r, z, n, state = sums(
        u_ptr, h_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, t, c, tokens,
        SIZE, True, BLOCK_T, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + r * state)
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    dz = -g * n
    if h_ptr is not None:
        dz += g * tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh_ptr + at, z * g, mask=inside)
    dz *= z * (1.0 - z)
    dn = g * (1.0 - z) * (1.0 - n * n)
    dr = dn * state * r * (1.0 - r)
    at += 2 * t[:, None] * SIZE  # rows of three gates
    tl.store(d_input_ptr + at, dr, mask=inside)
    tl.store(d_input_ptr + at + SIZE, dz, mask=inside)
    tl.store(d_input_ptr + at + 2 * SIZE, dn, mask=inside)
    tl.store(d_state_ptr + at, dr, mask=inside)
    tl.store(d_state_ptr + at + SIZE, dz, mask=inside)
    tl.store(d_state_ptr + at + 2 * SIZE, dn * r, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def choose(
    h_ptr, W2_ptr, base_ptr, scores_ptr, weights_ptr, experts_ptr, tokens,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    scores = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for begin in range(0, SIZE, COLUMNS):
        k = begin + tl.arange(0, COLUMNS)
        scores = add_product(scores, read(h_ptr, t, k, tokens, SIZE), W2_ptr, e, k, EXPERTS, SIZE)
    if base_ptr is not None:
        scores += read(base_ptr, t, e, tokens, EXPERTS)
    there = (e < EXPERTS)[None, :]
    tl.store(scores_ptr + t[:, None] * EXPERTS + e[None, :], scores, mask=(t < tokens)[:, None] & there)

    scores = tl.where(there, scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(p, 1)  # NaN if a score is, and so are the weights then
    # NaN, too, has its turn, before what is not there. By its bits: the compiler takes it that e^x >= 0 at any x.
    number = (p.to(tl.int32, bitcast=True) & 0x7FFFFFFF) <= 0x7F800000
    left = tl.where(there, tl.where(number, p, 0.0), -1.0)
    column = tl.arange(0, BLOCK_TOP)
    weights = tl.zeros([BLOCK_T, BLOCK_TOP], tl.float32)
    experts = tl.zeros([BLOCK_T, BLOCK_TOP], tl.int32)
    for i in range(TOP_K):
        most, expert = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        weights = tl.where((column == i)[None, :], (most / total)[:, None], weights)
        experts = tl.where((column == i)[None, :], expert[:, None], experts)
        left = tl.where(e[None, :] == expert[:, None], -1.0, left)
    if NORM:
        weights = weights / tl.sum(weights, 1)[:, None]
    at = t[:, None] * TOP_K + column[None, :]
    inside = (t < tokens)[:, None] & (column < TOP_K)[None, :]
    tl.store(weights_ptr + at, weights, mask=inside)
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def choose_backward(
    scores_ptr, weights_ptr, experts_ptr, g_scores_ptr, g_weights_ptr, out_ptr, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, with g of the weights w: g_scores + w_e g_e - q_e sum_j w_j g_j over the chosen j.

    q is w itself where weights were normalised (a softmax of the chosen scores), else the softmax of all scores."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_TOP)
    product = read(weights_ptr, t, column, tokens, TOP_K) * read(g_weights_ptr, t, column, tokens, TOP_K)
    mean = tl.sum(product, 1)
    if NORM:
        out = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    else:
        there = (e < EXPERTS)[None, :]
        scores = tl.where(there, read(scores_ptr, t, e, tokens, EXPERTS), float("-inf"))
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        out = -p * (mean / tl.sum(p, 1))[:, None]
    if g_scores_ptr is not None:
        out += read(g_scores_ptr, t, e, tokens, EXPERTS)
    for i in range(TOP_K):
        expert = tl.load(experts_ptr + t * TOP_K + i, mask=t < tokens, other=0)
        weight = tl.load(weights_ptr + t * TOP_K + i, mask=t < tokens, other=0.0)
        g = tl.load(g_weights_ptr + t * TOP_K + i, mask=t < tokens, other=0.0)
        if NORM:
            g -= mean
        out += tl.where(e[None, :] == expert[:, None], (weight * g)[:, None], 0.0)
    tl.store(out_ptr + t[:, None] * EXPERTS + e[None, :], out, mask=(t < tokens)[:, None] & (e < EXPERTS)[None, :])
