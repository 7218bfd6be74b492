"""Baselines of the LightNet benchmarks: gated linear attention (GLA, arXiv 2312.06635) and linear attention, in torch.

They sit in LightNet's own layer, so models differ in the recurrence alone, S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
with g from the input (GLA) or 0. Over images GLA reads row by row, once, or once from each end ("two scans").
"""

import torch
from torch import nn

from undersong.modeling.lightnet_layers import LightNetAttention

CHUNK = 32
GATE_RANK, GATE_DIVISOR = 16, 16.0  # the paper's: g = logsigmoid(x W_1 W_2 + b) / 16


def gla(q, k, v, g, scale=None):
    """`o_t = scale q_t S_t`; q, k, g `[batch, length, heads, dim]` with g <= 0 the log gate (or None), v likewise."""
    dtype, length = v.dtype, k.shape[1]
    scale = k.shape[3] ** -0.5 if scale is None else scale
    pad = -length % CHUNK
    q, k, v, g = (
        None
        if x is None
        else nn.functional.pad(x.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3)
        for x in (q, k, v, g)
    )  # [batch, chunks, heads, CHUNK, dim]
    total = None
    if g is not None:
        c = g.cumsum(3)
        total = c[..., -1, :]
        # relative to the middle of the chunk: both factors stay in range for gates of e^{-5} and more a step
        middle = c[..., CHUNK // 2 : CHUNK // 2 + 1, :]
        inside_q, inside_k = q * (c - middle).exp(), k * (middle - c).exp()
        q, k = q * c.exp(), k * (total[..., None, :] - c).exp()
    else:
        inside_q, inside_k = q, k
    o = (inside_q @ inside_k.mT).tril() @ v
    written = k.mT @ v  # what each chunk leaves
    S, before = torch.zeros_like(written[:, 0]), []
    for n in range(written.shape[1]):
        before.append(S)
        S = written[:, n] + (S if total is None else total[:, n].exp()[..., None] * S)
    o = o + q @ torch.stack(before, 1)
    return (scale * o).transpose(2, 3).flatten(1, 2)[:, :length].to(dtype)


class GatedLinearAttention(LightNetAttention):
    """LightNet's layer around GLA. `kind`: "gla", "gla two scans", or "linear" (no gate, keys through elu + 1)."""

    def __init__(self, config, layer_idx, kind):
        super().__init__(config, layer_idx, causal=True, axes=1)
        self.lrpe, self.kind = None, kind
        if kind != "linear":
            width = self.heads * self.key_dim
            self.gk_proj = nn.Sequential(
                nn.Linear(config.hidden_size, GATE_RANK, bias=False), nn.Linear(GATE_RANK, width)
            )

    def forward(self, hidden_states, positions=None, mask=None, packing=None, past_key_values=None):
        q, k = (proj(hidden_states).unflatten(-1, (self.heads, self.key_dim)) for proj in (self.q_proj, self.k_proj))
        v, g = self.v_proj(hidden_states).unflatten(-1, (self.heads, -1)), None
        if self.kind == "linear":
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        else:
            g = nn.functional.logsigmoid(self.gk_proj(hidden_states).float()) / GATE_DIVISOR
            g = g.unflatten(-1, (self.heads, self.key_dim))
        o = gla(q, k, v, g)
        if self.kind == "gla two scans":
            o = o + gla(q.flip(1), k.flip(1), v.flip(1), g.flip(1)).flip(1)
        return self.o_proj(self.g_norm(o.flatten(2)) * self.gate_fn(self.g_proj(hidden_states)))


def exchange_attention(model, kind):
    """Puts `kind` in every layer of a LightNet model, freshly initialised; returns the model."""
    for index, layer in enumerate(model.base_model.layers):
        layer.attn = GatedLinearAttention(model.config, index, kind)
        for module in layer.attn.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
    return model
