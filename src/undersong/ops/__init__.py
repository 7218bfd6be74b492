"""Sequence operators as pure functions, each with the backends reference, torch and (where one exists) triton."""

from ._dispatch import available_backends, explain, status
from .cumulative_softmax_average import cumulative_softmax_average
from .top_p_mask import top_p_mask
from .typical_mask import fused_typical_sample, typical_mask

__all__ = [
    "available_backends",
    "cumulative_softmax_average",
    "explain",
    "fused_typical_sample",
    "status",
    "top_p_mask",
    "typical_mask",
]
