"""The layer that the `kernels` library swaps in for a module around the op."""

import torch.nn as nn

from .function import problem, recurrent_router


class RecurrentRouter(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, u, h, cell, W2, top_k, base=None, norm_topk_prob=True):
        if problem(u, h, *cell, W2, base) is not None and "forward" in vars(self):  # back to what it stands in for
            return type(self).forward(self, u, h, cell, W2, top_k, base, norm_topk_prob)
        return recurrent_router(u, h, *cell, W2, top_k, base, norm_topk_prob)
