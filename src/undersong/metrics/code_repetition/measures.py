"""How repetitive generated code is, whether it ends, and whether it parses. Standard library; grammars where named.

TR-n, TR-S, CCP and EGP: Dong et al., "Rethinking Repetition Problems of LLMs in Code Generation", ACL 2025, arXiv
2505.10402. rep-w and rep-r: Fu et al., "A Theoretical Analysis of the Repetition Problem in Text
Generation", AAAI 2021, arXiv 2012.14660. The rate of repeated units is ours: it sees what names and numbers hide.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

_TOKENS = re.compile(r"\w+|[^\w\s]")


def tr_n(codes: Sequence[str], n: int = 2, tokenize: Callable[[str], Sequence[Hashable]] = _TOKENS.findall) -> float:
    """Share of n-grams that occurred before in the same code, summed over all codes before dividing.

    Tokens are names, numbers and single punctuation marks, unless `tokenize` says otherwise.

    Raises:
        ValueError: no codes, or n below 1.

    >>> tr_n(["x = 1; x = 1", "y"], n=2)  # x=, =1, 1;, ;x, x=, =1: 2 of 6; y has none
    0.333...
    """
    _check_positive("n", n)
    repeated = total = 0
    for code in _checked(codes):
        tokens = tokenize(code)
        ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        repeated += len(ngrams) - len(set(ngrams))
        total += len(ngrams)
    return repeated / total if total else 0.0


def tr_s(codes: Sequence[str]) -> float:
    """Share of lines that occurred before in the same code, summed over all codes; blank lines do not count.

    Raises:
        ValueError: no codes.

    >>> tr_s(["pass\\nx = 1\\n\\nx = 1\\n"])
    0.333...
    """
    repeated = total = 0
    for code in _checked(codes):
        lines = [line.strip() for line in code.splitlines() if line.strip()]
        repeated += len(lines) - len(set(lines))
        total += len(lines)
    return repeated / total if total else 0.0


def rep_w(tokens: Sequence[Hashable], width: int = 16) -> float:
    """Share of tokens that occur among the `width` tokens before them; 0 for no tokens.

    >>> rep_w("a b c a b".split(), width=3)
    0.4
    """
    _check_positive("width", width)
    last: dict[Hashable, int] = {}
    repeated = 0
    for position, token in enumerate(tokens):
        repeated += position - last.get(token, -width - 1) <= width
        last[token] = position
    return repeated / len(tokens) if len(tokens) else 0.0


def rep_r(tokens: Sequence[Hashable]) -> float:
    """Share of tokens that lie in a pair of neighbours which occurs more than once; 0 for no tokens.

    >>> rep_r("a b c a b".split())  # all but c
    0.8
    """
    pairs = list(zip(tokens, tokens[1:], strict=False))
    count = Counter(pairs)
    inside = set()
    for index, pair in enumerate(pairs):
        if count[pair] > 1:
            inside |= {index, index + 1}
    return len(inside) / len(tokens) if len(tokens) else 0.0


def ccp(codes: Sequence[str], language: str = "python") -> float:
    """Compiler-correctness percentage: the share of codes that parse, in [0, 1].

    Python is compiled, never run; for other languages the tree-sitter grammar must find no error.

    Raises:
        ValueError: no codes, or an unknown language.
        ImportError: the grammar is not installed.

    >>> ccp(["x = [1, 2]", "x = [1, 2"])
    0.5
    """
    parses = _compiles if language == "python" else _grammar_check(language)
    return sum(map(parses, _checked(codes))) / len(codes)


def egp(ended: Sequence[bool]) -> float:
    """End-of-generation percentage: the share of codes that the model ended before the length limit, in [0, 1].

    Raises:
        ValueError: nothing given.

    >>> egp([True, False, True, True])
    0.75
    """
    return sum(map(bool, _checked(ended))) / len(ended)


def sr_rate(
    codes: Sequence[str],
    language: str = "python",
    prompts: Sequence[str] | None = None,
    min_repeats: int = 3,
    max_period: int = 8,
) -> float:
    """Share of grammar units that complete the `min_repeats`-th or a later copy of a pattern.

    Units are statements, elements and comment lines, equal up to names and literals, as
    `undersong.GrammarRepetitionPenalty` sees them; a pattern is 1 to `max_period` sibling units. Summed over all codes
    before dividing.

    Args:
        prompts: for each code, the text that it continues: copies in it count, its units do not.

    Raises:
        ValueError: no codes, an unknown language, `min_repeats` below 2, or `prompts` of another length.
        ImportError: undersong or the grammar is not installed.

    >>> sr_rate(["a = 1\\nb = 2\\nc = 3\\nd = 4\\nf(a)\\n"])  # c and d of five statements
    0.4
    >>> sr_rate(["d = 4\\nf(a)\\n"], prompts=["a = 1\\nb = 2\\nc = 3\\n"])
    0.5
    """
    if min_repeats < 2:
        raise ValueError(f"min_repeats ({min_repeats}) must be at least 2.")
    prompts = [""] * len(_checked(codes)) if prompts is None else prompts
    _check_length("prompts", prompts, codes)
    grammar_units = _generation("grammar_units")
    repeated = total = 0
    for prompt, code in zip(prompts, codes, strict=True):
        units = grammar_units.GrammarUnits(language, max_period)
        units.update((prompt + code).encode())
        written = [unit for unit in units.units() if unit.start >= len(prompt.encode())]
        total += len(written)
        for unit in written:
            repeated += any(run // period + 1 >= min_repeats for period, run in enumerate(unit.runs, 1))
    return repeated / total if total else 0.0


def code_repetition_scores(
    codes: Sequence[str],
    ended: Sequence[bool] | None = None,
    language: str = "python",
    ngrams: Sequence[int] = (2, 3, 4),
    width: int = 16,
    units: bool = True,
) -> dict[str, float]:
    """All measures of this module.

    Args:
        codes: programs, or continuations of programs.
        ended: for each, whether the model ended it before the length limit; without it there is no `egp`.
        language: python, javascript, java, c, cpp, go or rust.
        ngrams: the n of `tr_n`.
        width: the window of `rep_w`.
        units: False leaves out `sr_rate`, which needs undersong and a grammar.

    Returns:
        `tr_<n>`, `tr_s`, `rep_w`, `rep_r` (these two are means over codes), `ccp`, `sr_rate` and `egp`.

    Raises:
        ValueError: no codes, or `ended` of another length.

    >>> scores = code_repetition_scores(["a = 1\\na = 1\\na = 1\\n"], ended=[True])
    >>> scores["tr_s"], scores["ccp"], scores["egp"], scores["sr_rate"]
    (0.666..., 1.0, 1.0, 0.333...)
    """
    codes = _checked(codes)
    if ended is not None:
        _check_length("ended", ended, codes)
    tokens = [_TOKENS.findall(code) for code in codes]
    scores = {f"tr_{n}": tr_n(codes, n) for n in ngrams}
    scores |= {
        "tr_s": tr_s(codes),
        "rep_w": sum(rep_w(t, width) for t in tokens) / len(codes),
        "rep_r": sum(map(rep_r, tokens)) / len(codes),
        "ccp": ccp(codes, language),
    }
    scores |= {"sr_rate": sr_rate(codes, language)} if units else {}
    return scores | ({"egp": egp(ended)} if ended is not None else {})


def _compiles(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes and comparisons are legal
        try:
            compile(code, "<generated>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False
    return True


def _grammar_check(language: str) -> Callable[[str], bool]:
    parser = _generation("grammar_tree").grammar(language).parser
    return lambda code: not parser.parse(code.encode()).root_node.has_error


def _generation(module: str):
    # by name: the other measures need nothing of undersong, in a Hub repository of this metric
    try:
        return importlib.import_module(f"undersong.generation.{module}")
    except ImportError as error:
        raise ImportError("grammars need undersong; pip install 'undersong[code]'.") from error


def _checked(values: Sequence) -> Sequence:
    if not len(values):
        raise ValueError("codes must hold at least one entry.")
    return values


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1.")


def _check_length(name: str, values: Sequence, codes: Sequence) -> None:
    if len(values) != len(codes):
        raise ValueError(f"{name} has {len(values)} entries but there are {len(codes)} codes; give one for each.")
