"""The precision in which states, norms and residual streams are computed."""

import torch


def wide(tensor):
    """In float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["wide"]
