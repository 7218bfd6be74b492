"""The layer that the `kernels` library swaps in for a module around the op."""

import torch.nn as nn

from .function import additive_pointer_attention


class AdditivePointerAttention(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, We, Wd, v, mask=None):
        return additive_pointer_attention(We, Wd, v, mask)
