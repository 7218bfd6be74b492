"""Long causal convolutions, one kernel a channel, by the fast Fourier transform: O(length log length).

How S4 and S4D (arXiv 2111.00396, 2206.11893) train: a time-invariant state space model is a convolution with its
impulse response.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._rows import align_right, packed_rows, take
from ._validate import check_devices, check_layout, check_rows, computing_dtype, describe


def fft_conv(u, k, *, mask=None, cu_seqlens=None, backend="auto"):
    """Causal convolution of every channel with its own kernel, which may be as long as the sequence.

    y_t = sum_{j <= t} k_j u_{t-j}

    There is no state to hand on: it would be all of u. `diagonal_ssm` has one, for kernels that are sums of powers.

    Args:
        u: `[batch, length, channels]`, any float dtype, any length, any strides.
        k: `[channels, taps]`, shorter or longer than the length.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and are no step: the taps fall on the
            tokens before them that are valid.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1; their values are read on the host.
        backend: "auto", "reference" or "torch".

    Returns:
        y like u in u's dtype, computed in float32 (float64 if either input is).

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, the length is 0, or an unknown backend.
        RuntimeError: backend="triton", which this op does not have.

    >>> u, k = torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1), torch.tensor([[1.0, 0.5, 0.25]])
    >>> fft_conv(u, k).flatten().round(decimals=4)
    tensor([1.0000, 0.5000, 2.2500])
    """
    _validate(u, k, mask, cu_seqlens)
    return run(OP, backend, u, k, mask, cu_seqlens)


def reference(u, k, mask=None, cu_seqlens=None):
    """The sum itself, O(length^2), sequence by sequence."""
    dtype, compute = u.dtype, computing_dtype(u, k)
    u, k = u.to(compute), k.to(compute)
    y = torch.zeros_like(u)
    for row, tokens in enumerate(_sequences(u, mask, cu_seqlens)):
        row = row if cu_seqlens is None else 0
        steps = torch.arange(len(tokens), device=u.device)
        lag = steps[:, None] - steps
        taps = torch.nn.functional.pad(k, (0, max(0, len(tokens) - k.shape[1])))[:, lag.clamp(min=0)]
        part = torch.einsum("cts,sc->tc", taps.masked_fill(lag < 0, 0.0), u[row, tokens])
        y = y.index_put((torch.full_like(tokens, row), tokens), part)
    return y.to(dtype)


def torch_conv(u, k, mask=None, cu_seqlens=None):
    """One transform of rows of equal length; padding and packing become zeros in front of a row."""
    dtype, compute = u.dtype, computing_dtype(u, k)
    u, k = u.to(compute), k.to(compute)
    if cu_seqlens is not None:
        y = torch.empty_like(u[0])
        for _, index, valid in packed_rows(cu_seqlens, u.device):
            rows = convolve(u[0, index].masked_fill(~valid[..., None], 0.0), k)
            y = y.index_copy(0, index[valid], rows[valid])
        return y[None].to(dtype)
    if mask is None:
        return convolve(u, k).to(dtype)
    hidden = ~mask[..., None]
    rows, places = align_right(u.masked_fill(hidden, 0.0), mask)
    return take(convolve(rows, k), places).masked_fill(hidden, 0.0).to(dtype)


def convolve(u, k):
    """u `[rows, length, channels]` with k `[channels, taps]`, both float32 or float64, causally."""
    return _Convolve.apply(u, k[:, : u.shape[1]])


class _Convolve(torch.autograd.Function):
    """Keeps both spectra: the gradients are correlations, of one transform of dy with each, all of real signals."""

    @staticmethod
    def forward(ctx, u, k):
        size = fast_size(u.shape[1] + k.shape[1] - 1)  # so that the circular convolution does not wrap around
        spectrum, response = torch.fft.rfft(u.transpose(1, 2), n=size), torch.fft.rfft(k, n=size)
        ctx.save_for_backward(spectrum, response)
        ctx.sizes = size, u.shape[1], k.shape[1]
        y = torch.fft.irfft(spectrum * response, n=size)[..., : u.shape[1]]
        return y.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        spectrum, response = ctx.saved_tensors
        size, length, taps = ctx.sizes
        dy = torch.fft.rfft(dy.transpose(1, 2), n=size)
        du = dk = None
        if ctx.needs_input_grad[0]:
            du = torch.fft.irfft(dy * response.conj(), n=size)[..., :length].transpose(1, 2).contiguous()
        if ctx.needs_input_grad[1]:
            dk = torch.fft.irfft((dy * spectrum.conj()).sum(0), n=size)[..., :taps]
        return du, dk


def fast_size(least):
    """The smallest even number not below `least` that is a power of two times 1, 3, 5, 9 or 15.

    >>> [fast_size(n) for n in (1, 9, 63, 65)]
    [2, 10, 64, 72]
    """
    return min(factor << max(1, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))


def _sequences(u, mask, cu_seqlens):
    """The positions of the valid tokens of every row, or of every packed sequence."""
    positions = torch.arange(u.shape[1], device=u.device)
    if cu_seqlens is not None:
        return positions.tensor_split(cu_seqlens[1:-1].cpu().long())
    return [positions] * len(u) if mask is None else [positions[row] for row in mask]


def _validate(u, k, mask, cu_seqlens):
    check_layout("u", u, "batch, length, channels")
    check_layout("k", k, "channels, taps")
    if k.shape[0] != u.shape[2] or k.shape[1] == 0:
        raise ValueError(
            f"k ({describe(k)}) must be a float [channels, taps] = [{u.shape[2]}, at least 1] because u is"
            f" {describe(u)}; reshape it."
        )
    check_rows("u", u, mask, cu_seqlens)
    check_devices("u", u, {"k": k, "mask": mask})


OP = register(Op(name="fft_conv", reference=reference, torch=torch_conv))
