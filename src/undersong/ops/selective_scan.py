"""The selective scan of Mamba: a diagonal linear recurrence whose step size, input and read-out depend on the token.

Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.2 and Algorithm 2). The state h is `[batch, channels, state]`:
each channel is `state` independent leaky sums, of which the output reads one combination.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu, softplus

from ._dispatch import Op, register, run
from ._selective_blocks import blocked_scan
from ._validate import (
    check_devices,
    check_groups,
    check_layout,
    check_rows,
    check_shape,
    check_state,
    computing_dtype,
    describe,
)
from .selective_state_update import NO_LIMIT
from .selective_state_update import torch_update as update


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    *,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    backend="auto",
):
    """Selective state space model over a sequence.

    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t;  y_t = C_t . h_t + D u_t;  y_t = y_t * silu(z_t)
    with d = softplus(delta + delta_bias)                           (Mamba, arXiv 2312.00752, Algorithm 2)

    Args:
        u, delta, z: `[batch, length, channels]`, any float dtype, any strides.
        A: `[channels, state]`, negative.
        B, C: `[batch, length, state]` or `[batch, length, groups, state]`; blocks of channels / groups channels share
            a group; B and C may have different ones.
        D, delta_bias: `[channels]`.
        delta_softplus: whether delta (plus its bias) goes through softplus.
        initial_state: `[batch, channels, state]`, as returned; packed: `[sequences, channels, state]`.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU (a CUDA tensor would have to wait for the device).
        return_final_state: also return the state after the last token, in float32 (float64 if any input is).
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `y` like u in u's dtype; with `return_final_state` `(y, state)`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, the length is 0, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> u, delta = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1), torch.ones(1, 3, 1)
    >>> half, one = torch.tensor([[-0.6931472]]), torch.ones(1, 3, 1)  # exp(delta A) = 1/2
    >>> selective_scan(u, delta, half, one, one).flatten()
    tensor([1.0000, 2.5000, 5.2500])
    """
    _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens)
    y, state = run(OP, backend, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, cu_seqlens)
    return (y, state) if return_final_state else y


def reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
    cu_seqlens=None,
):  # fmt: skip
    """The equations, step by step and sequence by sequence."""
    dtype, compute = u.dtype, computing_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    u, d, A, B, C, D, z, bias, h = (
        None if t is None else t.to(compute) for t in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    B, C = (t if t.dim() == 4 else t[:, :, None] for t in (B, C))
    if mask is not None:  # padding may hold anything, NaN included
        hidden = ~mask[..., None]
        u, d, z = (None if t is None else t.masked_fill(hidden, 0.0) for t in (u, d, z))
        B, C = B.masked_fill(hidden[..., None], 0.0), C.masked_fill(hidden[..., None], 0.0)
    d = d if bias is None else d + bias
    d = softplus(d) if delta_softplus else d
    d = d if mask is None else d.masked_fill(hidden, 0.0)
    batch, length, channels = u.shape
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        h_t = u.new_zeros(batch, *A.shape) if h is None else h[rows]
        for t in range(begin, end):
            B_t, C_t = (m[:, t].repeat_interleave(channels // m.shape[2], 1) for m in (B, C))
            h_t = (d[:, t, :, None] * A).exp() * h_t + (d[:, t] * u[:, t])[..., None] * B_t
            outputs.append((C_t * h_t).sum(-1))
        states.append(h_t)
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D * u
    y = y if z is None else y * silu(z)
    return y.to(dtype), torch.cat(states)


def torch_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
    cu_seqlens=None,
):  # fmt: skip
    """Blocks of steps held at once, and computed again for the gradients; a single token takes the update's path."""
    if u.shape[1] == 1 and cu_seqlens is None:
        u, delta, B, C, z, mask = (None if t is None else t[:, 0] for t in (u, delta, B, C, z, mask))
        compute = computing_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
        state = A.new_zeros(len(u), *A.shape, dtype=compute) if initial_state is None else initial_state
        y, state = update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, NO_LIMIT, mask)
        return y[:, None], state
    # torch.compile would unroll the loop over time, for minutes; its graph breaks here instead.
    scan = torch.compiler.disable(blocked_scan) if torch.compiler.is_dynamo_compiling() else blocked_scan
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, cu_seqlens)


def _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens):
    check_layout("u", u, "batch, length, channels")
    check_layout("A", A, "channels, state")
    batch, length, channels = u.shape
    size = A.shape[1]
    because = f"u is {describe(u)}"
    check_shape("delta", delta, "batch, length, channels", u.shape, because)
    check_shape("A", A, "channels, state", (channels, size), because)
    both = f"{because} and A is {describe(A)}"
    for name, x in {"B": B, "C": C}.items():
        if isinstance(x, torch.Tensor) and x.dim() == 4:
            groups = x.shape[2]
            check_shape(name, x, "batch, length, groups, state", (batch, length, groups, size), both)
            check_groups(name, x, groups, "channels", channels)
        else:
            check_shape(name, x, "batch, length, state", (batch, length, size), both)
    for name, x in {"D": D, "delta_bias": delta_bias}.items():
        if x is not None:
            check_shape(name, x, "channels", (channels,), because)
    if z is not None:
        check_shape("z", z, "batch, length, channels", u.shape, because)
    rows, count = check_rows("u", u, mask, cu_seqlens)
    if initial_state is not None:
        check_state("initial_state", initial_state, f"{count}, channels, state", (rows, channels, size))
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_devices("u", u, given | {"initial_state": initial_state, "mask": mask})


def _kernel_refuses(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None, *rest):
    if computing_dtype(u, delta, A, B, C, D, z, delta_bias, state) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if A.shape[1] > 128:
        return f"a state of {A.shape[1]} is more than the 128 that the kernel holds; use backend='torch'"
    return "a size is 0, which leaves the kernel nothing to do; use backend='torch'" if not u.numel() else None


def _example(device, dtype):
    """A small input for the kernel's self-check: several chunks, everything that a model uses switched on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator).to(device, to).requires_grad_()

    shape, single = (2, 300, 64), torch.float32
    u, delta, z, B, C = normal(*shape), normal(*shape), normal(*shape), normal(2, 300, 16), normal(2, 300, 16)
    A = torch.arange(1.0, 17.0).neg().repeat(64, 1).to(device).requires_grad_()
    return u, delta, A, B, C, normal(64, to=single), z, normal(64, to=single), True, None, None, None


OP = register(
    Op(
        name="selective_scan",
        reference=reference,
        torch=torch_scan,
        kernel="state_space",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
