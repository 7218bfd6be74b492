"""Repeated motifs: endless text that can be predicted from its last few dozen tokens, however long it is.

Every stretch of a text says one short motif over and over, then another one takes its place. What is worth knowing is
recent: a model with a memory of two motifs predicts all but the beginnings, at any position. A recurrence that never
forgets mixes up the motifs of old, so the loss over the position shows whether forgetting was learned.
"""

from __future__ import annotations

import torch

__all__ = ["repeated_motifs"]


def repeated_motifs(
    batch: int,
    length: int,
    vocab_size: int = 64,
    *,
    motif: int = 16,
    stretch: int = 512,
    beginnings: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random text of motifs, each of different tokens, each said for `stretch` tokens; rows begin anywhere in one.

    Rows from the middle are stationary: position t is distributed like any other, so a loss that grows with t, beyond
    the context that it needs, is the model's own doing. An ideal reader pays log(vocab_size) for the first saying of a
    motif, `motif / stretch` of all tokens, and little for the rest.

    Args:
        batch, length: shape of the result.
        vocab_size: kinds of tokens.
        motif: tokens of a motif, all different.
        stretch: tokens until the next motif.
        beginnings: probability that a row is the beginning of a text, with a whole stretch first, and not cut out of
            the middle.
        generator: source of randomness; its device is where the tokens are made.

    Returns:
        `[batch, length]` int64.

    Raises:
        ValueError: a motif that the vocabulary or the stretch has no room for, or no probability.

    >>> repeated_motifs(1, 12, motif=3, stretch=6, generator=torch.Generator().manual_seed(0)).tolist()
    [[...]]
    """
    if not 1 <= motif <= min(vocab_size, stretch):
        raise ValueError(
            f"motif ({motif}) must lie in 1..{min(vocab_size, stretch)}: it consists of different tokens of vocab_size"
            f" ({vocab_size}) and is said at least once in stretch ({stretch})."
        )
    if not 0.0 <= beginnings <= 1.0:
        raise ValueError(f"beginnings ({beginnings}) must lie in [0, 1], a share of the rows.")
    device = generator.device if generator is not None else "cpu"
    time = torch.randint(stretch, (batch, 1), generator=generator, device=device)
    time = time * (torch.rand(batch, 1, generator=generator, device=device) >= beginnings)
    time = time + torch.arange(length, device=device)  # [batch, length], position since the start of the first motif
    shape = batch, (length + stretch - 2) // stretch + 1, vocab_size
    motifs = torch.rand(shape, generator=generator, device=device).argsort(-1)[..., :motif]
    row = torch.arange(batch, device=device)[:, None]
    return motifs[row, time // stretch, time % stretch % motif]
