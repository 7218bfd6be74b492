"""The layer of "Attention as an RNN" (arXiv 2405.13956, section 3), which every model built of it shares.

A layer is a Transformer encoder layer whose query is a parameter. Its attention over every prefix is then the running
softmax average o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i} with s_i = q . k_i / sqrt(head_dim), whose state is
(m, u, w): the maximum score, the sum of weights and the weighted sum of values.
"""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import use_kernel_forward_from_hub
from ..ops.cumulative_softmax_average import cumulative_softmax_average


@use_kernel_forward_from_hub("CumulativeSoftmaxAverage")
class CumulativeSoftmaxAverage(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(self, s, v, initial_state=None, mask=None, cu_seqlens=None, return_final_state=False):
        return cumulative_softmax_average(
            s,
            v,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


class AarenAttention(nn.Module):
    """Attention of a learned query over every prefix."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_token = nn.Parameter(torch.empty(config.hidden_size))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.average = CumulativeSoftmaxAverage()

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None):
        per_head = (-1, self.head_dim)
        # as a batch of one row, so that adapters on q_proj see the shape they expect
        query = self.q_proj(self.query_token[None])[0].unflatten(-1, per_head)  # [heads, head_dim]
        keys = self.k_proj(hidden_states).unflatten(-1, per_head)  # [batch, length, heads, head_dim]
        values = self.v_proj(hidden_states).unflatten(-1, per_head)
        wide = torch.promote_types(keys.dtype, torch.float32)
        scores = torch.einsum("bthd,hd->bth", keys.to(wide), query.to(wide)) / math.sqrt(self.head_dim)

        if packing is not None:
            output = self.average(packing.pack(scores), packing.pack(values), cu_seqlens=packing.cu_seqlens)
            output = packing.unpack(output, scores.shape[:2])
        elif past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            output, (m, u, w) = self.average(
                scores, values, initial_state=layer.read("m", "u", "w"), mask=mask, return_final_state=True
            )
            layer.write(m=m, u=u, w=w)
        else:
            output = self.average(scores, values, mask=mask)
        return self.o_proj(output.flatten(2))


class AarenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class AarenLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm_first = config.norm_first
        self.self_attn = AarenAttention(config, layer_idx)
        self.mlp = AarenMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None):
        context = {"mask": mask, "packing": packing, "past_key_values": past_key_values}
        if self.norm_first:
            attended = self.self_attn(self.attention_norm(hidden_states), **context)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states + self.dropout(self.self_attn(hidden_states, **context)))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class AarenPositionEmbedding(nn.Module):
    """Positions as sines and cosines of geometric frequencies, computed for any length, or as a learned table."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.position_embedding_type == "learned":
            self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids, dtype):
        if self.config.position_embedding_type == "learned":
            if position_ids.device.type == "cpu" and position_ids.numel() and not torch.compiler.is_compiling():
                last = int(position_ids.max())
                if last >= self.config.max_position_embeddings:
                    raise ValueError(
                        f"position {last} is beyond max_position_embeddings ({self.config.max_position_embeddings});"
                        " shorten the input or use position_embedding_type='sinusoidal', which has no limit."
                    )
            return self.embedding(position_ids)
        return sinusoids(position_ids, self.config.hidden_size, self.config.initializer_range).to(dtype)


def sinusoids(positions, size, spread):
    """Sines and cosines of positions, whole or not, with geometric frequencies: `[...]` -> `[..., size]` float32.

    Args:
        spread: standard deviation, that of freshly initialised embeddings, so that neither drowns the other.
    """
    half = size // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    angle = positions.unsqueeze(-1).float() * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angle.sin(), angle.cos()], dim=-1) * (math.sqrt(2.0) * spread)


__all__ = [
    "AarenAttention",
    "AarenLayer",
    "AarenMLP",
    "AarenPositionEmbedding",
    "CumulativeSoftmaxAverage",
    "sinusoids",
]
