"""What the warpers over the vocabulary share: per-row settings, laid out for the batch, and the debug check."""

from __future__ import annotations

import os

import torch

from ..ops.vocabulary_mask import per_row


def warp(mask, name, mass, warper, scores):
    """`mask(scores, mass, ...)` with the settings of `warper`; `name` is what the warper calls its mass."""
    mass, minimum = per_row(mass, name, scores), per_row(warper.min_tokens_to_keep, "min_tokens_to_keep", scores)
    if os.environ.get("UNDERSONG_DEBUG") == "1":
        _check_rows(scores)
    return mask(scores, mass, min_tokens_to_keep=minimum, filter_value=warper.filter_value, backend=warper.backend)


def _check_rows(scores):
    invalid = ~scores.amax(-1).isfinite()  # NaN, +inf, or nothing but -inf
    if invalid.any():
        row = invalid.nonzero()[0].item()
        raise ValueError(
            f"scores[{row}] must hold a finite score, no NaN and no +inf; check the processors before this one."
        )


def belongs_to_rows(*settings) -> bool:
    """Continuous batching repacks rows at every step: such values would go to the wrong requests."""
    return any(torch.is_tensor(setting) for setting in settings)
