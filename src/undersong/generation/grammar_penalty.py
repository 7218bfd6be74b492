"""Grammar-based repetition penalty for code: loops end, legitimate repetition stays, and the text still parses.

Most loops of generated code repeat grammar rules while names and numbers change (`elif x == 3: return 4` ...), so
penalties on n-grams miss them and hurt brackets and indentation instead. RPG (Dong et al., ACL 2025, arXiv 2505.10402)
finds a pattern of grammar units that repeats at the end of the text and makes the token that would open its next copy
less likely. Here the units come from an incremental tree-sitter parse, and the decay is on probabilities.

State, per row: its token ids, their bytes, and the units of the code they spell. A call compares a row with the one it
knows and takes back what differs, so beams may be reordered, candidates dropped and other prompts begun at any time.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable

import numpy as np
import torch
from transformers import LogitsProcessor

from .grammar_tree import LANGUAGES
from .grammar_units import GrammarUnits, Unit
from .periods import TokenPeriods, best_period
from .token_bytes import token_bytes

_TOKEN_PERIODS = 256
_TOKEN_COPIES = 2  # of an exact copy, twice is a repetition
_COPIES_READ = 16  # whose first tokens are looked up
_LITERAL = 4  # times min_repeats: elements that a literal may have before the decay of one adds to the next
_WHITESPACE = b" \t\r\n\f\v"
_FENCE = re.compile(rb"^```([^\s`]*)([^\n`]*\n)?", re.MULTILINE)
_FENCE_NAMES = {name: name for name in LANGUAGES} | {
    "py": "python", "python3": "python", "js": "javascript", "jsx": "javascript", "node": "javascript",
    "c++": "cpp", "cxx": "cpp", "cc": "cpp", "h": "c", "hpp": "cpp", "golang": "go", "rs": "rust",
}  # fmt: skip
_FILE_NAME = re.compile(rb"[\w-]\.(py|js|jsx|java|c|h|cpp|cc|cxx|hpp|go|rs)\b")


class GrammarRepetitionPenalty(LogitsProcessor):
    """Makes it less likely, copy by copy, that code repeats the pattern it has just repeated.

    A pattern is 1 to `max_period` sibling units (statements of a block, elements of a bracket, lines of a comment)
    that are equal up to names and literals. Where a unit would begin and the last n >= `min_repeats` copies follow
    each other, the tokens that began those copies get

        log p(v) += s(n') log(beta),   n' = n - min_repeats + 1,

    with s(n') = 1 + ... + n' for statements: the decay of each copy adds to that of the next, so every loop ends.
    For elements s(n') = n' up to 4 min_repeats copies, because literals may be long, and the same sum on top beyond.
    At a statement outside brackets the end of text gets log p(eos) -= n' log(eos_gamma). No change is larger than
    `max_log_penalty`. Whitespace, closing brackets and tokens inside strings are never touched.

    Exact copies count as well (`include_content`): with n >= 2 copies of the last 1 to 256 tokens, the token that
    comes next in them gets (n - 1) log(beta) where a unit begins, or anywhere if the copies lie within one statement
    or the text is no code. Of two penalties of a token the larger counts.

    Args:
        tokenizer: the model's fast tokenizer, byte-level BPE or SentencePiece with byte fallback.
        language: one of python, javascript, java, c, cpp, go, rust; "auto" for that of the open code fence or else of
            a file name in the prompt; or a function from a prompt's text to one of these or None. With no language
            only exact copies count. In chat prompts and texts with code fences only the open fence is read as code.
        beta: in (0, 1]; 1 turns the penalty off.
        eos_gamma: in (0, 1]; 1 leaves the end of text as likely as it is.
        min_repeats: copies that are allowed, at least 2.
        max_period: units in the longest pattern.
        include_prompt: whether copies in the prompt count.
        include_content: whether exact copies count.
        max_log_penalty: bound of each change, in nats.

    One instance serves any number of `generate()` calls: greedy, sampling, beams, assisted decoding, left-padded
    batches. It costs one transfer of the ids per step; a row that is not its last text plus new tokens is read anew
    from where it differs, which happens often under beam search. Continuous batching is declared unsupported.

    Raises:
        ValueError: an argument out of range, an unknown language, a tokenizer whose tokens are not bytes.
        ImportError: tree-sitter or a grammar is not installed.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    >>> backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> backend.decoder = decoders.ByteLevel()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> ids = tokenizer("f(1)\\ng(2)\\nh(3)\\ng(x)\\n", return_tensors="pt")["input_ids"]
    >>> penalty = GrammarRepetitionPenalty(tokenizer, language="python")
    >>> scores = penalty(ids[:, :15], torch.zeros(1, 256))  # three calls with a number: n' = 1
    >>> [tokenizer.decode(i) for i in scores[0].nonzero().flatten()], scores.min().exp()
    (['f', 'g', 'h'], tensor(0.9000))
    >>> penalty(ids, torch.zeros(1, 256)).any()  # the fourth has a name: another unit
    tensor(False)
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer,
        language: str | Callable[[str], str | None] = "python",
        beta: float = 0.9,
        eos_gamma: float = 0.8,
        min_repeats: int = 3,
        max_period: int = 8,
        include_prompt: bool = True,
        include_content: bool = True,
        max_log_penalty: float = 10.0,
    ):
        for name, value, usual in (("beta", beta, 0.9), ("eos_gamma", eos_gamma, 0.8)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} ({value}) must lie in (0, 1]; use {usual}.")
        for name, value, least in (("min_repeats", min_repeats, 2), ("max_period", max_period, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} ({value}) must be an integer of at least {least}.")
        if not max_log_penalty >= 0.0:
            raise ValueError(f"max_log_penalty ({max_log_penalty}) must not be negative; use 10.0.")
        if not callable(language) and language != "auto":
            if language not in LANGUAGES:
                raise ValueError(
                    f"language ({language!r}) must be 'auto', a function, or one of {', '.join(LANGUAGES)}."
                )
            GrammarUnits(language)  # tells at once if a grammar is missing
        self.language, self.beta, self.eos_gamma = language, beta, eos_gamma
        self.min_repeats, self.max_period = min_repeats, max_period
        self.include_prompt, self.include_content = include_prompt, include_content
        self.max_log_penalty = max_log_penalty
        self._log_beta, self._log_gamma = math.log(beta), math.log(eos_gamma)
        self._vocabulary = _Vocabulary(tokenizer)
        self._rows: list[_Row] = []

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids = input_ids.cpu().numpy()  # the only wait for the device in a step
        del self._rows[len(ids) :]
        while len(self._rows) < len(ids):
            self._rows.append(_Row(self._vocabulary, self.language, self.max_period))
        rows, columns, changes = [], [], []
        for index, row_ids in enumerate(ids):
            row = self._rows[index]
            row.read(row_ids)
            for token, change in self._changes(row).items():
                if token < scores.shape[1]:
                    rows.append(index)
                    columns.append(token)
                    changes.append(max(-self.max_log_penalty, min(self.max_log_penalty, change)))
        if not rows:
            return scores
        where = torch.tensor([rows, columns], device=scores.device)
        change = torch.tensor(changes, dtype=scores.dtype, device=scores.device)
        return scores.index_put((where[0], where[1]), change, accumulate=True)

    def _changes(self, row: _Row) -> dict[int, float]:
        """Token id -> what is added to its log probability."""
        changes: dict[int, float] = {}
        units = row.units() if row.may_begin_unit() else None
        places = units.places() if units else []
        from_byte = 0 if self.include_prompt else row.prompt_bytes - row.code_start
        boost = 0
        for place in places:
            pattern = best_period(place.last.runs, self.min_repeats)
            if pattern is None:
                continue
            starts, copies = _starts(place.last, *pattern, from_byte, max(_COPIES_READ, self.min_repeats))
            excess = copies - self.min_repeats + 1
            if excess < 1:
                continue
            steps = self._steps(copies, place.is_statement)
            for token in row.openers(starts, place.indent):
                changes[token] = min(changes.get(token, 0.0), steps * self._log_beta)
            if place.is_statement and not units.in_bracket:
                boost = max(boost, excess)
        if boost and self._vocabulary.eos is not None:
            changes[self._vocabulary.eos] = -boost * self._log_gamma
        if self.include_content and (copy := row.exact_copy(self.include_prompt, bool(places))):
            token, copies = copy
            changes[token] = min(changes.get(token, 0.0), (copies - _TOKEN_COPIES + 1) * self._log_beta)
        return changes

    def _steps(self, copies: int, is_statement: bool) -> int:
        """s(n'), the power of beta."""
        excess = copies - self.min_repeats + 1
        if is_statement:
            return excess * (excess + 1) // 2
        late = max(0, copies - _LITERAL * self.min_repeats)
        return excess + late * (late + 1) // 2


def _starts(last: Unit, period: int, copies: int, from_byte: int, most: int) -> tuple[list[int], int]:
    """First bytes of the latest copies behind `from_byte`, at most `most` of them; and how many copies there are."""
    starts, unit = [], last.back(period - 1)
    for _ in range(min(copies, most)):
        if unit.start < from_byte:
            return starts, len(starts)
        starts.append(unit.start)
        unit = unit.back(period)
    return starts, copies


class _Vocabulary:
    """What the tokens stand for, and which may never be penalised."""

    def __init__(self, tokenizer):
        self.bytes, self.dummy_prefix = token_bytes(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.pad = -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.of_chats = {
            index
            for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
            if token in template
        }
        self._variants: dict[bytes, list[int]] = {}
        for index, token in enumerate(self.bytes):
            if self.may_be_penalised(token):
                self._variants.setdefault(token.lstrip(_WHITESPACE), []).append(index)

    @staticmethod
    def may_be_penalised(token: bytes) -> bool:
        text = token.strip(_WHITESPACE)
        return bool(text) and text[:1] not in b")]}" and text[:3] != b"```"

    def variants(self, index: int) -> list[int]:
        """The token with and without whitespace before it; none if it must not be penalised."""
        return self._variants.get(self.bytes[index].lstrip(_WHITESPACE), [])


class _Row:
    """One growing text: ids, bytes, the region that is code, its units."""

    def __init__(self, vocabulary: _Vocabulary, language: str | Callable[[str], str | None], max_period: int):
        self._vocabulary, self._language, self._max_period = vocabulary, language, max_period
        self._ids = np.empty(0, dtype=np.int64)
        self._length = 0
        self._ends: list[int] = []  # byte after each token
        self._text = bytearray()
        self._periods = TokenPeriods(_TOKEN_PERIODS)
        self._fences: list[tuple[int, bool, str | None]] = []  # (byte after the marker, opens, language)
        self._units: GrammarUnits | None = None
        self._unchanged = 0  # bytes of the text that are as when the units last read it
        self.code_start = 0
        self.prompt_tokens = self.prompt_bytes = 0

    def read(self, ids: np.ndarray) -> None:
        """Takes in the tokens of a row, going back to where they differ from what is known."""
        is_text = ids != self._vocabulary.pad
        ids = ids[is_text.argmax() if is_text.any() else len(ids) :]
        shared = min(self._length, len(ids))
        same = self._ids[:shared] == ids[:shared]
        if shared and not same.all():
            shared = int(same.argmin())
        # Candidates and beams share the prompt; a text that does not is a new one.
        is_new = not shared or shared < self.prompt_tokens
        if is_new:
            shared = 0
        if shared < self._length:
            self._go_back(shared)
        if len(ids) > len(self._ids):
            self._ids = np.concatenate([ids, np.zeros(len(ids) + 64, dtype=np.int64)])
        self._ids[shared : len(ids)] = ids[shared:]
        self._append(ids[shared:].tolist())
        if len(ids) - shared > 64:
            self._periods.restart(self._ids, len(ids))
        else:
            for length in range(shared + 1, len(ids) + 1):
                self._periods.append(self._ids, length)
        self._length = len(ids)
        if is_new:
            self._begin_prompt()
        self._find_fences(0 if is_new else self._ends[shared - 1])

    def _go_back(self, length: int) -> None:
        stop = self._ends[length - 1] if length else 0
        del self._text[stop:], self._ends[length:]
        self._unchanged = min(self._unchanged, stop)
        while self._fences and self._fences[-1][0] > stop:
            self._fences.pop()
        self._periods.restart(self._ids, length)
        self._length = length

    def _append(self, tokens: list[int]) -> None:
        table = self._vocabulary.bytes
        for token in tokens:
            piece = table[token] if token < len(table) else b""
            if not self._text and self._vocabulary.dummy_prefix:
                piece = piece.removeprefix(b" ")
            self._text += piece
            self._ends.append(len(self._text))

    def _begin_prompt(self) -> None:
        self.prompt_tokens, self.prompt_bytes = self._length, len(self._text)
        self._fences, self._units = [], None
        prompt = bytes(self._text)
        chat = self._vocabulary.of_chats.intersection(self._ids[1 : self._length].tolist())
        # Without fences everything is code, unless it is a chat.
        self._all_code = not chat and not _FENCE.search(prompt)
        self._default: str | None = None
        if callable(self._language):
            self._default = self._language(prompt.decode(errors="replace"))
            if self._default is not None and self._default not in LANGUAGES:
                raise ValueError(
                    f"language returned {self._default!r} but must return None or one of {', '.join(LANGUAGES)}."
                )
        elif self._language != "auto":
            self._default = self._language
        elif found := _FILE_NAME.findall(prompt):
            self._default = _FENCE_NAMES.get(found[-1].decode())

    def _find_fences(self, start: int) -> None:
        """Notes the fence markers behind byte `start` and sets where the code begins that the text ends in, if any."""
        line = self._text.rfind(b"\n", 0, start) + 1
        if self._text.find(b"```", line) >= 0:
            done = self._fences[-1][0] if self._fences else 0
            for marker in _FENCE.finditer(self._text, max(line, done)):
                is_open = self._fences[-1][1] if self._fences else self._all_code
                opens = bool(marker[1]) or not is_open
                if opens and not marker[2]:
                    continue  # the marker's line is not over
                name = marker[1].decode(errors="replace").lower()
                language = _FENCE_NAMES.get(name) if name else self._default
                if not (self._language == "auto" or language == self._default):
                    language = None
                self._fences.append((marker.end(), opens, language))
        start, opens, language = self._fences[-1] if self._fences else (0, self._all_code, self._default)
        language = language if opens else None
        if self._units is not None and (start != self.code_start or language != self._units.language):
            self._units = None
        if self._units is None and language is not None:
            self._units, self._unchanged = GrammarUnits(language, self._max_period), start
        self.code_start = start

    def may_begin_unit(self) -> bool:
        """Whether the text ends in a separator or a line break: a look at bytes that spares most parses."""
        if self._units is None:
            return False
        tail = bytes(self._text[-256:])
        code = tail.rstrip(_WHITESPACE)
        return code[-1:] in b",;{}:" or b"\n" in tail[len(code) :]

    def units(self) -> GrammarUnits:
        """The units of the code, up to date."""
        text = bytes(memoryview(self._text)[self.code_start :])
        self._units.update(text, max(0, self._unchanged - self.code_start))
        self._unchanged = len(self._text)
        return self._units

    def openers(self, starts: list[int], indent: int | None) -> set[int]:
        """Ids of the tokens that began units, with their variants, if they would begin one at column `indent` now."""
        column = len(self._text) - self._text.rfind(b"\n") - 1
        table, found = self._vocabulary.bytes, set()
        for start in starts:
            start += self.code_start
            token = bisect.bisect_right(self._ends, start)
            index = int(self._ids[token])
            before = start - (self._ends[token - 1] if token else 0)
            if table[index][:before].strip(_WHITESPACE):
                continue  # its first bytes belong to the unit before
            for variant in self._vocabulary.variants(index):
                blank = len(table[variant]) - len(table[variant].lstrip(_WHITESPACE))
                if indent is None or abs(column + blank - indent) <= 1:
                    found.add(variant)
        return found

    def exact_copy(self, include_prompt: bool, at_unit: bool) -> tuple[int, int] | None:
        """(next token of the copies, copies) if the end of the ids is an exact repetition that may be penalised."""
        found = self._periods.best(_TOKEN_COPIES)
        if found is None:
            return None
        period, copies = found
        if not include_prompt:
            copies = min(copies, (self._length - self.prompt_tokens) // period)
            if copies < _TOKEN_COPIES:
                return None
        token = int(self._ids[self._length - period])
        if token >= len(self._vocabulary.bytes) or not self._vocabulary.variants(token):
            return None
        if self._units is not None and not at_unit:
            units = self.units()
            first = self._length - period * copies
            begins = (self._ends[first - 1] if first else 0) - self.code_start
            if units.in_string or begins < units.statement_start:
                return None
        return token, copies
