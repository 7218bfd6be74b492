"""The layer that the `kernels` library swaps in for a module around the op."""

import torch.nn as nn

from .function import cumulative_softmax_average


class CumulativeSoftmaxAverage(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, s, v, initial_state=None, mask=None, cu_seqlens=None, return_final_state=False):
        o, state = cumulative_softmax_average(s, v, initial_state, mask, cu_seqlens)
        return (o, state) if return_final_state else o
