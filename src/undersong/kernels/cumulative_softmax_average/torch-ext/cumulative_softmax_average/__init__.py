"""Softmax-weighted average of every prefix (attention with one fixed query), in Triton, forward and backward."""

from . import layers
from .function import cumulative_softmax_average

__all__ = ["cumulative_softmax_average", "layers"]
