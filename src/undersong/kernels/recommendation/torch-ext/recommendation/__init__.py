"""The best items of a catalogue and the cross-entropy over it, without the matrix of all scores, in Triton."""

from .cross_entropy import linear_cross_entropy
from .topk import problem, topk_items

__all__ = ["linear_cross_entropy", "problem", "topk_items"]
