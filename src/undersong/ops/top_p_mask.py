"""Nucleus (top-p) filtering as an op.

Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (arXiv 1904.09751), section 3.1: keep the
most likely tokens that hold `mass` probability. The search, without a sort, is in `vocabulary_mask`.
"""

from __future__ import annotations

import functools
import math

import torch

from ._dispatch import Op, register, run
from .vocabulary_mask import (
    check_logits,
    checked_mass,
    checked_minimum,
    example,
    kernel_refuses,
    reference,
    torch_mask,
)


def top_p_mask(logits, mass, *, min_tokens_to_keep=1, filter_value=-math.inf, backend="auto"):
    """Logits with all but the most likely tokens of each row removed.

    Kept are {v : p_v >= q} with the largest q at which they hold `mass` probability and `min_tokens_to_keep` tokens.
    Tokens of equal score are kept or removed together, where transformers' class cuts through them in no defined
    order.

    Args:
        logits, min_tokens_to_keep, filter_value, backend: as for `undersong.ops.typical_mask`.
        mass: in [0, 1]; 0.0 keeps the best token alone (with ties), 1.0 everything. A float, or one per row `[batch]`.

    Returns:
        `[batch, vocab]` in logits' dtype, without gradient; logits themselves where `mass` is the number 1.0.

    Raises:
        ValueError, RuntimeError: as `undersong.ops.typical_mask`.

    >>> top_p_mask(torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log(), 0.7).exp()
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """
    mass, need = checked_mass(mass, least="[0"), checked_minimum(min_tokens_to_keep)
    check_logits(logits, mass=mass, min_tokens_to_keep=need)
    if not torch.is_tensor(mass) and mass == 1.0:
        return logits
    return run(OP, backend, logits.detach(), mass, need, filter_value)


OP = register(
    Op(
        name="top_p_mask",
        reference=functools.partial(reference, typical=False),
        torch=functools.partial(torch_mask, typical=False),
        kernel="vocabulary_mask",
        kernel_refuses=kernel_refuses,
        example=lambda device, dtype: (example(device, dtype), 0.7, 1, -math.inf),
    )
)
