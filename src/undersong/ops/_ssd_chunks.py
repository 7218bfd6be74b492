"""What the forms of Mamba-2's scan share: checks, step sizes, and the products of matrices inside one chunk.

With c_i the running sum of dt A inside a chunk of tokens, and h the state before it (Transformers are SSMs, arXiv
2405.21060, section 6),

    y_i = sum_{j<=i} M_ij dt_j x_j + e^{c_i} h C_i,      M_ij = (C_i . B_j) e^{c_i - c_j}
    h <- e^{c_last} h + sum_j e^{c_last - c_j} dt_j x_j B_j^T
"""

from __future__ import annotations

import torch

from ._validate import (
    check_devices,
    check_groups,
    check_layout,
    check_limit,
    check_rows,
    check_shape,
    computing_dtype,
    describe,
)

CPU_CHUNK = 64  # torch path on a CPU: a chunk's matrices stay in its cache


def check_inputs(x, dt, A, B, C, D, z, dt_bias, dt_limit, mask, cu_seqlens):
    """Check what every form of the scan reads; returns how many states there are, and of what."""
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
    given = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "mask": mask}
    check_devices("x", x, given)
    return rows, count


def kernel_refuses(x, dt, A, B, *rest):
    """Why the Triton kernels cannot take these inputs, or None."""
    if computing_dtype(x, dt, A, B, *(tensor for tensor in rest if isinstance(tensor, torch.Tensor))) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if B.shape[3] > 256:
        return f"a state of {B.shape[3]} is more than the 256 that the kernel holds in registers; use backend='torch'"
    return "x is empty, which leaves the kernel nothing to do; use backend='torch'" if not x.numel() else None


def step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute):
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


def tokens(tensor, mask, compute):
    """In the computing dtype, without what stands at masked positions: padding may hold anything, NaN included."""
    if tensor is None:
        return None
    tensor = tensor.to(compute)
    return tensor if mask is None else tensor.masked_fill(~mask[..., None, None], 0.0)


def token_output(h, x, C, D, mask):
    """y `[batch, 1, heads, head_dim]` of one token; states `[batch, groups, heads / groups, head_dim, state]`."""
    x, C = (tokens(tensor, mask, h.dtype)[:, 0] for tensor in (x, C))
    y = (h @ C[:, :, None, :, None])[..., 0].flatten(1, 2)
    return (y if D is None else y + D * x)[:, None]


def by_group(states, B, count):
    """States `[count * batch, heads, head_dim, state]`, or None, as `count` states of `Chunk`."""
    if states is None:
        return [None] * count
    rows, heads, head_dim, state_size = states.shape
    groups = B.shape[2]
    return states.reshape(count, rows // count, groups, heads // groups * head_dim, state_size)


class Chunk:
    """One chunk's tokens and decays, and what a pass through it does to states and gradients.

    States are [batch, groups, heads / groups * head_dim, state], so that they meet B and C, which the heads of a group
    share, in plain matrix products.
    """

    def __init__(self, x, dt, A, B, C, mask, begin, end):
        at = slice(None), slice(begin, end)
        mask = None if mask is None else mask[at]
        self.x, B, C = (tokens(tensor[at], mask, dt.dtype) for tensor in (x, B, C))
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
        new = self.left()
        if h is not None:
            new += self.across(h)
        return self.outputs(h), new

    def outputs(self, h):
        """y without the skip, for the state h before the chunk or None."""
        y = ((self.between * self.match).flatten(1, 2) @ self.written.transpose(1, 2)).transpose(1, 2)
        return y if h is None else torch.addcmul(y, self._by_head(self.C @ h.mT), self.since_start)

    def left(self):
        """What the chunk's own tokens leave in the state."""
        return self.kept.mT @ self.B

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
            through = self.across(dh)
            d_log += (through * h).unflatten(2, (-1, dy.shape[3])).sum((3, 4)).flatten(1)[:, None]
            before += through
        return d_written, dB.transpose(1, 2), dC.transpose(1, 2), d_log, before

    def across(self, h):
        """A state after the decays of the whole chunk."""
        groups = self.B.shape[1], -1
        decay = self.since_start[:, -1].unflatten(1, groups)[..., None]  # [batch, groups, heads / groups, 1, 1]
        return (h.unflatten(2, (decay.shape[2], -1)) * decay).flatten(2, 3)

    def _grouped(self, tokens):
        """[batch, chunk, heads, head_dim] -> [batch, groups, chunk, heads / groups * head_dim]."""
        return tokens.unflatten(2, (self.B.shape[1], -1)).flatten(3).transpose(1, 2)

    def _by_head(self, tokens):
        return tokens.transpose(1, 2).reshape(self.x.shape)
