"""The short causal depthwise convolution in front of a state-space scan, and its one-token step.

Mamba (Gu, Dao 2023, arXiv 2312.00752, section 3.4) mixes each channel with its last `width` inputs,

    y_t = act(bias + sum_k weight_k x_{t - width + 1 + k})

The state is the window of the last `width` inputs, newest last, with zeros before the start.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._dispatch import Op, register, run
from ._validate import (
    check_devices,
    check_layout,
    check_mask,
    check_rows,
    check_shape,
    check_state,
    computing_dtype,
    describe,
)

ACTIVATIONS = (None, "silu", "swish")  # the last two are one function
CPU_BLOCK = 1 << 17  # torch path on a CPU: entries of x that stay in its cache from tap to tap


def causal_conv1d(
    x,
    weight,
    bias=None,
    activation=None,
    *,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    backend="auto",
):
    """Causal depthwise convolution over time.

    y_t = act(bias + sum_k weight_k x_{t - width + 1 + k})      (Mamba, arXiv 2312.00752, section 3.4)

    Args:
        x: `[batch, length, channels]`, any float dtype, any strides.
        weight: `[channels, width]`, the newest input's weight last.
        bias: `[channels]`; None leaves it out.
        activation: None, "silu" or "swish" (the same function).
        initial_state: `[batch, channels, width]`, the inputs before the first, newest last, as returned; packed:
            `[sequences, ...]`. The oldest entry is out of reach and not read.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and are no input of others: the taps
            of a token are the valid tokens before it.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU (a CUDA tensor would have to wait for the device); it may stay there for inputs on a GPU.
        return_final_state: also return the window after the last token, in float32 (float64 for float64 inputs).
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `y` like x in x's dtype; with `return_final_state` `(y, state)`.

    Raises:
        ValueError: shapes, dtypes or offsets disagree, length 0, or an unknown activation or backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    >>> y, state = causal_conv1d(x, torch.tensor([[10.0, 1.0]]), return_final_state=True)
    >>> y.flatten(), state
    (tensor([ 1., 12., 23.]), tensor([[[2., 3.]]]))
    """
    _validate(x, weight, bias, activation, initial_state, mask, cu_seqlens)
    y, state = run(CONV, backend, x, weight, bias, activation, initial_state, mask, cu_seqlens)
    return (y, state) if return_final_state else y


def causal_conv1d_update(x, state, weight, bias=None, activation=None, *, mask=None, inplace=False, backend="auto"):
    """One token of `causal_conv1d`: shifts the window and applies the taps.

    Args:
        x: `[batch, channels]`, the newest input.
        state: `[batch, channels, width]`, the window before it, newest last.
        weight, bias, activation: as in `causal_conv1d`.
        mask: `[batch]` bool; False rows give zeros and keep their window.
        inplace: write the new window into `state`, which is also returned; without gradients only.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `(y, state)`: y like x in x's dtype; the new window in float32 (float64 for float64 inputs), or `state`.

    Raises:
        ValueError: shapes or dtypes disagree, an unknown activation or backend, or inplace=True where a gradient is
            needed.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> y, state = causal_conv1d_update(torch.tensor([[3.0]]), torch.tensor([[[1.0, 2.0]]]), torch.tensor([[10.0, 1]]))
    >>> y, state
    (tensor([[23.]]), tensor([[[2., 3.]]]))
    """
    _validate_update(x, state, weight, bias, activation, mask, inplace)
    return run(UPDATE, backend, x, state, weight, bias, activation, mask, inplace)


def reference(x, weight, bias=None, activation=None, initial_state=None, mask=None, cu_seqlens=None):
    """The definition: the window slides over the tokens, one by one."""
    compute = computing_dtype(x, weight, bias, initial_state)
    batch, length, channels = x.shape
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = x.new_zeros(batch * (len(offsets) - 1), channels, weight.shape[1], dtype=compute)
    outputs, states = [], []
    for window, begin, end in zip(initial_state.to(compute).split(batch), offsets, offsets[1:], strict=False):
        for t in range(begin, end):
            seen = None if mask is None else mask[:, t]
            y, window = reference_update(x[:, t], window, weight, bias, activation, seen)
            outputs.append(y)
        states.append(window)
    return torch.stack(outputs, 1), torch.cat(states)


def torch_conv(x, weight, bias=None, activation=None, initial_state=None, mask=None, cu_seqlens=None):
    """Shifted multiply-adds over blocks of tokens: nothing is transposed, and no product is kept for the gradients."""
    compute = computing_dtype(x, weight, bias, initial_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial_state is None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = torch.zeros(rows, channels, width, dtype=compute, device=x.device)
    held = initial_state.to(compute)
    before = held.mT[:, 1:]  # [rows, width - 1, channels]
    parameters = (
        weight.to(compute).t().contiguous(),
        None if bias is None else bias.to(compute),
        activation is not None,
    )
    if cu_seqlens is not None:  # convolve across the borders, then replace the first outputs of each sequence
        offsets = cu_seqlens.to(x.device, torch.long)
        first, end = offsets[:-1], offsets[1:]
        near = first[:, None] + torch.arange(width - 1, device=x.device)  # [sequences, width - 1]
        inside = near < end[:, None]
        y = _Convolution.apply(x, torch.zeros_like(before[:1]), *parameters)
        x_near = x[0].index_select(0, near.flatten().clamp(max=length - 1)).view(*near.shape, channels)
        y_near = _Convolution.apply(x_near, before, *parameters)
        return y.index_copy(1, near[inside], y_near[inside][None]), _window(x[0], held, first, end)
    if mask is not None:  # bring the valid tokens of each row to its front, and the outputs back
        count = mask.sum(1, keepdim=True)
        row = torch.arange(batch, device=x.device)[:, None] * length
        order = (row + mask.int().argsort(dim=1, descending=True, stable=True)).flatten()
        padding = torch.arange(length, device=x.device) >= count
        x = x.flatten(0, 1).index_select(0, order).masked_fill_(padding.view(-1, 1), 0.0)  # it may hold NaN
        y = _Convolution.apply(x.view(batch, length, channels), before, *parameters)
        y = y.flatten(0, 1).index_select(0, order.argsort()).masked_fill_(~mask.view(-1, 1), 0.0)
        return y.view(batch, length, channels), _window(x, held, row[:, 0], (row + count)[:, 0])
    new = min(length, width)
    state = torch.cat([held[:, :, new:], x[:, -new:].mT.to(compute)], 2)
    return _Convolution.apply(x, before, *parameters), state


def _window(tokens, held, first, end):
    """The last `width` of tokens[first:end], one row of `held` a pair, continued backwards by `held`."""
    width = held.shape[2]
    index = end[:, None] + torch.arange(-width, 0, device=tokens.device)  # [rows, width]
    new = tokens[index.clamp(0, len(tokens) - 1)].mT.to(held.dtype)
    old = (index - first[:, None] + width).clamp(0, width - 1)[:, None].expand(held.shape)
    return torch.where((index >= first[:, None])[:, None], new, held.gather(2, old)).contiguous()


class _Convolution(torch.autograd.Function):
    """x [rows, length, channels] behind before [rows, width - 1, channels], under taps [width, channels].

    The gradient of x is the same convolution, backwards in time, of the gradient before the activation.
    """

    @staticmethod
    def forward(ctx, x, before, taps, bias, activated):
        ctx.save_for_backward(x, before, taps, bias)
        ctx.activated = activated
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for begin, end in _blocks(x):
            _convolve(_with_past(x, before, begin, end), taps, bias, activated, into=y[:, begin:end])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, before, taps, bias = ctx.saved_tensors
        dx, d_taps, mirrored = torch.empty_like(x), torch.zeros_like(taps), taps.flip(0)
        d_bias = None if bias is None else torch.zeros_like(bias)
        behind = torch.zeros_like(before)
        for begin, end in reversed(_blocks(x)):
            tokens = _with_past(x, before, begin, end)
            d = dy[:, begin:end].to(taps.dtype)
            if ctx.activated:
                d = torch.ops.aten.silu_backward(d, _convolve(tokens, taps, bias))
            for k in range(len(taps) if ctx.needs_input_grad[2] else 0):
                d_taps[k] += (d * tokens[:, k : k + end - begin]).sum((0, 1))
            if bias is not None:
                d_bias += d.sum((0, 1))
            d = torch.cat([d, behind], 1)
            _convolve(d, mirrored, into=dx[:, begin:end])
            behind = d[:, : before.shape[1]]
        d_before = _convolve(torch.cat([torch.zeros_like(before), behind], 1), mirrored)
        return dx, d_before, d_taps, d_bias, None


def _convolve(tokens, taps, bias=None, activated=False, into=None):
    """[rows, length + width - 1, channels] -> [rows, length, channels], or written to such a tensor of any dtype."""
    length = tokens.shape[1] - len(taps) + 1
    first = tokens[:, :length]
    direct = into if into is not None and into.dtype == taps.dtype else None
    y = torch.mul(first, taps[0], out=direct) if bias is None else torch.addcmul(bias, first, taps[0], out=direct)
    for k in range(1, len(taps)):
        y.addcmul_(tokens[:, k : k + length], taps[k])
    if activated:
        torch.nn.functional.silu(y, inplace=True)
    return y if into is None or direct is not None else into.copy_(y)


def _with_past(x, before, begin, end):
    """Tokens begin - width + 1 to end, in the computing dtype, channels side by side."""
    past = before.shape[1]
    tokens = x[:, max(begin - past, 0) : end].to(before.dtype)
    if begin < past:
        tokens = torch.cat([before[:, begin:], tokens], 1)
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _blocks(x):
    length = x.shape[1]
    size = max(16, CPU_BLOCK // max(x.shape[0] * x.shape[2], 1)) if x.device.type == "cpu" else max(length, 1)
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def reference_update(x, state, weight, bias=None, activation=None, mask=None, inplace=False):
    """The definition of one step."""
    compute = computing_dtype(x, state, weight, bias)
    dtype, old = x.dtype, state.to(compute)
    x = x.to(compute) if mask is None else x.to(compute).masked_fill(~mask[:, None], 0.0)  # padding may hold NaN
    window = torch.cat([old[:, :, 1:], x[:, :, None]], 2)
    y = (window * weight.to(compute)).sum(2)
    if bias is not None:
        y = y + bias.to(compute)
    if activation is not None:
        y = torch.nn.functional.silu(y)
    if mask is not None:
        y, window = y.masked_fill(~mask[:, None], 0.0), torch.where(mask[:, None, None], window, old)
    return y.to(dtype), state.copy_(window) if inplace else window


def _validate(x, weight, bias, activation, initial_state, mask, cu_seqlens):
    check_layout("x", x, "batch, length, channels")
    rows, count = check_rows("x", x, mask, cu_seqlens)
    _check_taps(x, weight, bias, activation)
    if initial_state is not None:
        want = (rows, x.shape[2], weight.shape[1])
        check_state("initial_state", initial_state, f"{count}, channels, width", want)
    check_devices("x", x, {"weight": weight, "bias": bias, "initial_state": initial_state, "mask": mask})


def _validate_update(x, state, weight, bias, activation, mask, inplace):
    check_layout("x", x, "batch, channels")
    _check_taps(x, weight, bias, activation)
    check_state("state", state, "batch, channels, width", (*x.shape, weight.shape[1]))
    if mask is not None:
        check_mask(mask, x.shape[:1], "batch")
    check_devices("x", x, {"state": state, "weight": weight, "bias": bias, "mask": mask})
    given = (t for t in (x, state, weight, bias) if t is not None)
    if inplace and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ValueError(
            "inplace (True) must be False because a gradient is needed and the old state would be lost; "
            "use inplace=False or torch.no_grad()."
        )


def _check_taps(x, weight, bias, activation):
    check_layout("weight", weight, "channels, width")
    channels, width = x.shape[-1], weight.shape[1]
    check_shape("weight", weight, "channels, width", (channels, width), f"x is {describe(x)}")
    if width == 0:
        raise ValueError(f"weight ({describe(weight)}) must have a width of at least 1; leave the call out.")
    if bias is not None:
        check_shape("bias", bias, "channels", (channels,), f"x is {describe(x)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation!r}) must be one of None, 'silu', 'swish'; apply others yourself.")


def _kernel_refuses(x, *rest):
    if computing_dtype(x, *(tensor for tensor in rest if isinstance(tensor, torch.Tensor))) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    return "x is empty, which leaves the kernel nothing to do; use backend='torch'" if not x.numel() else None


def _example(device, dtype):
    """A small input for the kernel's self-check, with what a Mamba layer has: bias, silu, the usual width."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 150, 96), (96, 4), (96,)))
    x, weight, bias = (tensor.to(device, dtype).requires_grad_() for tensor in (x, weight, bias))
    return x, weight, bias, "silu", None, None, None


def _update_example(device, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 96), (2, 96, 4), (96, 4), (96,)
    x, state, weight, bias = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x.to(dtype), state, weight.to(dtype), bias.to(dtype), "silu", None, False


CONV = register(
    Op(
        name="causal_conv1d",
        reference=reference,
        torch=torch_conv,
        kernel="state_space",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
UPDATE = register(
    Op(
        name="causal_conv1d_update",
        reference=reference_update,
        torch=reference_update,
        kernel="state_space",
        kernel_refuses=_kernel_refuses,
        example=_update_example,
    )
)
