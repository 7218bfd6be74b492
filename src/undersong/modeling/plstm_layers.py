"""Layers that the pLSTM models on sequences, grids and graphs share (arXiv 2506.11997, section 3 and appendix).

Projections that may be sparse in blocks, gates in (0, 1), transitions whose norm is at most 1, and a norm per head.
Gates, transitions and norms are computed in float32 or wider whatever the weights are: a transition of 0.9999 would be
1 in bfloat16.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .precision import wide

STEEPNESS = 5.0  # of tanh in transitions: a bias of 1 makes them 0.9999
SERIES_TERMS = 16


class BlockLinear(nn.Linear):
    """A linear layer whose outputs, in `num_blocks` equal blocks, read one of `sub_heads` slices of the input each.

    Block b reads slice b mod sub_heads; with `sub_heads=1` this is `nn.Linear`. A projection to heads has
    `max(num_heads, sub_heads)` blocks.

    Args:
        in_features, out_features: sizes; sub_heads divides the first, num_blocks the second.
        num_blocks: blocks of outputs, a multiple of sub_heads.
        sub_heads: slices of the input.
        bias: whether to add one.

    Shapes:
        weight `[out_features, in_features / sub_heads]`; `[..., in_features]` -> `[..., out_features]`.

    Raises:
        ValueError: sizes that do not divide each other.

    >>> layer = BlockLinear(4, 2, num_blocks=2, sub_heads=2, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> layer(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [3.0, 7.0]
    """

    def __init__(self, in_features, out_features, num_blocks=1, sub_heads=1, bias=True):
        if in_features % sub_heads or num_blocks % sub_heads or out_features % num_blocks:
            raise ValueError(
                f"sub_heads ({sub_heads}) must divide in_features ({in_features}) and num_blocks ({num_blocks}), which"
                f" must divide out_features ({out_features}); use sub_heads=1 for a dense layer."
            )
        super().__init__(in_features // sub_heads, out_features, bias)
        self.in_features = in_features
        self.num_blocks, self.sub_heads = num_blocks, sub_heads

    def forward(self, x):
        if self.sub_heads == 1:
            return super().forward(x)
        weight = self.weight.unflatten(0, (self.num_blocks // self.sub_heads, self.sub_heads, -1))
        y = torch.einsum("...sc,gsoc->...gso", x.unflatten(-1, (self.sub_heads, -1)), weight).flatten(-3)
        return y if self.bias is None else y + self.bias

    def extra_repr(self):
        return f"{super().extra_repr()}, num_blocks={self.num_blocks}, sub_heads={self.sub_heads}"


def small_init_(module, std=None):
    """Weights from a normal distribution, biases 0.

    std: None for sqrt(2 / (5 fan_in)), as the authors have it.
    """
    init.normal_(module.weight, std=math.sqrt(2 / (5 * module.weight.shape[-1])) if std is None else std)
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)


class Gate(nn.Module):
    """sigmoid(W x + b) (source, mark and direct gates), or tanh(5 (W x + b)) (transitions of one number).

    Args:
        in_features: size of x.
        shape: of the gate, heads first, such as `(heads, JO, JQ, JT)` of a mark.
        sub_heads: slices of the input, as in `BlockLinear`; divides the heads.
        activation: "sigmoid" or "tanh".
        bias: initial value of b.
        weight: whether there is a W; without, the gate is one number for all inputs.

    Shapes:
        `[..., in_features]` -> `[..., *shape]`, float32 (float64 for float64 inputs).

    >>> gate = Gate(8, (2, 4, 1, 1), bias=-4.0)
    >>> gate.init_weights()
    >>> gate(torch.randn(3, 8)).shape, round(gate(torch.randn(8)).max().item(), 3)
    (torch.Size([3, 2, 4, 1, 1]), 0.018)
    """

    def __init__(self, in_features, shape, sub_heads=1, activation="sigmoid", bias=-5.0, weight=True):
        super().__init__()
        self.shape, self.activation, self.start = tuple(shape), activation, bias
        size = math.prod(self.shape)
        self.proj = BlockLinear(in_features, size, self.shape[0], sub_heads, bias=False) if weight else None
        self.bias = nn.Parameter(torch.empty(size))

    def init_weights(self, std=0.0):
        """The bias at its initial value, the weight 0 as the authors have it, or of deviation `std`."""
        init.constant_(self.bias, self.start)
        if self.proj is not None:
            init.normal_(self.proj.weight, std=std)

    def forward(self, x):
        bias = wide(self.bias)
        z = bias.expand(*x.shape[:-1], -1) if self.proj is None else bias + wide(self.proj(x))
        z = z.sigmoid() if self.activation == "sigmoid" else torch.tanh(STEEPNESS * z)
        return z.unflatten(-1, self.shape)


class Transition(nn.Module):
    """T = O diag(tanh(5 z)) I with orthogonal matrices O and I: norm below 1, yet any rotation or permutation.

    With `dim=1` it is tanh(5 z). z, and the matrices whose skew parts give O and I, are affine in x.

    Args:
        in_features: size of x.
        num_heads, dim: T is `[..., num_heads, dim, dim]`, float32 (float64 for float64 inputs).
        sub_heads: slices of the input, as in `BlockLinear`.
        orthogonalization: "matrix_exp", or "series", the authors' sum of 16 terms, which leaves the orthogonal
            matrices where the skew part is larger than about 4.

    >>> transition = Transition(8, num_heads=2, dim=4)
    >>> transition.init_weights(std=0.5)
    >>> torch.linalg.matrix_norm(transition(torch.randn(3, 8)), 2).max().item() < 1 + 1e-5
    True
    """

    def __init__(self, in_features, num_heads, dim, sub_heads=1, orthogonalization="matrix_exp"):
        super().__init__()
        if orthogonalization not in ORTHOGONALIZATIONS:
            raise ValueError(
                f"orthogonalization ({orthogonalization!r}) must be one of {', '.join(map(repr, ORTHOGONALIZATIONS))};"
                " use 'matrix_exp'."
            )
        self.num_heads, self.dim, self.orthogonalization = num_heads, dim, orthogonalization
        self.eigenvalues = Gate(in_features, (num_heads, dim), sub_heads, "tanh", bias=1.0)
        if dim > 1:
            size = num_heads * dim * dim
            self.inner, self.outer = (BlockLinear(in_features, size, num_heads, sub_heads) for _ in range(2))

    def init_weights(self, std=0.0):
        """T = 0.9999 I whatever x is, or weights of deviation `std` around that."""
        self.eigenvalues.init_weights(std)
        if self.dim > 1:
            for layer in (self.inner, self.outer):
                init.normal_(layer.weight, std=std)
                init.copy_(layer.bias, torch.eye(self.dim).expand(self.num_heads, -1, -1).flatten())

    def forward(self, x):
        eigenvalues = self.eigenvalues(x)
        if self.dim == 1:
            return eigenvalues.unsqueeze(-1)
        inner, outer = (
            wide(layer(x)).unflatten(-1, (self.num_heads, self.dim, self.dim)) for layer in (self.inner, self.outer)
        )
        with torch.autocast(x.device.type, enabled=False):  # its products would be in half precision
            exponential = ORTHOGONALIZATIONS[self.orthogonalization]
            # contiguous: torch's matrix exponential refuses some strides
            inner, outer = (exponential((a - a.mT).contiguous()) for a in (inner, outer))
            return (outer * eigenvalues.unsqueeze(-2)) @ inner


def exponential_series(skew):
    """sum_k A^k / k! of 16 terms, as n^k / k! (A / n)^k with the norm n of A: the authors' orthogonalisation."""
    norm = (skew.square() + 1e-3).sum((-2, -1), keepdim=True).sqrt().clamp(min=1.0)
    power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    unit, factor, total = skew / norm, torch.ones_like(norm), power
    for k in range(1, SERIES_TERMS):
        power, factor = power @ unit, factor * norm / k
        total = total + factor * power
    return total


ORTHOGONALIZATIONS = {"matrix_exp": torch.linalg.matrix_exp, "series": exponential_series}


class MultiHeadRMSNorm(nn.Module):
    """Root mean square norm of every head by itself, with weights of its own.

    Shapes:
        `[..., num_heads, head_dim]` -> the same, in the dtype of its input; weight `[num_heads, head_dim]`.

    >>> norm = MultiHeadRMSNorm(2, 4)
    >>> norm.init_weights()
    >>> norm(torch.full((1, 2, 4), 3.0)).round(decimals=4).unique().item()
    1.0
    """

    def __init__(self, num_heads, head_dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.eps = eps

    def init_weights(self):
        init.ones_(self.weight)

    def forward(self, x):
        return (F.rms_norm(wide(x), x.shape[-1:], eps=self.eps) * wide(self.weight)).to(x.dtype)


__all__ = [
    "BlockLinear",
    "Gate",
    "MultiHeadRMSNorm",
    "Transition",
    "exponential_series",
    "small_init_",
]
