"""Sequence operators as pure functions, each with the backends reference, torch and (where one exists) triton."""

from ._dispatch import available_backends, explain, status
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .cumulative_softmax_average import cumulative_softmax_average
from .diagonal_scan import diagonal_scan
from .diagonal_ssm import diagonal_ssm
from .fft_conv import fft_conv
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update
from .ssd import ssd
from .top_p_mask import top_p_mask
from .typical_mask import fused_typical_sample, typical_mask

__all__ = [
    "available_backends",
    "causal_conv1d",
    "causal_conv1d_update",
    "cumulative_softmax_average",
    "diagonal_scan",
    "diagonal_ssm",
    "explain",
    "fft_conv",
    "fused_typical_sample",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "status",
    "top_p_mask",
    "typical_mask",
]
