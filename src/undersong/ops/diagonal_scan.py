"""A diagonal linear recurrence, x_t = a_t x_{t-1} + b_t elementwise, real or complex, parallel over blocks of time.

What S5 (arXiv 2208.04933, section 3.2) and every other diagonal state space model evaluates; steps compose
associatively, (a, b) then (a', b') is (a' a, a' b + b'). The state is the last x.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._validate import check_devices, check_rows, describe

BLOCK = 32  # steps of a block; the blocks' ends are scanned the same way
SHORT = 16  # steps that are as fast one by one
SMALL = 2**14  # numbers, up to which a CPU spends more time on starting operations than in them


def diagonal_scan(
    a,
    b,
    *,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    reverse=False,
    backend="auto",
):
    """Linear recurrence of every element on its own.

    x_t = a_t x_{t-1} + b_t      (with `reverse` x_t = a_t x_{t+1} + b_t)

    Args:
        a: as many dimensions as b, each of b's size or 1: a decay that is constant over time has length 1. Real or
            complex.
        b: `[batch, length, ...]`, real or complex, any strides.
        initial_state: `[batch, ...]`, x before the first step (after the last one with `reverse`); packed:
            `[sequences, ...]`.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1; their values are read on the host.
        return_final_state: also return the last state, in float32 or complex64 (64-bit parts if any input has them).
        reverse: run from the last step to the first.
        backend: "auto", "reference" or "torch".

    Returns:
        x like b in b's dtype (complex64 or complex128 if anything is complex); with `return_final_state` `(x, state)`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, the length is 0, or an unknown backend.
        RuntimeError: backend="triton", which this op does not have.

    >>> half, b = torch.tensor([0.5]).view(1, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)
    >>> diagonal_scan(half, b).flatten()
    tensor([1.0000, 2.5000, 5.2500])
    >>> diagonal_scan(half, b, reverse=True).flatten()
    tensor([3., 4., 4.])
    """
    _validate(a, b, initial_state, mask, cu_seqlens)
    x, state = run(OP, backend, b, a, initial_state, mask, cu_seqlens, reverse)
    return (x, state) if return_final_state else x


def reference(b, a, initial_state=None, mask=None, cu_seqlens=None, reverse=False):
    """The recurrence, step by step and sequence by sequence."""
    b, a, first, dtype = _prepare(b, a, initial_state, mask, cu_seqlens)
    length = b.shape[1]
    a = a.expand(-1, length, *a.shape[2:])
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [None] * length, []
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        x = first if cu_seqlens is None else first[n : n + 1]
        for t in range(end - 1, begin - 1, -1) if reverse else range(begin, end):
            x = a[:, t] * x + b[:, t]
            outputs[t] = x
        states.append(x)
    return _finish(torch.stack(outputs, 1), mask, dtype), torch.cat(states)


def torch_scan(b, a, initial_state=None, mask=None, cu_seqlens=None, reverse=False):
    """Blocks of steps; the gradient is the same recurrence run the other way. O(length) time and memory."""
    b, a, first, dtype = _prepare(b, a, initial_state, mask, cu_seqlens)
    if cu_seqlens is not None:
        return _packed(b, a, first, cu_seqlens, reverse, dtype)
    if b.shape[1] == 1:
        x = a * first.unsqueeze(1) + b
    else:
        x = _Scan.apply(a, b, first, reverse)
    return _finish(x, mask, dtype), x[:, 0 if reverse else -1]


class _Scan(torch.autograd.Function):
    """All of one dtype: a `[1 or batch, 1 or length, ...]`, b `[batch, length, ...]`, first `[batch, ...]`.

    The adjoint g of x runs the other way, g_t = dx_t + conj(a_{t+1}) g_{t+1}; then db = g, da_t = g_t conj(x_{t-1}),
    and the gradient of the first state is conj(a_0) g_0. All of it is differentiable again.
    """

    @staticmethod
    def forward(ctx, a, b, first, reverse):
        if b.shape[1] <= SHORT or (b.device.type == "cpu" and b.numel() > SMALL):
            x = torch.empty_like(b, memory_format=torch.contiguous_format)
            _scan(a, b, first, reverse, x)
        elif reverse:
            x = _doubling(a.flip(1), b.flip(1), first).flip(1)
        else:
            x = _doubling(a, b, first)
        ctx.reverse = reverse
        ctx.save_for_backward(a, first, x)
        return x

    @staticmethod
    def backward(ctx, dx):
        a, first, x = ctx.saved_tensors
        reverse = ctx.reverse
        # a decay links a step to the one before it, so the adjoint's decays are shifted by one
        inner, links, seed = (slice(1, None), slice(-1), 0) if reverse else (slice(-1), slice(1, None), -1)
        decays = a if a.shape[1] == 1 else a[:, links]
        g = _Scan.apply(decays.conj().resolve_conj(), dx[:, inner], dx[:, seed], not reverse)
        g = _join(g, dx[:, seed], reverse)
        da = dfirst = None
        if ctx.needs_input_grad[0]:
            da = (g * _join(x[:, inner], first, not reverse).conj()).sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            dfirst = a[:, -1 if reverse else 0].conj() * g[:, -1 if reverse else 0]
        return da, g, dfirst, None


def _doubling(a, b, first):
    """All steps of a block at once, in log2(BLOCK) rounds that each take in twice as many steps: few operations, for
    devices that need time to start one."""
    length = b.shape[1]
    size = length if length < 2 * BLOCK else BLOCK
    blocks = length // size
    whole = blocks * size
    x = b[:, :whole].unflatten(1, (blocks, size))
    if a.shape[1] == 1:
        product = a.unsqueeze(1).expand(-1, 1, size, *a.shape[2:])
    else:
        product = a[:, :whole].unflatten(1, (blocks, size))
    step = 1
    while step < size:
        x = torch.cat([x[:, :, :step], torch.addcmul(x[:, :, step:], product[:, :, step:], x[:, :, :-step])], 2)
        product = torch.cat([product[:, :, :step], product[:, :, step:] * product[:, :, :-step]], 2)
        step *= 2
    before = first.unsqueeze(1)
    if blocks > 1:
        ends = _doubling(product[:, :, -1], x[:, :, -1], first)
        before = _join(ends[:, :-1], first, True)
    x = torch.addcmul(x, product, before.unsqueeze(2)).flatten(1, 2)
    if whole < length:
        rest = _doubling(a if a.shape[1] == 1 else a[:, whole:], b[:, whole:], x[:, -1])
        x = torch.cat([x, rest], 1)
    return x


def _scan(a, b, first, reverse, out):
    """One step of every block after the other: few passes over memory. Writes all x into `out`: first the blocks'
    ends, by the same recurrence over blocks, then every block from the end before it."""
    length, constant = b.shape[1], a.shape[1] == 1
    if length < 2 * BLOCK:
        x = first
        for t in range(length - 1, -1, -1) if reverse else range(length):
            x = torch.addcmul(b[:, t], a[:, 0 if constant else t], x, out=out[:, t])
        return
    blocks = length // BLOCK
    whole = blocks * BLOCK
    main, rest = (
        (slice(length - whole, None), slice(0, length - whole)) if reverse else (slice(whole), slice(whole, None))
    )

    def cut(x):
        return x[:, main].unflatten(1, (blocks, BLOCK))

    b_main, out_main = cut(b), cut(out)
    a_main = a.unsqueeze(1) if constant else cut(a)
    steps = range(BLOCK - 1, -1, -1) if reverse else range(BLOCK)
    decays = [a_main[:, :, 0 if constant else t] for t in steps]
    product, x = decays[0], b_main[:, :, steps[0]]
    for t, decay in zip(steps[1:], decays[1:], strict=True):
        x = torch.addcmul(b_main[:, :, t], decay, x)
        product = product * decay
    ends = torch.empty_like(x)
    _scan(product, x, first, reverse, ends)
    x = _join(ends[:, 1:] if reverse else ends[:, :-1], first, not reverse)
    for t, decay in zip(steps, decays, strict=True):
        x = torch.addcmul(b_main[:, :, t], decay, x, out=out_main[:, :, t])
    if whole < length:
        _scan(a if constant else a[:, rest], b[:, rest], ends[:, 0 if reverse else -1], reverse, out[:, rest])


def _join(x, one, in_front):
    """`one` `[batch, ...]` as a further step before or after x `[batch, length, ...]`."""
    return torch.cat([one.unsqueeze(1), x] if in_front else [x, one.unsqueeze(1)], 1)


def _packed(b, a, first, cu_seqlens, reverse, dtype):
    """One scan over all sequences, whose first steps take their own state in place of what came before."""
    length = b.shape[1]
    offsets = cu_seqlens.tolist()
    held = [n for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)) if begin < end]
    enter, leave = ([offsets[n] for n in held], [offsets[n + 1] - 1 for n in held])
    if reverse:
        enter, leave = leave, enter
    held, enter, leave = (torch.tensor(x, dtype=torch.long, device=b.device) for x in (held, enter, leave))
    a = a.expand(1, length, *a.shape[2:])
    b = b.index_add(1, enter, (a[0, enter] * first[held])[None])
    x = _Scan.apply(a.index_fill(1, enter, 0), b, torch.zeros_like(b[:, 0]), reverse)
    return x.to(dtype), first.index_copy(0, held, x[0, leave])


def _prepare(b, a, initial_state, mask, cu_seqlens):
    """b, a and the first state in the computing dtype, with nothing under the mask; and the dtype of the output."""
    wide = b.dtype
    for x in (a, initial_state):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    compute = torch.promote_types(wide, torch.complex64 if wide.is_complex else torch.float32)
    dtype = b.dtype if not compute.is_complex else compute
    b, a = b.to(compute), a.to(compute)
    if mask is not None:
        keep = mask.view(*mask.shape, *[1] * (b.dim() - 2))
        b, a = b.masked_fill(~keep, 0), torch.where(keep, a, 1)
    rows = b.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    first = b.new_zeros(rows, *b.shape[2:]) if initial_state is None else initial_state.to(compute)
    return b, a, first, dtype


def _finish(x, mask, dtype):
    if mask is not None:
        x = x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0)
    return x.to(dtype)


def _validate(a, b, initial_state, mask, cu_seqlens):
    if not _is_number(b) or b.dim() < 2:
        raise ValueError(f"b ({describe(b)}) must be a float or complex [batch, length, ...]; reshape or cast it.")
    fits = _is_number(a) and a.dim() == b.dim() and all(m in (1, n) for m, n in zip(a.shape, b.shape, strict=True))
    if not fits:
        raise ValueError(
            f"a ({describe(a)}) must be a float or complex tensor whose sizes are 1 or those of b, {list(b.shape)};"
            " unsqueeze or cast it."
        )
    rows, count = check_rows("b", b, mask, cu_seqlens)
    if initial_state is not None and (not _is_number(initial_state) or initial_state.shape != (rows, *b.shape[2:])):
        raise ValueError(
            f"initial_state ({describe(initial_state)}) must be a float or complex [{count}, ...] ="
            f" {[rows, *b.shape[2:]]}; pass what return_final_state=True returned."
        )
    check_devices("b", b, {"a": a, "initial_state": initial_state, "mask": mask})


def _is_number(x):
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


OP = register(Op(name="diagonal_scan", reference=reference, torch=torch_scan))
