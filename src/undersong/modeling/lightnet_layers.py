"""The layer of LightNet, which its text and vision models share (arXiv 2405.21022).

A layer is a pre-norm attention and a pre-norm gated feed-forward block. The attention's output is normalised and
gated, `o_proj(rms(o) * silu(g))` with a gate g of low rank. Its causal state is (S, m, u) of the op, of fixed size.
Parameters are named as in flash-linear-attention's checkpoints, so that those load as they are.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import use_kernel_forward_from_hub
from ..ops.lightnet_attention import lightnet_attention
from .lightnet_positions import LinearizedRelativePosition, ToeplitzAxis


@use_kernel_forward_from_hub("LightNetAttention")
class LightNetMixing(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(
        self,
        q,
        k,
        v,
        causal=True,
        scale=None,
        initial_state=None,
        mask=None,
        cu_seqlens=None,
        return_final_state=False,
    ):
        return lightnet_attention(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


class LightNetOutputNorm(nn.Module):
    """RMS norm over the whole width, or over each of several groups of it."""

    def __init__(self, hidden_size, groups, eps):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        x = x.unflatten(-1, (self.groups, -1))
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class LightNetAttention(nn.Module):
    """Linear attention with keys normalised over positions, its norm and its gate."""

    def __init__(self, config, layer_idx, causal, axes):
        super().__init__()
        self.layer_idx, self.causal = layer_idx, causal
        self.heads, self.key_dim = config.num_attention_heads, config.expand_ratio
        width = self.heads * self.key_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.g_proj = nn.Sequential(
            nn.Linear(config.hidden_size, config.gate_low_rank_dim, bias=False),
            nn.Linear(config.gate_low_rank_dim, config.hidden_size, bias=False),
        )
        self.g_norm = LightNetOutputNorm(config.hidden_size, config.norm_num_groups, config.rms_norm_eps)
        self.gate_fn = ACT2FN[config.gate_act]
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lrpe = None
        if config.use_lrpe:
            self.lrpe = LinearizedRelativePosition(self.heads, self.key_dim, axes, config.lrpe_type)
        self.mixing = LightNetMixing()

    def forward(self, hidden_states, positions=None, mask=None, packing=None, past_key_values=None):
        q = nn.functional.silu(self.q_proj(hidden_states)).unflatten(-1, (self.heads, self.key_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (self.heads, self.key_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (self.heads, -1))
        mix, options = self.mixing, {"causal": self.causal, "scale": self.key_dim**-0.5}
        if self.lrpe is not None:
            q, phase = self.lrpe(q, positions)
            if packing is not None:
                phase = packing.pack(phase.expand(k.shape[0], -1, -1, -1))
            mix, options["phase"] = lightnet_attention, phase  # swapped kernels take no phases
        if packing is not None:
            output = mix(packing.pack(q), packing.pack(k), packing.pack(v), cu_seqlens=packing.cu_seqlens, **options)
            output = packing.unpack(output, k.shape[:2])
        elif past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            output, (S, m, u) = mix(
                q,
                k,
                v,
                initial_state=layer.read("S", "m", "u"),
                mask=mask,
                return_final_state=True,
                **options,
            )
            layer.write(S=S, m=m, u=u)
        else:
            output = mix(q, k, v, mask=mask, **options)
        gate = self.gate_fn(self.g_proj(hidden_states))
        return self.o_proj(self.g_norm(output.flatten(2)) * gate)


class LightNetMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LightNetLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx, causal, axes=1):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = LightNetAttention(config, layer_idx, causal, axes)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LightNetMLP(config)

    def forward(self, hidden_states, positions=None, mask=None, packing=None, past_key_values=None):
        attended = self.attn(
            self.attn_norm(hidden_states),
            positions=positions,
            mask=mask,
            packing=packing,
            past_key_values=past_key_values,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


@torch.no_grad()
def initialise_lightnet(module):
    """Gives a part of LightNet that transformers does not know its initial values; loaded weights stay."""
    if isinstance(module, LightNetOutputNorm):
        init.ones_(module.weight)
    elif isinstance(module, LinearizedRelativePosition):
        init.copy_(module.theta, module.initial_theta())
    elif isinstance(module, ToeplitzAxis):
        init.normal_(module.query, std=(module.heads / module.query.shape[1]) ** 0.5)
        init.copy_(module.key, module.query)
        init.copy_(module.decay_logit, module.initial_decay())


__all__ = [
    "LightNetAttention",
    "LightNetLayer",
    "LightNetMLP",
    "LightNetMixing",
    "LightNetOutputNorm",
    "initialise_lightnet",
]
