"""The scores of a pointer network (additive attention without the hidden units' tensor), in Triton, with gradients."""

from . import layers
from .function import additive_pointer_attention

__all__ = ["additive_pointer_attention", "layers"]
