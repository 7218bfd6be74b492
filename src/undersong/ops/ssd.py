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
from ._validate import (
    check_devices,
    check_groups,
    check_layout,
    check_limit,
    check_rows,
    check_shape,
    check_state,
    computing_dtype,
    describe,
)

CPU_CHUNK = 64  # torch path on a CPU: a chunk's matrices stay in its cache


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
    dt = _step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
    dtype, (x, B, C, z) = x.dtype, (_tokens(tensor, mask, compute) for tensor in (x, B, C, z))
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
    dt = _step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
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
        y = y * torch.nn.functional.silu(_tokens(z, mask, compute))
    return y.to(x.dtype), state


def _step(x, dt, A, B, C, D, h, mask):
    """One token: no matrices."""
    x, B, C = (_tokens(tensor, mask, dt.dtype)[:, 0] for tensor in (x, B, C))
    groups = B.shape[1], -1
    new = (dt[:, 0, :, None] * x).unflatten(1, groups)[..., None] * B[:, :, None, None]  # groups before heads
    if h is not None:
        decay = (dt[:, 0] * A).exp().unflatten(1, groups)[..., None, None]
        new = torch.addcmul(new, decay, h.unflatten(1, groups))
    y = (new @ C[:, :, None, :, None])[..., 0].flatten(1, 2)
    return (y if D is None else y + D * x)[:, None], new.flatten(1, 2)


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
        for row, last, chunks in zip(_rows(state, B, len(spans)), _rows(final, B, len(spans)), spans, strict=True):
            h = row
            for begin, end in chunks:
                chunk = _Chunk(x, dt, A, B, C, mask, begin, end)
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
        rows = (_rows(tensor, B, len(ctx.spans)) for tensor in (d_final, d_state))
        for dh, first, chunks in reversed(list(zip(*rows, ctx.spans, strict=True))):
            for begin, end in reversed(chunks):
                at = slice(None), slice(begin, end)
                chunk = _Chunk(x, dt, A, B, C, ctx.mask, begin, end)
                dy_chunk = _tokens(dy[at], None if ctx.mask is None else ctx.mask[at], dt.dtype)
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


class _Chunk:
    """One chunk's tokens and decays, and what a pass through it does to states and gradients.

    States are [batch, groups, heads / groups * head_dim, state], so that they meet B and C, which the heads of a group
    share, in plain matrix products.
    """

    def __init__(self, x, dt, A, B, C, mask, begin, end):
        at = slice(None), slice(begin, end)
        mask = None if mask is None else mask[at]
        self.x, B, C = (_tokens(tensor[at], mask, dt.dtype) for tensor in (x, B, C))
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # [batch, groups, chunk, state]
        self.written = self.x * dt[at][..., None]
        # Differences of float32 sums would lose the small decays behind a large one.
        log = (dt[at].double() * A.double()).cumsum(1)
        self.since_start = log.exp().to(dt.dtype)[..., None]  # [batch, chunk, heads, 1]
        self.until_end = (log[:, -1:] - log).exp().to(dt.dtype)[..., None]
        self.kept = self._grouped(self.written * self.until_end)  # what of the tokens is left at the end
        log = log.transpose(1, 2).contiguous()  # or the matrices would inherit its strides
        future = torch.ones(2 * (end - begin,), dtype=torch.bool, device=x.device).triu(1)
        between = (log[..., None] - log[..., None, :]).to(dt.dtype).masked_fill_(future, -torch.inf).exp_()
        self.between = between.unflatten(1, (B.shape[2], -1))  # [batch, groups, heads / groups, chunk, chunk]
        self.match = (self.C @ self.B.mT)[:, :, None]  # [batch, groups, 1, chunk, chunk]

    def forward(self, h):
        y = ((self.between * self.match).flatten(1, 2) @ self.written.transpose(1, 2)).transpose(1, 2)
        new = self.kept.mT @ self.B
        if h is not None:
            y = torch.addcmul(y, self._by_head(self.C @ h.mT), self.since_start)
            new += self._across(h)
        return y, new

    def backward(self, h, dy, dh):
        """Gradients of (written, B, C, dt A, h)."""
        weights, dy_heads = (self.between * self.match).flatten(1, 2), dy.transpose(1, 2)
        d_written = (weights.mT @ dy_heads).transpose(1, 2)
        d_weights = (dy_heads @ self.written.permute(0, 2, 3, 1)).view(self.between.shape).mul_(self.between)
        d_match = d_weights.sum(2)
        dB, dC = d_match.mT @ self.C, d_match @ self.B
        # Token t lies between i >= t and j < t. Sums of just these pairs, rather than differences of larger sums,
        # leave no rounding noise where a strong decay has cut everything off.
        pairs = d_weights.mul_(self.match).flatten(1, 2)
        past = pairs.new_ones(pairs.shape[2:]).triu(1)
        d_log = (pairs @ past).tril_().sum(2).transpose(1, 2)
        before = None
        if h is not None:  # what reaches token i from h has passed all tokens until i
            read = dy * self.since_start
            d_log = d_log + (read * self._by_head(self.C @ h.mT)).sum(3).flip(1).cumsum(1).flip(1)
            read = self._grouped(read)
            dC, before = dC + read @ h, read.mT @ self.C
        if dh is not None:  # what leaves token j for the end passes all tokens after j
            left = self._by_head(self.B @ dh.mT).mul_(self.until_end)
            passed = (left * self.written).sum(3)[:, :-1].cumsum(1)
            d_log = d_log + torch.nn.functional.pad(passed, (0, 0, 1, 0))
            d_written, dB = d_written + left, dB + self.kept @ dh
        if h is not None and dh is not None:
            through = self._across(dh)
            d_log += (through * h).unflatten(2, (-1, dy.shape[3])).sum((3, 4)).flatten(1)[:, None]
            before += through
        return d_written, dB.transpose(1, 2), dC.transpose(1, 2), d_log, before

    def _across(self, h):
        """A state after the decays of the whole chunk."""
        groups = self.B.shape[1], -1
        decay = self.since_start[:, -1].unflatten(1, groups)[..., None]  # [batch, groups, heads / groups, 1, 1]
        return (h.unflatten(2, (decay.shape[2], -1)) * decay).flatten(2, 3)

    def _grouped(self, tokens):
        """[batch, chunk, heads, head_dim] -> [batch, groups, chunk, heads / groups * head_dim]."""
        return tokens.unflatten(2, (self.B.shape[1], -1)).flatten(3).transpose(1, 2)

    def _by_head(self, tokens):
        return tokens.transpose(1, 2).reshape(self.x.shape)


def _rows(states, B, count):
    """States `[count * batch, heads, head_dim, state]`, or None, as `count` states of `_Chunk`."""
    if states is None:
        return [None] * count
    rows, heads, head_dim, state_size = states.shape
    groups = B.shape[2]
    return states.reshape(count, rows // count, groups, heads // groups * head_dim, state_size)


def _step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute):
    dt = dt.to(compute)
    if mask is not None:  # padding may hold NaN, whose gradient would be NaN
        dt = dt.masked_fill(~mask[..., None], 0.0)
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    if tuple(dt_limit) != (float("-inf"), float("inf")):
        dt = dt.clamp(*dt_limit)
    return dt if mask is None else dt.masked_fill(~mask[..., None], 0.0)  # a step of 0 keeps the state


def _tokens(tensor, mask, compute):
    """In the computing dtype, without what stands at masked positions: padding may hold anything, NaN included."""
    if tensor is None:
        return None
    tensor = tensor.to(compute)
    return tensor if mask is None else tensor.masked_fill(~mask[..., None, None], 0.0)


def _validate(x, dt, A, B, C, D, z, dt_bias, dt_limit, chunk_size, initial_state, mask, cu_seqlens):
    check_layout("x", x, "batch, length, heads, head_dim")
    batch, length, heads, head_dim = x.shape
    because = f"x is {describe(x)}"
    rows, count = check_rows("x", x, mask, cu_seqlens)
    check_shape("dt", dt, "batch, length, heads", x.shape[:3], because)
    check_shape("A", A, "heads", (heads,), because)
    check_layout("B", B, "batch, length, groups, state")
    groups, state = B.shape[2:]
    check_shape("B", B, "batch, length, groups, state", (batch, length, groups, state), because)
    check_groups("B", B, groups, "heads", heads)
    check_shape("C", C, "batch, length, groups, state", B.shape, f"B is {describe(B)}")
    if D is not None:
        layout, want = ("heads, head_dim", (heads, head_dim)) if D.dim() == 2 else ("heads", (heads,))
        check_shape("D", D, layout, want, because)
    if z is not None:
        check_shape("z", z, "batch, length, heads, head_dim", x.shape, because)
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "heads", (heads,), because)
    check_limit("dt_limit", dt_limit)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be an integer of at least 1; use 64.")
    if initial_state is not None:
        layout, want = f"{count}, heads, head_dim, state", (rows, heads, head_dim, state)
        check_state("initial_state", initial_state, layout, want)
    given = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_devices("x", x, given | {"initial_state": initial_state, "mask": mask})


def _kernel_refuses(x, dt, A, B, *rest):
    if computing_dtype(x, dt, A, B, *(tensor for tensor in rest if isinstance(tensor, torch.Tensor))) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if B.shape[3] > 256:
        return f"a state of {B.shape[3]} is more than the 256 that the kernel holds in registers; use backend='torch'"
    return "x is empty, which leaves the kernel nothing to do; use backend='torch'" if not x.numel() else None


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
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
