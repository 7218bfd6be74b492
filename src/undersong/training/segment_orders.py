"""Targets that are sets of segments, and collators that write them in one order or in any.

A target such as "red , green , blue <eos>" is a set: its segments may be written in any order ("Order Matters:
Sequence to sequence for sets", arXiv 1511.06391, sec. 5). Reordering works on token ids, before anything is shifted,
and keeps every length: separators, and special tokens at both ends, stay in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

_IGNORED = -100  # the label that losses leave out


@dataclass(frozen=True)
class SegmentedTarget:
    """A row of labels, taken apart.

    Attributes:
        start: where the target begins in the row.
        prefix, suffix: token ids that stay in front and behind.
        segments: tuples of token ids, as they stand in the row.
        separator_id: the id between them; None where every token is a segment.
    """

    start: int
    prefix: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...]
    separator_id: int | None

    def ids(self, segments: Sequence[tuple[int, ...]]) -> list[int]:
        """The token ids of the target with its segments in another order."""
        ids = list(self.prefix)
        for index, segment in enumerate(segments):
            if index and self.separator_id is not None:
                ids.append(self.separator_id)
            ids.extend(segment)
        return ids + list(self.suffix)

    def write(self, row: list[int], segments: Sequence[tuple[int, ...]]) -> None:
        """Puts the target in another order into a row it came from, in place."""
        ids = self.ids(segments)
        row[self.start : self.start + len(ids)] = ids


def split_target(labels: Sequence[int], separator_id: int | None, fixed_ids: Collection[int], row: int = 0):
    """Takes a row of labels apart.

    Args:
        labels: token ids, -100 in front of the target and behind it.
        separator_id: the id between segments; None if every token is one.
        fixed_ids: special ids, which stay where they are at the beginning and the end of a target.
        row: named in errors.

    Raises:
        ValueError: -100 inside the target, or a separator with nothing in front of it.

    >>> split_target([-100, 5, 7, 9, 6, 2, -100], separator_id=9, fixed_ids=[2]).segments
    ((5, 7), (6,))
    """
    places = [place for place, token in enumerate(labels) if token != _IGNORED]
    start = places[0] if places else 0
    ids = [labels[place] for place in places]
    if places and places[-1] - start + 1 != len(places):
        raise ValueError(
            f"labels of row {row} hold -100 between their tokens {start} and {places[-1]}, but a set is one stretch;"
            " train on one target a row."
        )
    first, last = 0, len(ids)
    while first < last and ids[first] in fixed_ids:
        first += 1
    while first < last and ids[last - 1] in fixed_ids:
        last -= 1
    if separator_id is not None and first < last and ids[last - 1] == separator_id:
        last -= 1  # one separator behind every segment: the last one stays at the end
    prefix, body, suffix = ids[:first], ids[first:last], ids[last:]
    if separator_id is None:
        segments = [(token,) for token in body]
    else:
        cuts = [-1, *(place for place, token in enumerate(body) if token == separator_id), len(body)]
        segments = [tuple(body[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)] if body else []
    if () in segments:
        raise ValueError(
            f"labels of row {row} hold an empty segment in front of a separator_id ({separator_id}); leave empty"
            " segments out."
        )
    return SegmentedTarget(start, tuple(prefix), tuple(segments), tuple(suffix), separator_id)


def shuffled(segments: Sequence) -> list:
    """A uniformly random order, by torch's global generator (in a DataLoader's worker: that worker's)."""
    return [segments[index] for index in torch.randperm(len(segments)).tolist()]


class _OrderedSegments:
    def __init__(
        self,
        collator: Callable,
        separator_id: int | None = None,
        fixed_ids: Collection[int] = (),
        causal: bool = False,
    ):
        self.collator = collator
        self.separator_id = separator_id
        self.fixed_ids = frozenset(fixed_ids)
        self.causal = causal

    def order(self, segments):
        raise NotImplementedError

    def __call__(self, features: Sequence[dict]):
        return self.collator([self._reorder(row, dict(feature)) for row, feature in enumerate(features)])

    def _reorder(self, row, feature):
        labels = _as_list(feature["labels"])
        target = split_target(labels, self.separator_id, self.fixed_ids, row)
        segments = self.order(target.segments)
        for name in ("labels", "input_ids") if self.causal else ("labels",):
            values = feature[name]
            ids = _as_list(values)
            if len(ids) != len(labels):
                raise ValueError(
                    f"input_ids of row {row} ({len(ids)} tokens) must be as long as its labels ({len(labels)}) because"
                    " causal is True; mark the prompt in the labels by -100, or set causal=False."
                )
            target.write(ids, segments)
            feature[name] = values.new_tensor(ids) if isinstance(values, torch.Tensor) else ids
        return feature


def _as_list(values) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


class SortedSegments(_OrderedSegments):
    """A collator that writes every target set in one canonical order, then calls another collator.

    Sorting labels is the usual remedy for targets without an order, and the baseline of `OrderSearchLoss`. Segments
    move as runs of token ids, so tokenize them such that a segment has the same ids wherever it stands.

    Args:
        collator: pads the rows and makes decoder inputs, such as `DataCollatorForSeq2Seq`.
        separator_id: the id between segments; None if every token is one.
        fixed_ids: ids that stay at both ends of the target, such as `tokenizer.all_special_ids`.
        causal: the target is also in `input_ids`, behind a prompt whose labels are -100.
        key: of the order, called with a segment's token ids; None orders by the ids themselves.

    >>> collate = SortedSegments(lambda features: features, separator_id=9, fixed_ids=[2])
    >>> collate([{"labels": [7, 8, 9, 5, 9, 6, 2]}])
    [{'labels': [5, 9, 6, 9, 7, 8, 2]}]
    """

    def __init__(self, collator, separator_id=None, fixed_ids=(), causal=False, key: Callable | None = None):
        super().__init__(collator, separator_id, fixed_ids, causal)
        self.key = key

    def order(self, segments):
        return sorted(segments, key=self.key)


class RandomSegments(_OrderedSegments):
    """A collator that writes every target set in a new random order each time, then calls another collator.

    Arguments are those of `SortedSegments` without `key`.

    >>> collate = RandomSegments(lambda features: features, fixed_ids=[0])
    >>> sorted(collate([{"labels": [3, 1, 2, 0]}])[0]["labels"])
    [0, 1, 2, 3]
    """

    def order(self, segments):
        return shuffled(segments)
