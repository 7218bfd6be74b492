"""Cross-entropy over a table: launches, and the torch operators that autograd and torch.compile see."""

import torch
import triton

from .common import check, processors, wide, width
from .cross_entropy_kernels import attend, table_gradient
from .registry import register

# By whether the table has at most 128 columns.
FORWARD = {
    True: {"TOKENS": 128, "ITEMS": 64, "STAGES": 3, "num_warps": 8},
    False: {"TOKENS": 64, "ITEMS": 32, "STAGES": 2, "num_warps": 8},
}
BACKWARD = {
    True: {"TOKENS": 64, "ITEMS": 128, "STAGES": 3, "num_warps": 8},
    False: {"TOKENS": 32, "ITEMS": 64, "STAGES": 2, "num_warps": 8},
}
FEWEST = 4096  # items of a part of the table, of which each is a program of its own


def linear_cross_entropy(h, E, labels, bias=None, ignore_index=-100, label_smoothing=0.0, scale=1.0, chunk_size=None):
    """Losses [tokens] in float32 of the logits scale * h @ E.T + bias, 0 where the label is `ignore_index`.

    h [tokens, d], E [N, d] and bias [N] in float32, bfloat16 or float16 and any strides, labels [tokens] int64. What
    `chunk_size` would bound is never held.
    """
    check(h, E)
    losses, _, _ = _operator(
        h, E, labels, bias, ignore_index, label_smoothing, scale, torch.is_grad_enabled() and h.requires_grad
    )
    return losses


def _losses(h, E, labels, bias, ignore_index, smoothing, scale, mix):
    """(losses, lse, the gradient of h for a loss gradient of 1, empty unless `mix`)"""
    (tokens, d), n = h.shape, len(E)
    single = {"dtype": torch.float32, "device": h.device}
    if not tokens:
        return _fake_losses(h, E, labels, bias, ignore_index, smoothing, scale, mix)
    cut = FORWARD[d <= 128]
    blocks = triton.cdiv(tokens, cut["TOKENS"])
    parts = min(triton.cdiv(4 * processors(h.device), blocks), triton.cdiv(n, FEWEST))
    each = triton.cdiv(triton.cdiv(n, parts), cut["ITEMS"]) * cut["ITEMS"]
    parts = triton.cdiv(n, each)
    top, mass = torch.empty((2, parts, tokens), **single)
    mixed = torch.empty((parts, tokens, d if mix else 0), **single)
    with torch.cuda.device_of(h):
        attend[(blocks, parts)](
            h, E, bias, top, mass, mixed, tokens, n, each, scale, *_strides(h, E, bias), **_flags(h, E, bias),
            MIX=mix, **cut,
        )  # fmt: skip
    highest = top.amax(0)
    shares = torch.exp(top - highest)
    total = (mass * shares).sum(0)
    lse = highest + total.log()
    counts = labels != ignore_index
    rows = torch.where(counts, labels, 0)
    picked = E[rows].float()
    at_label = scale * (h.float() * picked).sum(1)
    at_label = at_label if bias is None else at_label + bias[rows].float()
    losses = lse - (1 - smoothing) * at_label
    if smoothing:
        mean = E.mean(0, dtype=torch.float32)
        losses -= smoothing * (scale * (h.float() @ mean) + (0.0 if bias is None else bias.float().mean()))
    dh = mixed[0]
    if mix:
        dh = (mixed * (shares / total)[:, :, None]).sum(0).sub_(picked, alpha=1 - smoothing)
        if smoothing:
            dh -= smoothing * mean
        dh *= scale
    return losses.masked_fill_(~counts, 0.0), lse, dh


def _table_gradient(h, E, labels, bias, ignore_index, smoothing, scale, lse, g):
    dE, db = _fake_gradient(h, E, labels, bias)
    d = h.shape[1]
    cut = BACKWARD[d <= 128]
    g = torch.where(labels != ignore_index, g, 0.0).float()
    with torch.cuda.device_of(h):
        table_gradient[(triton.cdiv(len(E), cut["ITEMS"]),)](
            h, E, bias, labels.contiguous(), lse, g, dE, db, len(h), len(E), scale, 1.0 - smoothing,
            smoothing / len(E), *_strides(h, E, bias), **_flags(h, E, bias), **cut,
        )  # fmt: skip
    return dE, db


def _flags(h, E, bias):
    return {"D": h.shape[1], "BLOCK_D": width(h.shape[1]), "WIDE": wide(h, E) or h.dtype == torch.float16,
            "BIAS": bias is not None}  # fmt: skip


def _strides(h, E, bias):
    return *h.stride(), *E.stride(), 0 if bias is None else bias.stride(0)


def _fake_losses(h, E, labels, bias, ignore_index, smoothing, scale, mix):
    losses, lse = (h.new_empty(h.shape[:1], dtype=torch.float32) for _ in range(2))
    return losses, lse, h.new_empty((h.shape[0], h.shape[1] if mix else 0), dtype=torch.float32)


def _fake_gradient(h, E, labels, bias, *_):
    return torch.empty(E.shape, dtype=E.dtype, device=E.device), E.new_empty(0) if bias is None else torch.empty(
        bias.shape, dtype=bias.dtype, device=bias.device
    )


def _save(ctx, inputs, output):
    h, E, labels, bias, ctx.ignore_index, ctx.smoothing, ctx.scale, _ = inputs
    _, lse, dh = output
    ctx.save_for_backward(h, E, labels, bias, lse, dh)


def _differentiate(ctx, g, *_):
    h, E, labels, bias, lse, dh = ctx.saved_tensors
    counted = torch.where(labels != ctx.ignore_index, g, 0.0)[:, None]
    dE = db = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        settings = ctx.ignore_index, ctx.smoothing, ctx.scale
        dE, db = _gradient(h, E, labels, bias, *settings, lse, g)
    given = (counted * dh).to(h.dtype) if ctx.needs_input_grad[0] else None
    return given, dE, None, None if bias is None else db, None, None, None, None


_INPUTS = "Tensor h, Tensor E, Tensor labels, Tensor? bias, int ignore_index, float smoothing, float scale"
_gradient = register(
    "table_gradient", f"({_INPUTS}, Tensor lse, Tensor g) -> (Tensor, Tensor)", _table_gradient, _fake_gradient
)
_operator = register(
    "losses", f"({_INPUTS}, bool mix) -> (Tensor, Tensor, Tensor)", _losses, _fake_losses, _differentiate, _save
)
