"""How repetitive a text is. Plain Python, no imports beyond the standard library.

rep-n: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, section 6.1 (there seq-rep-n).
rep/l: ibid.; averaged over l = 16, 32 and 128 it is the REP of Meister et al., "Locally Typical Sampling", TACL 2023.
rep-sen: Xu et al., "Learning to Break the Loop", NeurIPS 2022.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence

_WORDS = re.compile(r"\w+|[^\w\s]")
# A sentence ends at . ! ? (with closing quotes or brackets) before a space, at the CJK forms, and at a line break.
_SENTENCE_END = re.compile(r"([.!?][\"'”’)\]]*)\s+|(?<=[。！？])")


def rep_n(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that occurred before: 1 - distinct n-grams / all n-grams; 0 for fewer than n tokens.

    Raises:
        ValueError: no tokens, or n below 1.

    >>> rep_n("a b a b a b".split(), n=2)  # ab ba ab ba ab: 2 distinct of 5
    0.6
    """
    _check_positive("n", n)
    tokens = _checked(tokens)
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return (len(ngrams) - len(set(ngrams))) / len(ngrams) if ngrams else 0.0


def rep_l(tokens: Sequence[Hashable], length: int) -> float:
    """Share of tokens that already occur among the `length` tokens before them (Welleck's rep/l, of the text itself).

    Raises:
        ValueError: no tokens, or length below 1.

    >>> rep_l("a b c a b".split(), length=3)  # the second a and b
    0.4
    >>> rep_l("a b c a b".split(), length=2)
    0.0
    """
    _check_positive("length", length)
    tokens = _checked(tokens)
    last: dict[Hashable, int] = {}
    repeated = 0
    for position, token in enumerate(tokens):
        repeated += position - last.get(token, -length - 1) <= length
        last[token] = position
    return repeated / len(tokens)


def rep_sen(text: str | Sequence[Hashable]) -> float:
    """Share of sentences that occurred before: 1 - distinct sentences / all sentences.

    Takes a text (split at . ! ? and their CJK forms, and at line breaks) or a list of sentences.

    Raises:
        ValueError: nothing but whitespace.

    >>> rep_sen("It rains. It rains. We wait. It rains.")  # 2 distinct of 4
    0.5
    """
    sentences = _SENTENCE_END.sub(r"\1\n", text).splitlines() if isinstance(text, str) else text
    sentences = [s.strip() if isinstance(s, str) else s for s in sentences]
    sentences = _checked([s for s in sentences if s])
    return (len(sentences) - len(set(sentences))) / len(sentences)


def repetition_scores(
    texts: Iterable[str | Sequence[int]],
    tokenizer: Callable[[str], Sequence[Hashable]] | None = None,
    ngrams: Sequence[int] = (1, 2, 3, 4),
    lengths: Sequence[int] = (16, 32, 128),
) -> dict[str, float]:
    """All measures of this module, each the mean over texts.

    Args:
        texts: strings, or token ids as the model wrote them (prompts and padding cut off).
        tokenizer: splits strings: a transformers tokenizer (its special tokens are left out), or any callable from a
            string to a list. By default words and punctuation marks. Figures of different tokenizers do not compare.
        ngrams: the n of rep_n.
        lengths: the window lengths of rep_l.

    Returns:
        `rep_<n>`, `rep_l_<length>`, `rep_l` (the mean over lengths) and, for strings, `rep_sen`.

    Raises:
        ValueError: no texts, or an empty text.

    >>> scores = repetition_scores(["the cat and the dog and the cat"], ngrams=[2], lengths=[3])
    >>> scores["rep_2"], scores["rep_l"], scores["rep_sen"]  # "the cat", "and the" of 7; the, and, the of 8 words
    (0.2857..., 0.375, 0.0)
    """
    totals: dict[str, float] = {}
    count = 0
    for index, text in enumerate(texts):
        tokens = _tokenize(text, tokenizer) if isinstance(text, str) else text
        if not len(tokens):
            raise ValueError(f"texts[{index}] ({text!r}) must hold a token because nothing cannot repeat; drop it.")
        scores = {f"rep_{n}": rep_n(tokens, n) for n in ngrams}
        scores |= {f"rep_l_{length}": rep_l(tokens, length) for length in lengths}
        if lengths:
            scores["rep_l"] = sum(scores[f"rep_l_{length}"] for length in lengths) / len(lengths)
        if isinstance(text, str):
            scores["rep_sen"] = rep_sen(text)
        for name, score in scores.items():
            totals[name] = totals.get(name, 0.0) + score
        count += 1
    if not count:
        raise ValueError("texts must hold at least one text.")
    return {name: total / count for name, total in totals.items()}


def _tokenize(text: str, tokenizer: Callable[[str], Sequence[Hashable]] | None) -> Sequence[Hashable]:
    if tokenizer is None:
        return _WORDS.findall(text)
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # a transformers tokenizer
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(text)


def _checked(tokens: Sequence[Hashable]) -> Sequence[Hashable]:
    if not len(tokens):
        raise ValueError("tokens must not be empty because nothing cannot repeat; drop empty texts.")
    return tokens


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1.")
