"""State-space operators of Mamba and Mamba-2 in Triton, forward and backward."""

from . import layers
from .conv import causal_conv1d, causal_conv1d_update
from .scan import selective_scan
from .ssd import ssd
from .ssd_control import ssd_threshold, ssd_window
from .update import selective_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "layers",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_threshold",
    "ssd_window",
]
