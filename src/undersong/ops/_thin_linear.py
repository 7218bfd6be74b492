"""A linear layer on the few rows of a decoding step, on all threads of a CPU.

Such a product reads every weight once and is bound by memory; BLAS multiplies a float32 matrix with one vector on one
thread, and with a few on all of them but slower than that. As a batch of products with parts of the weight, each
thread reads its own part, at the speed of the memory.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

ROWS = 8  # up to this many are "few"
SMALL = 2**17  # weights below this many numbers stay in a cache, where starting threads costs more than it saves


def thin_linear(x, weight, bias=None):
    """`torch.nn.functional.linear`, split over the threads where that is faster and no gradient is recorded.

    >>> torch.equal(thin_linear(torch.ones(1, 2), torch.eye(2)), torch.ones(1, 2))
    True
    """
    parts = _parts(x, weight)
    if parts == 1:
        return linear(x, weight, bias)
    y = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(parts, -1, -1), weight.unflatten(0, (parts, -1)).mT)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _parts(x, weight):
    """Into how many parts of equal size the weight's rows are cut: one a thread, or else none is."""
    few = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and 0 < x.numel() <= ROWS * x.shape[-1]
    if not few or weight.numel() < SMALL or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    threads = torch.get_num_threads()
    return threads if len(weight) % threads == 0 and not torch.is_autocast_enabled("cpu") else 1
