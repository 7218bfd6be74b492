"""Pseudo-repetitive rows for DITTO (Xu et al., "Learning to Break the Loop", NeurIPS 2022, arXiv 2206.02369, sec. 4).

A sentence of a training row is repeated until the row is full again, after the sentence that preceded it. All draws
are functions of (seed, epoch, the row's tokens): they do not depend on workers, processes, the order of rows or how
often training was interrupted. The only state is the epoch, in shared memory, so that living workers see it change.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Sequence

import torch

_ENDS = tuple(".!?。！？…")
_CLOSING = "\"'”’»)]」』）"
_IGNORED = -100  # the label that causal LM losses leave out


def sentence_end_ids(tokenizer) -> list[int]:
    """Ids of all tokens that end a sentence: those ending in . ! ? or a CJK form, closing quotes aside, and newlines.

    BPE vocabularies have many (".", ".\\n", "?!", '."'); knowing one of them misses most sentences.

    >>> from transformers import AutoTokenizer
    >>> from undersong.data import smollm2
    >>> tokenizer = AutoTokenizer.from_pretrained(smollm2())  # doctest: +SKIP
    >>> tokenizer.decode(sentence_end_ids(tokenizer)[:3])  # doctest: +SKIP
    '!.?'
    """
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if i not in special and _ends_sentence(text)]


class DittoDataCollator:
    """Makes batches for `DittoTrainer`: plain rows for the LM loss, pseudo-repetitive rows for the DITTO loss.

    With the sentence ends e_0 < e_1 < ... of a row, the unit is row[e_i : e_i+1] for an i drawn uniformly: it starts
    with the full stop of the sentence before and lacks its own, so that copies join seamlessly. The prefix is the
    sentence before, row[e_i-1 + 1 : e_i]. Of neighbouring end tokens (". " and a line break) the first counts.

    Features hold `input_ids` and optionally `attention_mask` (padding is cut off), `labels` or `assistant_masks` (as
    `apply_chat_template(..., return_assistant_tokens_mask=True)` gives). Where labels leave out part of a row, units
    come from inside one labelled stretch, and the prefix is all of the row before it: a chat model repeats itself
    inside its own turn, behind the template.

    Args:
        tokenizer: gives the padding token and, by "auto", the sentence ends.
        sentence_end_token_ids: "auto" for `sentence_end_ids(tokenizer)`, or a list of ids.
        rate: how often a row is made pseudo-repetitive.
        per_batch: decide for the batch as a whole, as the paper does: then rows in which no sentence can be repeated
            are left out of the batch's loss. Otherwise every row is decided alone and such rows stay plain.
        seed: of all draws.

    Returns (when called with a list of features), padded on the right:
        `input_ids`, `attention_mask`, `labels` `[rows, length]`: labels are -100 throughout pseudo-repetitive rows, so
        that a Trainer without DITTO skips them. Pseudo-repetitive rows fill the batch's length, whatever they had.
        `ditto_prefix_len`, `ditto_unit_len` `[rows]`: 0 for plain rows.

    Raises:
        ValueError: an argument out of range, or a tokenizer without sentence ends or padding token where needed.

    >>> from types import SimpleNamespace
    >>> collate = DittoDataCollator(SimpleNamespace(pad_token_id=0), sentence_end_token_ids=[9], rate=1.0)
    >>> batch = collate([{"input_ids": [1, 9, 2, 2, 9, 3, 4, 9, 5, 5, 5, 5]}])  # 9 is the full stop
    >>> batch["input_ids"].tolist(), batch["ditto_prefix_len"].tolist(), batch["ditto_unit_len"].tolist()
    ([[2, 2, 9, 3, 4, 9, 3, 4, 9, 3, 4, 9]], [2], [3])
    """

    def __init__(
        self,
        tokenizer,
        sentence_end_token_ids: Sequence[int] | str = "auto",
        rate: float = 0.5,
        per_batch: bool = False,
        seed: int = 0,
    ):
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate ({rate}) must lie in [0, 1]; it is the share of pseudo-repetitive rows, e.g. 0.5.")
        if isinstance(sentence_end_token_ids, str) and sentence_end_token_ids != "auto":
            raise ValueError(f"sentence_end_token_ids ({sentence_end_token_ids!r}) must be 'auto' or a list of ids.")
        ends = sentence_end_ids(tokenizer) if sentence_end_token_ids == "auto" else sentence_end_token_ids
        if not ends:
            raise ValueError(
                f"sentence_end_token_ids ({sentence_end_token_ids!r}) found no token that ends a sentence; pass ids, "
                "e.g. sentence_end_token_ids=tokenizer.convert_tokens_to_ids(['.', '?'])."
            )
        self.tokenizer = tokenizer
        self.sentence_end_token_ids = frozenset(ends)
        self.rate = rate
        self.per_batch = per_batch
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """New draws for every epoch; `DittoTrainer` calls it."""
        self._epoch.fill_(epoch)

    def plain(self) -> DittoDataCollator:
        """The same collator without pseudo-repetitive rows, for evaluation."""
        return DittoDataCollator(self.tokenizer, self.sentence_end_token_ids, rate=0.0)

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = [_tokens_and_labels(feature) for feature in features]
        width = max(len(ids) for ids, _ in rows)
        chosen = [self._draw([ids], "row").random() < self.rate for ids, _ in rows]
        if self.per_batch:
            chosen = [self._draw([ids for ids, _ in rows], "batch").random() < self.rate] * len(rows)
        pseudo = [self._repeat(*row, width) if yes else None for yes, row in zip(chosen, rows, strict=True)]
        left_out = self.per_batch and any(pseudo)
        prefix, unit = [0] * len(rows), [0] * len(rows)
        for index, made in enumerate(pseudo):
            if made:
                ids, prefix[index], unit[index] = made
                rows[index] = (ids, [_IGNORED] * width)
            elif left_out:
                rows[index] = (rows[index][0], [_IGNORED] * len(rows[index][0]))
        return {
            "input_ids": self._pad([ids for ids, _ in rows], width),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [_IGNORED] * (width - len(labels)) for _, labels in rows]),
            "ditto_prefix_len": torch.tensor(prefix),
            "ditto_unit_len": torch.tensor(unit),
        }

    def _draw(self, rows: Iterable[list[int]], purpose: str) -> random.Random:
        state = hashlib.blake2b(f"{purpose} {self.seed} {self._epoch.item()}".encode(), digest_size=16)
        for ids in rows:
            state.update(array("q", ids).tobytes())
        return random.Random(int.from_bytes(state.digest(), "little"))

    def _repeat(self, ids: list[int], labels: list[int], width: int) -> tuple[list[int], int, int] | None:
        spans = [
            (start, first, last)
            for start, first, last in self._units(ids, labels)
            # a pseudo row is worth its tokens if at least one prediction has a counterpart, one unit earlier
            if last - start < width - 1
        ]
        if not spans:
            return None
        start, first, last = self._draw([ids], "unit").choice(spans)
        copies = -(-(width - (first - start)) // (last - first))
        return (ids[start:first] + ids[first:last] * copies)[:width], first - start, last - first

    def _units(self, ids: list[int], labels: list[int]) -> Iterable[tuple[int, int, int]]:
        """(start of the prefix, start of the unit, end of the unit) for every sentence that can be repeated."""
        whole = _IGNORED not in labels
        ends: list[int] = []
        inside = False  # of a run of end tokens
        for position, token in enumerate([*ids, None]):
            if token is None or labels[position] == _IGNORED:
                yield from ((a + 1 if whole else 0, b, c) for a, b, c in zip(ends, ends[1:], ends[2:], strict=False))
                ends, inside = [], False
                continue
            is_end = token in self.sentence_end_token_ids
            if is_end and not inside:
                ends.append(position)
            inside = is_end

    def _pad(self, rows: list[list[int]], width: int) -> torch.Tensor:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None:
            if any(len(ids) < width for ids in rows):
                raise ValueError(
                    f"tokenizer.pad_token_id (None) must be set because rows have {min(map(len, rows))} to {width} "
                    "tokens; use tokenizer.pad_token = tokenizer.eos_token, or rows of one length."
                )
            pad = 0
        return torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows])


def _tokens_and_labels(feature: dict) -> tuple[list[int], list[int]]:
    ids = _as_list(feature["input_ids"])
    labels = _as_list(feature.get("labels", ids))
    if "labels" not in feature and "assistant_masks" in feature:
        labels = [token if m else _IGNORED for token, m in zip(ids, _as_list(feature["assistant_masks"]), strict=True)]
    if "attention_mask" in feature:
        real = _as_list(feature["attention_mask"])
        ids = [token for token, m in zip(ids, real, strict=True) if m]
        labels = [label for label, m in zip(labels, real, strict=True) if m]
    return ids, labels


def _as_list(values) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _ends_sentence(text: str) -> bool:
    return text.strip().rstrip(_CLOSING).endswith(_ENDS) or ("\n" in text and not text.strip())
