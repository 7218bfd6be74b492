"""LightNet's two position encodings for grids of any number of axes (arXiv 2405.21022, section 3.3).

MD-LRPE turns queries and keys inside the attention, so that what a pair of positions exchanges depends on their
offset. MD-TPE runs once, behind the embedding: along every axis it adds a decaying average of the positions before,
which is a product with a Toeplitz matrix, and for sequences a recurrence whose state is one vector a head and rank.
"""

import math

import torch
from torch import nn

from ..ops.diagonal_scan import diagonal_scan

LONGEST_WAVE = 10000.0


class LinearizedRelativePosition(nn.Module):
    """MD-LRPE: angles of the channels of a key, `phase_c = position on the axis of c * theta_c`.

    The channels of a head are dealt out to the axes in equal blocks. The op keeps, for every channel, the cosine and
    the sine half of what was written; `forward` makes the queries that read

        "cosine":  sum_c q_c k_c cos(phi_c - phi'_c)
        "rotate":  the product of pairs (c, c') turned by their angle, as in rotary embeddings

    Both depend on the offset of the positions only, whatever each channel's softmax does.

    Args:
        heads, dim: of the keys.
        axes: dimensions of the grid.
        kind: "cosine", whose angles are one a channel, or "rotate", one a pair.

    >>> lrpe = LinearizedRelativePosition(heads=2, dim=4)
    >>> q, phase = lrpe(torch.ones(1, 3, 2, 4), torch.arange(3).view(1, 3, 1))
    >>> q.shape, phase.shape
    (torch.Size([1, 3, 2, 8]), torch.Size([1, 3, 2, 4]))
    """

    def __init__(self, heads, dim, axes=1, kind="cosine"):
        super().__init__()
        self.dim, self.kind = dim, kind
        self.per_axis = -(-dim // axes)
        self.theta = nn.Parameter(torch.empty(heads, self.per_axis if kind == "cosine" else self.per_axis // 2))
        self.reset()

    def initial_theta(self):
        angles = self.theta.shape[1]
        return (LONGEST_WAVE ** (-torch.arange(angles, dtype=torch.float32) / angles)).expand_as(self.theta)

    @torch.no_grad()
    def reset(self):
        self.theta.copy_(self.initial_theta())

    def forward(self, q, positions):
        """Queries `[batch, length, heads, dim]` and positions `[batch or 1, length, axes]` -> queries of both halves
        `[batch, length, heads, 2 * dim]` and the phase `[batch or 1, length, heads, dim]` of the keys."""
        wide = torch.promote_types(q.dtype, torch.float32)  # angles of long sequences
        channel = torch.arange(self.dim, device=q.device)
        theta = self.theta.to(wide)[:, channel % self.per_axis % self.theta.shape[1]]
        phase = positions[:, :, None, channel // self.per_axis].to(wide) * theta
        cos, sin = phase.cos(), phase.sin()
        turned = torch.cat([q * cos, q * sin], -1)
        if self.kind == "rotate":
            # [a, b] . R(phi - phi') [a', b'] reads, beside the above, a from the halves of b' and b from those of a'
            a, b = q.unflatten(-1, (-1, 2, self.per_axis // 2)).unbind(-2)
            other = torch.stack([-b, a], -2).flatten(-3)
            turned = turned + torch.cat([other * sin, -other * cos], -1)
        return turned.to(q.dtype), phase


class ToeplitzAxis(nn.Module):
    """MD-TPE along one axis: `y_n = sum_{m<=n} t_{n-m} x_m`, `t_i = sum_r c_r lambda_r^i` a head, then norm and
    projection. `c = <query, key>` of two learned vectors, `lambda = sigmoid(decay_logit)`.

    >>> axis = ToeplitzAxis(8, heads=2)
    >>> x = torch.randn(1, 5, 8)
    >>> torch.allclose(axis.scan(x)[0], axis.along(x, 1), atol=1e-5)
    True
    """

    def __init__(self, hidden_size, heads, rank=1, eps=1e-6, bidirectional=False):
        super().__init__()
        self.heads, self.bidirectional = heads, bidirectional
        self.query = nn.Parameter(torch.empty(rank, hidden_size))
        self.key = nn.Parameter(torch.empty(rank, hidden_size))
        self.decay_logit = nn.Parameter(torch.empty(rank, heads))
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        std = math.sqrt(self.heads / self.query.shape[1])
        self.query.normal_(std=std)
        self.key.copy_(self.query)  # c starts positive, about 1
        self.decay_logit.copy_(self.initial_decay())

    def initial_decay(self):
        """Averages over about 1 to 5 positions, spread over ranks and heads."""
        return torch.linspace(-1.4, 1.4, self.decay_logit.numel()).view_as(self.decay_logit)

    def coefficients(self, dtype):
        """(c, lambda), each `[rank, heads]`, in at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        c = (self.query.to(wide) * self.key.to(wide)).unflatten(-1, (self.heads, -1)).sum(-1)
        return c, self.decay_logit.to(wide).sigmoid()

    def along(self, x, axis):
        """`[batch, ..., hidden]` with the axis somewhere between: one matrix a head. For axes of up to a thousand."""
        c, decay = self.coefficients(x.dtype)
        n = torch.arange(x.shape[axis], device=x.device)
        offset = n[:, None] - n
        matrix = (c[..., None, None] * decay[..., None, None] ** offset.abs()).sum(0)
        if not self.bidirectional:
            matrix = matrix.masked_fill(offset < 0, 0.0)
        heads = x.movedim(axis, -2).unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., heads, n, head_dim]
        y = (matrix.to(x.dtype) @ heads).transpose(-2, -3).flatten(-2).movedim(-2, axis)
        return self.o_proj(self.norm(y))

    def scan(self, x, initial_state=None, mask=None, cu_seqlens=None):
        """`[batch, length, hidden]` of any length, as a recurrence; returns the state `[batch, rank, heads, head_dim]`
        (packed: `[sequences, ...]`) as well."""
        c, decay = self.coefficients(x.dtype)
        written = x.to(c.dtype).unflatten(-1, (1, self.heads, -1)).expand(-1, -1, c.shape[0], -1, -1)
        states, last = diagonal_scan(
            decay[None, None, :, :, None],
            written,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        y = (c[..., None] * states).sum(2).flatten(2)
        return self.o_proj(self.norm(y.to(x.dtype))), last


class GridToeplitzEncoding(nn.Module):
    """MD-TPE of a grid: the sum over its axes, each with parameters of its own.

    >>> GridToeplitzEncoding(8, heads=2, axes=2)(torch.randn(1, 3, 4, 8)).shape
    torch.Size([1, 3, 4, 8])
    """

    def __init__(self, hidden_size, heads, axes, rank=1, eps=1e-6, bidirectional=False):
        super().__init__()
        self.axes = nn.ModuleList([ToeplitzAxis(hidden_size, heads, rank, eps, bidirectional) for _ in range(axes)])

    def forward(self, x):
        """`[batch, *grid, hidden]` -> the same."""
        return sum(axis.along(x, index + 1) for index, axis in enumerate(self.axes))


__all__ = ["GridToeplitzEncoding", "LinearizedRelativePosition", "ToeplitzAxis"]
