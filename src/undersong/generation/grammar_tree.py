"""The leaves of a tree-sitter tree of program text that grows at its end, at a cost that does not grow with the text.

An incremental parse of unfinished code takes time in proportion to the text, because an open brace makes one flat
error node of all before it. So the tree covers a window: the last units under the headers of the blocks that they are
in. State: the window's document, its tree, and where it lies in the text.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterator
from typing import NamedTuple

LANGUAGES = ("python", "javascript", "java", "c", "cpp", "go", "rust")
WINDOW, KEPT = 2048, 640  # bytes: a longer document is cut to its last units, from KEPT bytes before its end
# Words that are keywords in one state of a parser and names in another.
_SOFT_WORDS = {"print", "exec", "get", "set", "of", "async", "static"}
_CHARACTERS = {"char_literal", "character_literal", "rune_literal"}


class _Grammar(NamedTuple):
    parser: object  # a tree_sitter.Parser
    symbols: dict[int, str]  # kind id -> symbol, "" for line breaks
    whole: frozenset[int]  # kinds that count as leaves, whatever they hold


class GrammarTree:
    """Window on a text in one language of `LANGUAGES`; `anchor` is the first byte of the text in the window.

    Raises:
        ValueError: no grammar of that name.
        ImportError: tree-sitter or the grammar is not installed.

    >>> tree = GrammarTree("python")
    >>> tree.update(b"x = f(1, 'a')", keep=0)
    0
    >>> [symbol for symbol, start, stop in tree.leaves(4)]
    ['identifier', '(', 'integer', ',', 'string', ')']
    """

    def __init__(self, language: str):
        self._grammar = grammar(language)
        self._limit = WINDOW
        self.anchor, self._prefix, self._document, self._tree = 0, b"", b"", None

    def update(self, text: bytes, keep: int) -> int | None:
        """Reads `text`, whose first `keep` bytes are as before; the first byte whose leaves may differ, or None."""
        if min(keep, len(text)) < self.anchor:
            self.anchor, self._prefix, self._document, self._tree = 0, b"", b"", None
        shift = self.anchor - len(self._prefix)
        old, tree, new = self._document, self._tree, self._prefix + text[self.anchor :]
        if tree is not None and new == old:
            return None
        self._document = new
        parse = self._grammar.parser.parse
        if tree is None:
            self._tree = parse(new)
            return self.anchor
        same = max(0, min(keep - shift, len(old), len(new)))
        points = (_point(old, same), _point(old, len(old)), _point(new, len(new)))
        tree.edit(same, len(old), len(new), *points)
        self._tree = parse(new, tree)
        # near an error the parser may give earlier text another shape
        changed = min([same, *(range_.start_byte for range_ in tree.changed_ranges(self._tree))])
        return max(changed + shift, self.anchor)

    def leaves(self, position: int) -> Iterator[tuple[str, int, int]]:
        """(symbol, start, stop) from byte `position` of the text on; strings and comments are leaves."""
        shift = self.anchor - len(self._prefix)
        position = max(position, self.anchor) - shift
        symbols, whole = self._grammar.symbols, self._grammar.whole
        cursor = self._tree.walk()
        while cursor.node.kind_id not in whole and cursor.goto_first_child_for_byte(position) is not None:
            pass
        while True:
            node = cursor.node
            kind = node.kind_id
            if kind in whole or not cursor.goto_first_child():
                start, stop = node.start_byte, node.end_byte
                if start >= position and stop > start and (symbol := symbols.get(kind, "ERROR")):
                    yield symbol, start + shift, stop + shift
                while not cursor.goto_next_sibling():
                    if not cursor.goto_parent():
                        return

    @property
    def is_long(self) -> bool:
        """Whether it is time to move the window."""
        return len(self._document) > self._limit

    def move(self, anchor: int | None, prefix: bytes) -> None:
        """Lets the window begin at `anchor` with `prefix` before it; None: later, there is no good place yet."""
        if anchor is None:
            self._limit = 2 * len(self._document)
            return
        self._limit = WINDOW
        self.anchor, self._prefix = anchor, prefix if len(prefix) <= WINDOW // 2 else b""
        self._document, self._tree = b"", None


@functools.cache
def grammar(language: str) -> _Grammar:
    """Parser and symbols of a language: node types, with all kinds of names, strings and comments made one each."""
    if language not in LANGUAGES:
        raise ValueError(f"language ({language!r}) must be one of {', '.join(LANGUAGES)}.")
    try:
        import tree_sitter

        kinds = tree_sitter.Language(pkgutil.resolve_name(f"tree_sitter_{language}:language")())
    except ImportError as error:
        raise ImportError(
            f"language {language!r} needs tree-sitter and its grammar; pip install 'undersong[code]'."
        ) from error
    symbols, whole = {}, set()
    for kind in range(kinds.node_kind_count):
        name = kinds.node_kind_for_id(kind) or ""
        if kinds.node_kind_is_named(kind):
            if "comment" in name:
                name = "comment"
            elif "string" in name or name in _CHARACTERS:
                name = "string"
            elif "identifier" in name:
                name = "identifier"
            if name in ("comment", "string"):
                whole.add(kind)
        elif name in _SOFT_WORDS:
            name = "identifier"
        symbols[kind] = name.strip()
    return _Grammar(tree_sitter.Parser(kinds), symbols, frozenset(whole))


def _point(text: bytes, end: int) -> tuple[int, int]:
    return text.count(b"\n", 0, end), end - text.rfind(b"\n", 0, end) - 1
