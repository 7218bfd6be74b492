"""English prose written by people, found on every machine: CPython's language reference and its library's docstrings.

Both come with the interpreter (PSF licence version 2): `pydoc_data.topics`, the text behind `help()`, and the modules
of the standard library, which are parsed, not imported. Whole sentences are kept; headings, signatures, grammar, code
and tables are not. The text is technical and differs a little from one Python version to the next, so figures compare
only where `fingerprint` agrees.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

__all__ = ["fingerprint", "human_documents", "human_text", "split"]

_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_EMPHASIS = re.compile(r"\*{1,2}(\w[^*]*)\*{1,2}")
_SHEET = re.compile(r"(^|\s)(>>>|\.\.\.|::=|\||\+-|\*{3}|={2,}|-{2,})|\[")  # code, grammar, tables, optional arguments
_WORD = re.compile(r"[\"'(“‘]*[A-Za-z]+(['’-][A-Za-z]+)*[\"')”’]*[.,;:!?]*[\"')”’]*$|[–—]$")
MIN_WORDS, MIN_SHARE_OF_WORDS, BLOCK = 15, 0.9, 8
_NOT_THE_LIBRARY = {"dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


def human_text() -> list[str]:
    """Paragraphs of prose, each on one line, in a fixed order and each once: about 3,500, some 120,000 words.

    >>> text = human_text()
    >>> print(next(p for p in text if p.startswith("Exceptions are a means")))
    Exceptions are a means of breaking out of the normal flow of control of a code block in order to handle errors ...
    """
    return [paragraph for document in _documents() for paragraph in document]


def human_documents() -> list[list[str]]:
    """The same paragraphs by document: a help topic, or the docstring of one module, class or function.

    >>> documents = human_documents()
    >>> sum(documents, []) == human_text()
    True
    """
    return [list(document) for document in _documents()]


def split(paragraphs: Sequence[str], held_out: int = 5) -> tuple[list[str], list[str]]:
    """Training and held-out paragraphs: of every `held_out` neighbouring blocks of 8 paragraphs the last is held out.

    Blocks instead of single paragraphs, so that a held-out text is not the next sentence of a training text.

    Raises:
        ValueError: `held_out` below 2, or so few paragraphs that nothing would be held out.

    >>> train, test = split([f"Paragraph {i}." for i in range(100)])
    >>> len(train), len(test), test[0]
    (84, 16, 'Paragraph 32.')
    """
    if held_out < 2:
        raise ValueError(f"held_out ({held_out}) must be at least 2: one block of so many is held out; use 5.")
    if len(paragraphs) <= (held_out - 1) * BLOCK:
        raise ValueError(
            f"paragraphs ({len(paragraphs)}) must be more than {(held_out - 1) * BLOCK} to hold out one block of "
            f"{held_out}; pass more text or a smaller held_out."
        )
    parts = [], []
    for index, paragraph in enumerate(paragraphs):
        parts[index // BLOCK % held_out == held_out - 1].append(paragraph)
    return parts


def fingerprint(paragraphs: Sequence[str]) -> str:
    """Twelve hexadecimal digits that change with any character.

    >>> fingerprint(["a", "b"]) == fingerprint(["a", "b"]) != fingerprint(["ab"])
    True
    """
    return hashlib.sha256("\n".join(paragraphs).encode()).hexdigest()[:12]


@cache
def _documents() -> tuple[tuple[str, ...], ...]:
    documents, seen = [], set()  # texts quote each other: the first occurrence stays
    for text in _texts():
        document = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(_EMPHASIS.sub(r"\1", _FOOTNOTE.sub("", block)).split()).removeprefix("Note: ")
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                document.append(paragraph)
        if document:
            documents.append(tuple(document))
    return tuple(documents)


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _NOT_THE_LIBRARY.isdisjoint(path.relative_to(library).parts):
            with warnings.catch_warnings():  # odd escapes in somebody else's string literals
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < MIN_WORDS or not paragraph[0].isupper() or paragraph[-1] not in ".!?" or _SHEET.search(paragraph):
        return False
    return sum(bool(_WORD.match(word)) for word in words) >= MIN_SHARE_OF_WORDS * len(words)
