"""Locally typical sampling without sorting the vocabulary, as a LogitsProcessor.

Meister et al., "Locally Typical Sampling", TACL 2023 (arXiv 2202.00666), section 4: keep the tokens whose information
content -log p is closest to the entropy H of the next-token distribution until they hold `mass` probability.
transformers' `TypicalLogitsWarper` sorts the vocabulary at every step; the op behind this class does not.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TypicalLogitsWarper
from transformers import TopPLogitsWarper as StockTopPLogitsWarper

from ..ops.typical_mask import typical_mask
from ..ops.vocabulary_mask import checked_mass, checked_minimum
from .top_p import TopPLogitsWarper
from .vocabulary_warper import belongs_to_rows, warp

REFERENCES = ("model", "processed")


class LocallyTypicalLogitsWarper(LogitsProcessor):
    """Keeps the locally typical tokens of every row; a drop-in for `transformers.TypicalLogitsWarper`.

    With p the softmax of a row, H its entropy in nats and d_v = |H + log p_v|, the kept tokens are {v : d_v <= e}
    where e is the smallest distance at which they hold at least `mass` probability (all tokens tied at e are kept).
    The stock class keeps the same set, except where its rounded running sum is within 1e-6 of `mass`.

    Passed to `generate(logits_processor=[...])` it runs *before* temperature, top-k and top-p and so sees the model's
    own distribution; the later warpers act on the survivors. `generate(typical_p=...)` runs the stock class *after*
    them, and since top_k is 50 by default when sampling, that means "typical within the 50 most likely tokens".

    Args:
        mass: probability to keep, in (0, 1]; 1.0 keeps everything. A float, or one value per row (1-D tensor or list):
            a batch of `n * len(mass)` rows then uses each value n times, in `num_return_sequences` order.
        filter_value: score given to removed tokens. Tokens that are -inf already stay -inf.
        min_tokens_to_keep: keep at least this many tokens (those of smallest d, with ties). An int, or one per row.
            Under beam sampling use the number of EOS tokens + 1, so that a beam always has a continuation besides EOS.
        reference: whose entropy and mass are meant, which decides where `DecodingConfig` and the decoding loops here
            place the processor: "model", before temperature and the other warpers, or "processed", after them, as
            `typical_p` is. The class itself uses the scores it is given.
        backend: "auto", "reference", "torch" or "triton", as for `undersong.ops.typical_mask`.

    A very peaked row may lose its most likely token at a small `mass`: that is the method. Rows of NaN or of nothing
    but -inf come back unchanged; with the environment variable UNDERSONG_DEBUG=1 they raise. Any float dtype goes in
    and comes out; the selection is made in float32.

    Raises:
        ValueError: `mass` outside (0, 1], `min_tokens_to_keep` below 1, per-row values that do not fit the batch, or
            an unknown `reference`.

    >>> warper = LocallyTypicalLogitsWarper(mass=0.3)
    >>> scores = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()  # entropy 1.21 nats: 0.25 (1.39 nats) is the nearest
    >>> warper(None, scores).exp()  # 0.25 alone is less than 0.3, so the next nearest, 0.5, is kept as well
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """

    def __init__(
        self,
        mass: float | list[float] | torch.Tensor = 0.9,
        filter_value: float = -float("inf"),
        min_tokens_to_keep: int | list[int] | torch.Tensor = 1,
        reference: str = "model",
        backend: str = "auto",
    ):
        if reference not in REFERENCES:
            raise ValueError(f"reference ({reference!r}) must be 'model' or 'processed'; use 'model'.")
        self.mass = checked_mass(mass)
        self.min_tokens_to_keep = checked_minimum(min_tokens_to_keep)
        self.filter_value, self.reference, self.backend = filter_value, reference, backend
        self.supports_continuous_batching = not belongs_to_rows(self.mass, self.min_tokens_to_keep)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return warp(typical_mask, "mass", self.mass, self, scores)


def use_fast_typical(processors: list) -> LogitsProcessorList:
    """The processors with transformers' typical and top-p warpers replaced by ours, in the same places.

    Args:
        processors: as `generate` prepared them, e.g. in a custom decoding loop.

    >>> fast = use_fast_typical([TypicalLogitsWarper(0.9), StockTopPLogitsWarper(0.95)])
    >>> [type(processor).__name__ for processor in fast], fast[0].reference
    (['LocallyTypicalLogitsWarper', 'TopPLogitsWarper'], 'processed')
    """
    return LogitsProcessorList(_fast(processor) for processor in processors)


def _fast(processor):
    # exact types: a subclass may do something else
    if type(processor) is TypicalLogitsWarper:
        return LocallyTypicalLogitsWarper(
            processor.mass, processor.filter_value, processor.min_tokens_to_keep, reference="processed"
        )
    if type(processor) is StockTopPLogitsWarper:
        return TopPLogitsWarper(processor.top_p, processor.filter_value, processor.min_tokens_to_keep)
    return processor
