"""The layer that the `kernels` library swaps in for a module around the op."""

import torch.nn as nn

from .bidirectional import lightnet_attention_bidirectional as _bidirectional
from .causal import lightnet_attention as _causal


class LightNetAttention(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self, q, k, v, causal=True, scale=None, initial_state=None, mask=None, cu_seqlens=None,
        return_final_state=False,
    ):  # fmt: skip
        scale = k.shape[3] ** -0.5 if scale is None else scale
        if not causal:
            return _bidirectional(q, k, v, scale, None, mask, cu_seqlens)
        o, state = _causal(q, k, v, scale, None, initial_state, mask, cu_seqlens)
        return (o, state) if return_final_state else o
