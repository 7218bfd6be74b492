"""Sequence operators as pure functions, each with the backends reference, torch and (where one exists) triton."""

from ._dispatch import available_backends, explain, status
from .cumulative_softmax_average import cumulative_softmax_average

__all__ = ["available_backends", "cumulative_softmax_average", "explain", "status"]
