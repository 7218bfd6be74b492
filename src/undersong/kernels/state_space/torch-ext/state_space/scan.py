"""Launches the kernels of the selective scan and registers them as torch operators."""

import math

import torch
import triton

from .conv import cdiv
from .registry import records_gradients, register
from .scan_backward import backward
from .scan_common import ALIGN, CHANNELS_LAST, PAD, STRIDED, TIME_LAST, gather
from .scan_forward import forward

WINDOW = 16  # time steps between two states that are kept for the backward pass
# How the kernels cut their work, tuned on an H100 at a state of 16: where so few programs run that each has
# registers in plenty, up to the given number for each multiprocessor, and where there are more.
FORWARD = {
    "few": {"TILE": 16, "BLOCK": 32, "STAGES": 3, "num_warps": 4, "maxnreg": 168},
    "many": {"TILE": 8, "BLOCK": 16, "STAGES": 3, "num_warps": 2, "maxnreg": 96},
    "limit": 5,
}
BACKWARD = {
    "few": {"TILE": 8, "BLOCK": 32, "num_warps": 4, "maxnreg": None},
    "many": {"TILE": 8, "BLOCK": 32, "num_warps": 4, "maxnreg": 168},
    "limit": 2,
}
GATHER_ROWS = 32
MAX_STATE = 128  # what shared memory holds of a tile's products

_INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
    cu_seqlens=None,
):  # fmt: skip
    """h_t = e^{d_t A} h_{t-1} + d_t B_t u_t; y_t = (C_t . h_t + D u_t) silu(z_t); and the state after the last token.

    d = softplus(delta + delta_bias). u, delta, z [batch, length, channels] in float32, bfloat16 or float16 and any
    strides; A [channels, state]; B, C [batch, length, state] or [batch, length, groups, state]; D, delta_bias
    [channels]; the state [batch, channels, state] in float32; mask [batch, length] bool; cu_seqlens [sequences + 1]
    int32 with batch 1, the state then has a row for each sequence.
    """
    tensors = u, delta, A, B, C, D, z, delta_bias, initial_state
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if u.device.type == "cpu" and not _INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    if A.shape[1] > MAX_STATE:
        raise ValueError(f"A's state ({A.shape[1]}) must be at most {MAX_STATE}; use the torch path for more.")
    save = records_gradients(*tensors)
    B, C = (x if x.dim() == 4 else x.unsqueeze(2) for x in (B, C))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(u.device, torch.int32)
    y, state, _ = _operator(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens, delta_softplus, save)
    return y, state


def _forward(u, delta, A, B, C, D, z, bias, h0, mask, cu, softplus, save):
    outputs = y, state, saved = _empty_outputs(u, delta, A, B, C, D, z, bias, h0, mask, cu, softplus, save)
    plan = _Plan(u, A, B, cu, FORWARD)
    tensors = u, delta, plan.pad(A), plan.gather(B, C, mask), D, z, bias, h0, _bytes(mask), cu, y, state, saved
    plan.launch(forward, tensors, {"U": u, "DELTA": delta, "Z": z}, mask, SOFTPLUS=softplus, SAVE=save)
    return outputs


def _backward(u, delta, A, B, C, D, z, bias, h0, mask, cu, softplus, saved, dy, dstate):
    plan = _Plan(u, A, B, cu, BACKWARD)
    single = {"dtype": torch.float32, "device": u.device}
    du, ddelta, dz = (None if x is None else _like(u, x.dtype) for x in (u, delta, z))
    # One part for each block of channels or each sequence, added up below.
    dA = torch.empty((plan.rows, *A.shape), **single)
    dBC = torch.empty((2, plan.blocks, *B.shape), **single)
    dD, dbias = (None if x is None else torch.empty((plan.rows, *x.shape), **single) for x in (D, bias))
    dh0 = None if h0 is None else torch.empty_like(h0)
    gradients = du, ddelta, dA, dBC[0], dBC[1], dD, dz, dbias, dh0
    inputs = u, delta, plan.pad(A), plan.gather(B, C, mask), D, z, bias, _bytes(mask), cu, saved, dy, dstate
    layouts = {"U": u, "DELTA": delta, "Z": z, "Y": dy}
    plan.launch(backward, (*inputs, *gradients), layouts, mask, SOFTPLUS=softplus, PRODUCT=_product(B, C))
    dB, dC = (x.sum(0) for x in dBC)
    parts = (A, dA.sum(0)), (B, dB), (C, dC), (D, None if D is None else dD.sum(0))
    dA, dB, dC, dD = (None if x is None else dx.to(x.dtype) for x, dx in parts)
    dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
    return _given(u, du, ddelta, dA, dB, dC, dD, dz, dbias, dh0)


def _product(B, C):
    """How sums over channels are computed for dB and dC: about as precisely as these are given back."""
    if B.device.type == "cpu":  # Triton's interpreter (3.9 still) multiplies the bit patterns of bfloat16
        return "ieee"
    if torch.float32 in (B.dtype, C.dtype):
        return "tf32x3"
    return "bf16" if torch.bfloat16 in (B.dtype, C.dtype) else "tf32"


class _Plan:
    """How a call is cut into programs. Nothing that depends on the length becomes a compile-time constant."""

    def __init__(self, u, A, B, cu, table):
        self.batch, self.length, self.channels = u.shape
        self.rows = self.batch if cu is None else cu.shape[0] - 1
        self.size, self.groups = A.shape[1], B.shape[2]
        self.per_group = self.channels // self.groups
        state = max(1 << (self.size - 1).bit_length(), 16)
        programs = self.rows * self.groups * cdiv(self.per_group, table["few"]["BLOCK"])
        few = state == 16 and programs <= table["limit"] * _multiprocessors(u)
        self.cut = dict(table["few" if few else "many"])
        if state > 16:  # as many elements a thread, at least 16 channels for a product
            block = max(16, self.cut["BLOCK"] * 16 // state)
            warps = min(16, max(self.cut["num_warps"], state * block // 128))
            self.cut |= {"BLOCK": block, "num_warps": warps, "maxnreg": None}
        self.blocks = cdiv(self.per_group, self.cut["BLOCK"])
        self.cut |= {"PACKED": cu is not None, "EVEN": self.per_group % self.cut["BLOCK"] == 0}
        self.cut |= {"WINDOW": WINDOW, "STATE": state}

    def pad(self, A):
        """A in float32, [channels, STATE]. Its reads must be as wide as those of B and C, lest the compiler lays the
        two out differently, and Triton 3.6 then fails to compile the backward kernel."""
        missing = self.cut["STATE"] - self.size
        return torch.nn.functional.pad(A.to(torch.float32), (0, missing)) if missing else A.to(torch.float32)

    def gather(self, B, C, mask):
        """B and C side by side, as the kernels read them."""
        packed = B.dtype == C.dtype == torch.bfloat16
        shape = self.batch, self.length + PAD.value, self.groups, 1 if packed else 2, self.cut["STATE"]
        both = torch.empty(shape, dtype=torch.int32 if packed else torch.float32, device=B.device)
        rows = math.prod(shape[:3])
        with torch.cuda.device_of(B):
            gather[(cdiv(rows, GATHER_ROWS),)](
                B, C, _bytes(mask), both, self.length, rows, self.groups, self.size,
                *B.stride(), *C.stride(), *_mask_strides(mask),
                MASKED=mask is not None, STATE=self.cut["STATE"], ROWS=GATHER_ROWS,
            )  # fmt: skip
        return both

    def launch(self, kernel, tensors, layouts, mask, **flags):
        strides = []
        for name, x in layouts.items():
            flags[name], *x_strides = _layout(x)
            strides += x_strides
        sizes = self.length, self.channels, self.size, self.per_group, self.blocks, self.groups
        with torch.cuda.device_of(tensors[0]):
            kernel[(self.rows * self.blocks * self.groups,)](
                *tensors, *sizes, *strides, *_mask_strides(mask), MASKED=mask is not None, **flags, **self.cut,
                num_stages=1,
            )  # fmt: skip


def _multiprocessors(x):
    return 1 if x.device.type == "cpu" else torch.cuda.get_device_properties(x.device).multi_processor_count


def _layout(x):
    """(layout, strides) as the kernels take them, see scan_common.py."""
    if x is None:
        return STRIDED.value, 0, 0, 0
    strides, align = x.stride(), ALIGN.value
    if strides[2] == 1 and strides[1] % align == 0 and strides[0] % align == 0:
        return CHANNELS_LAST.value, strides[0] // align, strides[1] // align, 1
    return (TIME_LAST if strides[1] == 1 else STRIDED).value, *strides


def _mask_strides(mask):
    return (0, 0) if mask is None else mask.stride()


def _bytes(mask):
    return None if mask is None else mask.view(torch.uint8)


def _like(u, dtype):
    """An output of the shape of u, which lies in memory as u does."""
    if _layout(u)[0] == TIME_LAST.value:
        return torch.empty(u.mT.shape, dtype=dtype, device=u.device).mT
    return torch.empty(u.shape, dtype=dtype, device=u.device)


def _given(u, *gradients):
    """Operators return tensors; an empty one stands for what was not given."""
    return tuple(u.new_empty(0) if x is None else x for x in gradients)


def _empty_outputs(u, delta, A, B, C, D, z, bias, h0, mask, cu, softplus, save):
    batch, length, _ = u.shape
    rows = batch if cu is None else cu.shape[0] - 1
    windows = batch * cdiv(length, WINDOW) if cu is None else length // WINDOW + rows
    single = {"dtype": torch.float32, "device": u.device}
    return (
        _like(u, u.dtype),
        torch.empty((rows, *A.shape), **single),
        torch.empty((windows if save else 0, *A.shape), **single),
    )


def _fake_backward(u, delta, A, B, C, D, z, bias, h0, mask, cu, softplus, saved, dy, dstate):
    du, ddelta, dz = (None if x is None else _like(u, x.dtype) for x in (u, delta, z))
    dA, dB, dC, dD, dbias, dh0 = (None if x is None else x.new_empty(x.shape) for x in (A, B, C, D, bias, h0))
    return _given(u, du, ddelta, dA, dB, dC, dD, dz, dbias, dh0)


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dstate, _):
    *tensors, saved = ctx.saved_tensors
    u = tensors[0]
    if dy is None:
        dy = torch.zeros((), dtype=u.dtype, device=u.device).expand_as(u)
    if dstate is not None:
        dstate = dstate.to(torch.float32).contiguous()
    gradients = _backward_operator(*tensors, ctx.softplus, saved, dy, dstate)
    given = (None if x is None else dx for x, dx in zip(tensors[:9], gradients, strict=True))
    return *given, None, None, None, None


_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? h0,"
    " Tensor? mask, Tensor? cu, bool softplus"
)
_operator = register(
    "scan_forward",
    f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _differentiate,
    _save,
)
_backward_operator = register(
    "scan_backward",
    f"({_INPUTS}, Tensor saved, Tensor dy, Tensor? dstate) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _fake_backward,
)
