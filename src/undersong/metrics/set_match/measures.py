"""How well predicted sets agree with those that were asked for, whatever their order. Plain Python.

For outputs that are sets: labels, keyphrases, fields ("Order Matters: Sequence to sequence for sets", arXiv
1511.06391). An element that occurs twice counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable


def split_elements(text: str, separator: str) -> list[str]:
    """The elements of a text, without the white space around them; empty ones are left out.

    >>> split_elements("red , green,", ",")
    ['red', 'green']
    """
    return [part.strip() for part in text.split(separator) if part.strip()]


def set_match_scores(
    predictions: Iterable[Iterable[Hashable] | str],
    references: Iterable[Iterable[Hashable] | str],
    separator: str | None = None,
) -> dict[str, float]:
    """Means over rows of exact match, precision, recall and F1 between multisets.

    With TP the elements in common, as often as they occur in both, F1 = 2 TP / (|prediction| + |reference|). Two empty
    sets agree; of an empty and another one, precision, recall and F1 are 0.

    Args:
        predictions, references: a row each: elements, or with `separator` a text.
        separator: splits texts into elements.

    Returns:
        `exact_match`, `precision`, `recall`, `f1`, each in [0, 1].

    Raises:
        ValueError: nothing to score, different numbers of rows, texts without a separator, or a separator that is
            empty or comes with rows of elements.

    >>> set_match_scores([[1, 2, 3], [4, 4]], [[3, 1, 2], [4, 5]])
    {'exact_match': 0.5, 'precision': 0.75, 'recall': 0.75, 'f1': 0.75}
    >>> set_match_scores(["red, blue"], ["blue, red"], separator=",")["exact_match"]
    1.0
    """
    if separator == "":
        raise ValueError("separator ('') must hold at least one character; use separator=','.")
    predicted, wanted = (
        [_elements(name, index, row, separator) for index, row in enumerate(rows)]
        for name, rows in (("predictions", predictions), ("references", references))
    )
    if len(predicted) != len(wanted):
        raise ValueError(
            f"predictions ({len(predicted)}) and references ({len(wanted)}) must be equally many; give one set a row."
        )
    if not predicted:
        raise ValueError("predictions must hold at least one set.")
    rows = [_scores(Counter(got), Counter(want)) for got, want in zip(predicted, wanted, strict=True)]
    names = ("exact_match", "precision", "recall", "f1")
    return {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _elements(name, index, row, separator):
    if isinstance(row, str) != (separator is not None):
        need = "a separator to be split at; pass separator=','" if separator is None else "to be texts; drop separator"
        raise ValueError(f"{name}[{index}] ({row!r}) needs {need}.")
    return list(row) if separator is None else split_elements(row, separator)


def _scores(got: Counter, want: Counter) -> tuple[float, float, float, float]:
    common, sizes = (got & want).total(), (got.total(), want.total())
    if not any(sizes):
        return 1.0, 1.0, 1.0, 1.0
    precision, recall = (common / size if size else 0.0 for size in sizes)
    return float(got == want), precision, recall, 2 * common / sum(sizes)
