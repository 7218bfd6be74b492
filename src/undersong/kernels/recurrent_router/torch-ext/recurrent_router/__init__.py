"""The router of a mixture of experts whose state travels up the layers, in Triton: two launches, with gradients."""

from . import layers
from .function import problem, recurrent_router

__all__ = ["layers", "problem", "recurrent_router"]
