"""Locally typical sampling as an op: filter next-token logits, or filter and draw a token in one go.

Meister et al., "Locally Typical Sampling", TACL 2023 (arXiv 2202.00666), section 4: keep the tokens whose information
content -log p is closest to the entropy H of the next-token distribution until they hold `mass` probability. The
search, without a sort, is in `vocabulary_mask`.
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
    checked_setting,
    example,
    kernel_refuses,
    one_choice,
    reference,
    torch_mask,
    torch_sample,
)


def typical_mask(logits, mass, *, min_tokens_to_keep=1, filter_value=-math.inf, backend="auto"):
    """Logits with the tokens outside the locally typical set of each row removed.

    d_v = |H + log p_v|; kept are {v : d_v <= e} with the smallest e at which they hold `mass` probability and
    `min_tokens_to_keep` tokens. Tokens tied at e are all kept.

    Args:
        logits: `[batch, vocab]`, any float dtype; the selection is made in float32 (in float64 by the reference, for
            float64 logits). Rows with NaN or +inf, or of nothing but -inf, come back unchanged; -inf stays -inf.
        mass: in (0, 1]; 1.0 keeps everything. A float, or one per row `[batch]`.
        min_tokens_to_keep: a positive integer, or one per row `[batch]`.
        filter_value: what removed tokens are set to.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `[batch, vocab]` in logits' dtype, without gradient; logits themselves where `mass` is the number 1.0.

    Raises:
        ValueError: a mass outside (0, 1], a minimum below 1, shapes that disagree, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()  # entropy 1.21 nats: 0.25 (1.39 nats) is the nearest
    >>> typical_mask(logits, 0.3).exp()  # 0.25 alone is less than 0.3, so the next nearest, 0.5, is kept as well
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """
    mass, need = checked_mass(mass), checked_minimum(min_tokens_to_keep)
    check_logits(logits, mass=mass, min_tokens_to_keep=need)
    if not torch.is_tensor(mass) and mass == 1.0:
        return logits
    return run(MASK, backend, logits.detach(), mass, need, filter_value)


def fused_typical_sample(logits, mass, temperature=1.0, *, min_tokens_to_keep=1, generator=None, backend="auto"):
    """A token of each row, drawn from the locally typical set; filtered logits are never written.

    In transformers' order: the logits are divided by the temperature first, so entropy and mass are those of the
    tempered distribution. The distribution is that of `typical_mask(logits / temperature, mass)`, softmax and
    `torch.multinomial`; the random numbers are others, and differ between backends.

    Args:
        logits, mass, min_tokens_to_keep, backend: as for `typical_mask`.
        temperature: positive, or one per row `[batch]`.
        generator: on the device of logits; by default torch's own.

    Returns:
        `[batch]` int64; -1 for a row with NaN or +inf or of nothing but -inf, which has no distribution.

    Raises:
        ValueError, RuntimeError: as `typical_mask`; a temperature that is not positive.

    >>> fused_typical_sample(torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log(), 0.2)  # only 0.25 is kept
    tensor([1])
    """
    mass, need = checked_mass(mass), checked_minimum(min_tokens_to_keep)
    temperature = checked_setting(
        temperature, "temperature", lambda t: 0.0 < t < math.inf, "be positive; use argmax for greedy choice"
    )
    check_logits(logits, mass=mass, min_tokens_to_keep=need, temperature=temperature)
    return run(SAMPLE, backend, logits.detach(), mass, need, temperature, generator)


MASK = register(
    Op(
        name="typical_mask",
        reference=functools.partial(reference, typical=True),
        torch=functools.partial(torch_mask, typical=True),
        kernel="vocabulary_mask",
        kernel_refuses=kernel_refuses,
        example=lambda device, dtype: (example(device, dtype), 0.7, 1, -math.inf),
    )
)
# The self-check can only compare draws that leave no choice.
SAMPLE = register(
    Op(
        name="fused_typical_sample",
        reference=functools.partial(torch_sample, mask=reference),
        torch=torch_sample,
        kernel="vocabulary_mask",
        kernel_refuses=kernel_refuses,
        example=lambda device, dtype: (one_choice(device, dtype), 0.5, 1, 0.7, None),
    )
)
