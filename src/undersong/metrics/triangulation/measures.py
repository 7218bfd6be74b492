"""How good predicted triangulations are. Plain Python, no imports beyond the standard library.

Accuracy and triangle coverage as in Vinyals et al., "Pointer Networks" (arXiv 1506.03134, section 4.3): neither the
order of the triangles nor that of a triangle's corners matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def triangles(row: Iterable[int]) -> tuple[list[tuple[int, ...]], int]:
    """The triples of a row, each ascending, and how many ids are left over behind them.

    A 0 in front is dropped, the next id below 1 ends the row.

    >>> triangles([0, 3, 1, 2, 2, 3, 4, 0, 0]), triangles([1, 2, 3, 4, -100])
    (([(1, 2, 3), (2, 3, 4)], 0), ([(1, 2, 3)], 1))
    """
    row = [int(id_) for id_ in row]
    row = row[1:] if row[:1] == [0] else row
    row = row[: next((place for place, id_ in enumerate(row) if id_ < 1), len(row))]
    return [tuple(sorted(triple)) for triple in zip(*[iter(row)] * 3, strict=False)], len(row) % 3


def triangulation_scores(
    predictions: Sequence[Iterable[int]], references: Sequence[Iterable[int]]
) -> dict[str, float]:
    """Accuracy and triangle coverage.

    Args:
        predictions, references: rows of ids from 1, three for each triangle; the 0 in front, the final 0 and padding
            of 0 or negative ids may be there or not.

    Returns:
        `accuracy`: the share of rows with all triangles of the reference, each once, and nothing else.
        `triangle_coverage`: the share of the reference's triangles that were found, the mean over rows.

    Raises:
        ValueError: no rows, different numbers of rows, or a reference that is not triangles.

    >>> triangulation_scores([[0, 3, 4, 2, 1, 3, 2, 0], [1, 2, 3, 1, 2, 4, 0]], [[1, 2, 3, 2, 3, 4, 0]] * 2)
    {'accuracy': 0.5, 'triangle_coverage': 0.75}
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions ({len(predictions)}) and references ({len(references)}) must be equally many; "
            "pass one reference per prediction."
        )
    if not len(references):
        raise ValueError("references must hold at least one row.")
    right, coverage = 0, 0.0
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        found, rest = triangles(prediction)
        wanted, extra = triangles(reference)
        if extra or not wanted:
            raise ValueError(
                f"references[{index}] holds {3 * len(wanted) + extra} ids, but must hold 3 for each triangle."
            )
        right += rest == 0 and sorted(found) == sorted(wanted)
        coverage += len(set(found) & set(wanted)) / len(set(wanted))
    return {"accuracy": right / len(references), "triangle_coverage": coverage / len(references)}
