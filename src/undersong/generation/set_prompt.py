"""Prompts that contain sets: answers to choose from, passages found, candidates to judge, in no order.

Set-based prompting (McIlroy-Young et al., "Order-Independence Without Fine Tuning", NeurIPS 2024, arXiv 2406.06581).
A prompt is a sequence of texts and sets; every piece is tokenised by itself. Beyond the paper, members are laid out in
the order of their token ids, so that not only the function but every rounding error is the same for all orders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .set_encoding import SetPromptEncoding

START, SPLIT, END = "<|start_2d|>", "<|split_2d|>", "<|end_2d|>"  # of the authors' code
_DELIMITER = re.compile("|".join(map(re.escape, (START, SPLIT, END))))
_MOST_MEMBERS = 2**15 - 1  # int16


@dataclass(frozen=True, init=False, repr=False)
class SetPrompt:
    """A prompt of texts and sets.

    Args:
        parts: a sequence of strings and sets. A set is a list or tuple of members, a member is a string or again a
            sequence of parts (so sets nest). White space belongs to the piece it is written in.

    Raises:
        ValueError: no parts, an empty set or member, a delimiter inside a string, or something that is none of these.

    >>> prompt = SetPrompt(["Which is a fruit?", [" stone", " plum"], " Answer:"])
    >>> str(prompt)
    'Which is a fruit?<|start_2d|> stone<|split_2d|> plum<|end_2d|> Answer:'
    >>> SetPrompt.parse(str(prompt)) == prompt
    True
    """

    parts: tuple

    def __init__(self, parts: Sequence):
        object.__setattr__(self, "parts", _sequence(parts, "parts"))

    def __str__(self) -> str:
        return _written(self.parts)

    def __repr__(self) -> str:
        return f"SetPrompt.parse({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> SetPrompt:
        """A prompt from text with the authors' delimiters: `A <|start_2d|>B<|split_2d|>C<|end_2d|> D`.

        Raises:
            ValueError: a delimiter without its partner, or an empty member, with the offset in `text`.
        """
        sequence, stack, done = [], [], 0  # stack: (sequence around the set, members, offset)
        for match in _DELIMITER.finditer(text):
            sequence += [text[done : match.start()]] * (done < match.start())
            done, offset = match.end(), match.start()
            if match[0] == START:
                stack.append((sequence, [], offset))
                sequence = []
                continue
            if not stack:
                raise ValueError(f"text has {match[0]} at offset {offset} outside a set; begin the set with {START}.")
            if not sequence:
                raise ValueError(f"text has an empty member before offset {offset}; drop it or one delimiter.")
            stack[-1][1].append(sequence)
            sequence = []
            if match[0] == END:
                sequence, members, _ = stack.pop()
                sequence.append(members)
        if stack:
            raise ValueError(f"text has {START} at offset {stack[-1][2]} that is never closed; add {END}.")
        return cls([*sequence, text[done:]])

    @classmethod
    def from_chat(
        cls,
        tokenizer,
        messages: Sequence[dict],
        sets: dict[str, Sequence],
        *,
        add_generation_prompt: bool = True,
        **template_options,
    ) -> SetPrompt:
        """A chat in which placeholders stand for sets.

        Args:
            messages: as for `tokenizer.apply_chat_template`; contents are strings.
            sets: placeholder -> members; each placeholder occurs once in the contents.
            template_options: further arguments of `apply_chat_template`.

        Raises:
            ValueError: a placeholder that does not occur exactly once, or a template that drops or repeats it.
        """
        messages = [dict(message) for message in messages]
        marks = {}  # a template may change what it takes for markup, but not a plain word
        for i, placeholder in enumerate(sets):
            found = sum(message["content"].count(placeholder) for message in messages)
            if found != 1:
                raise ValueError(f"placeholder {placeholder!r} occurs {found} times in messages; it must occur once.")
            marks[placeholder] = f"Undersong{i:04d}Set"
            for message in messages:
                message["content"] = message["content"].replace(placeholder, marks[placeholder])
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_options
        )
        for placeholder, mark in marks.items():
            if rendered.count(mark) != 1:
                raise ValueError(
                    f"the chat template writes placeholder {placeholder!r} {rendered.count(mark)} times; put it into "
                    "a message that the template writes once."
                )
        members = {mark: list(sets[placeholder]) for placeholder, mark in marks.items()}
        pieces = re.split(f"({'|'.join(marks.values())})", rendered) if marks else [rendered]
        return cls([members.get(piece, piece) for piece in pieces])

    @staticmethod
    def encode(
        tokenizer,
        prompts: SetPrompt | str | Sequence[SetPrompt | str],
        *,
        padding: bool = True,
        canonicalize: bool = True,
        edit_position: bool = True,
        edit_attention: bool = True,
    ) -> SetPromptEncoding:
        """Tokenise prompts and lay them out.

        Special tokens that the tokenizer puts in front come once, before everything. Pieces after the first are
        tokenised without the space that SentencePiece tokenizers prepend to a text.

        Args:
            prompts: one or several; strings are parsed.
            padding: pad on the left to the longest prompt.
            canonicalize: lay members out by their token ids: results are then equal bit for bit in every order.
            edit_position, edit_attention: for ablations. False keeps the usual positions, or lets members see those
                before them; with neither, the prompt is the plain text in the members' order.

        Raises:
            ValueError: a member without tokens, a prompt without any, or lengths that differ without padding.
        """
        prompts = [prompts] if isinstance(prompts, SetPrompt | str) else list(prompts)
        prompts = [SetPrompt.parse(p) if isinstance(p, str) else p for p in prompts]
        pieces = Pieces(tokenizer)
        rows = [_Row(pieces, prompt.parts, canonicalize) for prompt in prompts]
        lengths = sorted({len(row.ids) for row in rows})
        if not lengths or not lengths[0]:
            raise ValueError("prompts must hold at least one prompt, and every prompt at least one token.")
        if not padding and len(lengths) > 1:
            raise ValueError(f"prompts have {lengths[0]} to {lengths[-1]} tokens; pass padding=True or one at a time.")
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        width = max((len(path) for row in rows for path in row.paths), default=0) or 2
        ids, mask, positions, segments = [], [], [], []
        for row in rows:
            left = lengths[-1] - len(row.ids)
            ids.append([pad] * left + row.ids)
            mask.append([0] * left + [1] * len(row.ids))
            positions.append([0] * left + (row.positions if edit_position else list(range(len(row.ids)))))
            paths = row.paths if edit_attention else [()] * len(row.ids)
            segments.append([[-1] * width] * left + [[*path, *[-1] * (width - len(path))] for path in paths])
        return SetPromptEncoding(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            segment_ids=torch.tensor(segments, dtype=torch.int16),
            permutation=[row.permutation for row in rows],
        )


def _sequence(parts, where: str) -> tuple:
    """A sequence of parts: strings, and sets as tuples of sequences."""
    if not isinstance(parts, list | tuple):
        raise ValueError(f"{where} ({parts!r}) must be a list of strings and sets; write [text] for a single text.")
    checked = []
    for i, part in enumerate(parts):
        name = f"{where}[{i}]"
        if isinstance(part, str):
            if match := _DELIMITER.search(part):
                raise ValueError(
                    f"{name} holds the delimiter {match[0]} at offset {match.start()}; use SetPrompt.parse(text)."
                )
            checked += [part] * bool(part)
        elif isinstance(part, list | tuple):
            members = [[member] if isinstance(member, str) else member for member in part]
            members = tuple(_sequence(member, f"{name}[{j}]") for j, member in enumerate(members))
            for j, member in enumerate(members):
                if not member:
                    raise ValueError(f"{name}[{j}] is an empty member; drop it.")
            if not 0 < len(members) <= _MOST_MEMBERS:
                raise ValueError(f"{name} has {len(members)} members; a set has 1 to {_MOST_MEMBERS}.")
            checked.append(members)
        else:
            raise ValueError(f"{name} ({part!r}) must be a string or a set (a list or tuple of members).")
    if where == "parts" and not checked:
        raise ValueError("parts is empty; a prompt needs a text or a set.")
    return tuple(checked)


def _written(sequence: tuple) -> str:
    texts = (p if isinstance(p, str) else START + SPLIT.join(map(_written, p)) + END for p in sequence)
    return "".join(texts)


class _Row:
    """One prompt laid out: `ids`, `positions` and `paths` (set, member, set, member, ...) per token."""

    def __init__(self, pieces: Pieces, parts: tuple, canonicalize: bool):
        self.ids, self.positions, self.paths, self.permutation = [], [], [], []
        self.canonicalize = canonicalize
        sequence = _tokenised(pieces, parts, first=True)
        leading = sequence[0] if sequence and not _is_set(sequence[0]) else ()
        if leading[: len(pieces.prefix)] != pieces.prefix:  # a chat template writes the special tokens itself
            sequence.insert(0, pieces.prefix)
        self._lay_out(sequence, 0, ())

    def _lay_out(self, sequence: list, position: int, path: tuple) -> int:
        """Appends the sequence from `position` on and returns the position after it."""
        for node in sequence:
            if not _is_set(node):
                self.ids += node
                self.positions += range(position, position + len(node))
                self.paths += [path] * len(node)
                position += len(node)
                continue
            order = range(len(node))
            if self.canonicalize:
                order = sorted(order, key=lambda i, node=node: _canonical(node[i]))
            number = len(self.permutation)
            self.permutation.append(tuple(order))
            ends = [self._lay_out(node[i], position, (*path, number, j)) for j, i in enumerate(order)]
            position = max(ends)
        return position


def _is_set(node) -> bool:
    return isinstance(node, list)  # token ids are tuples


def _canonical(member: list) -> tuple:
    """What a member is, whatever the order of the sets in it and the pieces its texts were given in."""
    parts = []
    for node in member:
        if _is_set(node):
            parts.append((1, *sorted(map(_canonical, node))))
        elif parts and parts[-1][0] == 0:
            parts[-1] += node
        else:
            parts.append((0, *node))
    return tuple(parts)


def _tokenised(pieces: Pieces, sequence: tuple, first: bool) -> list:
    """The same sequence with tuples of token ids for texts and lists for sets."""
    nodes = []
    for part in sequence:
        if isinstance(part, str):
            nodes.append(pieces(part, first))
        else:
            members = [_tokenised(pieces, member, first) for member in part]
            for member, nodes_of_member in zip(part, members, strict=True):
                if not any(nodes_of_member):
                    raise ValueError(f"member {_written(member)!r} has no tokens under this tokenizer; drop it.")
            nodes.append(members)
        first = False
    return nodes


class Pieces:
    """Tokenises pieces of a text. `prefix`: the special tokens that the tokenizer puts before a text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        bare, full = self._ids("a"), tuple(tokenizer("a")["input_ids"])
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        self.prefix = full[: starts[0]] if starts else ()
        # SentencePiece tokenizers put a space before every text; after an anchor they do not.
        self.anchors = ("\n", "|", "=")
        self.prepends = self._ids("\na") != self._ids("\n") + bare

    def __call__(self, piece: str, first: bool) -> tuple[int, ...]:
        if first or not self.prepends:
            return self._ids(piece)
        for anchor in self.anchors:
            before, both = self._ids(anchor), self._ids(anchor + piece)
            if both[: len(before)] == before:
                return both[len(before) :]
        raise ValueError(f"piece {piece!r} merges with whatever comes before it; let the piece begin with a space.")

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
