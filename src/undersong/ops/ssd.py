"""The state-space scan of Mamba-2: one decay a head and token, a matrix as state.

Transformers are SSMs (Dao, Gu 2024, arXiv 2405.21060, section 6): with step sizes dt_t, a rate A < 0 a head, and
inputs x_t, the state h [head_dim, state] follows

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T,      y_t = h_t C_t + D x_t
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable

from ._dispatch import Op, register, run
from ._ssd_chunks import (
    CPU_CHUNK,
    Chunk,
    by_group,
    check_inputs,
    kernel_refuses,
    step_sizes,
    token_output,
    tokens,
)
from ._validate import check_devices, check_state, computing_dtype


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    *,
    chunk_size=64,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    backend="auto",
):
    """Mamba-2's scan ("state-space duality").

    dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit),  h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T,
    y_t = (h_t C_t + D x_t) silu(z_t)      (Transformers are SSMs, arXiv 2405.21060, section 6)

    Args:
        x: `[batch, length, heads, head_dim]`, any float dtype, any strides.
        dt: `[batch, length, heads]`, step sizes, before bias and softplus where those are asked for.
        A: `[heads]`, rates, negative in a trained model.
        B, C: `[batch, length, groups, state]`; head h reads group h // (heads / groups).
        D: `[heads]` or `[heads, head_dim]`, the skip; None leaves it out.
        z: like x, the gate; None leaves it out.
        dt_bias: `[heads]`, added to dt before the softplus.
        dt_softplus: whether dt goes through softplus.
        dt_limit: lowest and highest step size, applied last (masked tokens take no step whatever it says).
        chunk_size: tokens that are computed by matrix products at once; it steers speed, not the result.
        initial_state: `[batch, heads, head_dim, state]`; packed: `[sequences, ...]`.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU (a CUDA tensor would have to wait for the device); it may stay there for inputs on a GPU.
        return_final_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `y` like x in x's dtype; with `return_final_state` `(y, state)`.

    Raises:
        ValueError: shapes, dtypes or offsets disagree, length 0, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> x, ones = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    >>> ssd(x, ones[..., 0], torch.tensor([-0.6931472]), ones, ones).flatten()  # the state halves, then takes x in
    tensor([1.0000, 2.5000, 5.2500])
    """
    _validate(x, dt, A, B, C, D, z, dt_bias, dt_limit, chunk_size, initial_state, mask, cu_seqlens)
    y, state = run(
        OP, backend, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, chunk_size, initial_state, mask, cu_seqlens
    )
    return (y, state) if return_final_state else y


def reference(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, chunk_size, initial_state, mask, cu_seqlens):
    """The definition, token by token."""
    compute = computing_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
    dtype, (x, B, C, z) = x.dtype, (tokens(tensor, mask, compute) for tensor in (x, B, C, z))
    batch, length, heads, head_dim = x.shape
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = x.new_zeros(batch * (len(offsets) - 1), heads, head_dim, B.shape[3])
    outputs, states = [], []
    for h, (begin, end) in zip(initial_state.to(compute).split(batch), pairwise(offsets), strict=True):
        for t in range(begin, end):
            decay = (dt[:, t] * A).exp()[:, :, None, None]
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            outputs.append((h @ C[:, t, :, :, None])[..., 0])
        states.append(h)
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(compute) * x
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    return y.to(dtype), torch.cat(states)


def torch_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, chunk_size, initial_state, mask, cu_seqlens):
    """Matrix products inside chunks, the recurrence from chunk to chunk; one chunk's matrices are alive at a time."""
    compute = computing_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
    length = x.shape[1]
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(compute)
    if initial_state is not None:
        initial_state = initial_state.to(compute)
    inputs = x, dt, A.to(compute), B, C, D, initial_state, mask
    if length == 1 and cu_seqlens is None:
        y, state = _step(*inputs)
    else:
        offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        size = min(chunk_size, CPU_CHUNK) if x.device.type == "cpu" else chunk_size
        spans = [[(i, min(i + size, end)) for i in range(begin, end, size)] for begin, end in pairwise(offsets)]
        dtype = x.dtype if z is None else compute
        y, state = _ChunkedScan.apply(*inputs, spans, dtype, torch.is_grad_enabled())
    if z is not None:
        y = y * torch.nn.functional.silu(tokens(z, mask, compute))
    return y.to(x.dtype), state


def _step(x, dt, A, B, C, D, h, mask):
    """One token: no matrices."""
    written, B = (tokens(tensor, mask, dt.dtype)[:, 0] for tensor in (x, B))
    groups = B.shape[1], -1
    new = (dt[:, 0, :, None] * written).unflatten(1, groups)[..., None] * B[:, :, None, None]  # groups before heads
    if h is not None:
        decay = (dt[:, 0] * A).exp().unflatten(1, groups)[..., None, None]
        new = torch.addcmul(new, decay, h.unflatten(1, groups))
    return token_output(new, x, C, D, mask), new.flatten(1, 2)


class _ChunkedScan(torch.autograd.Function):
    """With c_i the running sum of dt A inside a chunk, and h the state before it:

        y_i = sum_{j<=i} M_ij dt_j x_j + e^{c_i} h C_i + D x_i,      M_ij = (C_i . B_j) e^{c_i - c_j}
        h <- e^{c_last} h + sum_j e^{c_last - c_j} dt_j x_j B_j^T

    The backward pass keeps the states before the chunks and computes everything else again. A sequence that starts
    from zero, or whose final state has no gradient, has None for that state, and nothing is computed with it.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, mask, spans, dtype, training):
        batch, _, heads, head_dim = x.shape
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        final = torch.empty(batch * len(spans), heads, head_dim, B.shape[3], dtype=dt.dtype, device=x.device)
        held, keep = [], training and any(ctx.needs_input_grad)
        for row, last, chunks in zip(
            by_group(state, B, len(spans)), by_group(final, B, len(spans)), spans, strict=True
        ):
            h = row
            for begin, end in chunks:
                chunk = Chunk(x, dt, A, B, C, mask, begin, end)
                if keep:
                    held.append(h)
                y_chunk, h = chunk.forward(h)
                y[:, begin:end] = y_chunk if D is None else y_chunk.addcmul_(D, chunk.x)
            last.copy_(torch.zeros_like(last) if h is None else h)
        ctx.spans, ctx.mask = spans, mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, state, *held)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, D, state, *held = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros((), dtype=dt.dtype, device=x.device).expand(x.shape)
        dx, dB, dC = (torch.empty_like(tensor) for tensor in (x, B, C))
        d_step, d_log_decay = torch.empty_like(dt), torch.empty_like(dt)
        d_skip = None if D is None else dt.new_zeros(x.shape[2:])
        d_state = None if state is None else dt.new_zeros(state.shape)
        rows = (by_group(tensor, B, len(ctx.spans)) for tensor in (d_final, d_state))
        for dh, first, chunks in reversed(list(zip(*rows, ctx.spans, strict=True))):
            for begin, end in reversed(chunks):
                at = slice(None), slice(begin, end)
                chunk = Chunk(x, dt, A, B, C, ctx.mask, begin, end)
                dy_chunk = tokens(dy[at], None if ctx.mask is None else ctx.mask[at], dt.dtype)
                d_write, dB[at], dC[at], d_log_decay[at], dh = chunk.backward(held.pop(), dy_chunk, dh)
                d_step[at] = (d_write * chunk.x).sum(3)
                d_input = d_write.mul_(dt[at][..., None])
                if D is not None:
                    d_input.addcmul_(D, dy_chunk)
                    d_skip += (dy_chunk * chunk.x).sum((0, 1))
                dx[at] = d_input
            if first is not None and dh is not None:
                first.copy_(dh)
        dA = (d_log_decay * dt).sum((0, 1))
        d_step.addcmul_(d_log_decay, A)
        d_skip = None if D is None else d_skip.sum_to_size(D.shape)
        return dx, d_step, dA, dB, dC, d_skip, d_state, None, None, None, None


def _validate(x, dt, A, B, C, D, z, dt_bias, dt_limit, chunk_size, initial_state, mask, cu_seqlens):
    rows, count = check_inputs(x, dt, A, B, C, D, z, dt_bias, dt_limit, mask, cu_seqlens)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be an integer of at least 1; use 64.")
    if initial_state is not None:
        want = (rows, *x.shape[2:], B.shape[3])
        check_state("initial_state", initial_state, f"{count}, heads, head_dim, state", want)
        check_devices("x", x, {"initial_state": initial_state})


def _example(device, dtype):
    """A small input for the kernel's self-check: several chunks and the options of a Mamba-2 layer in training, so
    that it runs the very kernels that training runs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, dt = normal(2, 150, 4, 64), normal(2, 150, 4)
    B, C = normal(2, 150, 2, 128), normal(2, 150, 2, 128)
    narrow = [tensor.to(device, dtype).requires_grad_() for tensor in (x, dt, B, C)]
    A, D, dt_bias = (tensor.to(device).requires_grad_() for tensor in (-normal(4).exp(), normal(4), normal(4) - 2))
    x, dt, B, C = narrow
    return x, dt, A, B, C, D, None, dt_bias, True, (0.0, float("inf")), 64, None, None, None


OP = register(
    Op(
        name="ssd",
        reference=reference,
        torch=torch_scan,
        kernel="state_space",
        kernel_refuses=kernel_refuses,
        example=_example,
    )
)
