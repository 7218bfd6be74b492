"""Causal depthwise convolution with a window that goes in and out, and its one-token step: launches and autograd."""

import torch
import triton

from . import conv_kernels as kernels
from .registry import records_gradients, register

# How the kernels cut their work (the forward tuned on an H100), in their own names; whatever batch and length are.
# The key says whether channels lie side by side; where they do not, a program reads fewer of them, each along time.
FORWARD = {
    True: {"ROWS": 8, "BLOCK_C": 256, "num_warps": 1},
    False: {"ROWS": 16, "BLOCK_C": 32, "num_warps": 1},
}
BACKWARD = {
    True: {"ROWS": 8, "TILES": 8, "BLOCK_C": 128, "num_warps": 1},
    False: {"ROWS": 16, "TILES": 4, "BLOCK_C": 32, "num_warps": 1},
}
BLOCK_C = 128  # channels of one program in the step

INTERPRETED = not isinstance(kernels.forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at the import


def causal_conv1d(x, weight, bias=None, activation=None, initial_state=None, mask=None, cu_seqlens=None):
    """y_t = act(bias + sum_k weight_k x_{t - width + 1 + k}), and the window of the last `width` inputs in float32.

    x [batch, length, channels] in float32, bfloat16 or float16, any strides; weight [channels, width]; bias
    [channels]; activation None, "silu" or "swish"; initial_state [batch, channels, width], newest last; mask [batch,
    length] bool; cu_seqlens [sequences + 1] int32 with batch 1, the windows then are [sequences, channels, width].
    """
    check_tensors(x, weight, bias, initial_state)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int32)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    return _operator(x, weight, bias, initial_state, mask, cu_seqlens, takes_silu(activation))


def causal_conv1d_update(x, state, weight, bias=None, activation=None, mask=None, inplace=False):
    """One token: x [batch, channels], state [batch, channels, width], mask [batch] bool -> (y, window after it).

    Where a gradient is needed it is the convolution over one token, which has one."""
    check_tensors(x, weight, bias, state)
    silu = takes_silu(activation)
    if records_gradients(x, state, weight, bias):
        mask = None if mask is None else mask[:, None]
        y, new = causal_conv1d(x[:, None], weight, bias, activation, state, mask, None)
        return y.squeeze(1), state.copy_(new) if inplace else new
    arguments = x, state, weight, bias, mask, silu
    if not inplace:
        return _step_operator(*arguments)
    return _inplace_operator(*arguments), written(state)


def check_tensors(x, *others):
    if any(t is not None and t.dtype == torch.float64 for t in (x, *others)):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if x.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )


def cdiv(a, b):
    return -(-a // b)  # triton.cdiv takes the host microseconds


def takes_silu(activation):
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation ({activation!r}) must be one of None, 'silu', 'swish'; apply others yourself.")
    return activation is not None


def written(state):
    """`state` after a kernel wrote into it: autograd must refuse a backward pass that had saved it."""
    if not (torch.compiler.is_compiling() or state.is_inference()):
        torch.autograd.graph.increment_version(state)
    return state


class _Places:
    """Where the tokens of each sequence lie, cut in runs of `span` ranks: see the kernels."""

    def __init__(self, x, mask, cu_seqlens, span):
        batch, self.length, _ = x.shape
        self.place = self.sequence = self.run = self.first = self.count = None
        self.sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.runs = cdiv(self.length, span)  # of a row
        self.parts = batch * self.runs
        if mask is not None:
            self.count = mask.sum(1, dtype=torch.int32)
            # valid tokens first, in order, then the padding
            self.place = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)
        elif cu_seqlens is not None:
            self.first = cu_seqlens[:-1]
            self.count = cu_seqlens.diff().clamp_(min=0)
            runs = ((self.count + span - 1) // span).clamp_(min=1)
            ends = runs.cumsum(0, dtype=torch.int32)
            self.parts = self.runs + self.sequences  # at most
            part = torch.arange(self.parts, dtype=torch.int32, device=x.device)
            self.sequence = torch.searchsorted(ends, part, right=True, out_int32=True)
            self.run = part - (ends - runs)[self.sequence.clamp(max=self.sequences - 1).long()]
        self.flags = {"MASKED": mask is not None, "PACKED": cu_seqlens is not None}

    @property
    def tables(self):
        return self.place, self.sequence, self.run, self.first, self.count


def _strides(x):
    """Strides for a kernel: what grows with the length is counted in units and never specialised on, and contiguous
    channels are a flag. -> ((batch, time, channel), unit, channels contiguous)."""
    stride_b, stride_t, stride_c = (0, *x.stride()[1:]) if x.shape[0] == 1 else x.stride()
    unit = 16 if stride_c == 1 and stride_t % 16 == 0 and stride_b % 16 == 0 else 1
    return (stride_b // unit, stride_t, stride_c), unit, stride_c == 1


def _forward(x, weight, bias, state, mask, cu_seqlens, silu):
    batch, length, channels = x.shape
    width = weight.shape[1]
    strides, unit, x_rows = _strides(x)
    cut = FORWARD[x_rows]
    places = _Places(x, mask, cu_seqlens, cut["ROWS"])
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    window = torch.empty((places.sequences, channels, width), dtype=torch.float32, device=x.device)
    if programs := places.parts * cdiv(channels, cut["BLOCK_C"]):
        with torch.cuda.device_of(x):
            kernels.forward[(programs,)](
                x, weight, bias, state, *places.tables, y, window,
                length, places.runs, places.sequences, channels, *strides, *weight.stride(),
                X_UNIT=unit, X_ROWS=x_rows, WIDTH=width, HAS_BIAS=bias is not None, HAS_STATE=state is not None,
                SILU=silu, **places.flags, **cut,
            )  # fmt: skip
    return y, window


def _backward(x, weight, bias, state, mask, cu_seqlens, silu, dy, dwindow):
    batch, length, channels = x.shape
    width = weight.shape[1]
    x_strides, x_unit, x_rows = _strides(x)
    g_strides, g_unit, g_rows = _strides(dy)
    cut = BACKWARD[x_rows and g_rows]
    places = _Places(x, mask, cu_seqlens, cut["ROWS"] * cut["TILES"] - width + 1)
    dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    dstate = None if state is None else torch.empty(state.shape, dtype=torch.float32, device=x.device)
    sums = torch.empty((places.parts, width + 1, channels), dtype=torch.float32, device=x.device)
    if programs := places.parts * cdiv(channels, cut["BLOCK_C"]):
        with torch.cuda.device_of(x):
            kernels.backward[(programs,)](
                x, weight, bias, state, *places.tables, dy, dwindow, dx, dstate, sums,
                length, places.runs, places.sequences, channels, *x_strides, *weight.stride(), *g_strides,
                X_UNIT=x_unit, X_ROWS=x_rows, G_UNIT=g_unit, G_ROWS=g_rows,
                WIDTH=width, HAS_BIAS=bias is not None, HAS_STATE=state is not None, SILU=silu,
                HAS_WINDOW=dwindow is not None, **places.flags, **cut,
            )  # fmt: skip
    sums = sums.sum(0)
    empty = x.new_empty(0)
    return (
        dx,
        sums[:width].t().contiguous().to(weight.dtype),
        empty if bias is None else sums[width].to(bias.dtype),
        empty if state is None else dstate.to(state.dtype),
    )


def _step(x, state, weight, bias, mask, silu):
    new = torch.empty(state.shape, dtype=torch.float32, device=x.device)
    return _launch_step(x, state, weight, bias, mask, silu, new), new


def _step_(x, state, weight, bias, mask, silu):
    return _launch_step(x, state, weight, bias, mask, silu, state)


def _launch_step(x, state, weight, bias, mask, silu, new):
    batch, channels = x.shape
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    if programs := batch * cdiv(channels, BLOCK_C):
        with torch.cuda.device_of(x):
            kernels.step[(programs,)](
                x, state, weight, bias, None if mask is None else mask.view(torch.uint8), y, new,
                batch, channels, *x.stride(), *state.stride(), *new.stride(), *weight.stride(),
                0 if mask is None else mask.stride(0), WIDTH=weight.shape[1], HAS_BIAS=bias is not None, SILU=silu,
                MASKED=mask is not None, BLOCK_C=BLOCK_C,
            )  # fmt: skip
    return y


def _fake_forward(x, weight, bias, state, mask, cu_seqlens, silu):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((rows, x.shape[2], weight.shape[1]), dtype=torch.float32)


def _fake_backward(x, weight, bias, state, mask, cu_seqlens, silu, dy, dwindow):
    empty = x.new_empty(0)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        empty if bias is None else bias.new_empty(bias.shape),
        empty if state is None else state.new_empty(state.shape),
    )


def _fake_step(x, state, weight, bias, mask, silu):
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dwindow):
    x, weight, bias, state, mask, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
    dwindow = None if dwindow is None else dwindow.to(torch.float32).contiguous()
    dx, dweight, dbias, dstate = _backward_operator(x, weight, bias, state, mask, cu_seqlens, ctx.silu, dy, dwindow)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None, None


_GIVEN = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? mask, Tensor? cu_seqlens, bool silu"
_STEP = "Tensor weight, Tensor? bias, Tensor? mask, bool silu"
_operator = register("conv_forward", f"({_GIVEN}) -> (Tensor, Tensor)", _forward, _fake_forward, _differentiate, _save)
_backward_operator = register(
    "conv_backward", f"({_GIVEN}, Tensor dy, Tensor? dwindow) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
_step_operator = register("conv_step", f"(Tensor x, Tensor state, {_STEP}) -> (Tensor, Tensor)", _step, _fake_step)
_inplace_operator = register(
    "conv_step_", f"(Tensor x, Tensor(a!) state, {_STEP}) -> Tensor", _step_, lambda *args: _fake_step(*args)[0]
)
