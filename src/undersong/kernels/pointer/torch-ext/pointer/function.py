"""Launches the kernels and registers them as torch operators, so that autograd and torch.compile see them."""

import torch
import triton

from .kernels import backward, forward
from .registry import register

# How a kernel cuts its work, for a single step (decoding) and for several. Nothing else depends on a length.
FORWARD = {
    True: {"BLOCK_T": 1, "BLOCK_N": 32, "BLOCK_H": 64, "num_warps": 4},
    False: {"BLOCK_T": 8, "BLOCK_N": 16, "BLOCK_H": 32, "num_warps": 4},
}
BACKWARD = {"CHUNK": 128, "BLOCK_T": 8, "BLOCK_N": 16, "BLOCK_H": 32, "num_warps": 4}

_INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported


def additive_pointer_attention(We, Wd, v, mask=None):
    """logits[b, t, j] = v . tanh(We[b, j] + Wd[b, t]) in float32, -inf where mask is False.

    We [batch, n, hidden], Wd [batch, T, hidden], v [hidden] in float32, bfloat16 or float16 and any strides, mask
    [batch, n] bool.
    """
    if torch.float64 in (We.dtype, Wd.dtype, v.dtype):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if We.device.type == "cpu" and not _INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    return _operator(We, Wd, v, mask)


def _forward(We, Wd, v, mask):
    scores = _empty_scores(We, Wd, v, mask)
    batch, steps, n = scores.shape
    cut = FORWARD[steps == 1]
    programs = batch * triton.cdiv(steps, cut["BLOCK_T"]) * triton.cdiv(n, cut["BLOCK_N"])
    _launch(forward, programs, (We, Wd, v, mask), (scores,), (), cut)
    return scores


def _backward(We, Wd, v, mask, g):
    (batch, n, hidden), steps = We.shape, Wd.shape[1]
    if not g.numel():
        return torch.zeros_like(We), torch.zeros_like(Wd), torch.zeros_like(v)
    single = {"dtype": torch.float32, "device": We.device}
    chunks = triton.cdiv(steps, BACKWARD["CHUNK"])
    dWe, dv = torch.empty((chunks, batch, n, hidden), **single), torch.empty((chunks * batch, hidden), **single)
    dWd = torch.empty((batch, steps, hidden), dtype=Wd.dtype, device=Wd.device)
    programs = chunks * batch * triton.cdiv(hidden, BACKWARD["BLOCK_H"])
    _launch(backward, programs, (We, Wd, v, mask, g.contiguous()), (dWe, dWd, dv), (batch,), BACKWARD)
    dWe = dWe[0] if chunks == 1 else dWe.sum(0)
    return dWe.to(We.dtype), dWd, dv.sum(0).to(v.dtype)


def _launch(kernel, programs, inputs, outputs, sizes, cut):
    We, Wd, v, mask, *rest = inputs
    if programs:
        strides = *_strides(We), *_strides(Wd), *v.stride(), *((0, 0) if mask is None else _strides(mask))
        mask = None if mask is None else mask.view(torch.uint8)
        with torch.cuda.device_of(We):
            kernel[(programs,)](
                We, Wd, v, mask, *rest, *outputs, Wd.shape[1], *We.shape[1:], *sizes, *strides,
                MASKED=mask is not None, **cut,
            )  # fmt: skip


def _strides(x):
    """Strides, with 0 for a batch of one: whatever that stride was, it must not lead to another compiled kernel."""
    return x.stride() if x.shape[0] > 1 else (0, *x.stride()[1:])


def _empty_scores(We, Wd, v, mask):
    return We.new_empty((We.shape[0], Wd.shape[1], We.shape[1]), dtype=torch.float32)


def _fake_backward(We, Wd, v, mask, g):
    return We.new_empty(We.shape), Wd.new_empty(Wd.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, g):
    return *_backward_operator(*ctx.saved_tensors, g), None


_INPUTS = "Tensor We, Tensor Wd, Tensor v, Tensor? mask"
_operator = register("scores", f"({_INPUTS}) -> Tensor", _forward, _empty_scores, _differentiate, _save)
_backward_operator = register(
    "scores_backward", f"({_INPUTS}, Tensor g) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward
)
