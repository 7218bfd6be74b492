"""One token of a selective state space model: the step of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060).

The state is the recurrence's h: `[batch, channels, state]` for Mamba, `[batch, heads, head_dim, state]` for Mamba-2,
whose decay is one number a head. `selective_scan` and `ssd` take and return it; a step equals them at length 1.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import silu, softplus

from ._dispatch import Op, register, run
from ._validate import (
    check_devices,
    check_groups,
    check_layout,
    check_limit,
    check_mask,
    check_shape,
    computing_dtype,
    describe,
)

INFINITY = float("inf")
NO_LIMIT = (-INFINITY, INFINITY)


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, INFINITY),
    *,
    mask=None,
    inplace=False,
    backend="auto",
):
    """One step of Mamba's or Mamba-2's recurrence; which one, the state's shape says.

    h = exp(dt A) h + dt x B^T;  y = h C + D x;  y = y * silu(z)   with dt = clamp(softplus(dt + dt_bias), *dt_limit)

    Args:
        state: `[batch, channels, state]` (Mamba) or `[batch, heads, head_dim, state]` (Mamba-2), any float dtype.
        x, z: `[batch, channels]` or `[batch, heads, head_dim]`.
        dt: `[batch, channels]` or `[batch, heads]`.
        A: `[channels, state]` or `[heads]`, negative.
        B, C: `[batch, state]` (Mamba only) or `[batch, groups, state]`: blocks of channels / groups channels, or of
            heads / groups heads, share a group.
        D, dt_bias: `[channels]` or `[heads]`.
        dt_softplus: whether dt goes through softplus; dt_limit applies either way, so a negative step becomes 0.
        mask: `[batch]` bool; False rows give zeros, get no gradient and keep their state.
        inplace: write the new state into `state` and return it; refused where gradients are recorded.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `(y, state)`: y like x in x's dtype; the new state in float32 (float64 if any input is), or `state` itself.

    Raises:
        ValueError: shapes, dtypes or devices disagree, inplace where gradients are recorded, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> state, x, dt = torch.zeros(1, 2, 1), torch.tensor([[3.0, 5.0]]), torch.ones(1, 2)
    >>> y, state = selective_state_update(state, x, dt, -torch.ones(2, 1), torch.ones(1, 1), torch.ones(1, 1))
    >>> y
    tensor([[3., 5.]])
    """
    _validate(state, x, dt, A, B, C, D, z, dt_bias, dt_limit, mask, inplace)
    return run(
        OP, backend, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, tuple(map(float, dt_limit)), mask, inplace
    )


def reference(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INFINITY), mask=None,
    inplace=False,
):  # fmt: skip
    """The equations, one after the other."""
    dtype, held, blocks = x.dtype, state, state.shape[1]
    h, x, dt, A, B, C, D, z = _prepare(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask)
    B, C = (t.repeat_interleave(blocks // t.shape[1], 1) for t in (B, C))  # [batch, channels or heads, state]
    if h.dim() == 4:  # heads: one decay for head_dim channels
        dt, A, B, C = dt[..., None], A[:, None, None], B[:, :, None], C[:, :, None]
        D = None if D is None else D[:, None]
    h = (dt[..., None] * A).exp() * h + (dt * x)[..., None] * B
    y = (h * C).sum(-1)
    y = y if D is None else y + D * x
    y = y if z is None else y * silu(z)
    return y.to(dtype), held.copy_(h) if inplace else h


def torch_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INFINITY), mask=None,
    inplace=False,
):  # fmt: skip
    """Few passes over the state: decay, rank-one update, product with C; groups are broadcast, not repeated."""
    dtype, held = x.dtype, state
    h, x, dt, A, B, C, D, z = _prepare(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask)
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (t.repeat_interleave(groups // t.shape[1], 1) if t.shape[1] < groups else t for t in (B, C))
    if h.dim() == 4:  # heads: one decay for head_dim channels
        decay, dt, D = (dt * A).exp()[..., None, None], dt[..., None], None if D is None else D[:, None]
    else:
        decay = (dt[..., None] * A).exp()
    h = h.mul_(decay) if inplace and h is held else decay * h
    write, grouped = (t.unflatten(1, (groups, -1)) for t in (dt * x, h))  # [batch, groups, ..]
    over_channels = (*[1] * (grouped.dim() - 3), -1)
    grouped.addcmul_(write[..., None], B.unflatten(-1, over_channels))
    if torch.is_grad_enabled():  # under autocast, a matrix product's backward would round
        y = (grouped * C.unflatten(-1, over_channels)).sum(-1).view(x.shape)
    else:
        with torch.autocast(h.device.type, enabled=False):
            y = torch.matmul(grouped.flatten(2, -2), C[..., None]).view(x.shape)
    y = y if D is None else torch.addcmul(y, D, x)
    y = y if z is None else y * silu(z)
    return y.to(dtype), held.copy_(h) if inplace and h is not held else h


def _prepare(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask):
    """Everything in the computing dtype; B and C `[batch, groups, state]`; dt as the equations take it; nothing of a
    masked row, and for it the step 0, which keeps the state."""
    compute = computing_dtype(state, x, dt, A, B, C, D, z, dt_bias)
    state, x, dt, A, B, C, D, z, dt_bias = (
        None if t is None else t.to(compute) for t in (state, x, dt, A, B, C, D, z, dt_bias)
    )
    B, C = (t if t.dim() == 3 else t[:, None] for t in (B, C))
    if mask is not None:
        x, dt, B, C, z = (
            None if t is None else t.masked_fill(~mask.view(-1, *[1] * (t.dim() - 1)), 0.0) for t in (x, dt, B, C, z)
        )
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) not in (NO_LIMIT, (0.0, INFINITY) if dt_softplus else NO_LIMIT):  # softplus is positive
        dt = dt.clamp(*dt_limit)
    dt = dt if mask is None else dt.masked_fill(~mask[:, None], 0.0)
    return state, x, dt, A, B, C, D, z


def _validate(state, x, dt, A, B, C, D, z, dt_bias, dt_limit, mask, inplace):
    if not isinstance(state, torch.Tensor) or state.dim() not in (3, 4) or not state.is_floating_point():
        raise ValueError(
            f"state ({describe(state)}) must be a float [batch, channels, state] (Mamba) or "
            "[batch, heads, head_dim, state] (Mamba-2); pass what the scan returned."
        )
    batch, blocks, *inner, size = state.shape
    because = f"state is {describe(state)}"
    what = "heads" if inner else "channels"
    layout = f"batch, {what}" + ", head_dim" * len(inner)
    check_shape("x", x, layout, (batch, blocks, *inner), because)
    check_shape("dt", dt, f"batch, {what}", (batch, blocks), because)
    check_shape("A", A, *(("heads", (blocks,)) if inner else ("channels, state", (blocks, size))), because)
    for name, t in {"B": B, "C": C}.items():
        if not inner and isinstance(t, torch.Tensor) and t.dim() == 2:
            check_shape(name, t, "batch, state", (batch, size), because)
            continue
        check_layout(name, t, "batch, groups, state")
        check_shape(name, t, "batch, groups, state", (batch, t.shape[1], size), because)
        check_groups(name, t, t.shape[1], what, blocks)
    for name, t in {"D": D, "dt_bias": dt_bias}.items():
        if t is not None:
            check_shape(name, t, what, (blocks,), because)
    if z is not None:
        check_shape("z", z, layout, (batch, blocks, *inner), because)
    check_limit("dt_limit", dt_limit)
    if mask is not None:
        check_mask(mask, (batch,), "batch")
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "mask": mask}
    check_devices("state", state, given)
    if inplace and torch.is_grad_enabled():
        for name, t in {"state": state, **given}.items():
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"inplace (True) must be False because {name} requires a gradient; "
                    "use inplace=False, or torch.no_grad() to decode."
                )


def _kernel_refuses(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, *options):
    if computing_dtype(state, x, dt, A, B, C, D, z, dt_bias) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    return (
        "the state is empty, which leaves the kernel nothing to do; use backend='torch'" if not state.numel() else None
    )


def _example(device, dtype):
    """A small input for the kernel's self-check: Mamba-2's layout with everything on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator).to(device, to)

    single = torch.float32
    state, A = normal(2, 4, 16, 32, to=single), -normal(4, to=single).exp()
    D, bias = normal(4, to=single), normal(4, to=single)
    x, z, dt, B, C = normal(2, 4, 16), normal(2, 4, 16), normal(2, 4), normal(2, 2, 32), normal(2, 2, 32)
    return state, x, dt, A, B, C, D, z, bias, True, (0.0, INFINITY), None, False


OP = register(
    Op(
        name="selective_state_update",
        reference=reference,
        torch=torch_update,
        kernel="state_space",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
