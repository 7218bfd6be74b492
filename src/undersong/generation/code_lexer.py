"""Where strings and comments lie in a growing program text, and whether one of them is still open at its end.

A grammar's parser recovers from an unfinished string by reading its words as code, so the grammar repetition penalty
parses only up to an open string and needs to know that it is in one. State: the spans found so far.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMENTS = (b"#", b"//", b"/*")


class Span(NamedTuple):
    """A string or comment: `end` is None while it is open, `opener` the bytes that began it."""

    start: int
    end: int | None
    opener: bytes

    @property
    def is_comment(self) -> bool:
        return self.opener in _COMMENTS


_OPENERS = {
    "python": rb'"""|\'\'\'|"|\'|#',
    "javascript": rb'"|\'|`|//|/\*',
    "java": rb'"""|"|\'|//|/\*',
    "c": rb'"|\'|//|/\*',
    "cpp": rb'R"[^()\\\s]{0,16}\(|"|(?<![0-9a-fA-F])\'|//|/\*',  # 1'000 is a number
    "go": rb'"|\'|`|//|/\*',
    # a quote that is not a whole character literal begins a lifetime
    "rust": rb'r#*"|"|\'(?=\\|[^\\\']{1,4}\')|//|/\*',
}
_OPENERS = {language: re.compile(pattern) for language, pattern in _OPENERS.items()}
# What ends a span, as one pattern per opener; a backslash takes the next byte with it.
_ENDS = {
    b"#": rb"\n",
    b"//": rb"\n",
    b"/*": rb"\*/",
    b'"': rb'(?:[^\\"\n]|\\(?s:.))*+("|\n)',
    b"'": rb"(?:[^\\'\n]|\\(?s:.))*+('|\n)",
    b'"""': rb'(?:[^\\"]|\\(?s:.)|"(?!""))*+(""")',
    b"'''": rb"(?:[^\\']|\\(?s:.)|'(?!''))*+(''')",
    b"`": rb"(?:[^\\`]|\\(?s:.))*+(`)",
}
_ENDS = {opener: re.compile(pattern) for opener, pattern in _ENDS.items()}
_RUST_STRING = re.compile(rb'(?:[^\\"]|\\(?s:.))*+(")')  # may hold line breaks
_GO_RAW = re.compile(rb"[^`]*+(`)")  # knows no escapes
_LONGEST_OPENER = 3  # bytes that may turn out to begin a string or comment once more text is there


class CodeLexer:
    """Finds the spans of a text in one of the languages of `_OPENERS`.

    >>> lexer = CodeLexer("python")
    >>> lexer.update(b'x = "a, b"  # note')
    >>> lexer.spans
    [Span(start=4, end=10, opener=b'"'), Span(start=12, end=None, opener=b'#')]
    >>> lexer.update(b'x = "a, ', keep=8)
    >>> lexer.open
    Span(start=4, end=None, opener=b'"')
    """

    def __init__(self, language: str):
        self.language = language
        self.spans: list[Span] = []

    @property
    def open(self) -> Span | None:
        return self.spans[-1] if self.spans and self.spans[-1].end is None else None

    def update(self, text: bytes, keep: int = 0) -> None:
        """Reads `text`, whose first `keep` bytes are those of the last call."""
        position = max(0, keep - _LONGEST_OPENER)
        while self.spans and (self.spans[-1].end is None or self.spans[-1].end > position):
            position = min(position, self.spans.pop().start)
        if self.spans:
            position = max(position, self.spans[-1].end)
        find = _OPENERS[self.language].search
        while opened := find(text, position):
            opener = opened[0]
            end = self._end(text, opener, opened.end())
            self.spans.append(Span(opened.start(), end, opener))
            if end is None:
                break
            position = end

    def _end(self, text: bytes, opener: bytes, position: int) -> int | None:
        if opener[:1] in b"Rr":  # raw strings of C++ and Rust
            closer = b")" + opener[2:-1] + b'"' if opener[:1] == b"R" else b'"' + opener[1:-1]
            found = text.find(closer, position)
            return found + len(closer) if found >= 0 else None
        if self.language == "rust" and opener == b'"':
            pattern = _RUST_STRING
        elif self.language == "go" and opener == b"`":
            pattern = _GO_RAW
        else:
            pattern = _ENDS[opener]
        if opener in _COMMENTS:
            found = pattern.search(text, position)
            return None if found is None else found.end() if opener == b"/*" else found.start()
        found = pattern.match(text, position)
        # a line break ends a string that was never closed, and is not part of it
        return None if found is None else found.start(1) if found[1] == b"\n" else found.end()
