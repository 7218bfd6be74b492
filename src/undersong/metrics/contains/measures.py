"""Whether an answer contains a gold value. Plain Python, no imports beyond the standard library.

The recall score of Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff"
(arXiv 2402.18668) and "Just read twice" (arXiv 2407.05483): generated text may go on after the value, so it is not
compared but searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def contains(prediction: str, references: str | Sequence[str]) -> bool:
    """Whether any gold value is a substring of the prediction, whatever the case of letters.

    Values are plain text: points, brackets and the like mean themselves.

    Raises:
        ValueError: no gold value, or an empty one, which every text contains.

    >>> contains("The Applicant is K143467.", ["k143467", "K-143467"])
    True
    >>> contains("about 315 mg", "3.5 mg")
    False
    """
    references = [references] if isinstance(references, str) else list(references)
    if not references or not all(references):
        raise ValueError(f"references ({references!r}) must hold values of at least 1 character; drop the document.")
    text = prediction.casefold()
    return any(value.casefold() in text for value in references)


def contains_score(predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> float:
    """Share of documents whose prediction contains one of its gold values.

    Args:
        predictions: one text per document.
        references: per document, a value or a list of values.

    Raises:
        ValueError: nothing to score, or different numbers of predictions and references.

    >>> contains_score(["a plum", "a fig"], ["Plum", ["pear", "peach"]])
    0.5
    """
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions ({len(predictions)}) and references ({len(references)}) must be equally many; give one entry"
            " per document."
        )
    if not predictions:
        raise ValueError("predictions must hold at least one text.")
    return sum(map(contains, predictions, references)) / len(predictions)
