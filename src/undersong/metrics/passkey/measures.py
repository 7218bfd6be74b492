"""Accuracy of passkey retrieval over length and depth. Plain Python, no imports beyond the standard library.

A number is hidden in a long text and asked for at its end; an answer is right if it contains the number. T_recall, the
length up to which a model finds it, is from Chen et al., "Stuffed Mamba", arXiv 2410.07145, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence


def passkey_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] | None = None,
    threshold: float = 0.95,
    bins: int = 10,
) -> dict:
    """Accuracy over length and depth, and the length up to which it holds.

    Args:
        predictions: what the model said.
        references: the numbers, as texts with their leading zeros.
        lengths: of the prompts, in tokens, as they were asked for.
        depths: where the numbers were hidden, in [0, 1].
        threshold: the accuracy that T_recall wants.
        bins: cells of equal size that depths are sorted into.

    Returns:
        `accuracy` of all; `lengths`, sorted; `accuracy_by_length`, one entry per length; `t_recall`, the longest
        length whose accuracy, and that of every shorter one, reaches the threshold, 0 if none does; with depths also
        `grid`, a list per length of accuracies per depth bin, None where there was no prompt.

    Raises:
        ValueError: nothing to score, lists of different lengths, a depth out of range.

    >>> scores = passkey_scores(["It is 042.", "7"], ["042", "123"], lengths=[100, 200], depths=[0.1, 0.9], bins=2)
    >>> scores["accuracy_by_length"], scores["t_recall"], scores["grid"]
    ([1.0, 0.0], 100, [[1.0, None], [None, 0.0]])
    """
    given = {"references": references, "lengths": lengths} | ({} if depths is None else {"depths": depths})
    for name, values in given.items():
        if len(values) != len(predictions):
            raise ValueError(f"{name} ({len(values)}) must be as many as predictions ({len(predictions)}).")
    if not len(predictions):
        raise ValueError("predictions must hold at least one answer.")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold ({threshold}) must lie in (0, 1]; use 0.95.")
    if bins < 1:
        raise ValueError(f"bins ({bins}) must be at least 1.")
    for depth in depths if depths is not None else ():
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths must lie in [0, 1], but one is {depth}.")
    right = [key in said for said, key in zip(predictions, references, strict=True)]
    kinds = sorted(set(lengths))
    by_length = [_mean([ok for ok, length in zip(right, lengths, strict=True) if length == kind]) for kind in kinds]
    scores = {
        "accuracy": _mean(right),
        "lengths": kinds,
        "accuracy_by_length": by_length,
        "t_recall": t_recall(kinds, by_length, threshold),
    }
    if depths is not None:
        cells = {}
        for ok, length, depth in zip(right, lengths, depths, strict=True):
            cells.setdefault((length, min(int(depth * bins), bins - 1)), []).append(ok)
        scores["grid"] = [[_mean(cells.get((length, cell))) for cell in range(bins)] for length in kinds]
    return scores


def t_recall(lengths: Sequence[int], accuracies: Sequence[float], threshold: float = 0.95) -> int:
    """The longest length whose accuracy, and that of every shorter one, reaches the threshold; 0 if none does.

    >>> t_recall([128, 256, 512, 1024], [1.0, 0.97, 0.4, 1.0])
    256
    """
    reached = 0
    for length, accuracy in sorted(zip(lengths, accuracies, strict=True)):
        if accuracy < threshold:
            break
        reached = length
    return reached


def _mean(values):
    return sum(values) / len(values) if values else None
