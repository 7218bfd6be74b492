"""Item texts as tokens, and histories of items as the inputs of Recformer (arXiv 2305.13731, section 2.1).

An item is an ordered dictionary of attributes. Each becomes the tokens of its name, then of its value, without special
tokens or separators; kinds of tokens tell the two apart. Any fast tokenizer serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..modeling.recformer.histories import lay_out_histories

FILE_NAME = "recformer_tokenizer.json"
LIMITS = ("max_attr_num", "max_attr_length", "max_item_embeddings", "max_token_num")
_EXAMPLE = '{"title": "Blue kettle", "brand": "Acme"}'


class EncodedItem(NamedTuple):
    """Tokens of an item, 1 or 2 for each (name or value), and the number of the word that it belongs to."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]
    word_ids: tuple[int, ...]


class ItemTable(NamedTuple):
    """Items beside each other, `[items, width]` int64: tokens, 1 or 2 (0 is padding), numbers of words."""

    tokens: torch.Tensor
    token_types: torch.Tensor
    words: torch.Tensor


class RecformerTokenizer:
    """Makes Recformer's inputs from the texts of items.

    Args:
        tokenizer: a fast tokenizer of transformers with a padding token and a first token (`<s>` or `[CLS]`).
        max_attr_num: attributes of an item that are read, the first ones.
        max_attr_length: tokens of an attribute, its name included.
        max_item_embeddings: one more than the items of a history.
        max_token_num: tokens of a history.

    Raises:
        ValueError: the tokenizer is slow or lacks one of the two tokens.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["<s>", "<pad>", "?", "color", "red"])}, "?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> words = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<pad>", unk_token="?")
    >>> batch = RecformerTokenizer(words)([[{"color": "red"}, {"color": "dark red"}], []])
    >>> batch["input_ids"].tolist(), batch["item_position_ids"].tolist()
    ([[0, 3, 2, 4, 3, 4], [0, 1, 1, 1, 1, 1]], [[0, 1, 1, 1, 2, 2], [0, 50, 50, 50, 50, 50]])
    """

    model_input_names = ["input_ids", "attention_mask", "token_type_ids", "item_position_ids"]

    def __init__(self, tokenizer, max_attr_num=3, max_attr_length=32, max_item_embeddings=51, max_token_num=1024):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer ({type(tokenizer).__name__}) must be a fast one, which tells words apart.")
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if first is None or tokenizer.pad_token_id is None:
            lacking = "first token" if first is None else "padding token"
            raise ValueError(f"tokenizer has no {lacking}; set tokenizer.bos_token and tokenizer.pad_token.")
        self.tokenizer, self.bos_token_id, self.pad_token_id = tokenizer, first, tokenizer.pad_token_id
        self.max_attr_num, self.max_attr_length = max_attr_num, max_attr_length
        self.max_item_embeddings, self.max_token_num = max_item_embeddings, max_token_num
        self._items: dict[tuple, EncodedItem] = {}

    @classmethod
    def from_config(cls, tokenizer, config):
        """With the limits of a `RecformerConfig`.

        Raises:
            ValueError: the tokenizer's ids are not those of the configuration.
        """
        ours = cls(tokenizer, **{name: getattr(config, name) for name in LIMITS})
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(ours, name) != getattr(config, name):
                raise ValueError(
                    f"{name} of the tokenizer ({getattr(ours, name)}) must be the configuration's"
                    f" ({getattr(config, name)}); use RecformerConfig({name}={getattr(ours, name)})."
                )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"tokenizer ({len(tokenizer)} tokens) must fit into vocab_size ({config.vocab_size}); use a"
                f" configuration with vocab_size={len(tokenizer)}."
            )
        return ours

    @classmethod
    def train(cls, items, vocab_size=8192, **limits):
        """A byte-level BPE tokenizer of the catalogue's own words, for an encoder that starts from nothing.

        Args:
            items: attribute dictionaries.
            vocab_size: most tokens; a small catalogue gives fewer.
            limits: as for the class.

        >>> tokenizer = RecformerTokenizer.train([{"color": "red"}, {"color": "dark red"}], vocab_size=300)
        >>> len(tokenizer.encode_item({"color": "red"}).input_ids)
        2
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe = Tokenizer(models.BPE(unk_token="<unk>"))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        texts = (str(text) for item in items for pair in item.items() for text in pair if text is not None)
        bpe.train_from_iterator(texts, trainer)
        names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **dict(zip(names, special, strict=True)))
        return cls(fast, **limits)

    def encode_item(self, item) -> EncodedItem:
        """Tokens of one item; an `EncodedItem` comes back as it is."""
        return self._encode([item])[0]

    def encode_items(self, items) -> ItemTable:
        """Tokens of a catalogue, for `model.set_items` and collators."""
        encoded = self._encode(items)
        width = max([1, *(len(item.input_ids) for item in encoded)])
        table = ItemTable(*(torch.zeros(len(encoded), width, dtype=torch.int64) for _ in range(3)))
        table.tokens.fill_(self.pad_token_id)
        for n, item in enumerate(encoded):
            for column, values in zip(table, item, strict=True):
                column[n, : len(values)] = torch.tensor(values, dtype=torch.int64)
        return table

    def lay_out(self, histories, table, *, max_token_num=None, words=False) -> BatchEncoding:
        """Inputs for histories of rows of an `ItemTable`.

        Args:
            histories: `[batch, length]` int64, item n of the table as n, from 1; oldest first, 0 for none.
            table: what `encode_items` returned.
            max_token_num: instead of the tokenizer's own; half of it loses little and costs half.
            words: add `word_ids`, for masking whole words.
        """
        batch = lay_out_histories(
            histories,
            table.tokens,
            table.token_types,
            table.words if words else None,
            bos_token_id=self.bos_token_id,
            pad_token_id=self.pad_token_id,
            max_item_embeddings=self.max_item_embeddings,
            max_token_num=self.max_token_num if max_token_num is None else max_token_num,
        )
        return BatchEncoding(batch)

    def __call__(self, histories, *, max_token_num=None, words=False) -> BatchEncoding:
        """Inputs for histories of item texts.

        Args:
            histories: list of lists of attribute dictionaries (or `EncodedItem`), oldest first. An item to be encoded
                alone is a history of one.
            max_token_num, words: as for `lay_out`.

        Raises:
            TypeError: a history or an item is of another type.
        """
        if isinstance(histories, str | Mapping):
            raise TypeError(f"histories ({type(histories).__name__}) must be a list of histories; use [[{_EXAMPLE}]].")
        for history in histories:
            if isinstance(history, str | Mapping | EncodedItem):
                raise TypeError(
                    f"a history ({type(history).__name__}) must be a list of dictionaries; use [{_EXAMPLE}]."
                )
        recent = [history[max(0, len(history) - self.max_item_embeddings + 1) :] for history in histories]
        rows: dict[EncodedItem, int] = {}
        encoded = iter(self._encode([item for history in recent for item in history]))
        numbered = [[rows.setdefault(next(encoded), len(rows) + 1) for _ in history] for history in recent]
        table = self.encode_items(list(rows) or [EncodedItem((), (), ())])
        ids = torch.zeros(len(recent), max([1, *map(len, recent)]), dtype=torch.int64)
        for row, numbers in zip(ids, numbered, strict=True):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return self.lay_out(ids, table, max_token_num=max_token_num, words=words)

    def _encode(self, items) -> list[EncodedItem]:
        """One call of the tokenizer for all texts that were not met before."""
        keys = [item if isinstance(item, EncodedItem) else self._attributes(item) for item in items]
        fresh = list(dict.fromkeys(k for k in keys if not isinstance(k, EncodedItem) and k not in self._items))
        texts = list(dict.fromkeys(text for item in fresh for attribute in item for text in attribute))
        if texts:
            tokenized = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            known = {text: (tokenized["input_ids"][n], tokenized.word_ids(n)) for n, text in enumerate(texts)}
            for item in fresh:
                self._items[item] = self._assemble(item, known)
        for item in fresh:
            self._items.setdefault(item, EncodedItem((), (), ()))
        return [key if isinstance(key, EncodedItem) else self._items[key] for key in keys]

    def _assemble(self, item, known):
        ids, types, words, word = [], [], [], 0
        for name, value in item:
            room = self.max_attr_length
            for kind, text in ((1, name), (2, value)):
                tokens, numbers = known[text]
                tokens, numbers = tokens[:room], numbers[:room]
                room -= len(tokens)
                ids += tokens
                types += [kind] * len(tokens)
                words += [word + number for number in numbers]
                word = words[-1] + 1 if words else 0
        return EncodedItem(tuple(ids), tuple(types), tuple(words))

    def _attributes(self, item):
        """The first attributes of an item as texts; a value of None is an attribute that the item lacks."""
        if not isinstance(item, Mapping):
            raise TypeError(f"an item ({item!r}) must be a dictionary of attributes; use {_EXAMPLE}.")
        there = [(str(name), str(value)) for name, value in item.items() if value is not None]
        return tuple(there[: self.max_attr_num])

    def save_pretrained(self, save_directory, **kwargs):
        """Writes the wrapped tokenizer and the limits into a folder; returns the paths."""
        files = self.tokenizer.save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / FILE_NAME
        path.write_text(json.dumps({name: getattr(self, name) for name in LIMITS}), encoding="utf-8")
        return (*files, str(path))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Reads a folder or a repository on the Hub that `save_pretrained` wrote; `kwargs` as for any tokenizer.

        Raises:
            OSError: there is no `recformer_tokenizer.json`; wrap another tokenizer with `RecformerTokenizer(...)`.
        """
        path = cached_file(pretrained_model_name_or_path, FILE_NAME, **kwargs)
        limits = json.loads(Path(path).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(tokenizer, **{name: int(limits[name]) for name in LIMITS})


__all__ = ["FILE_NAME", "EncodedItem", "ItemTable", "RecformerTokenizer"]
