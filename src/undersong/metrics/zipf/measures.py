"""Zipf's law of a collection of texts. Plain Python, no imports beyond the standard library.

Zipf: the f-th most frequent word has a frequency of about c / rank^s. The coefficient s is the negative slope of the
least-squares line of log frequency on log rank; human English has s near 1, text that falls back on few words more.
Used for generated text by Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020, section 5.2,
and Meister et al., "Locally Typical Sampling", TACL 2023 (arXiv 2202.00666).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

_WORDS = re.compile(r"\w+|[^\w\s]")


def zipf_fit(counts: Iterable[int], min_count: int = 1) -> dict[str, float]:
    """Least-squares line of log count on log rank.

    Args:
        counts: how often each type occurs, in any order.
        min_count: types that occur less often are left out after ranking. 2 cuts the tail of words seen once, a long
            flat step that a line through all types bends to.

    Returns:
        `zipf` = -slope, `r_squared` of the line (1.0 if all counts are equal: the flat line passes through them) and
        `types`, the number of types on the line.

    Raises:
        ValueError: fewer than two types are left, or min_count below 1.

    >>> fit = zipf_fit([60, 30, 20, 15, 12])  # 60 / rank
    >>> round(fit["zipf"], 6), round(fit["r_squared"], 6), fit["types"]
    (1.0, 1.0, 5)
    """
    if min_count < 1:
        raise ValueError(f"min_count ({min_count}) must be at least 1; 1 keeps every type.")
    counts = sorted((count for count in counts if count >= min_count), reverse=True)
    if len(counts) < 2:
        raise ValueError(
            f"texts must hold at least 2 types that occur {min_count} times or more because a line needs two points, "
            f"but there are {len(counts)}; pass more text or a smaller min_count."
        )
    x = [math.log(rank) for rank in range(1, len(counts) + 1)]
    y = [math.log(count) for count in counts]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xx = math.fsum((a - mean_x) ** 2 for a in x)
    yy = math.fsum((b - mean_y) ** 2 for b in y)
    xy = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    flat = counts[0] == counts[-1]
    return {
        "zipf": 0.0 if flat else -xy / xx,
        "r_squared": 1.0 if flat else min(1.0, xy**2 / (xx * yy)),
        "types": len(counts),
    }


def zipf_scores(
    texts: Iterable[str | Sequence[int]],
    tokenizer: Callable[[str], Sequence[Hashable]] | None = None,
    min_count: int = 1,
) -> dict[str, float]:
    """`zipf_fit` of all texts together. Compare collections of the same size: the coefficient depends on it.

    Args:
        texts: strings, or token ids as the model wrote them (prompts and padding cut off).
        tokenizer: splits strings: a transformers tokenizer (its special tokens are left out), or any callable from a
            string to a list. By default lower-cased words and punctuation marks.
        min_count: see `zipf_fit`.

    Raises:
        ValueError: no texts, an empty text, or fewer than two types.

    >>> zipf_scores(["The cat saw the dog.", "The dog slept."])["types"]  # the cat saw dog slept .
    6
    """
    counter: Counter = Counter()
    empty = True
    for index, text in enumerate(texts):
        tokens = _tokenize(text, tokenizer) if isinstance(text, str) else text
        if not len(tokens):
            raise ValueError(f"texts[{index}] ({text!r}) must hold a token; drop empty texts.")
        counter.update(tokens)
        empty = False
    if empty:
        raise ValueError("texts must hold at least one text.")
    return zipf_fit(counter.values(), min_count)


def _tokenize(text: str, tokenizer: Callable[[str], Sequence[Hashable]] | None) -> Sequence[Hashable]:
    if tokenizer is None:
        return _WORDS.findall(text.lower())  # "The" and "the" are one word
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # a transformers tokenizer
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(text)
