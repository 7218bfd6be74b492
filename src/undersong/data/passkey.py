"""Passkey retrieval: a number hidden somewhere in a long filler text must be said at its end.

As an accuracy over length and depth it is the recall measure of "Stuffed Mamba" (arXiv 2410.07145, section 4). The
layout follows Landmark Attention (arXiv 2305.16300) and InfiniteBench (arXiv 2402.13718), whose wording can be passed
in; the default wording is our own, so figures compare with published ones only under theirs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PREFIX = "A number is hidden somewhere in this long text. Keep it in mind, for it is asked for at the end.\n"
FILLER = "Rain runs down the window. The kettle hums. A cat sleeps, and nobody is in a hurry.\n"
KEY = "The hidden number is {key}. Remember it well, because {key} is what is asked.\n"
SUFFIX = "Which number was hidden in the text? The hidden number is"


@dataclass(frozen=True)
class PasskeyPrompt:
    """A prompt and what must follow.

    Attributes:
        input_ids: the prompt.
        key: the number that must be said, with its leading zeros.
        length: the length in tokens that was asked for.
        depth: where the key is hidden, 0 at the beginning and 1 at the end.
        max_new_tokens: enough for the key however the tokenizer splits it.
    """

    input_ids: list[int]
    key: str
    length: int
    depth: float
    max_new_tokens: int


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts of a wanted length: prefix, filler blocks of which one is replaced by the key, suffix.

    With lengths in tokens there are (length - |prefix| - |suffix|) // |filler| blocks, and the key replaces block
    number int(depth * (blocks - 1)). So a prompt is at most a filler block shorter than asked for, and differs by as
    much as the key's block does from a filler block. Parts are tokenized one by one.

    Args:
        tokenizer: a tokenizer of transformers, or any callable from a text to a list of token ids.
        prefix: what announces the hidden number; special tokens that begin a text stand before it.
        filler: the block that is repeated.
        key_block: what says the number, at each "{key}".
        suffix: the question, whose continuation is the number.
        digits: of the number.

    Raises:
        ValueError: no digits, an empty filler, or a key block without "{key}".

    >>> task = PasskeyTask(lambda text: list(text.encode()))
    >>> prompt = task.prompt(1000, depth=0.5)
    >>> len(prompt.input_ids), prompt.key, bytes(prompt.input_ids).decode().count(prompt.key)
    (988, '05178', 2)
    """

    tokenizer: Callable = field(repr=False)
    prefix: str = PREFIX
    filler: str = FILLER
    key_block: str = KEY
    suffix: str = SUFFIX
    digits: int = 5

    def __post_init__(self):
        if self.digits < 1:
            raise ValueError(f"digits ({self.digits}) must be at least 1; use 5.")
        if "{key}" not in self.key_block:
            raise ValueError(f"key_block ({self.key_block!r}) must say where the number stands; write {{key}} there.")
        if not self._ids(self.filler):
            raise ValueError(f"filler ({self.filler!r}) must hold at least one token.")

    def prompt(self, length: int, depth: float, seed: int = 0) -> PasskeyPrompt:
        """One prompt; the number is a function of length, depth and seed.

        Args:
            length: in tokens.
            depth: in [0, 1].
            seed: of the number.

        Raises:
            ValueError: a depth out of range, or a length without room for one block.
        """
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth ({depth}) must lie in [0, 1], from the beginning to the end of the text.")
        begin, filler, end = self._beginning(), self._ids(self.filler), self._ids(self.suffix)
        blocks = (length - len(begin) - len(end)) // len(filler)
        if blocks < 1:
            raise ValueError(
                f"length ({length}) must be at least {len(begin) + len(end) + len(filler)} tokens, those of prefix,"
                " suffix and one block."
            )
        draw = hashlib.blake2b(f"{length} {depth} {seed}".encode(), digest_size=8).digest()
        key = f"{random.Random(int.from_bytes(draw, 'little')).randrange(10**self.digits):0{self.digits}d}"
        place = int(depth * (blocks - 1))
        hidden = self._ids(self.key_block.replace("{key}", key))
        ids = begin + filler * place + hidden + filler * (blocks - 1 - place) + end
        return PasskeyPrompt(ids, key, length, depth, len(self._ids(key)) + 2)

    def prompts(self, length: int, n: int, seed: int = 0) -> list[PasskeyPrompt]:
        """n prompts of a length, with the number ever deeper: sample i at depth (i + 0.5) / n."""
        if n < 1:
            raise ValueError(f"n ({n}) must be at least 1 prompt.")
        return [self.prompt(length, (i + 0.5) / n, seed) for i in range(n)]

    def _ids(self, text: str) -> list[int]:
        if hasattr(self.tokenizer, "convert_tokens_to_ids"):  # a transformers tokenizer
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(text))

    def _beginning(self) -> list[int]:
        """The prefix, behind what the tokenizer begins a text with."""
        if not hasattr(self.tokenizer, "convert_tokens_to_ids"):
            return self._ids(self.prefix)
        whole = self.tokenizer(self.prefix, return_special_tokens_mask=True)
        ids, special = list(whole["input_ids"]), whole["special_tokens_mask"]
        while special and special.pop():  # a text that goes on does not end here
            ids.pop()
        return ids


def hide_passkey(
    text: torch.Tensor,
    vocab_size: int,
    *,
    digits: int = 5,
    depth: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same task in token ids, for small models: rows of text in which a number is hidden and then asked for.

    Token ids: `vocab_size` kinds of text, ten digits, then a mark before the hidden number and one that asks for it.

    Args:
        text: `[batch, length]` ids below `vocab_size`; the result is as long, so `2 * digits + 2` tokens are replaced.
        vocab_size: kinds of text tokens.
        digits: of the number.
        depth: `[batch]` in [0, 1], where it is hidden; by default uniformly random.
        generator: source of randomness, on the text's device.

    Returns:
        `input_ids` `[batch, length]`, whose last `digits` are the answer, and `labels`, -100 except at the answer.

    Raises:
        ValueError: a text too short for the number and its question.

    >>> ids, labels = hide_passkey(torch.zeros(1, 9, dtype=torch.long), 1, digits=2, depth=torch.tensor([0.0]),
    ...                            generator=torch.Generator().manual_seed(0))
    >>> ids.tolist()
    [[11, 5, 10, 0, 0, 0, 12, 5, 10]]
    """
    batch, length = text.shape
    body = length - digits - 1
    if digits < 1 or body < digits + 1:
        raise ValueError(
            f"length ({length}) must be at least {2 * digits + 2} for {digits} digits: the number behind its mark, the"
            " question and the answer; digits must be at least 1."
        )
    number = torch.randint(10, (batch, digits), generator=generator, device=text.device) + vocab_size
    if depth is None:
        depth = torch.rand(batch, generator=generator, device=text.device)
    place = (depth * (body - digits - 1)).long()
    ids = text.clone()
    hidden = torch.cat([torch.full_like(number[:, :1], vocab_size + 10), number], 1)
    ids.scatter_(1, place[:, None] + torch.arange(digits + 1, device=text.device), hidden)
    ids[:, body] = vocab_size + 11
    ids[:, body + 1 :] = number
    labels = torch.full_like(ids, -100)
    labels[:, body + 1 :] = number
    return ids, labels


__all__ = ["PasskeyPrompt", "PasskeyTask", "hide_passkey"]
