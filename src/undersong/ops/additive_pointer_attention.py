"""Additive attention scores, the output distribution of a pointer network, without the tensor of all hidden units.

Pointer Networks (Vinyals et al. 2015, arXiv 1506.03134, section 2.3): position j of the input is scored at decoding
step t by one hidden layer, whose units `[batch, T, n, hidden]` are held block by block and computed again for the
gradients; what stays is `[batch, T, n]`.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_mask, check_shape, computing_dtype, describe

BLOCK = 2**19  # hidden units held at once, twice, for each thread of a CPU: in its caches, in few calls
FEW = 2**15  # so many hidden units are cheaper to keep than to hold in blocks
SATURATED = 20.0  # where tanh is 1 to the last bit, in float64 too


def additive_pointer_attention(We, Wd, v, *, mask=None, backend="auto"):
    """Scores of every input position at every decoding step.

    logits[b, t, j] = v . tanh(We[b, j] + Wd[b, t])               (Pointer Networks, arXiv 1506.03134, equation 3)

    Args:
        We: `[batch, n, hidden]`, the projected encoder outputs W1 e_j, any float dtype, any strides.
        Wd: `[batch, T, hidden]`, the projected decoder states W2 d_t.
        v: `[hidden]`.
        mask: `[batch, n]` bool; False positions score -inf and get no gradient, whatever We holds there.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        logits `[batch, T, n]` in float32 (float64 if any input is).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> We, Wd = torch.tensor([[[0.0, 0.0], [9.0, -9.0]]]), torch.zeros(1, 1, 2)
    >>> additive_pointer_attention(We, Wd, torch.tensor([3.0, 1.0]))
    tensor([[[0.0000, 2.0000]]])
    """
    _validate(We, Wd, v, mask)
    return run(OP, backend, We, Wd, v, mask)


def reference(We, Wd, v, mask=None):
    """The definition, with all hidden units at once."""
    We, Wd, v = (x.to(computing_dtype(We, Wd, v)) for x in (We, Wd, v))
    We = We if mask is None else We.masked_fill(~mask[..., None], 0.0)  # padding may hold anything, NaN included
    logits = (torch.tanh(We[:, None] + Wd[:, :, None]) * v).sum(-1)
    return logits if mask is None else logits.masked_fill(~mask[:, None], -torch.inf)


def torch_scores(We, Wd, v, mask=None):
    """Hidden units in blocks that stay in the cache; nothing of their size is ever stored."""
    if Wd.shape[1] * We.numel() <= FEW or torch.compiler.is_exporting():
        return reference(We, Wd, v, mask)
    # torch.compile would unroll the loop over the blocks; its graph breaks here instead.
    scores = torch.compiler.disable(_Scores.apply) if torch.compiler.is_dynamo_compiling() else _Scores.apply
    We, Wd, v = (x.to(computing_dtype(We, Wd, v)) for x in (We, Wd, v))
    if mask is None:
        return scores(We, Wd, v)
    return scores(We.masked_fill(~mask[..., None], 0.0), Wd, v).masked_fill(~mask[:, None], -torch.inf)


class _Scores(torch.autograd.Function):
    """With z the hidden units and g the gradient of the scores, d_btjh = g_btj (1 - z_btjh^2) is that of v's inputs:

    dWe_bjh = v_h sum_t d_btjh,      dWd_bth = v_h sum_j d_btjh,      dv_h = sum_btj g_btj z_btjh
    """

    @staticmethod
    def forward(ctx, We, Wd, v):
        ctx.save_for_backward(We, Wd, v)
        scores = v.new_empty(*Wd.shape[:2], We.shape[1])
        units = _Units(We, Wd)
        for rows, steps in units.blocks:
            torch.mv(units(rows, steps).view(-1, len(v)), v, out=scores[rows, steps].view(-1))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        We, Wd, v = ctx.saved_tensors
        dWe, dWd, dv = torch.zeros_like(We), torch.empty_like(Wd), torch.zeros_like(v)
        units = _Units(We, Wd)
        for rows, steps in units.blocks:
            z, g_b = units(rows, steps), g[rows, steps]
            dv.addmv_(z.view(-1, len(v)).T, g_b.reshape(-1))
            d = torch.ops.aten.tanh_backward.grad_input(g_b.unsqueeze(-1), z, grad_input=units.spare(z))
            dWe[rows] += d.sum(1)
            dWd[rows, steps] = d.sum(2)
        return dWe.mul_(v), dWd.mul_(v), dv


class _Units:
    """z = tanh(We + Wd), `[rows, steps, n, hidden]`, for one block after the other in the same memory.

    On a CPU a unit costs no tanh. With c the largest Wd of a row over its steps, a = We + c and b = Wd - c,

        z = w / (w + 2),      w = e^{2(a + b)} - 1 = (e^{2a} - 1) e^{2b} + (e^{2b} - 1)

    As b <= 0, the two terms of w are no larger than w + 2 and small where a and b are: z is as exact as tanh(a + b).
    e^{2a} may overflow. Where a is cut off, z is 1 either way, unless b lies so far below 0 that it matters: then it
    is tanh after all.
    """

    def __init__(self, We, Wd):
        (batch, n, hidden), steps = We.shape, Wd.shape[1]
        on_cpu = We.device.type == "cpu"
        self.We, self.Wd, self.scale = We, Wd, None
        if on_cpu:
            top = 0.49 * math.log(torch.finfo(We.dtype).max)
            c = Wd.amax(1, keepdim=True)
            b = 2 * (Wd - c)
            if b.min() > 2 * (SATURATED - top):  # NaN is not
                self.We = (We + c).clamp_(max=top).mul_(2).expm1_()
                self.Wd, self.scale = b.expm1(), b.exp()
        size = BLOCK * torch.get_num_threads() if on_cpu else 2**24
        at_once = min(max(1, size // (n * hidden)), steps)
        rows = max(1, size // (steps * n * hidden))
        self.blocks = [
            (slice(row, min(row + rows, batch)), slice(step, min(step + at_once, steps)))
            for row in range(0, batch, rows)
            for step in range(0, steps, at_once)
        ]
        self.memory = We.new_empty(2, min(rows, batch) * at_once * n * hidden)

    def __call__(self, rows, steps):
        We, Wd = self.We[rows, None], self.Wd[rows, steps, None]
        shape = len(We), Wd.shape[1], *We.shape[2:]
        z = self.memory[0, : math.prod(shape)].view(shape)
        if self.scale is None:
            return torch.add(We, Wd, out=z).tanh_()
        w = torch.addcmul(Wd, We, self.scale[rows, steps, None], out=z)
        return w.div_(torch.add(w, 2.0, out=self.spare(w)))

    def spare(self, like):
        """Memory for one more block, in the shape of `like`."""
        return self.memory[1, : like.numel()].view_as(like)


def _validate(We, Wd, v, mask):
    check_layout("We", We, "batch, n, hidden")
    batch, n, hidden = We.shape
    because = f"We is {describe(We)}"
    check_layout("Wd", Wd, "batch, T, hidden")
    check_shape("Wd", Wd, "batch, T, hidden", (batch, Wd.shape[1], hidden), because)
    check_shape("v", v, "hidden", (hidden,), because)
    if mask is not None:
        check_mask(mask, (batch, n), "batch, n")
    check_devices("We", We, {"Wd": Wd, "v": v, "mask": mask})


def _kernel_refuses(We, Wd, v, mask=None):
    if computing_dtype(We, Wd, v) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    return None


def _example(device, dtype):
    """A small input for the kernel's self-check: several tiles, not full, a masked row, and a step far from others."""
    generator = torch.Generator().manual_seed(0)
    We, Wd, v = (torch.randn(shape, generator=generator) for shape in ((3, 37, 72), (3, 19, 72), (72,)))
    Wd[0, 3] -= 40.0
    mask = torch.ones(3, 37, dtype=torch.bool)
    mask[1, 20:] = False
    return *(x.to(device, dtype).requires_grad_() for x in (We, Wd, v)), mask.to(device)


OP = register(
    Op(
        name="additive_pointer_attention",
        reference=reference,
        torch=torch_scores,
        kernel="pointer",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
