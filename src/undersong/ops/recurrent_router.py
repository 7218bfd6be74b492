"""One layer of a mixture of experts chooses experts from a state that travels up the layers.

Layerwise Recurrent Router for Mixture-of-Experts (Qiu et al., arXiv 2408.06793, section 3): every token has a state h
that one cell, shared by all layers, carries from router to router; the router's scores are linear in it. The state
never travels along the sequence, so tokens are independent rows here.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_shape, computing_dtype, describe

GATES = {3: "gru", 1: "rnn"}  # rows of the cell's weights, in router sizes
KERNEL_LIMIT = 256  # router size and number of experts that the kernel takes


def recurrent_router(u, h, cell, W2, *, top_k, base=None, norm_topk_prob=True, backend="auto"):
    """A recurrent cell, router scores, and the experts they choose, for every token.

    GRU, with [r, z, n] the thirds of the cell's rows as `torch.nn.GRUCell` keeps them:
        r = sigmoid(W_ir u + b_ir + W_hr h + b_hr),   z likewise,   n = tanh(W_in u + b_in + r (W_hn h + b_hn)),
        h' = (1 - z) n + z h
    Elman (a cell without gates): h' = tanh(W_i u + b_i + W_h h + b_h)
    s = base + W2 h',   p = softmax(s),   (w, e) = top_k(p),   w <- w / sum(w) with norm_topk_prob

    Args:
        u: `[tokens, router_size]`, any float dtype: the layer's input, projected.
        h: like u, the state the layer below left; None is the zero state of the first layer.
        cell: `(weight_ih, weight_hh, bias_ih, bias_hh)` of `torch.nn.GRUCell` (`[3 router_size, router_size]`, biases
            `[3 router_size]`) or `torch.nn.RNNCell` (`[router_size, ...]`); the shape says which.
        W2: `[experts, router_size]`.
        top_k: how many experts each token gets.
        base: `[tokens, experts]`, scores to add to, as of a router that is there already; None is 0.
        norm_topk_prob: whether the weights of a token's experts add up to 1.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `(h', s, w, e)`: the new state `[tokens, router_size]`, scores `[tokens, experts]` and weights
        `[tokens, top_k]`, all in float32 (float64 if any input is), and experts `[tokens, top_k]` in int64, the
        largest weight first.

    Raises:
        ValueError: shapes or devices disagree, top_k is not among the experts, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> cell = torch.nn.GRUCell(2, 2)
    >>> parameters = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    >>> h, s, w, e = recurrent_router(torch.ones(1, 2), None, parameters, torch.eye(2), top_k=1)
    >>> torch.allclose(h, cell(torch.ones(1, 2))), torch.equal(s, h), w.tolist()
    (True, True, [[1.0]])
    """
    _validate(u, h, cell, W2, top_k, base)
    return run(OP, backend, u, h, *cell, W2, top_k, base, norm_topk_prob)


def reference(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, top_k, base, norm_topk_prob):
    """The equations, gate by gate."""
    compute = computing_dtype(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base)
    u, W2 = u.to(compute), W2.to(compute)
    h = torch.zeros_like(u) if h is None else h.to(compute)
    weights_i, weights_h, biases_i, biases_h = (
        t.to(compute).split(u.shape[1]) for t in (weight_ih, weight_hh, bias_ih, bias_hh)
    )
    inputs = [u @ w.T + b for w, b in zip(weights_i, biases_i, strict=True)]
    states = [h @ w.T + b for w, b in zip(weights_h, biases_h, strict=True)]
    if len(inputs) == 1:
        h = torch.tanh(inputs[0] + states[0])
    else:
        r, z = (torch.sigmoid(i + s) for i, s in zip(inputs[:2], states[:2], strict=True))
        n = torch.tanh(inputs[2] + r * states[2])
        h = (1 - z) * n + z * h
    scores = h @ W2.T if base is None else base.to(compute) + h @ W2.T
    weights, experts = scores.softmax(-1).topk(top_k, -1)
    return h, scores, weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights, experts


def torch_router(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, top_k, base, norm_topk_prob):
    """All gates in one product a side; without a state the state's side is its bias."""
    compute = computing_dtype(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base)
    with torch.autocast(u.device.type, enabled=False):
        u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base = (
            None if t is None else t.to(compute) for t in (u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base)
        )
        inputs = F.linear(u, weight_ih, bias_ih)
        states = bias_hh.expand_as(inputs) if h is None else F.linear(h, weight_hh, bias_hh)
        if weight_ih.shape[0] == u.shape[1]:
            h = torch.tanh(inputs + states)
        else:
            size = u.shape[1]
            r, z = torch.sigmoid(inputs[:, : 2 * size] + states[:, : 2 * size]).chunk(2, 1)
            n = torch.tanh(torch.addcmul(inputs[:, 2 * size :], r, states[:, 2 * size :]))
            h = n - z * n if h is None else torch.lerp(n, h, z)
        scores = F.linear(h, W2) if base is None else torch.addmm(base, h, W2.T)
        probabilities = scores.softmax(-1)
        weights, experts = probabilities.topk(top_k, -1)
        if norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
    return h, scores, weights, experts


def _validate(u, h, cell, W2, top_k, base):
    check_layout("u", u, "tokens, router_size")
    tokens, size = u.shape
    because = f"u is {describe(u)}"
    if h is not None:
        check_shape("h", h, "tokens, router_size", (tokens, size), because)
    if not isinstance(cell, tuple | list) or len(cell) != 4:
        raise ValueError(
            f"cell ({describe(cell)}) must be (weight_ih, weight_hh, bias_ih, bias_hh); "
            "take them from a torch.nn.GRUCell or RNNCell."
        )
    weight_ih = cell[0]
    check_layout("cell's weight_ih", weight_ih, "rows, router_size")
    gates = weight_ih.shape[0] // max(size, 1)
    if gates not in GATES or weight_ih.shape != (gates * size, size):
        raise ValueError(
            f"cell's weight_ih ({describe(weight_ih)}) must be [{3 * size}, {size}] (GRU) or [{size}, {size}] (Elman) "
            f"because {because}; build the cell with that size for input and state."
        )
    because = f"its weight_ih is {describe(weight_ih)}"
    check_shape("cell's weight_hh", cell[1], "rows, router_size", weight_ih.shape, because)
    for name, bias in {"bias_ih": cell[2], "bias_hh": cell[3]}.items():
        check_shape(f"cell's {name}", bias, "rows", weight_ih.shape[:1], because)
    check_layout("W2", W2, "experts, router_size")
    experts = W2.shape[0]
    check_shape("W2", W2, "experts, router_size", (experts, size), f"u is {describe(u)}")
    if base is not None:
        check_shape("base", base, "tokens, experts", (tokens, experts), f"u is {describe(u)} and W2 {describe(W2)}")
    if not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k ({top_k!r}) must lie between 1 and the number of experts ({experts}).")
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    given = {f"cell's {name}": t for name, t in zip(names, cell, strict=True)}
    check_devices("u", u, {"h": h, **given, "W2": W2, "base": base})


def _kernel_refuses(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, top_k, base, norm_topk_prob):
    if computing_dtype(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    for name, size in {"router size": u.shape[1], "number of experts": W2.shape[0]}.items():
        if size > KERNEL_LIMIT:
            return f"the {name} ({size}) is above the kernel's {KERNEL_LIMIT}; use backend='torch'"
    return None


def _example(device, dtype):
    """A small input for the kernel's self-check: several tiles, not full, of tokens, channels and experts.

    Scores lie so far apart that rounding does not change the choice; the cell stays in float32, as in the models.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, size, experts = 300, 72, 20  # enough for the way that many tokens take

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    u, h, W2 = normal(tokens, size), normal(tokens, size).tanh(), normal(experts, size, scale=0.05)
    cell = normal(3 * size, size, scale=0.2), normal(3 * size, size, scale=0.2), normal(3 * size), normal(3 * size)
    base = 0.5 * torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    h, *cell = (x.to(device).requires_grad_() for x in (h, *cell))
    u, W2, base = (x.to(device, dtype).requires_grad_() for x in (u, W2, base))
    return u, h, *cell, W2, 3, base, True


OP = register(
    Op(
        name="recurrent_router",
        reference=reference,
        torch=torch_router,
        kernel="recurrent_router",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
