"""The selective scan in blocks of time: all that is `[steps, channels, state]` is one block's, and is used again.

Mamba (arXiv 2312.00752, section 3.3.2) keeps such tensors in fast memory and computes them again for the gradients; on
a CPU that memory is the cache. Stored are the inputs and the states before every block; time is linear in the length.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import silu, softplus

from ._validate import computing_dtype

BLOCK = 32  # steps held at once
CACHED = 2**15  # numbers in the states of one step on a CPU: with its decays they fit a core's second-level cache


def blocked_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
    cu_seqlens=None,
):  # fmt: skip
    """`selective_scan` on validated arguments: (y, state)."""
    dtype = computing_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    B, C = (t if t.dim() == 4 else t.unsqueeze(2) for t in (B, C))
    groups = math.lcm(B.shape[2], C.shape[2])
    B, C = (t.repeat_interleave(groups // t.shape[2], 2) if t.shape[2] < groups else t for t in (B, C))
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = A.new_zeros(rows, *A.shape, dtype=dtype)
    # Channels last inside: the state dimension is short, and products along a short last dimension do not vectorise.
    A, h = (t.to(dtype).mT.unflatten(-1, (groups, -1)).transpose(-3, -2).contiguous() for t in (A, initial_state))
    D, delta_bias = (None if t is None else t.to(dtype) for t in (D, delta_bias))
    tensors = u, delta, A, B, C, D, z, delta_bias, h
    plan = delta_softplus, mask, _pieces(u, h, cu_seqlens)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, h = _BlockedScan.apply(*tensors, plan)
    else:
        y, h = _forward(*tensors, plan)
    return y, h.transpose(-3, -2).flatten(-2).mT.contiguous()


class _BlockedScan(torch.autograd.Function):
    """A `[groups, state, channels of a group]`, states `[rows, groups, state, channels of a group]`."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, h, plan):
        starts = []
        y, h = _forward(u, delta, A, B, C, D, z, bias, h, plan, starts)
        ctx.plan = plan
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, *starts)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        u, delta, A, B, C, D, z, bias, *starts = ctx.saved_tensors
        return *_backward(u, delta, A, B, C, D, z, bias, starts, dy, dh, ctx.plan), None


def _pieces(u, h, cu_seqlens):
    """[(rows, states, [steps of each block])]: a packed sequence each, or some rows of the batch."""
    batch, length = u.shape[:2]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        spans = [(slice(0, 1), slice(n, n + 1), *o) for n, o in enumerate(zip(offsets, offsets[1:], strict=False))]
    else:
        size = max(1, CACHED // max(1, h[0].numel())) if u.device.type == "cpu" and batch else max(1, batch)
        spans = [(rows, rows, 0, length) for rows in (slice(i, i + size) for i in range(0, batch, size))]
    return [
        (rows, states, [slice(t, min(t + BLOCK, end)) for t in range(begin, end, BLOCK)])
        for rows, states, begin, end in spans
    ]


def _forward(u, delta, A, B, C, D, z, bias, initial, plan, starts=None):
    """y and the last states; `starts`, a list, receives the states before every block."""
    softplus_on, mask, pieces = plan
    y, last = u.new_empty(u.shape), torch.empty_like(initial)
    memory = _memory(2, initial, pieces)
    for rows, states, blocks in pieces:
        h = initial[states]
        for steps in blocks:
            if starts is not None:
                starts.append(h)
            u_b, r, B_b, C_b, z_b, hidden = _tokens((u, delta, B, C, z), bias, mask, rows, steps, A.dtype)
            d = _step_sizes(r, softplus_on, hidden)
            _, hs = _recur(d, d * u_b, A, B_b, h, *memory)
            y_b = _dot(C_b, hs[1:]).view(u_b.shape)
            y_b = y_b if D is None else y_b.addcmul_(D, u_b)
            y_b = y_b if z is None else y_b.mul_(silu(z_b))
            y[rows, steps] = y_b.transpose(0, 1)
            h = hs[-1].clone()
        last[states] = h
    return y, last


def _backward(u, delta, A, B, C, D, z, bias, starts, dy, dlast, plan):
    """The adjoint g of h runs backwards: g_t = C_t dy_t + a_{t+1} g_{t+1}, a = exp(d A). Then, with x = d u, by steps

    dC = sum_c dy h;  dB = sum_c x g;  dx = B . g;  and with w_t = g_t a_t h_{t-1}, the gradient of d_t A,
    dd = sum_n A w;  dA = sum_t d w                                        (sums over channels, state and time)
    """
    softplus_on, mask, pieces = plan
    du, ddelta, dB, dC = (t.new_empty(t.shape) for t in (u, delta, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    dA, dinitial = torch.zeros_like(A), torch.empty_like(dlast)
    dD, dbias = (None if t is None else torch.zeros_like(t) for t in (D, bias))
    memory = _memory(3, dlast, pieces)
    end = len(starts)
    for rows, states, blocks in reversed(pieces):
        carry = dlast[states]  # a_{t+1} g_{t+1} for the last step t
        for steps in reversed(blocks):
            end -= 1
            u_b, r, B_b, C_b, z_b, hidden = _tokens((u, delta, B, C, z), bias, mask, rows, steps, A.dtype)
            d = _step_sizes(r, softplus_on, hidden)
            x = d * u_b
            a, h = _recur(d, x, A, B_b, starts[end], *memory[:2])
            dy_b = _load(dy, rows, steps, A.dtype, hidden)
            if z is not None:
                y_b = _dot(C_b, h[1:]).view(u_b.shape)
                y_b = y_b if D is None else y_b.addcmul_(D, u_b)
                s = z_b.sigmoid()
                gate = z_b * s
                dz[rows, steps] = (y_b * dy_b * (s + gate * (1 - s))).transpose(0, 1)
                dy_b = dy_b * gate
            g = _view(memory[2], len(d), carry)
            torch.mul(C_b.unsqueeze(-1), _grouped(dy_b, A).unsqueeze(-2), out=g)
            *earlier, after = g.unbind()
            after.add_(carry)
            for g_t, a_after in zip(reversed(earlier), reversed(a.unbind()), strict=False):
                after = g_t.addcmul_(a_after, after)
            dC[rows, steps] = _dot(_grouped(dy_b, A), h[1:].mT).view(C_b.shape).transpose(0, 1)
            dB[rows, steps] = _dot(_grouped(x, A), g.mT).view(B_b.shape).transpose(0, 1)
            dx = _dot(B_b, g).view(u_b.shape)
            w = a.mul_(g)
            carry = w[0].clone()
            w.mul_(h[:-1])
            dA += torch.mul(w, _grouped(d, A).unsqueeze(-2), out=g).sum((0, 1))
            dr = w.mul_(A).sum(-2).view(u_b.shape).addcmul_(dx, u_b)
            dr = dr.mul_(r.sigmoid()) if softplus_on else dr
            dr = dr if hidden is None else dr.masked_fill_(hidden, 0.0)
            du_b = dx.mul_(d)
            if D is not None:
                dD += (dy_b * u_b).sum((0, 1))
                du_b.addcmul_(D, dy_b)
            if bias is not None:
                dbias += dr.sum((0, 1))
            du[rows, steps], ddelta[rows, steps] = du_b.transpose(0, 1), dr.transpose(0, 1)
        dinitial[states] = carry
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


def _tokens(tensors, bias, mask, rows, steps, dtype):
    """u, delta + bias, B, C and z of a block, time first, nothing under the mask; and what the mask hides."""
    hidden = None if mask is None else ~mask[rows, steps].mT.unsqueeze(-1)
    u, r, B, C, z = (None if t is None else _load(t, rows, steps, dtype, hidden) for t in tensors)
    return u, r if bias is None else r + bias, B, C, z, hidden


def _load(t, rows, steps, dtype, hidden):
    """[batch, length, ...] -> [steps, rows, ...], contiguous."""
    t = t[rows, steps].transpose(0, 1).to(dtype).contiguous()
    return t if hidden is None else t.masked_fill(hidden.view(*hidden.shape[:2], *[1] * (t.dim() - 2)), 0.0)


def _step_sizes(r, softplus_on, hidden):
    d = softplus(r) if softplus_on else r
    return d if hidden is None else d.masked_fill(hidden, 0.0)


def _recur(d, x, A, B, first, decays, states):
    """a_t = exp(d_t A), `[steps, ...]`, and h, `[steps + 1, ...]` from h_0 = `first`, in the memory given."""
    a, h = _view(decays, len(d), first), _view(states, len(d) + 1, first)
    h[0].copy_(first)
    torch.mul(_grouped(d, A).unsqueeze(-2), A, out=a).exp_()
    torch.mul(B.unsqueeze(-1), _grouped(x, A).unsqueeze(-2), out=h[1:])
    before, *after = h.unbind()
    for a_t, h_t in zip(a.unbind(), after, strict=True):
        before = h_t.addcmul_(a_t, before)
    return a, h


def _grouped(t, A):
    """[.., channels] -> [.., groups, channels of a group]."""
    return t.unflatten(-1, (len(A), -1))


def _dot(rows, matrices):
    """[steps, rows, groups, n] x [steps, rows, groups, n, m] -> a batch of row vectors, in full precision."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.bmm(rows.reshape(-1, 1, rows.shape[-1]), matrices.flatten(0, 2))


def _memory(count, h, pieces):
    """Flat memory for the largest block and one step more, `count` times: touching fresh pages would cost more."""
    sizes = (h[states].numel() * (s.stop - s.start + 1) for _, states, blocks in pieces for s in blocks)
    largest = max(sizes, default=0)
    return [h.new_empty(largest) for _ in range(count)]


def _view(memory, steps, like):
    return memory[: steps * like.numel()].view(steps, *like.shape)
