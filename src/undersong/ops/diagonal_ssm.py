"""One diagonal state space model a channel, the layer of S4D (arXiv 2206.11893): a convolution or a recurrence.

The state is complex, `[batch, channels, state]`, one number of every conjugate pair. Its impulse response
K_l = 2 Re sum_n C_n B_n a_n^l is a sum of powers; with l = i r + j a power is a product of two, so K, the effect of a
carried state and the last state are small matrix products over tables of sqrt(length) powers (the Vandermonde product
of section 3.3, without its [channels, state, length] matrix).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ._complex import exp, powers
from ._dispatch import Op, register, run
from ._rows import align_right, packed_rows, take
from ._validate import check_devices, check_layout, check_rows, check_shape, computing_dtype, describe
from .diagonal_scan import reference as scan_step_by_step
from .diagonal_scan import torch_scan as scan_blocked
from .fft_conv import convolve

LOWERINGS = ("auto", "convolution", "scan")
SHORT = 16  # steps that the scan takes in less time than the convolution needs for its tables


def diagonal_ssm(
    u,
    log_a,
    B,
    C,
    D=None,
    *,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    reverse=False,
    lowering="auto",
    backend="auto",
):
    """A linear time-invariant state space model of every channel, with a diagonal transition.

    x_t = a x_{t-1} + B u_t,   y_t = 2 Re(C . x_t) + D u_t,   a = exp(log_a)       (S4D, arXiv 2206.11893, section 3)

    Args:
        u: `[batch, length, channels]`, any float dtype, any strides.
        log_a: complex `[channels, state]`, real part below 0; `undersong.ops.hippo.discretise` makes it and the scale
            of B from continuous dynamics.
        B, C: complex `[channels, state]`; the state is half of the real one, the factor 2 is for the other half.
        D: `[channels]`.
        initial_state: complex `[batch, channels, state]`; packed: `[sequences, channels, state]`.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1; their values are read on the host.
        return_final_state: also return the last state, in complex64 (complex128 if any input has 64-bit parts).
        reverse: run from the last step to the first.
        lowering: "convolution" (by FFT, O(length log length), memory as for u), "scan" (all states at once, `state`
            times the memory of u), or "auto": the convolution for more than 16 steps. Not with backend="reference".
        backend: "auto", "reference" (the recurrence) or "torch".

    Returns:
        y like u in u's dtype; with `return_final_state` `(y, state)`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, the length is 0, an unknown lowering or backend.
        RuntimeError: backend="triton", which this op does not have.

    >>> u, one = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1), torch.ones(1, 1, dtype=torch.complex64)
    >>> half = torch.full((1, 1), 0.5 + 0j).log()
    >>> diagonal_ssm(u, half, one, one / 2).flatten().round(decimals=4)
    tensor([1.0000, 2.5000, 5.2500])
    """
    _validate(u, log_a, B, C, D, initial_state, mask, cu_seqlens, lowering, backend)
    with torch.autocast(u.device.type, enabled=False):
        y, state = run(
            OP, backend, u, log_a, B, C, D, initial_state, mask, cu_seqlens, return_final_state, reverse, lowering
        )
    return (y, state) if return_final_state else y


def reference(
    u, log_a, B, C, D=None, initial_state=None, mask=None, cu_seqlens=None, wants_state=True, reverse=False,
    lowering="auto",
):  # fmt: skip
    """The recurrence, step by step."""
    u, log_a, B, C, D, first, dtype = _prepare(u, log_a, B, C, D, initial_state, mask)
    y, state = _scan(scan_step_by_step, u, log_a, B, C, first, mask, cu_seqlens, reverse)
    return _finish(y, u, D, dtype), state


def torch_ssm(
    u, log_a, B, C, D=None, initial_state=None, mask=None, cu_seqlens=None, wants_state=True, reverse=False,
    lowering="auto",
):  # fmt: skip
    """Either lowering; rows of the convolution end together, see `_rows`."""
    u, log_a, B, C, D, first, dtype = _prepare(u, log_a, B, C, D, initial_state, mask)
    if lowering == "scan" or (lowering == "auto" and u.shape[1] <= SHORT):
        y, state = _scan(scan_blocked, u, log_a, B, C, first, mask, cu_seqlens, reverse)
        return _finish(y, u, D, dtype), state
    if reverse:
        u, mask = u.flip(1), None if mask is None else mask.flip(1)
    parts = log_a, B, C
    if cu_seqlens is not None:
        y, state = _packed(u, parts, first, cu_seqlens, wants_state, reverse)
    elif mask is None:
        y, state = _convolution(u, *parts, first, None, wants_state)
    else:
        rows, places = align_right(u, mask)
        y, state = _convolution(rows, *parts, first, mask.sum(1), wants_state)
        y = take(y, places).masked_fill(~mask[..., None], 0.0)
    y = _finish(y, u, D, dtype)
    return (y.flip(1) if reverse else y), state


def _packed(u, parts, first, cu_seqlens, wants_state, reverse):
    """Groups of rows of similar length. With `reverse`, u is flipped already; sequence n keeps its number."""
    sequences, channels, size = cu_seqlens.numel() - 1, *parts[0].shape
    offsets = (cu_seqlens[-1] - cu_seqlens).flip(0) if reverse else cu_seqlens
    last = u.new_zeros(sequences, channels, size, dtype=parts[0].dtype) if first is None else first
    y = torch.empty_like(u[0])
    for which, index, valid in packed_rows(offsets, u.device):
        which = sequences - 1 - which if reverse else which
        rows = u[0, index].masked_fill(~valid[..., None], 0.0)
        part, state = _convolution(rows, *parts, None if first is None else first[which], valid.sum(1), wants_state)
        y = y.index_copy(0, index[valid], part[valid])
        last = last.index_copy(0, which, state) if wants_state else None
    return y[None], last


def _convolution(u, log_a, B, C, first, lengths, wants_state):
    """Rows u `[rows, length, channels]`, of which the last `lengths` steps count (None: all) and the others are zero.

    Returns y and, if wanted, the last states.
    """
    length = u.shape[1]
    y = convolve(u, _powers_read(C * B, log_a, length))
    if first is not None:
        carried = _powers_read(C * exp(log_a) * first, log_a, length).transpose(1, 2)
        if lengths is not None:  # the first step of a row is where it begins to count
            age = torch.arange(length, device=u.device) - (length - lengths).unsqueeze(1)
            carried = take(carried, age.clamp(min=0))
        y = y + carried
    if not wants_state:
        return y, None
    state = B * _powers_sum(u, log_a)
    if first is not None:
        steps = length if lengths is None else lengths.view(-1, 1, 1)
        state = state + powers(log_a, steps) * first
    return y, state


def _powers_read(w, log_a, length):
    """2 Re sum_n w_n a_n^l for l < length: w `[..., channels, state]` -> `[..., channels, length]`."""
    rows = w.shape[:-2]
    w = w.reshape(-1, *log_a.shape).transpose(0, 1).unsqueeze(2)  # [channels, rows, 1, state]
    near, far = _steps(length, log_a)
    left = w * powers(log_a.unsqueeze(1), far[:, None]).unsqueeze(1)  # [channels, rows, far, state]
    right = powers(log_a.unsqueeze(2), near)  # [channels, state, near]
    left, right = torch.cat([left.real, -left.imag], -1), torch.cat([right.real, right.imag], 1)
    sums = 2 * left.flatten(1, 2) @ right
    return sums.view(len(log_a), w.shape[1], -1)[..., :length].transpose(0, 1).reshape(*rows, len(log_a), length)


def _powers_sum(u, log_a):
    """sum_t a^(length - 1 - t) u_t: `[rows, length, channels]` -> complex `[rows, channels, state]`."""
    near, far = _steps(u.shape[1], log_a)
    u = pad(u, (0, 0, len(near) * len(far) - u.shape[1], 0)).unflatten(1, (len(far), len(near)))
    table = powers(log_a.unsqueeze(1), near.flip(0)[:, None])  # [channels, near, state]
    sums = u.permute(3, 0, 1, 2).flatten(1, 2) @ torch.cat([table.real, table.imag], -1)
    sums = torch.complex(*sums.chunk(2, -1)).unflatten(1, u.shape[:2])  # [channels, rows, far, state]
    return (sums * powers(log_a.unsqueeze(1), far.flip(0)[:, None]).unsqueeze(1)).sum(2).transpose(0, 1)


def _steps(length, log_a):
    """0, 1, ... and multiples of their count: every number below the length is a sum of one of each."""
    near = 1 << ((length - 1).bit_length() + 1) // 2
    steps = torch.arange(near, device=log_a.device, dtype=log_a.real.dtype)
    return steps, near * torch.arange(-(-length // near), device=log_a.device, dtype=log_a.real.dtype)


def _scan(scan, u, log_a, B, C, first, mask, cu_seqlens, reverse):
    x, state = scan(B * u.unsqueeze(-1), exp(log_a)[None, None], first, mask, cu_seqlens, reverse)
    return 2 * (C * x).sum(-1).real, state


def _prepare(u, log_a, B, C, D, initial_state, mask):
    """All in float32 and complex64 or wider, u with nothing under the mask; and the dtype of the output."""
    dtype = u.dtype
    compute = computing_dtype(u, D, *(None if x is None else x.real for x in (log_a, B, C, initial_state)))
    wide = compute.to_complex()
    u, D = u.to(compute), None if D is None else D.to(compute)
    log_a, B, C, first = (None if x is None else x.to(wide) for x in (log_a, B, C, initial_state))
    return u if mask is None else u.masked_fill(~mask[..., None], 0.0), log_a, B, C, D, first, dtype


def _finish(y, u, D, dtype):
    return (y if D is None else torch.addcmul(y, D, u)).to(dtype)


def _validate(u, log_a, B, C, D, initial_state, mask, cu_seqlens, lowering, backend):
    check_layout("u", u, "batch, length, channels")
    channels = u.shape[2]
    for name, x in {"log_a": log_a, "B": B, "C": C}.items():
        size = log_a.shape[-1] if isinstance(log_a, torch.Tensor) and log_a.dim() else 0
        if not isinstance(x, torch.Tensor) or not x.is_complex() or x.shape != (channels, size):
            raise ValueError(
                f"{name} ({describe(x)}) must be a complex [channels, state] = [{channels}, {size or 'any'}] because u"
                f" is {describe(u)}{'' if name == 'log_a' else f' and log_a is {describe(log_a)}'}; use"
                " torch.view_as_complex on real pairs."
            )
    if D is not None:
        check_shape("D", D, "channels", (channels,), f"u is {describe(u)}")
    rows, count = check_rows("u", u, mask, cu_seqlens)
    if initial_state is not None:
        want = (rows, *log_a.shape)
        if (
            not isinstance(initial_state, torch.Tensor)
            or not initial_state.is_complex()
            or initial_state.shape != want
        ):
            raise ValueError(
                f"initial_state ({describe(initial_state)}) must be a complex [{count}, channels, state] ="
                f" {list(want)}; pass what return_final_state=True returned."
            )
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering ({lowering!r}) must be one of {', '.join(map(repr, LOWERINGS))}; use 'auto'.")
    if lowering != "auto" and backend not in ("auto", "torch"):
        raise ValueError(
            f"lowering ({lowering!r}) is a choice of the torch backend, but backend is {backend!r}; leave one out."
        )
    given = {"log_a": log_a, "B": B, "C": C, "D": D, "initial_state": initial_state, "mask": mask}
    check_devices("u", u, given)


OP = register(Op(name="diagonal_ssm", reference=reference, torch=torch_ssm))
