"""External item ids and the rows of an item table, so that no external id ever reaches a model.

Row 0 is padding, rows 1..N are the items in the order of the vocabulary, row N + 1 is the mask. The vocabulary is one
JSON file, `item_vocab.json`, which recommenders save beside their weights and read back.
"""

import json
import warnings
from pathlib import Path

import torch
from transformers import BatchEncoding
from transformers.utils import cached_file

FILE_NAME = "item_vocab.json"


def left_pad(sequences, length=None, value=0):
    """Integer sequences as `[batch, length]` int64, the last `length` of each at the right end of its row.

    Args:
        sequences: list of sequences of integers; empty ones are allowed.
        length: columns; None takes the longest sequence, and at least 1.
        value: what stands on the left.

    >>> left_pad([[1, 2, 3], [4]], length=2)
    tensor([[2, 3],
            [0, 4]])
    """
    if length is None:
        length = max([1, *map(len, sequences)])
    padded = torch.full((len(sequences), length), value, dtype=torch.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        kept = sequence[max(0, len(sequence) - length) :]
        if len(kept):
            row[length - len(kept) :] = torch.as_tensor(kept, dtype=torch.int64)
    return padded


class ItemVocab:
    """External ids (strings or integers) of a catalogue and their rows 1..N; 1 and "1" are different ids.

    Args:
        items: the external ids; the first becomes row 1.
        unknown: what an id outside the vocabulary does in a history: "error", or "drop" to leave it out (with one
            warning when nothing of a history is left).

    Raises:
        ValueError: an id occurs twice, is neither a string nor an integer, or `unknown` is another word.

    >>> vocab = ItemVocab(["kiwi", "lime", "plum"])
    >>> vocab.encode(["plum", "kiwi"]), vocab.decode([3, 1])
    ([3, 1], ['plum', 'kiwi'])
    >>> vocab([["plum"], ["kiwi", "lime"]]).input_ids
    tensor([[0, 3],
            [1, 2]])
    >>> vocab.num_items, vocab.pad_token_id, vocab.mask_token_id, vocab.vocab_size
    (3, 0, 4, 5)
    """

    model_input_names = ["input_ids", "attention_mask"]
    pad_token_id = 0

    def __init__(self, items, *, unknown="error"):
        self.items = [_plain(item) for item in items]
        self.unknown = _check_unknown(unknown)
        self._rows = {item: row for row, item in enumerate(self.items, start=1)}
        if len(self._rows) < len(self.items):
            seen = set()
            twice = next(item for item in self.items if item in seen or seen.add(item))
            raise ValueError(
                f"items holds {twice!r} more than once, but an id names one row; use ItemVocab.from_histories, or"
                " remove the duplicates."
            )

    @classmethod
    def from_histories(cls, histories, *, unknown="error"):
        """The vocabulary of all ids that occur: integers by value, then strings by the alphabet.

        Never by frequency: where scores are equal, the order of rows must not say what is popular.

        >>> ItemVocab.from_histories([["b", "a"], ["b"]]).items
        ['a', 'b']
        """
        items = {_plain(item) for history in histories for item in history}
        return cls(sorted(items, key=lambda item: (isinstance(item, str), item)), unknown=unknown)

    @property
    def num_items(self):
        return len(self.items)

    @property
    def mask_token_id(self):
        return len(self.items) + 1

    @property
    def vocab_size(self):
        return len(self.items) + 2

    def __len__(self):
        return len(self.items)

    def __contains__(self, item):
        return item in self._rows

    def __eq__(self, other):
        return isinstance(other, ItemVocab) and (self.items, self.unknown) == (other.items, other.unknown)

    def __repr__(self):
        return f"ItemVocab({len(self)} items, unknown={self.unknown!r})"

    def encode(self, history, *, unknown=None):
        """The rows of external ids, a list of int.

        Args:
            history: external ids, oldest first; numpy scalars count as what they hold.
            unknown: overrides the vocabulary's own policy.

        Raises:
            TypeError: `history` is a string, whose letters would be taken for ids.
            ValueError: an id is not in the vocabulary and the policy is "error".
        """
        if isinstance(history, str):
            raise TypeError(f"history ({history!r}) must be a list of item ids; use [{history!r}].")
        unknown = _check_unknown(unknown or self.unknown)
        history = [_plain(item) for item in history]
        rows = [self._rows[item] for item in history if item in self._rows]
        if unknown == "error" and len(rows) < len(history):
            raise ValueError(self._what_is_wrong_with(next(item for item in history if item not in self._rows)))
        if history and not rows:
            warnings.warn(
                f"no item of a history is known; the first: {self._what_is_wrong_with(history[0])}", stacklevel=2
            )
        return rows

    def _what_is_wrong_with(self, item):
        other = str(item) if isinstance(item, int) else int(item) if item.isdecimal() else None
        if other in self._rows:
            return f"item id {item!r} is a {type(item).__name__}, but the vocabulary holds {other!r}; convert it."
        return f"item id {item!r} is not among the {len(self)} items of the vocabulary; add it, or use unknown='drop'."

    def decode(self, rows):
        """The external ids of rows, a list.

        Raises:
            ValueError: a row is no item: padding, mask, the -1 of an unfilled place, or beyond the table.
        """
        rows = [int(row) for row in rows]
        for row in rows:
            if not 1 <= row <= len(self):
                raise ValueError(
                    f"row {row} is no item: items have rows 1..{len(self)}, 0 is padding, {self.mask_token_id} the"
                    " mask; leave it out."
                )
        return [self.items[row - 1] for row in rows]

    def __call__(self, histories, *, max_length=None, unknown=None):
        """Histories as a left-padded batch of `input_ids` and `attention_mask` `[batch, length]`.

        Args:
            histories: list of lists of external ids, oldest first; an empty history is a row of padding.
            max_length: at most so many columns; the most recent items are kept.
        """
        rows = [self.encode(history, unknown=unknown) for history in histories]
        longest = max([1, *map(len, rows)])
        ids = left_pad(rows, longest if max_length is None else min(longest, max_length))
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})

    def extended(self, items):
        """A new vocabulary with more items behind the old ones, whose rows stay; for `resize_item_embeddings`."""
        return ItemVocab([*self.items, *items], unknown=self.unknown)

    def save_pretrained(self, save_directory, **kwargs):
        """Writes `item_vocab.json` into a folder and returns its path, as tokenizers do."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"unknown": self.unknown, "items": self.items}, ensure_ascii=False)
        (folder / FILE_NAME).write_text(content, encoding="utf-8")
        return (str(folder / FILE_NAME),)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Reads the vocabulary of a folder or of a repository on the Hub.

        Args:
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, ... as for a model.

        Raises:
            OSError: there is no `item_vocab.json`.
            ValueError: the file holds something else.
        """
        return cls.read(cached_file(pretrained_model_name_or_path, FILE_NAME, **kwargs))

    @classmethod
    def read(cls, path):
        """Reads the vocabulary from its file."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"unknown", "items"} <= content.keys():
            raise ValueError(f"{FILE_NAME} must hold 'unknown' and 'items'; write it with ItemVocab.save_pretrained.")
        return cls(content["items"], unknown=content["unknown"])


def _plain(item):
    """The Python string or integer of an id; numpy's scalars are unpacked."""
    item = item.item() if hasattr(item, "item") else item
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise ValueError(f"item id {item!r} ({type(item).__name__}) must be a string or an integer; convert it.")
    return item


def _check_unknown(unknown):
    if unknown not in ("error", "drop"):
        raise ValueError(f"unknown ({unknown!r}) must be 'error' or 'drop'; use 'drop' to leave out unknown items.")
    return unknown


__all__ = ["FILE_NAME", "ItemVocab", "left_pad"]
