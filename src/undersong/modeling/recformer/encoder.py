"""Longformer's encoder (arXiv 2004.05150) for histories whose first token is the only global one.

Parameters, names and results are transformers' own; three things are saved. Padding is not computed (the valid tokens
are packed). Local attention goes through `band_attention`. And the keys and values that only the first token's query
meets are never projected: with u_h = W_k,h^T q_h and c_h = sum_j p_hj x_j,

    q_h . (W_k,h x_j + b) = u_h . x_j + q_h . b,        sum_j p_hj (W_v,h x_j + b) = W_v,h c_h + b sum_j p_hj

so two of the five projections of every token become one of the first.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.longformer.modeling_longformer import (
    LongformerEncoder,
    LongformerLayer,
    LongformerSelfAttention,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from ...ops.band_attention import band_attention
from .flex_band import flex_band


class RecformerSelfAttention(LongformerSelfAttention):
    """Longformer's projections; `forward` is transformers' own, `band` and `first` give the same from packed rows."""

    def band(self, hidden_states, rows, implementation):
        """Attention of all tokens: `[1, tokens, hidden_size]` -> the same shape."""
        per_head = (self.num_heads, self.head_dim)
        q, k, v = (f(hidden_states).unflatten(-1, per_head) for f in (self.query, self.key, self.value))
        half, dropout_p = self.one_sided_attn_window_size, self.dropout if self.training else 0.0
        if implementation == "flex_band":
            output = flex_band(q, k, v, rows.block_mask(half), dropout_p)
        else:
            output = band_attention(q, k, v, window=2 * half, cu_seqlens=rows.packing.cu_seqlens, dropout_p=dropout_p)
        output = output.flatten(2)
        return output.index_copy(1, rows.starts, self.first(hidden_states, rows)[None].to(output.dtype))

    def first(self, hidden_states, rows):
        """Attention of the first token of every row to the row: `[rows, hidden_size]`."""
        per_head = (self.num_heads, self.head_dim)
        x = rows.spread(hidden_states)  # [rows, longest, hidden_size]
        q = self.query_global(hidden_states[0, rows.starts]).unflatten(-1, per_head) * self.head_dim**-0.5
        if type(self.key_global) is nn.Linear:
            weight, bias = self.key_global.weight.unflatten(0, per_head), self.key_global.bias.view(per_head)
            u = torch.einsum("shd,hde->she", q, weight)
            scores = u @ x.transpose(1, 2) + (q * bias).sum(-1, keepdim=True)
        else:  # an adapter or a quantized layer must be called
            scores = torch.einsum("shd,sjhd->shj", q, self.key_global(x).unflatten(-1, per_head))
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide).masked_fill(~rows.inside[:, None], torch.finfo(wide).min)
        p = F.dropout(scores.softmax(-1), self.dropout, self.training).to(q.dtype)
        if type(self.value_global) is nn.Linear:
            weight, bias = self.value_global.weight.unflatten(0, per_head), self.value_global.bias.view(per_head)
            output = torch.einsum("she,hde->shd", p @ x.to(p.dtype), weight) + p.sum(-1, keepdim=True) * bias
        else:
            output = torch.einsum("shj,sjhd->shd", p, self.value_global(x).unflatten(-1, per_head))
        return output.flatten(1)


class RecformerLayer(LongformerLayer):
    """Longformer's layer, for padded rows as it is, and for packed rows."""

    def __init__(self, config, layer_id=0):
        super().__init__(config, layer_id)
        self.attention.self = RecformerSelfAttention(config, layer_id)

    def forward(self, hidden_states, rows=None, implementation=None, first_only=False, **padded):
        if rows is None:
            return super().forward(hidden_states, **padded)
        if first_only:
            attended, residual = self.attention.self.first(hidden_states, rows), hidden_states[0, rows.starts]
            attended, residual = attended[None].to(residual.dtype), residual[None]
        else:
            attended, residual = self.attention.self.band(hidden_states, rows, implementation), hidden_states
        attended = self.attention.output(attended, residual)
        return apply_chunking_to_forward(self.ff_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attended)


class RecformerEncoder(LongformerEncoder):
    """The stack of layers. Given `rows`, it gives packed tokens; else padded ones, as Longformer does."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = copy.copy(config)
        self.config.attention_window = config.attention_windows  # the layers look theirs up
        self.layer = nn.ModuleList([RecformerLayer(self.config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states,
        rows=None,
        implementation=None,
        first_only=False,
        output_hidden_states=False,
        **padded,
    ):
        """`first_only`: the last layer computes the first tokens alone, `[1, rows, hidden_size]`."""
        if rows is None:
            return super().forward(hidden_states, output_hidden_states=output_hidden_states, **padded)
        packing, shape, states = rows.packing, hidden_states.shape[:2], [hidden_states]
        hidden_states = packing.pack(hidden_states)
        for index, layer in enumerate(self.layer, start=1):
            hidden_states = layer(hidden_states, rows, implementation, first_only and index == len(self.layer))
            if output_hidden_states:  # recorded as what the next layer reads, so that gradients reach the records
                states.append(packing.unpack(hidden_states, shape))
                hidden_states = packing.pack(states[-1])
        return BaseModelOutput(hidden_states, tuple(states) if output_hidden_states else None)
