"""Locally typical sampling without sorting the vocabulary.

Meister et al., "Locally Typical Sampling", TACL 2023 (arXiv 2202.00666), section 4: keep the tokens whose information
content -log p is closest to the entropy H of the next-token distribution until they hold `mass` probability.
transformers' `TypicalLogitsWarper` sorts the vocabulary at every step; here the threshold is found by a radix select
over the bits of the distance d = |H + log p|: three histograms of probability mass, no sort, no host synchronisation.

All sums are taken over integers that float64 holds exactly, so a row's result depends neither on the batch around it,
nor on the number of threads, nor on the order in which a GPU adds.
"""

from __future__ import annotations

import math
import os

import torch
from transformers import LogitsProcessor

_UNITS = 2.0**44  # fixed point of probabilities and of p log p: sums stay below 2^48, which float64 holds exactly
_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of the radix select; the sign bit is always 0
_KEEP_ALL = 2**31 - 1
_CPU_CHUNK = 2**18  # elements


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

    A very peaked row may lose its most likely token at a small `mass`: that is the method. Rows of NaN or of nothing
    but -inf come back unchanged; with the environment variable UNDERSONG_DEBUG=1 they raise. Any float dtype goes in
    and comes out; the selection is made in float32.

    Raises:
        ValueError: `mass` outside (0, 1], `min_tokens_to_keep` below 1, or per-row values that do not fit the batch.

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
    ):
        self.mass = _checked(mass, "mass", lambda x: 0.0 < x <= 1.0, "lie in (0, 1]; use 1.0 to keep every token")
        self.min_tokens_to_keep = _checked(
            min_tokens_to_keep,
            "min_tokens_to_keep",
            lambda x: float(x).is_integer() and x >= 1,
            "be a positive integer; use 1 for no minimum",
        )
        self.filter_value = filter_value
        # Continuous batching repacks rows at every step: values that belong to rows would go to the wrong requests.
        per_row = torch.is_tensor(self.mass) or torch.is_tensor(self.min_tokens_to_keep)
        self.supports_continuous_batching = not per_row

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        mass = _per_row(self.mass, "mass", scores)
        min_tokens = _per_row(self.min_tokens_to_keep, "min_tokens_to_keep", scores)
        if not torch.is_tensor(mass) and mass == 1.0:
            return scores

        # A few rows at a time stay in a CPU's cache: at 16 x 128256 that is twice as fast as all rows at once.
        rows = max(1, _CPU_CHUNK // scores.shape[1]) if scores.device.type == "cpu" else scores.shape[0]
        chunks = []
        for i in range(0, scores.shape[0], rows):
            settings = (x[i : i + rows] if torch.is_tensor(x) else x for x in (mass, min_tokens))
            chunks.append(self._warp(scores[i : i + rows], *settings, first_row=i))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _warp(self, scores: torch.Tensor, mass, min_tokens, first_row: int) -> torch.Tensor:
        log_p = scores.float().log_softmax(-1)  # [rows, vocab]
        p = log_p.exp()
        # The clamp turns 0 * -inf into 0 and leaves NaN rows NaN.
        entropy = -_units(p * log_p.clamp(min=-1e30)).sum(-1, keepdim=True, dtype=torch.float64) / _UNITS
        invalid = entropy.isnan()
        if os.environ.get("UNDERSONG_DEBUG") == "1" and invalid.any():
            row = first_row + invalid.flatten().nonzero()[0].item()
            raise ValueError(
                f"scores[{row}] must hold a finite score, no NaN and no +inf; check the processors before this one."
            )

        # A float >= 0 and its bit pattern read as an integer have the same order: tied distances share a key.
        key = log_p.add_(entropy.float()).abs_().view(torch.int32)
        threshold = _select(key, _units(p), mass * _UNITS)
        if torch.is_tensor(mass):
            threshold = threshold.masked_fill(mass == 1.0, _KEEP_ALL)
        if torch.is_tensor(min_tokens) or min_tokens > 1:
            threshold = threshold.maximum(_select(key, torch.ones_like(p), min_tokens))
        removed = key > threshold.masked_fill(invalid, _KEEP_ALL)
        if self.filter_value != -math.inf:
            removed &= scores != -math.inf
        return scores.masked_fill(removed, self.filter_value)


def _units(x: torch.Tensor) -> torch.Tensor:
    """`x` (float32, |x| <= 1) as whole numbers of 2^-44; exact above 2^-21, rounded below."""
    return (x * _UNITS).round_()


def _select(key: torch.Tensor, weight: torch.Tensor, target: float | torch.Tensor) -> torch.Tensor:
    """Smallest key k per row with sum(weight[key <= k]) >= target; above every key if there is none. `[rows, 1]` int32

    `key` `[rows, vocab]` int32 >= 0; `weight` alike, float32 whole numbers; `target` a number or `[rows, 1]`. Each
    round fixes one digit of k, from the top: a histogram of the weight over that digit, among keys that agree with k.
    """
    prefix = torch.zeros(key.shape[0], 1, dtype=torch.int32, device=key.device)
    below = torch.zeros(key.shape[0], 1, dtype=torch.float64, device=key.device)  # weight of the keys under the prefix
    for shift, bits in _DIGITS:
        digit, counted = key >> shift, weight
        if shift + bits < 31:
            counted = weight.masked_fill((digit >> bits) != prefix, 0.0)
            digit &= 2**bits - 1
        histogram = torch.zeros(key.shape[0], 2**bits, dtype=torch.float64, device=key.device)
        cumulative = histogram.scatter_add_(1, digit.long(), counted.double()).cumsum_(1).add_(below)
        chosen = (cumulative < target).sum(1, keepdim=True).clamp_(max=2**bits - 1)
        below = torch.where(chosen > 0, cumulative.gather(1, (chosen - 1).clamp_(min=0)), below)
        prefix = (prefix << bits) | chosen.int()
    return prefix


def _checked(value, name: str, valid, must: str):
    """`value` as a Python number or as a 1-D tensor, with every entry checked."""
    per_row = torch.is_tensor(value) or isinstance(value, list | tuple)
    tensor = torch.as_tensor(value)
    if tensor.ndim > 1 or tensor.numel() == 0:
        shape = list(tensor.shape)
        raise ValueError(f"{name} (shape {shape}) must be a number or one number per row; pass a 1-D tensor.")
    for row, entry in enumerate(tensor.flatten().tolist()):
        if not valid(entry):
            raise ValueError(f"{name}{f'[{row}]' if tensor.ndim else ''} ({entry}) must {must}.")
    return tensor if per_row and tensor.ndim else tensor.item()


def _per_row(value, name: str, scores: torch.Tensor):
    """A number as it is; per-row values as `[batch, 1]` float64, repeated for every sequence of a prompt."""
    if not torch.is_tensor(value):
        return value
    repeats, rest = divmod(scores.shape[0], value.shape[0])
    if rest or not repeats:
        raise ValueError(
            f"{name} has {value.shape[0]} values but scores have {scores.shape[0]} rows; pass one value per prompt."
        )
    return value.to(scores.device, torch.float64).repeat_interleave(repeats).unsqueeze(1)
