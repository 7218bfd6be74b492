"""Program text as a sequence of grammar units that can be compared: statements, elements, comment and docstring lines.

A unit is the sequence of grammar symbols (leaf types of a tree-sitter tree; keywords and operators verbatim, names and
literals only as their kind) of one statement-level node with everything nested in it; RPG (Dong et al., arXiv
2505.10402) has the symbols of the whole text from a pushdown automaton. Units are compared with their siblings, the
units of the same block or bracket, so a repeated pattern begins at its shallowest unit.

State: the leaves so far and, after each leaf, the immutable stack of open blocks and brackets. Text may shrink as well
as grow: what no changed range of the tree touches stays. A new unit costs O(max_period).
"""

from __future__ import annotations

import bisect
import difflib
import functools
from typing import NamedTuple

from .code_lexer import CodeLexer, Span
from .grammar_tree import KEPT, GrammarTree

_SIMILAR = 0.8  # comment lines as like as this count as equal
_COMPARED = 120  # bytes of a comment line that are compared
_OPENS = {")": "(", "]": "[", "}": "{"}
_DEFINES = {"def", "function", "func", "fn"}
_CASES = {"case", "default"}
# A statement goes on after a closing brace or a line break if one of these follows.
_JOINS = frozenset(
    ". ?. :: , ; : => -> = == != === !== + - * / % && || | & ^ < > <= >= ? ?? ) ] } in instanceof".split()  # noqa: SIM905
)
_WHITESPACE = b" \t\r\n\f\v"


class Unit:
    """One finished unit: `start` is its first byte, `previous` the sibling before it, `runs` as in `best_period`.

    `text` is that of a comment or docstring line. `element` says that a comma ended the unit.
    """

    __slots__ = ("depth", "digest", "element", "previous", "runs", "start", "text")

    def __init__(self, digest: int, start: int, depth: int, element: bool, text: bytes | None, previous: Unit | None,
                 max_period: int):  # fmt: skip
        self.digest, self.start, self.depth = digest, start, depth
        self.element, self.text, self.previous = element, text, previous
        self.runs = []
        for index in range(max_period):
            if previous is None:
                break
            # a sibling too young for a period has no run of it
            run = self.previous.runs[index] if index < len(self.previous.runs) else 0
            self.runs.append(run + 1 if self.equals(previous) else 0)
            previous = previous.previous

    def back(self, steps: int) -> Unit | None:
        unit = self
        for _ in range(steps):
            unit = unit and unit.previous
        return unit

    def equals(self, other: Unit) -> bool:
        if self.text is not None and other.text is not None:
            return similar(self.text, other.text)
        return self.digest == other.digest


class Frame(NamedTuple):
    """An open block or bracket: its finished units (`last`, `digest`) and the unfinished one (from `current` on)."""

    below: Frame | None
    kind: str  # "" for the whole text, "block" of indented lines, "case", or a bracket
    indent: int = 0
    depth: int = 0
    opened: int = 0  # the byte after the bracket or colon
    splits: bool = True  # whether a comma ends a unit within a line, too
    last: Unit | None = None
    digest: int = 0
    current: int | None = None  # hash of the symbols so far; None between units
    start: int = 0
    first: str = ""
    text: bytes | None = None
    separator: str = ""  # the latest symbol if it may end the unit: , ; } : or comment


class Place(NamedTuple):
    """Where the next unit could begin: after `last`, at column `indent` (None: anywhere)."""

    last: Unit
    indent: int | None
    is_statement: bool


@functools.lru_cache(maxsize=2**12)
def similar(a: bytes, b: bytes) -> bool:
    """Whether two comment lines share 80 % of their text (difflib's ratio of the first 120 bytes).

    >>> similar(b"# HINT 1: use a counter", b"# HINT 2: use a counter")
    True
    >>> similar(b"# use a counter", b"# sort the list first")
    False
    """
    if a == b:
        return True
    matcher = difflib.SequenceMatcher(None, a[:_COMPARED], b[:_COMPARED], autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # each below the one before, and dearer
    return all(bound() >= _SIMILAR for bound in bounds)


class GrammarUnits:
    """Units of a growing text in one language, see `grammar_tree.LANGUAGES`.

    Args:
        language: name of the grammar.
        max_period: how many siblings back a unit is compared.

    Raises:
        ValueError: no grammar of that name.
        ImportError: tree-sitter or the grammar is not installed.

    >>> units = GrammarUnits("python")
    >>> units.update(b"if x == 1:\\n    return y\\nelif x == 2:\\n    return z\\nelif a == 3:\\n    return y\\n")
    >>> place = units.places()[-1]  # the next unit could begin in the block of the last return or, outermost, here
    >>> place.indent, place.last.start, place.last.runs  # the second elif clause equals the one before it
    (0, 50, [1, 0])
    """

    def __init__(self, language: str, max_period: int = 8):
        self._tree = GrammarTree(language)
        self.language, self._max_period = language, max_period
        self._python = language == "python"
        self._line_ends = language in ("javascript", "go")  # a line break may end a statement
        self._lexer = CodeLexer(language)
        self._text = b""
        self._starts: list[int] = []  # of the leaves
        self._stops: list[int] = []
        self._names: list[str] = []
        self._finished: list[list[Unit]] = []  # by each leaf
        self._frames = [Frame(None, "")]  # before each leaf, and at the end
        self._lines: tuple[int, int, Frame] | None = None  # of an open docstring: start, bytes read, frame

    def update(self, text: bytes, keep: int = 0) -> None:
        """Reads `text`, whose first `keep` bytes are those of the last call."""
        self._lexer.update(text, keep)
        self._text = text
        if self._lines and self._lines[1] > keep:
            self._lines = None
        end = self._lexer.open.start if self._lexer.open else len(text)
        changed = self._tree.update(text[:end], min(keep, end))
        if changed is None:
            return
        leaf = len(self._stops)
        while leaf and self._stops[leaf - 1] >= changed and self._starts[leaf - 1] >= self._tree.anchor:
            leaf -= 1
        self._read_leaves(leaf, keep)
        if self._tree.is_long:
            self._move_window(end)

    @property
    def in_string(self) -> bool:
        """Whether the text ends within a string that is no docstring."""
        return self._lexer.open is not None and not self._is_prose(self._lexer.open)

    @property
    def in_bracket(self) -> bool:
        """Whether a bracket is open other than the braces of a block."""
        frame = self._frames[-1]
        while frame is not None and not self._is_bracket(frame):
            frame = frame.below
        return frame is not None

    @property
    def statement_start(self) -> int:
        """First byte of the statement or comment in which the text ends."""
        if self._lexer.open and self._is_prose(self._lexer.open):
            return self._lexer.open.start
        frame = self._frames[-1]
        while frame.below is not None and self._is_bracket(frame):
            frame = frame.below
        return frame.start if frame.current is not None else len(self._text)

    def places(self) -> list[Place]:
        """Where a unit that began now would belong, innermost first; none if the text ends inside a unit.

        The last unit of each place counts as finished, with everything nested in it.
        """
        opened = self._lexer.open
        if opened:
            if not self._is_prose(opened) or self._text[self._text.rfind(b"\n") + 1 :].strip(_WHITESPACE):
                return []
            last = self._prose_lines(opened).last
            return [Place(last, None, True)] if last is not None else []
        stop = self._stops[-1] if self._stops else 0
        newline = self._breaks_line(stop, len(self._text))
        frame = self._frames[-1]
        if self._text[stop:].strip(_WHITESPACE) or not self._ends_unit(frame, newline):
            return []
        if self._python and frame.separator == ":" and frame.kind in ("", "block"):
            return []  # a header: its block must come
        places, finished = [], []
        while True:
            frame = self._finish(frame, finished)
            lines = self._python and frame.kind in ("", "block")
            element = frame.last.element or self._is_bracket(frame)
            places.append(Place(frame.last, frame.indent if lines else None, not element))
            if frame.kind != "case" and not (frame.kind == "block" and newline):
                return places
            frame = self._close(frame, finished)

    def units(self) -> list[Unit]:
        """All units in document order, those still open at the end included."""
        finished = [unit for units in self._finished for unit in units]
        frame = self._frames[-1]
        while frame is not None:
            frame = self._finish(frame, finished)
            frame = self._close(frame, finished) if frame.below is not None else None
        if self._lexer.open and self._is_prose(self._lexer.open):
            self._add_lines(Frame(None, ""), self._lexer.open.start, len(self._text), finished)
        return sorted(finished, key=lambda unit: (unit.start, unit.depth))

    def _read_leaves(self, leaf: int, keep: int) -> None:
        """Takes the tree's leaves from number `leaf` on; as long as they are as before, so are the units."""
        starts, stops, names, frames = self._starts, self._stops, self._names, self._frames
        known = len(stops)
        for name, start, stop in self._tree.leaves(stops[leaf - 1] if leaf else 0):
            if leaf < known:
                same = starts[leaf] == start and stops[leaf] == stop and names[leaf] == name
                if same and (stop <= keep or name not in ("comment", "string")):  # their lines are units
                    leaf += 1
                    continue
                self._forget(leaf)
                known = leaf
            finished: list[Unit] = []
            frames.append(self._feed(frames[-1], name, start, stop, finished))
            starts.append(start)
            stops.append(stop)
            names.append(name)
            self._finished.append(finished)
            leaf += 1
            known = leaf
        self._forget(leaf)

    def _forget(self, leaf: int) -> None:
        del (
            self._starts[leaf:],
            self._stops[leaf:],
            self._names[leaf:],
            self._finished[leaf:],
            self._frames[leaf + 1 :],
        )

    def _move_window(self, end: int) -> None:
        """Cuts the tree to the units of the last bytes, under the headers of the blocks that they are in."""
        leaf = bisect.bisect_left(self._starts, end - KEPT)
        while leaf < len(self._starts):
            frame = self._frames[leaf + 1]
            if frame.start == self._starts[leaf] and frame.current is not None and frame.text is None:
                break
            leaf += 1
        else:  # one long unit
            self._tree.move(None, b"")
            return
        headers = []
        while frame.below is not None:
            line = b"\n" if frame.kind == "block" else b""
            headers.append(self._text[self._line_start(frame.below.start) : frame.opened] + line)
            frame = frame.below
        self._tree.move(self._line_start(self._starts[leaf]), b"".join(reversed(headers)))

    def _line_start(self, position: int) -> int:
        """Where the indentation before `position` begins; `position` itself if something else stands before it."""
        start = self._text.rfind(b"\n", 0, position) + 1
        return position if self._text[start:position].strip(_WHITESPACE) else start

    def _breaks_line(self, start: int, stop: int) -> bool:
        gap = self._text[start:stop]
        return b"\n" in gap and not (self._python and b"\\" in gap)

    # From leaves to units

    def _feed(self, frame: Frame, name: str, start: int, stop: int, finished: list[Unit]) -> Frame:
        """The stack after one more leaf."""
        newline = bool(self._stops) and self._breaks_line(self._stops[-1], start)
        if name == "comment" and frame.current is not None and not newline:
            return frame._replace(current=hash((frame.current, name)))  # beside code, it is no unit of its own
        if name in _OPENS:
            return self._feed_closer(frame, name, start, finished)
        if frame.current is not None and self._ends_unit(frame, newline, name):
            frame = self._next_unit(frame, name, start, newline, finished)
        elif frame.below is None and not self._stops:
            frame = frame._replace(indent=start - self._text.rfind(b"\n", 0, start) - 1)
        if frame.current is None:
            if frame.kind == "case" and name in _CASES:
                frame = self._finish(self._close(frame, finished), finished)
            prose = name == "comment" or (self._python and name == "string" and self._is_docstring(start))
            if prose:
                frame = self._add_lines(frame, start, stop, finished)
                return frame._replace(separator="comment" if name == "comment" else "")
            frame = frame._replace(current=0, start=start, first=name, text=None)
        separator = name if name in (",", ";") or (self._python and name == ":") else ""
        frame = frame._replace(current=hash((frame.current, name)), text=None, separator=separator)
        if name in ("(", "[", "{"):
            # Arguments of a call are no units, unless each has its line; parameters are.
            splits = name != "(" or any(word in _DEFINES for word in self._names[-2:])
            return Frame(frame, name, 0, frame.depth + 1, stop, splits)
        if name in (":", "->") and frame.first in _CASES and frame.kind == "{":
            return Frame(frame, "case", 0, frame.depth + 1, stop)
        return frame

    def _ends_unit(self, frame: Frame, newline: bool, name: str = "") -> bool:
        """Whether the frame's unit is over if a leaf `name` follows, or anything that does not continue it."""
        if frame.current is None:
            return False
        if frame.separator == "comment":
            return True
        if frame.separator == ",":
            return frame.kind not in ("", "block", "case") and (frame.splits or newline)
        if self._is_bracket(frame):
            return False
        if self._python:
            return newline or frame.separator == ";"
        if name in _JOINS or frame.kind == "(":
            return False
        if frame.separator in (";", "}"):
            return True
        latest = self._names[-1]
        ends_line = self._line_ends and (latest[-1].isalnum() or latest in (")", "]", "++", "--"))
        return newline and (frame.first[0] in "#@" or ends_line)

    def _next_unit(self, frame: Frame, name: str, start: int, newline: bool, finished: list[Unit]) -> Frame:
        """The frame that a leaf after a finished unit belongs to: it may open a block or leave some."""
        if not (self._python and newline and frame.kind in ("", "block")):
            return self._finish(frame, finished)
        column = start - self._text.rfind(b"\n", 0, start) - 1
        while frame.kind == "block" and column < frame.indent:
            frame = self._close(frame, finished)
        if column > frame.indent and frame.separator == ":":
            return Frame(frame, "block", column, frame.depth + 1, self._stops[-1])
        frame = self._finish(frame, finished)
        return frame._replace(indent=min(column, frame.indent))

    def _feed_closer(self, frame: Frame, name: str, start: int, finished: list[Unit]) -> Frame:
        opener, match = _OPENS[name], frame
        while match is not None and match.kind != opener:
            match = match.below
        if match is None:  # nothing to close: a symbol like others
            current = hash((frame.current, name))
            begun = frame.start if frame.current is not None else start
            return frame._replace(current=current, start=begun, first=frame.first or name, separator="")
        while frame.depth > match.depth:
            frame = self._close(frame, finished)
        frame = self._close(frame, finished, name)
        return frame._replace(separator="}") if name == "}" and not self._python else frame

    def _finish(self, frame: Frame, finished: list[Unit]) -> Frame:
        if frame.current is None:
            return frame
        element = frame.separator == ","
        unit = Unit(frame.current, frame.start, frame.depth, element, frame.text, frame.last, self._max_period)
        if frame.kind != "(" or frame.splits or element or frame.last is not None:
            finished.append(unit)  # all that stands in other parentheses is no unit, but part of one
        return frame._replace(
            last=unit, digest=hash((frame.digest, frame.current)), current=None, separator="", first=""
        )

    def _close(self, frame: Frame, finished: list[Unit], closer: str = "") -> Frame:
        """The frame below, whose unit goes on after all that the closed one holds."""
        frame = self._finish(frame, finished)
        current = hash((frame.below.current, frame.kind, frame.digest, closer))
        return frame.below._replace(current=current, text=None, separator="")

    def _add_lines(self, frame: Frame, start: int, stop: int, finished: list[Unit]) -> Frame:
        """Every line of a comment or docstring as a unit; the last is left unfinished."""
        for line in self._text[start:stop].split(b"\n"):
            if text := line.strip(_WHITESPACE):
                frame = self._finish(frame, finished)
                first = start + line.index(text)
                frame = frame._replace(current=hash("comment"), start=first, first="comment", text=text)
            start += len(line) + 1
        return frame

    def _prose_lines(self, opened: Span) -> Frame:
        """The finished lines of an open docstring or comment, among themselves."""
        _, read, frame = self._lines or (0, 0, None)
        if self._lines is None or self._lines[0] != opened.start:
            read, frame = opened.start, Frame(None, "")
        stop = max(read, self._text.rfind(b"\n") + 1)
        frame = self._finish(self._add_lines(frame, read, stop, []), [])
        self._lines = (opened.start, stop, frame)
        return frame

    def _is_bracket(self, frame: Frame) -> bool:
        return frame.kind in ("(", "[") or (self._python and frame.kind == "{")

    def _is_prose(self, span: Span) -> bool:
        return span.is_comment or (self._python and len(span.opener) == 3 and self._is_docstring(span.start))

    def _is_docstring(self, start: int) -> bool:
        """Whether a string that begins here is all its line begins with, and a triple-quoted one."""
        line = self._text.rfind(b"\n", 0, start) + 1
        quoted = self._text[start : start + 4].lstrip(b"rRuU")[:3] in (b'"""', b"'''")
        return quoted and not self._text[line:start].strip(_WHITESPACE + b"rRuU")
