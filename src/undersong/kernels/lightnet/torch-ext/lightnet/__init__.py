"""LightNet's attention, causal and over all positions, in Triton, forward and backward."""

from . import layers
from .bidirectional import lightnet_attention_bidirectional
from .causal import lightnet_attention

__all__ = ["layers", "lightnet_attention", "lightnet_attention_bidirectional"]
