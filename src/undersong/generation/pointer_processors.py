"""Constrained decoding for pointer networks: tours, hulls and triangulations that are valid whatever the scores say.

The vocabulary of a batch is its own input (Vinyals et al., "Pointer Networks", arXiv 1506.03134): id 0 ends a
sequence, ids 1..n are positions of the input. Which ids may come next is worked out anew at every step from the ids
that came before. Nothing is remembered, so beams may be reordered and one processor may serve several calls.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList

__all__ = [
    "TASKS",
    "HullLogitsProcessor",
    "PermutationLogitsProcessor",
    "TriangleLogitsProcessor",
    "decoding_steps",
    "pointer_processors",
]

TASKS = ("tour", "permutation", "hull", "triangulation")


class PointerLogitsProcessor(LogitsProcessor):
    """What the processors of this module share: masks of the batch, laid out for beams, and the end of a sequence.

    Args:
        attention_mask: `[batch, n]`, 1 for items. `generate()` hands over several rows for each of them with beams or
            `num_return_sequences`; the number is read off the scores.

    Scores come back as log-probabilities among the ids that are left. A row that has ended gets 0 and nothing else. A
    row that broke the rules already (a beam of score -inf) may end.

    Raises:
        ValueError: a mask that is not `[batch, n]` or a row without items; when called, scores of another shape.
    """

    supports_continuous_batching = False  # the masks belong to the rows of one batch

    def __init__(self, attention_mask: torch.Tensor):
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask ({list(attention_mask.shape)}) must be [batch, n] with 1 for items and 0 for padding."
            )
        self.valid = attention_mask.bool()
        empty = ~self.valid.any(1)
        if empty.any():
            raise ValueError(f"attention_mask[{int(empty.nonzero()[0])}] must have an item; drop the empty row.")

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        n = self.valid.shape[1]
        if scores.shape[1] != n + 1 or scores.shape[0] % len(self.valid):
            raise ValueError(
                f"scores ({list(scores.shape)}) must be [{len(self.valid)} * beams, {n + 1}] because attention_mask is"
                f" {list(self.valid.shape)}: an id for every position, and 0."
            )
        chosen = input_ids[:, 1:]  # behind the decoder's start
        allowed = self.allowed(chosen, torch.nn.functional.pad(self.expand(self.valid, chosen), (1, 0)))
        allowed &= (chosen != 0).all(1, keepdim=True)
        allowed[:, 0] |= ~allowed.any(1)
        scores = scores.masked_fill(~allowed, -float("inf"))
        # Beams add up what comes back: a path must not lose what the model gave to ids that the rules leave out.
        total = scores.logsumexp(-1, keepdim=True)
        return scores - total.masked_fill(~total.isfinite(), 0.0)

    @staticmethod
    def expand(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """A row of `values` for every row of `chosen`."""
        return values.to(chosen.device).repeat_interleave(len(chosen) // len(values), 0)

    def allowed(self, chosen: torch.LongTensor, valid: torch.BoolTensor) -> torch.BoolTensor:
        """The ids that may come next.

        Args:
            chosen: `[rows, t]`, the ids so far; rows that have ended may be answered with anything.
            valid: `[rows, n + 1]`, False for padding and for id 0.
        """
        raise NotImplementedError


class PermutationLogitsProcessor(PointerLogitsProcessor):
    """Every item once, then 0: orders and round trips.

    Args:
        attention_mask: `[batch, n]`, 1 for items.
        start_at_first: the first item comes first, as in a tour's label; a cycle loses nothing by it.

    >>> processor = PermutationLogitsProcessor(torch.tensor([[1, 1, 1, 0]]))
    >>> processor(torch.tensor([[0, 2]]), torch.zeros(1, 5)).exp()
    tensor([[0.0000, 0.5000, 0.0000, 0.5000, 0.0000]])
    """

    def __init__(self, attention_mask: torch.Tensor, *, start_at_first: bool = False):
        super().__init__(attention_mask)
        self.start_at_first = start_at_first

    def allowed(self, chosen, valid):
        if self.start_at_first and chosen.shape[1] == 0:
            return valid & (valid.cumsum(1) == 1)
        return _fresh(chosen, valid)  # none left: the row may end


class HullLogitsProcessor(PointerLogitsProcessor):
    """Closed polygons: no point twice but the first, which closes the polygon once it has three corners, then 0.

    A row of one or two points closes when it has used them.

    Args:
        attention_mask: `[batch, n]`, 1 for points.
        input_values: `[batch, n, 2]` coordinates; needed for `strict_geometry`.
        strict_geometry: only convex polygons, counter-clockwise: every turn is to the left, among them the two with
            which the polygon would close. No choice leads into a dead end. Points that all lie on a line have no such
            polygon; their rows follow the plain rules.

    Raises:
        ValueError: `strict_geometry` without coordinates, or coordinates that are not `[batch, n, 2]`.

    >>> square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
    >>> processor = HullLogitsProcessor(torch.ones(1, 4), square, strict_geometry=True)
    >>> processor(torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 5)).exp()  # close, or the last corner
    tensor([[0.0000, 0.5000, 0.0000, 0.0000, 0.5000]])
    """

    def __init__(
        self, attention_mask: torch.Tensor, input_values: torch.Tensor | None = None, *, strict_geometry: bool = False
    ):
        super().__init__(attention_mask)
        self.points = None
        if strict_geometry:
            if input_values is None:
                raise ValueError("input_values (None) must be given because strict_geometry looks at the turns.")
            rows, n = self.valid.shape
            if input_values.ndim != 3 or input_values.shape[1:] != (n, 2) or rows % len(input_values):
                raise ValueError(
                    f"input_values ({list(input_values.shape)}) must be [{rows}, {n}, 2] because attention_mask is"
                    f" [{rows}, {n}] and turns are those of points in a plane; else use strict_geometry=False."
                )
            self.points = input_values.double()  # products of float32 differences without rounding

    def allowed(self, chosen, valid):
        t = chosen.shape[1]
        if t == 0:
            return valid.clone()
        candidates = _fresh(chosen, valid)
        if self.points is not None:
            candidates = self._convex(chosen, candidates)
        first = chosen[:, :1]
        enough = t >= valid.sum(1, keepdim=True).clamp(max=3)
        candidates = candidates.scatter(1, first, enough)
        closed = (chosen[:, 1:] == first).any(1, keepdim=True)
        return candidates & ~closed

    def _convex(self, chosen, candidates):
        """The candidates that keep the polygon convex; all of them in rows where no polygon is."""
        points = self.expand(self.points, chosen)  # [rows, n, 2]
        corners = points.gather(1, (chosen - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, 2))
        t = chosen.shape[1]
        if t == 1:  # a third point must remain on the left of the first edge
            beyond = _turn(corners[:, :, None], points[:, :, None], points[:, None]) > 0  # [rows, n, n]
            left = (beyond & candidates[:, None, 1:]).any(2)
        else:
            left = _turn(corners[:, -2:-1], corners[:, -1:], points) > 0
        if t >= 3:
            left &= _turn(corners[:, -1:], points, corners[:, :1]) > 0
            left &= _turn(points, corners[:, :1], corners[:, 1:2]) > 0
            flat = _turn(corners[:, 0], corners[:, 1], corners[:, 2]).unsqueeze(1) <= 0
        else:
            flat = ~(left & candidates[:, 1:]).any(1, keepdim=True)
        return candidates & torch.nn.functional.pad(left | flat, (1, 0))


class TriangleLogitsProcessor(PointerLogitsProcessor):
    """Triples of ascending ids, none of them twice, then 0; one triple at least and 2 n - 5 at most.

    More triangles than 2 n - 5 no triangulation of n points has. A row of one or two points ends at once.

    Args:
        attention_mask: `[batch, n]`, 1 for points.

    >>> processor = TriangleLogitsProcessor(torch.ones(1, 4))
    >>> processor(torch.tensor([[0, 1, 2, 4, 1, 2]]), torch.zeros(1, 5)).exp()  # 1 2 4 there is already
    tensor([[0., 0., 0., 1., 0.]])
    """

    def allowed(self, chosen, valid):
        rows, t = chosen.shape
        ids = torch.arange(valid.shape[1], device=chosen.device)
        later = valid.sum(1, keepdim=True) - valid.cumsum(1)  # valid ids above each id
        a, b, c = chosen[:, : t - t % 3].view(rows, -1, 3).unbind(-1)  # the triples so far

        def count(ids, which):
            return torch.zeros_like(later).scatter_add_(1, ids, which.long())

        if t % 3 == 0:  # a triple may begin with an id that has unused triples left
            candidates = valid & (count(a, a > 0) < later * (later - 1) // 2)
            candidates &= t // 3 < 2 * valid.sum(1, keepdim=True) - 5
            candidates[:, 0] = t > 0
            return candidates
        same = a == chosen[:, t - t % 3, None]
        if t % 3 == 1:
            return valid & (ids > chosen[:, -1:]) & (count(b, same) < later)
        same &= b == chosen[:, -1:]
        return valid & (ids > chosen[:, -1:]) & (count(c, same) == 0)


def pointer_processors(
    task: str,
    input_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    strict_geometry: bool = False,
) -> LogitsProcessorList:
    """The processors of a task, for `generate(logits_processor=...)`.

    Args:
        task: "tour" (every item once, the first one first), "permutation" (every item once), "hull" or
            "triangulation".
        input_values: `[batch, n, ...]` the items of the batch; needed without a mask, and for `strict_geometry`.
        attention_mask: `[batch, n]`, 1 for items; None: there is no padding.
        strict_geometry: hulls must be convex as well.

    Raises:
        ValueError: an unknown task, neither items nor mask, or `strict_geometry` for another task than "hull".

    >>> processors = pointer_processors("tour", torch.rand(1, 3, 2))
    >>> processors(torch.tensor([[0, 1]]), torch.zeros(1, 4)).exp()
    tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """
    if task not in TASKS:
        raise ValueError(f"task ({task!r}) must be one of {', '.join(TASKS)}.")
    if strict_geometry and task != "hull":
        raise ValueError(f"strict_geometry (True) is a rule for hulls, not for task {task!r}; drop it.")
    if attention_mask is None:
        if input_values is None:
            raise ValueError("input_values and attention_mask (None) say nothing of the batch; pass one of them.")
        attention_mask = torch.ones(input_values.shape[:2], dtype=torch.bool, device=input_values.device)
    if task == "hull":
        processor = HullLogitsProcessor(attention_mask, input_values, strict_geometry=strict_geometry)
    elif task == "triangulation":
        processor = TriangleLogitsProcessor(attention_mask)
    else:
        processor = PermutationLogitsProcessor(attention_mask, start_at_first=task == "tour")
    return LogitsProcessorList([processor])


def decoding_steps(task: str, n: int) -> int:
    """Ids that the longest answer over n items has, the final 0 included: what `max_new_tokens` must allow.

    >>> [decoding_steps(task, 5) for task in TASKS]
    [6, 6, 7, 16]
    """
    if task not in TASKS:
        raise ValueError(f"task ({task!r}) must be one of {', '.join(TASKS)}.")
    return {"hull": n + 2, "triangulation": 3 * max(2 * n - 5, 0) + 1}.get(task, n + 1)


def _fresh(chosen, valid):
    """Valid ids that were not chosen."""
    return valid & ~torch.zeros_like(valid).scatter_(1, chosen, True)


def _turn(a, b, c):
    """Twice the signed area of the triangle a, b, c: positive for a turn to the left at b."""
    ab, ac = b - a, c - a
    return ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]
