"""The step of a recurrent router (arXiv 2408.06793, section 3) as a module that has no parameters of its own."""

from torch import nn

from .._compat import use_kernel_forward_from_hub
from ..ops.recurrent_router import recurrent_router


@use_kernel_forward_from_hub("RecurrentRouter")
class RecurrentRouter(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(self, u, h, cell, W2, top_k, base=None, norm_topk_prob=True):
        return recurrent_router(u, h, cell, W2, top_k=top_k, base=base, norm_topk_prob=norm_topk_prob)


__all__ = ["RecurrentRouter"]
