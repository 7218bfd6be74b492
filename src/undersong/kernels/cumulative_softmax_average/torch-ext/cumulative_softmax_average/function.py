"""Launches the kernels and registers them as torch operators, so that autograd and torch.compile see them."""

import torch
import triton

from .backward import backward
from .common import GROUP, HEADER, TAIL
from .forward import forward
from .registry import register

# How a kernel cuts its work, for half and for float32 values, tuned on an H100 (the names are the kernels' own).
# Nothing here depends on batch or length.
FORWARD = {
    True: {"CHUNK": 256, "ROWS": 8, "BATCH": 8, "num_warps": 4},
    False: {"CHUNK": 128, "ROWS": 4, "BATCH": 8, "num_warps": 4},
}
BACKWARD = {
    True: {"CHUNK": 128, "SUM_T": 32, "SUM_STAGES": 1, "BLOCK_T": 16, "num_warps": 1},
    False: {"CHUNK": 256, "SUM_T": 16, "SUM_STAGES": 1, "BLOCK_T": 16, "num_warps": 1},
}
BLOCK_D = 64  # most of dim that one program holds
PRODUCT = {True: "split", False: "ieee"}  # see backward.weighted_sum

_INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported


def cumulative_softmax_average(s, v, initial_state=None, mask=None, cu_seqlens=None):
    """o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}, and the state (m, u, w) after the last token.

    s [batch, length, heads], v [batch, length, heads, dim] in float32, bfloat16 or float16 and any strides; the state
    is ([batch, heads], [batch, heads], [batch, heads, dim]) in float32, m without gradient; mask [batch, length] bool;
    cu_seqlens [sequences + 1] int32 with batch 1, the state then has a row for each sequence.
    """
    if s.dtype == torch.float64 or v.dtype == torch.float64:
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if s.device.type == "cpu" and not _INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    m0 = u0 = w0 = None
    if initial_state is not None:
        m0, u0, w0 = (x.to(torch.float32).contiguous() for x in initial_state)
        m0 = m0.detach()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(s.device, torch.int32)
    o, _, m, u, w = _operator(s, v, m0, u0, w0, mask, cu_seqlens)
    return o, (m.detach(), u, w)


def _forward(s, v, m0, u0, w0, mask, cu_seqlens):
    plan = _Plan(s, v, mask, cu_seqlens, FORWARD)
    o, z, m, u, w = _empty_outputs(s, v, m0, u0, w0, mask, cu_seqlens)
    tensors = s, v, plan.mask, cu_seqlens, m0, u0, w0, plan.slots, o, z, m, u, w
    plan.launch(forward, tensors, plan.strides, HAS_STATE=u0 is not None)
    return o, z, m, u, w


def _backward(s, v, m0, u0, mask, cu_seqlens, o, z, u, do, du, dw):
    plan = _Plan(s, v, mask, cu_seqlens, BACKWARD)
    ds, dv, du0, dw0 = _empty_gradients(s, v, u0, plan.blocks)
    tensors = s, v, plan.mask, cu_seqlens, m0, u0, plan.slots, o, z, u, do, du, dw, ds, dv, du0, dw0
    strides = (*plan.strides, *_strides(do, plan.batch))
    # Triton's interpreter (3.9 still) multiplies the bit patterns of bfloat16 in tl.dot.
    product = PRODUCT[v.dtype != torch.float32 and v.device.type != "cpu"]
    plan.launch(backward, tensors, strides, HAS_STATE=u0 is not None, HAS_FINAL=du is not None, PRODUCT=product)
    ds = ds.squeeze(-1) if plan.blocks == 1 else ds.sum(-1)
    du0 = du0.squeeze(-1) if plan.blocks == 1 else du0.sum(-1)
    return ds.to(s.dtype), dv, du0, dw0


class _Plan:
    """How a call is cut into programs. Nothing that depends on batch or length becomes a compile-time constant."""

    def __init__(self, s, v, mask, cu_seqlens, table):
        self.batch, self.length, self.heads, self.dim = v.shape
        rows = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        half = v.dtype != torch.float32
        self.cut = table[half]
        self.block, self.blocks = _blocks(self.dim)
        self.chunks = max(triton.cdiv(self.length, self.cut["CHUNK"]), 1)
        self.units = rows * self.heads * self.blocks
        words = HEADER.value + self.units * (self.chunks + self.chunks // GROUP.value + 1) * (self.block + TAIL.value)
        self.slots = torch.empty(words, dtype=torch.int32, device=s.device)
        if self.chunks > 1:  # nobody waits for a single chunk
            self.slots.fill_(-1)
        self.mask = None if mask is None else mask.view(torch.uint8)
        mask_strides = (0, 0) if mask is None else _strides(mask, self.batch)
        self.strides = (*_strides(s, self.batch), *_strides(v, self.batch), *mask_strides)
        self.flags = {"MASKED": mask is not None, "PACKED": cu_seqlens is not None}

    def launch(self, kernel, tensors, strides, **flags):
        if self.units == 0:
            return
        with torch.cuda.device_of(tensors[0]):
            kernel[(self.units * self.chunks,)](
                *tensors, self.length, self.chunks, self.units, self.heads, self.dim, self.blocks, *strides,
                **self.flags, **flags, **self.cut, BLOCK_D=self.block, num_stages=1,
            )  # fmt: skip


def _blocks(dim):
    """Size and number of the blocks that dim is cut in; 16 is the least that a matrix product takes."""
    size = min(BLOCK_D, max(16, triton.next_power_of_2(dim)))
    return size, triton.cdiv(dim, size)


def _strides(x, batch):
    """Strides, with 0 for a batch of one: whatever that stride was, it must not lead to another compiled kernel."""
    return x.stride() if batch > 1 else (0, *x.stride()[1:])


def _empty_outputs(s, v, m0, u0, w0, mask, cu_seqlens):
    batch, length, heads, dim = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    level = {"dtype": torch.float32, "device": v.device}
    return (
        torch.empty((batch, length, heads, dim), dtype=v.dtype, device=v.device),
        torch.empty((batch, heads, _blocks(dim)[1], length), **level),
        torch.empty((rows, heads), **level),
        torch.empty((rows, heads), **level),
        torch.empty((rows, heads, dim), **level),
    )


def _empty_gradients(s, v, u0, blocks):
    batch, length, heads, dim = v.shape
    level = {"dtype": torch.float32, "device": v.device}
    rows = 0 if u0 is None else u0.shape[0]
    return (
        torch.empty((batch, length, heads, blocks), **level),
        torch.empty((batch, length, heads, dim), dtype=v.dtype, device=v.device),
        torch.empty((rows, heads, blocks), **level),
        torch.empty((rows, heads, dim), **level),
    )


def _fake_backward(s, v, m0, u0, mask, cu_seqlens, o, z, u, do, du, dw):
    ds, dv, du0, dw0 = _empty_gradients(s, v, u0, 1)
    return ds.squeeze(-1).to(s.dtype), dv, du0.squeeze(-1), dw0


def _save(ctx, inputs, output):
    s, v, m0, u0, _, mask, cu_seqlens = inputs
    o, z, m, u, _ = output
    ctx.save_for_backward(s, v, m0, u0, mask, cu_seqlens, o, z, u)
    ctx.mark_non_differentiable(z, m)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dz, dm, du, dw):
    s, v, m0, u0, mask, cu_seqlens, o, z, u = ctx.saved_tensors
    if do is None:
        do = torch.zeros((), dtype=o.dtype, device=o.device).expand_as(o)
    if du is not None or dw is not None:
        shape = (*u.shape, v.shape[-1])
        du = torch.zeros_like(u) if du is None else du.to(torch.float32).contiguous()
        dw = torch.zeros(shape, dtype=u.dtype, device=u.device) if dw is None else dw.to(torch.float32).contiguous()
    ds, dv, du0, dw0 = _backward_operator(s, v, m0, u0, mask, cu_seqlens, o, z, u, do, du, dw)
    return ds, dv, None, None if u0 is None else du0, None if u0 is None else dw0, None, None


_operator = register(
    "forward",
    "(Tensor s, Tensor v, Tensor? m0, Tensor? u0, Tensor? w0, Tensor? mask, Tensor? cu_seqlens)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _differentiate,
    _save,
)
_backward_operator = register(
    "backward",
    "(Tensor s, Tensor v, Tensor? m0, Tensor? u0, Tensor? mask, Tensor? cu_seqlens, Tensor o, Tensor z, Tensor u,"
    " Tensor do, Tensor? du, Tensor? dw) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
