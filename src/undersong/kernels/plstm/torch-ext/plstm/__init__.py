"""The linear recurrences of pLSTM (arXiv 2506.11997) in Triton, forward and backward."""

from . import layers
from .plstm1d import plstm1d, problem
from .plstm2d import plstm2d, plstm2d_problem

__all__ = ["layers", "plstm1d", "plstm2d", "plstm2d_problem", "problem"]
