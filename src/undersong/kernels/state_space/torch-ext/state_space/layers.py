"""The layers that the `kernels` library swaps in: modules around our ops, and the functions of stock Mamba models.

Stock transformers looks the functions up by these names, `causal_conv1d_fn` and so on; a replacement must have the
same number and kinds of arguments, so it takes `**kwargs` where stock does. What they do is in stock.py.
"""

import torch.nn as nn

from . import stock
from .conv import causal_conv1d as _causal_conv1d
from .conv import causal_conv1d_update as _causal_conv1d_update
from .scan import selective_scan as _selective_scan
from .ssd import ssd as _ssd
from .update import selective_state_update as _selective_state_update


class SelectiveScan(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
        cu_seqlens=None, return_final_state=False,
    ):  # fmt: skip
        y, state = _selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, cu_seqlens
        )
        return (y, state) if return_final_state else y


class SelectiveStateUpdate(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
        mask=None, inplace=False,
    ):  # fmt: skip
        return _selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask, inplace)


class SSD(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
        chunk_size=64, initial_state=None, mask=None, cu_seqlens=None, return_final_state=False,
    ):  # fmt: skip
        y, state = _ssd(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, chunk_size, initial_state, mask, cu_seqlens
        )
        return (y, state) if return_final_state else y


class CausalConv1d(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, x, weight, bias=None, activation=None, initial_state=None, mask=None, cu_seqlens=None,
        return_final_state=False,
    ):  # fmt: skip
        y, state = _causal_conv1d(x, weight, bias, activation, initial_state, mask, cu_seqlens)
        return (y, state) if return_final_state else y


class CausalConv1dUpdate(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x, state, weight, bias=None, activation=None, mask=None, inplace=False):
        return _causal_conv1d_update(x, state, weight, bias, activation, mask, inplace)


class causal_conv1d_fn(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        arguments = (hidden_states, weight, bias, activation)
        return stock.run(self, stock.convolve, hidden_states, *arguments, **kwargs)


class causal_conv1d_update(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        arguments = (hidden_states, conv_state, weight, bias, activation)
        return stock.run(self, stock.convolve_step, hidden_states, *arguments)


class selective_scan_fn(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False, use_mambapy=False, use_associative_scan=False, **kwargs,
    ):  # fmt: skip
        arguments = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, use_mambapy,
                     use_associative_scan)  # fmt: skip
        return stock.run(self, stock.scan, hidden_states, *arguments, **kwargs)


class selective_state_update(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs):
        arguments = (state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
        return stock.run(self, stock.update, hidden_states, *arguments, **kwargs)


class mamba_chunk_scan_combined(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
        dt_limit=(0.0, float("inf")), return_final_states=False, **kwargs,
    ):  # fmt: skip
        arguments = (hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit,
                     return_final_states)  # fmt: skip
        return stock.run(self, stock.chunk_scan, hidden_states, *arguments, **kwargs)


class mamba_inner_fn(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
        B=None, C=None, D=None, delta_bias=None, delta_softplus=True, b_rms_weight=None, c_rms_weight=None,
        dt_rms_weight=None, b_c_dt_rms_eps=1e-6, **kwargs,
    ):  # fmt: skip
        # None sends stock through its separate steps; stock.py says why that is better than fusing them.
        return None


class mamba_split_conv1d_scan_combined(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
        dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None,
        rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
        **kwargs,
    ):  # fmt: skip
        # None sends stock through its separate steps; stock.py says why that is better than fusing them.
        return None
