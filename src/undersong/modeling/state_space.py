"""What Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060) share: ops as modules, norms, mixers, blocks.

Every class here is put in front of one of transformers' own and replaces its `forward`; parameters, initialisation and
configuration stay theirs. The state of a layer is (conv, ssm): the last `conv_kernel` inputs of its convolution and
the hidden state of its recurrence, both float32.
"""

from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.accelerate import force_accelerate_hooks

from .._compat import use_kernel_forward_from_hub
from ..ops._thin_linear import thin_linear
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from ..ops.selective_scan import selective_scan
from ..ops.selective_state_update import selective_state_update
from ..ops.ssd import ssd
from .precision import wide


@use_kernel_forward_from_hub("CausalConv1d")
class CausalConv1d(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(
        self,
        x,
        weight,
        bias=None,
        activation=None,
        initial_state=None,
        mask=None,
        cu_seqlens=None,
        return_final_state=False,
    ):
        return causal_conv1d(
            x,
            weight,
            bias,
            activation,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


@use_kernel_forward_from_hub("CausalConv1dUpdate")
class CausalConv1dUpdate(nn.Module):
    """One token of `CausalConv1d`."""

    def forward(self, x, state, weight, bias=None, activation=None, mask=None, inplace=False):
        return causal_conv1d_update(x, state, weight, bias, activation, mask=mask, inplace=inplace)


@use_kernel_forward_from_hub("SelectiveScan")
class SelectiveScan(nn.Module):
    """Mamba's recurrence over a sequence."""

    def forward(
        self,
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        initial_state=None,
        mask=None,
        cu_seqlens=None,
        return_final_state=False,
    ):
        return selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


@use_kernel_forward_from_hub("SSD")
class SSD(nn.Module):
    """Mamba-2's recurrence over a sequence."""

    def forward(
        self,
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
        chunk_size=64,
        initial_state=None,
        mask=None,
        cu_seqlens=None,
        return_final_state=False,
    ):
        return ssd(
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus,
            dt_limit,
            chunk_size=chunk_size,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


@use_kernel_forward_from_hub("SelectiveStateUpdate")
class SelectiveStateUpdate(nn.Module):
    """One token of either recurrence."""

    def forward(
        self,
        state,
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
        mask=None,
        inplace=False,
    ):
        return selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask=mask, inplace=inplace
        )


def exchange_class(module, ours):
    """Makes a module one of our class, which derives from its own and adds no parameters."""
    module.__class__ = ours
    if "_old_forward" in vars(module):  # accelerate's hooks call the forward that they found
        module._old_forward = MethodType(ours.forward, module)


def exchange_linear(module, ours, *names):
    """Makes the named linear layers of a module ours, unless an adapter or a quantiser made something else of them."""
    for name in names:
        if type(getattr(module, name, None)) is nn.Linear:
            exchange_class(getattr(module, name), ours)


class RMSNorm:
    """Root mean square norm of a wide residual stream, in the dtype of its weight."""

    def forward(self, hidden_states):
        size = self.weight.shape
        return F.rms_norm(wide(hidden_states), size, wide(self.weight), self.variance_epsilon).to(self.weight.dtype)


class GatedRMSNorm:
    """rms(y * silu(z)), every group of `group_size` channels by itself: the gate comes before the norm."""

    def forward(self, hidden_states, gate=None):
        hidden_states = wide(hidden_states)
        if gate is not None:
            hidden_states = hidden_states * F.silu(wide(gate))
        if self.group_size == self.weight.numel():
            return RMSNorm.forward(self, hidden_states)
        groups = hidden_states.unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(groups, (self.group_size,), eps=self.variance_epsilon).flatten(-2)
        return (wide(self.weight) * normed).to(self.weight.dtype)


class ThinLinear(nn.Linear):
    """A linear layer that is fast for the few rows of a decoding step, too."""

    def forward(self, x):
        return thin_linear(x, self.weight, self.bias)


class TimeStepProjection(nn.Linear):
    """Mamba's `dt_proj`, whose bias can be left to the scan.

    The bias stays float32 in half precision, where rounding it would change a time step by percents, and the scan adds
    it in float32. Adapters, which wrap the layer, get the whole of it.
    """

    def forward(self, x, with_bias=True):
        return F.linear(x, self.weight, self.bias.to(x.dtype) if with_bias else None)


class StateSpaceMixer:
    """Projections around a convolution and a recurrence.

    The names of the arguments are transformers', so that its hybrid models can call a mixer too. Projections are
    called as modules, whatever wraps them; the ops only take activations.

    Args:
        hidden_states: `[batch, length, hidden_size]`.
        cache_params: a cache whose layer `layer_idx` is a `RecurrentStateLayer`, or None.
        attention_mask: `[batch, length]`, 0 for padding of this very segment.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences.
    """

    recurrence_class = None

    def add_ops(self):
        """The ops as children; they hold no parameters, so the state dict is transformers'."""
        # transformers' own ops, which `use_kernels=True` would fetch for nothing
        vars(self).pop("_kernel_funcs", None)
        exchange_linear(self, ThinLinear, "in_proj", "x_proj", "out_proj")
        self.convolution, self.convolution_step = CausalConv1d(), CausalConv1dUpdate()
        self.recurrence, self.recurrence_step = self.recurrence_class(), SelectiveStateUpdate()

    @force_accelerate_hooks("conv1d")
    def forward(self, hidden_states, cache_params=None, attention_mask=None, cu_seqlens=None, **kwargs):
        layer = None if cache_params is None else cache_params.layers[self.layer_idx]
        mask = None if attention_mask is None else attention_mask.bool()
        if layer is not None and layer.states and hidden_states.shape[1] == 1:
            return self.step(hidden_states, layer, mask)
        return self.scan(hidden_states, layer, mask, cu_seqlens)

    def convolve(self, x, layer=None, mask=None, cu_seqlens=None, step=False):
        """The activated convolution of x, `[batch, length, channels]` (`[batch, channels]` in a step): (y, window)."""
        activation = self.activation if self.activation in ("silu", "swish") else None
        taps = self.conv1d.weight.squeeze(1), self.conv1d.bias, activation
        if step:
            window = layer.read("conv")
            y, window = self.convolution_step(x, window, *taps, mask=mask, inplace=may_write(window))
        elif layer is None:
            y, window = self.convolution(x, *taps, mask=mask, cu_seqlens=cu_seqlens), None
        else:
            y, window = self.convolution(
                x, *taps, initial_state=layer.read("conv"), mask=mask, return_final_state=True
            )
        return y if activation else self.act(y), window

    @property
    def decay(self):
        return -wide(self.A_log).exp()


def may_write(state):
    """Whether a step may write into the cached state: without gradients, and not into what inference mode made."""
    if torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not state.is_inference() or torch.is_inference_mode_enabled()


class StateSpaceBlock:
    """x + mixer(norm(x)), the residual stream in float32 if `residual_in_fp32`."""

    def forward(self, hidden_states, mask=None, cu_seqlens=None, past_key_values=None):
        residual = wide(hidden_states) if self.residual_in_fp32 else hidden_states
        normed = self.norm(hidden_states).to(self.norm.weight.dtype)  # a kernel in its place gives its input's dtype
        return residual + self.mixer(normed, cache_params=past_key_values, attention_mask=mask, cu_seqlens=cu_seqlens)


__all__ = [
    "SSD",
    "CausalConv1d",
    "CausalConv1dUpdate",
    "GatedRMSNorm",
    "RMSNorm",
    "SelectiveScan",
    "SelectiveStateUpdate",
    "StateSpaceBlock",
    "StateSpaceMixer",
    "ThinLinear",
    "TimeStepProjection",
    "exchange_class",
    "exchange_linear",
    "may_write",
]
