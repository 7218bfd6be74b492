"""Sequence operators as pure functions, each with the backends reference, torch and (where one exists) triton."""

from ._dispatch import available_backends, explain, status
from .additive_pointer_attention import additive_pointer_attention
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .cumulative_softmax_average import cumulative_softmax_average
from .diagonal_scan import diagonal_scan
from .diagonal_ssm import diagonal_ssm
from .fft_conv import fft_conv
from .recurrent_router import recurrent_router
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update
from .set2set import set2set
from .ssd import ssd
from .ssd_control import controlled_ssd
from .top_p_mask import top_p_mask
from .typical_mask import fused_typical_sample, typical_mask

__all__ = [
    "additive_pointer_attention",
    "available_backends",
    "causal_conv1d",
    "causal_conv1d_update",
    "controlled_ssd",
    "cumulative_softmax_average",
    "diagonal_scan",
    "diagonal_ssm",
    "explain",
    "fft_conv",
    "fused_typical_sample",
    "recurrent_router",
    "selective_scan",
    "selective_state_update",
    "set2set",
    "ssd",
    "status",
    "top_p_mask",
    "typical_mask",
]
