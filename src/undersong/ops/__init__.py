"""Sequence operators as pure functions, each with the backends reference, torch and (where one exists) triton."""

from ._dispatch import available_backends, explain, status
from .additive_pointer_attention import additive_pointer_attention
from .band_attention import band_attention
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .cumulative_softmax_average import cumulative_softmax_average
from .diagonal_scan import diagonal_scan
from .diagonal_ssm import diagonal_ssm
from .fft_conv import fft_conv
from .lightnet_attention import lightnet_attention
from .line_graph import LineGraph, line_graph
from .linear_cross_entropy import linear_cross_entropy
from .plstm1d import plstm1d
from .plstm2d import plstm2d
from .plstm_graph import plstm_graph
from .recurrent_router import recurrent_router
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update
from .set2set import set2set
from .ssd import ssd
from .ssd_control import controlled_ssd
from .top_p_mask import top_p_mask
from .topk_items import topk_items
from .typical_mask import fused_typical_sample, typical_mask

__all__ = [
    "LineGraph",
    "additive_pointer_attention",
    "available_backends",
    "band_attention",
    "causal_conv1d",
    "causal_conv1d_update",
    "controlled_ssd",
    "cumulative_softmax_average",
    "diagonal_scan",
    "diagonal_ssm",
    "explain",
    "fft_conv",
    "fused_typical_sample",
    "lightnet_attention",
    "line_graph",
    "linear_cross_entropy",
    "plstm1d",
    "plstm2d",
    "plstm_graph",
    "recurrent_router",
    "selective_scan",
    "selective_state_update",
    "set2set",
    "ssd",
    "status",
    "top_p_mask",
    "topk_items",
    "typical_mask",
]
