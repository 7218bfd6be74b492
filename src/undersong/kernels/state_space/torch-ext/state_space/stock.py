"""What stock transformers' Mamba functions mean in terms of our kernels.

Stock hands over [batch, channels, length] views; transposed back they are read where they lie, without a copy. A stock
function is one object for the whole process, so its replacement also meets models it was not meant for, on a CPU or in
float64: those go on to the torch function it replaced. Packed rows (`seq_idx`, `cu_seqlens`) are kept apart; finding
the boundaries in `seq_idx` waits for the device.

`mamba_inner_fn` and `mamba_split_conv1d_scan_combined`, which take the projections' raw weights, answer None: stock
then takes the separate steps that it takes in evaluation, each of which is ours. So hooks, LoRA and quantised
projections see every call, training computes what evaluation computes, padding is masked after the convolution too,
and only the projections' launches, which the fused functions make as well, stay outside.
"""

import torch

from . import conv
from .scan import selective_scan
from .ssd import ssd
from .update import selective_state_update


def run(layer, function, tensor, *args, **kwargs):
    """`function`, or the torch function that `layer` stands in for where the kernels cannot run."""
    unfit = (tensor.device.type == "cpu" and not conv.INTERPRETED) or tensor.dtype == torch.float64
    if unfit and "forward" in vars(layer):
        return type(layer).forward(layer, *args, **kwargs)
    return function(*args, **kwargs)


def convolve(x, weight, bias, activation, seq_idx=None, cu_seqlens=None, **ignored):
    """causal_conv1d_fn: x [batch, channels, length]."""
    packed = _Packed(x.shape[0], x.shape[2], seq_idx, cu_seqlens)
    y, _ = conv.causal_conv1d(packed.lay(x.transpose(1, 2)), weight, bias, activation, None, None, packed.offsets)
    return packed.back(y).transpose(1, 2)


def convolve_step(x, state, weight, bias, activation):
    """causal_conv1d_update: x [batch, channels, length], the window is shifted in place."""
    width, length = weight.shape[1], state.shape[2]
    if x.shape[2] == 1 and length == width:
        y, _ = conv.causal_conv1d_update(x[:, :, 0], state, weight, bias, activation, None, True)
        return y[:, :, None]
    before = torch.nn.functional.pad(state, (width - length, 0))
    y, _ = conv.causal_conv1d(x.transpose(1, 2), weight, bias, activation, before, None, None)
    state.copy_(torch.cat([state, x.to(state.dtype)], 2)[:, :, -length:])
    return y.transpose(1, 2)


def scan(
    u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, use_mambapy, use_associative_scan,
    seq_idx=None, cu_seqlens=None, **ignored,
):  # fmt: skip
    """selective_scan_fn: u, dt, z [batch, channels, length], B, C [batch, state, length]."""
    packed = _Packed(u.shape[0], u.shape[2], seq_idx, cu_seqlens)
    u, dt, B, C, z = (None if t is None else packed.lay(t.transpose(1, 2)) for t in (u, dt, B, C, z))
    y, state = selective_scan(u, dt, A, B, C, D, z, delta_bias, delta_softplus, None, None, packed.offsets)
    y = packed.back(y).transpose(1, 2)
    return (y, packed.last(state)) if return_last_state else y


def update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z, dt_limit=(0.0, float("inf")), **ignored):
    """selective_state_update, in place: Mamba's, and Mamba-2's with dt, A, D, dt_bias expanded over head_dim."""
    if state.dim() == 4:
        dt, A = dt[..., 0], A[:, 0, 0]
        D, dt_bias = (None if t is None else t[:, 0] for t in (D, dt_bias))
    y, _ = selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, None, True)
    return y


def chunk_scan(
    x, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states, z=None,
    seq_idx=None, cu_seqlens=None, **ignored,
):  # fmt: skip
    """mamba_chunk_scan_combined. `chunk_size` steers stock's torch path; how ours cuts its work is its own."""
    packed = _Packed(x.shape[0], x.shape[1], seq_idx, cu_seqlens)
    if packed.offsets is not None and initial_states is not None:
        raise ValueError(
            "initial_states must be None because seq_idx or cu_seqlens is given, and it would be unclear which"
            " sequence goes on; run the sequences as rows of a batch."
        )
    x, dt, B, C, z = (None if t is None else packed.lay(t) for t in (x, dt, B, C, z))
    y, state = ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, 64, initial_states, None, packed.offsets)
    return (packed.back(y), packed.last(state)) if return_final_states else packed.back(y)


class _Packed:
    """Packed rows as one row with offsets; without packing nothing happens to the tensors."""

    def __init__(self, batch, length, seq_idx, cu_seqlens):
        self.batch, self.offsets = batch, None
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(
                    f"cu_seqlens ({cu_seqlens.numel()} offsets) must come with batch 1 but batch is {batch}; lay the"
                    " sequences behind each other, or pass seq_idx."
                )
            self.offsets = cu_seqlens.to(torch.int32)
            self.ends = torch.tensor([cu_seqlens.numel() - 2], device=cu_seqlens.device)
        elif seq_idx is not None:
            seq_idx = seq_idx.expand(batch, length)
            starts = torch.ones_like(seq_idx, dtype=torch.bool)
            starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
            offsets = starts.flatten().nonzero().squeeze(1)
            self.offsets = torch.nn.functional.pad(offsets, (0, 1), value=batch * length).to(torch.int32)
            self.ends = starts.sum(1).cumsum(0) - 1

    def lay(self, x):
        return x if self.offsets is None else x.flatten(0, 1)[None]

    def back(self, y):
        return y if self.offsets is None else y[0].unflatten(0, (self.batch, -1))

    def last(self, state):
        """Stock keeps one state a row: that of the row's last sequence."""
        return state if self.offsets is None else state[self.ends]
