"""Launches the kernels and registers them as torch operators, so that autograd and torch.compile see them."""

import functools

import torch
import triton

from . import kernels
from .registry import register

# How the kernels cut their work, in their own names. A few tokens are spread over as many programs as there is work
# for; many have the weights read less often. Nothing else depends on the number of tokens.
FEW = 256
STEP = {
    True: {"BLOCK_T": 16, "BLOCK_C": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    False: {"BLOCK_T": 64, "BLOCK_C": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
}
CHOOSE = {"BLOCK_T": 16, "num_warps": 4, "num_stages": 4}
LARGEST = 256  # router size, and number of experts: a program holds all scores of its tokens

_INTERPRETED = not isinstance(kernels.step, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
_COMPILED = {}  # what decides how a kernel is compiled -> the compiled kernel


def recurrent_router(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, top_k, base=None, norm_topk_prob=True):
    """h' = cell(u, h), s = base + W2 h' and the top_k of softmax(s) -> (h', s, weights, experts), for every token.

    u and h [tokens, size], h None for zeros; weights and biases of a torch.nn.GRUCell or RNNCell, the shape says
    which; W2 [experts, size], base [tokens, experts] or None; all in float32, bfloat16 or float16. Results in float32,
    experts in int64. Of equal probabilities the lower expert comes first.
    """
    inputs = u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base
    if (reason := problem(*inputs)) is not None:
        raise ValueError(f"{reason}; use the torch path.")
    return tuple(_operator(*inputs, top_k, norm_topk_prob))


def problem(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base=None):
    """Why the kernel cannot take these inputs, or None."""
    if max(W2.shape) > LARGEST:
        return f"experts ({W2.shape[0]}) and router size ({W2.shape[1]}) must be at most {LARGEST}"
    if u.device.type == "cpu" and not _INTERPRETED:
        return "the kernel needs CUDA tensors, got cpu; set TRITON_INTERPRET=1 before the start"
    inputs = u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base
    if any(x is not None and x.dtype == torch.float64 for x in inputs):
        return "the kernel computes in float32, got float64 inputs"
    return None


def _forward(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base, top_k, norm):
    new, scores, weights, experts = outputs = _empty_outputs(u, W2, top_k)
    cell = u, h, weight_ih, weight_hh, bias_ih, bias_hh
    _launch_step(kernels.step, cell, (new,), {"GRU": weight_ih.shape[0] != u.shape[1]})
    constants = {"SIZE": u.shape[1], **_choice(W2.shape[0], top_k, norm)}
    _launch_choice(kernels.choose, (new, W2, base), outputs[1:], constants)
    return outputs


def _backward(
    u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, new, scores, weights, experts, norm, g_new, g_scores, g_weights,
    needed,
):  # fmt: skip
    """Gradients in float32 of the eight inputs that may have one, empty where not needed."""
    g = g_new
    with torch.autocast(u.device.type, enabled=False):
        if g_weights is not None:
            g_scores = _choose_backward(scores, weights, experts, g_scores, g_weights, W2.shape[0], norm)
        elif g_scores is not None:
            g_scores = g_scores.clone()  # an operator returns nothing that it was given
        if g_scores is not None:
            g = g_scores @ W2.float() if g is None else torch.addmm(g, g_scores, W2.float())
        if weight_ih.shape[0] == u.shape[1]:
            d_input = d_state = g * (1 - new * new)
            past = None
        else:
            d_input, d_state, past = _step_backward(u, h, weight_ih, weight_hh, bias_ih, bias_hh, g)
        find = (
            lambda: d_input @ weight_ih.float(),
            lambda: d_state @ weight_hh.float() if past is None else past.addmm_(d_state, weight_hh.float()),
            lambda: d_input.T @ u.float(),
            lambda: d_state.T @ h.float(),
            lambda: d_input.sum(0),
            lambda: d_state.sum(0),
            lambda: g_scores.T @ new,
            lambda: g_scores,
        )
        return [f() if need else u.new_empty(0) for f, need in zip(find, needed)]  # noqa: B905 - python 3.9


def _choose_backward(scores, weights, experts, g_scores, g_weights, n_experts, norm):
    tokens, top_k = weights.shape
    out = torch.empty((tokens, n_experts), dtype=torch.float32, device=weights.device)
    inputs = None if norm else scores, weights, experts, g_scores, g_weights
    _launch_choice(kernels.choose_backward, inputs, (out,), _choice(n_experts, top_k, norm))
    return out


def _step_backward(u, h, weight_ih, weight_hh, bias_ih, bias_hh, g):
    tokens, size = u.shape
    d_input, d_state = (torch.empty((tokens, 3 * size), dtype=torch.float32, device=u.device) for _ in range(2))
    past = None if h is None else torch.empty((tokens, size), dtype=torch.float32, device=u.device)
    inputs = u, h, weight_ih, weight_hh, bias_ih, bias_hh, g
    _launch_step(kernels.step_backward, inputs, (d_input, d_state, past), {})
    return d_input, d_state, past


def _launch_step(kernel, inputs, outputs, constants):
    tokens, size = inputs[0].shape
    cut = STEP[tokens <= FEW]
    programs = _cdiv(tokens, cut["BLOCK_T"]) * _cdiv(size, cut["BLOCK_C"])
    _launch(kernel, programs, inputs, outputs, tokens, {"SIZE": size, **constants}, cut)


def _launch_choice(kernel, inputs, outputs, constants):
    tokens = outputs[0].shape[0]
    _launch(kernel, _cdiv(tokens, CHOOSE["BLOCK_T"]), inputs, outputs, tokens, constants, CHOOSE)


@functools.lru_cache
def _choice(experts, top_k, norm):
    """Constants of the kernels that have all experts of a token at once; a matrix product has at least 16."""
    blocks = {"BLOCK_E": max(16, triton.next_power_of_2(experts)), "BLOCK_TOP": triton.next_power_of_2(top_k)}
    return {"EXPERTS": experts, "TOP_K": top_k, "NORM": norm, **blocks}


def _cdiv(a, b):
    return -(-a // b)  # triton.cdiv takes the host microseconds


def _launch(kernel, programs, inputs, outputs, tokens, constants, cut):
    """A launch; the next one with inputs of the same kinds skips Triton's look at them, half of its host time."""
    if not programs:
        return
    inputs = [x if x is None or x.is_contiguous() else x.contiguous() for x in inputs]
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in inputs]
    key = (kernel, outputs[0].device, tokens <= FEW, *kinds, *constants.values())
    with torch.cuda.device_of(outputs[0]):
        if key in _COMPILED:
            compiled, blocks = _COMPILED[key]
            compiled[(programs, 1, 1)](*inputs, *outputs, tokens, *constants.values(), *blocks)
        else:
            compiled = kernel[(programs,)](*inputs, *outputs, tokens, **constants, **cut)
            if not _INTERPRETED:
                _COMPILED[key] = compiled, [value for name, value in cut.items() if name.startswith("BLOCK")]


def _empty_outputs(u, W2, top_k):
    tokens, single = u.shape[0], {"dtype": torch.float32, "device": u.device}
    return (
        torch.empty((tokens, u.shape[1]), **single),
        torch.empty((tokens, W2.shape[0]), **single),
        torch.empty((tokens, top_k), **single),
        torch.empty((tokens, top_k), dtype=torch.int64, device=u.device),
    )


def _fake_forward(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base, top_k, norm):
    return _empty_outputs(u, W2, top_k)


def _fake_backward(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, new, scores, weights, experts, norm, *rest):
    shapes = u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, scores
    return [
        x.new_empty(x.shape, dtype=torch.float32) if need else u.new_empty(0)
        for x, need in zip(shapes, rest[-1])  # noqa: B905 - python 3.9
    ]


def _save(ctx, inputs, output):
    *tensors, base, _, ctx.norm = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (*tensors, base)]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_new, g_scores, g_weights, _):
    saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:8])
    needed[3] &= saved[1] is not None  # without a state nothing is multiplied with its weights
    if g_scores is None and g_weights is None:
        needed[6] = needed[7] = False
    gradients = _backward_operator(*saved, ctx.norm, g_new, g_scores, g_weights, needed)
    given = (
        gradient.to(dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, needed)  # noqa: B905 - python 3.9
    )
    return *given, None, None


_INPUTS = "Tensor u, Tensor? h, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh, Tensor W2"
_operator = register(
    "forward",
    f"({_INPUTS}, Tensor? base, int top_k, bool norm) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _differentiate,
    _save,
)
_backward_operator = register(
    "backward",
    f"({_INPUTS}, Tensor new, Tensor scores, Tensor weights, Tensor experts, bool norm, Tensor? g_new,"
    " Tensor? g_scores, Tensor? g_weights, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)
