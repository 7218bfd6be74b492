"""Nucleus (top-p) sampling without sorting the vocabulary, as a LogitsProcessor.

Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (arXiv 1904.09751), section 3.1: keep the
most likely tokens that hold `top_p` probability. It is the search of `LocallyTypicalLogitsWarper` with another centre.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from ..ops.top_p_mask import top_p_mask
from ..ops.vocabulary_mask import checked_mass, checked_minimum
from .vocabulary_warper import belongs_to_rows, warp


class TopPLogitsWarper(LogitsProcessor):
    """Keeps the most likely tokens of every row that hold `top_p`; a drop-in for `transformers.TopPLogitsWarper`.

    The stock class keeps the same set, except where its rounded running sum is within 1e-6 of `top_p`, and except for
    ties: tokens of equal score are kept together here, while stock cuts through them in the order of its sort.

    Args:
        top_p: probability to keep, in [0, 1]; 1.0 keeps everything, 0.0 the best token. A float, or one value per row
            (1-D tensor or list): a batch of `n * len(top_p)` rows then uses each value n times.
        filter_value: score given to removed tokens. Tokens that are -inf already stay -inf.
        min_tokens_to_keep: keep at least this many tokens, with ties. An int, or one per row.
        backend: "auto", "reference", "torch" or "triton", as for `undersong.ops.top_p_mask`.

    Rows of NaN or of nothing but -inf come back unchanged; with the environment variable UNDERSONG_DEBUG=1 they raise.

    Raises:
        ValueError: `top_p` outside [0, 1], `min_tokens_to_keep` below 1, or per-row values that do not fit the batch.

    >>> TopPLogitsWarper(0.7)(None, torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()).exp()
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """

    def __init__(
        self,
        top_p: float | list[float] | torch.Tensor,
        filter_value: float = -float("inf"),
        min_tokens_to_keep: int | list[int] | torch.Tensor = 1,
        backend: str = "auto",
    ):
        self.top_p = checked_mass(top_p, "top_p", least="[0")
        self.min_tokens_to_keep = checked_minimum(min_tokens_to_keep)
        self.filter_value, self.backend = filter_value, backend
        self.supports_continuous_batching = not belongs_to_rows(self.top_p, self.min_tokens_to_keep)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return warp(top_p_mask, "top_p", self.top_p, self, scores)
