"""How varied a text is. Plain Python, no imports beyond the standard library.

Two figures go by the name of diversity: the mean of distinct-n over n = 1..4 (Meister et al., "Locally Typical
Sampling", TACL 2023, arXiv 2202.00666, section 6, there D) and the product over n = 2..4 (Su et al., "A Contrastive
Framework for Neural Text Generation", NeurIPS 2022, arXiv 2202.06417, section 4.2). They do not compare, so each has
its own name here. distinct-n: Li et al., "A Diversity-Promoting Objective Function", NAACL 2016.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence

_WORDS = re.compile(r"\w+|[^\w\s]")


def distinct_n(tokens: Sequence[Hashable], n: int) -> float:
    """Distinct n-grams / all n-grams; 1 for fewer than n tokens, where nothing can repeat.

    Raises:
        ValueError: no tokens, or n below 1.

    >>> distinct_n("a b a b a b".split(), n=2)  # ab ba ab ba ab
    0.4
    """
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1.")
    if not len(tokens):
        raise ValueError("tokens must not be empty because nothing has no n-grams; drop empty texts.")
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def diversity_mean(tokens: Sequence[Hashable], ngrams: Sequence[int] = (1, 2, 3, 4)) -> float:
    """Mean of distinct-n over `ngrams`: D of Meister et al.

    Raises:
        ValueError: no tokens, no n, or an n below 1.

    >>> diversity_mean("a b a b".split())  # 2/4, 2/3, 2/2, 1/1
    0.7916...
    """
    return sum(_distinct(tokens, ngrams)) / len(ngrams)


def diversity_product(tokens: Sequence[Hashable], ngrams: Sequence[int] = (2, 3, 4)) -> float:
    """Product of distinct-n over `ngrams`: the diversity of SimCTG (Su et al.).

    Raises:
        ValueError: no tokens, no n, or an n below 1.

    >>> diversity_product("a b a b".split())  # 2/3 * 2/2 * 1/1
    0.6666...
    """
    return math.prod(_distinct(tokens, ngrams))


def diversity_scores(
    texts: Iterable[str | Sequence[int]], tokenizer: Callable[[str], Sequence[Hashable]] | None = None
) -> dict[str, float]:
    """All measures of this module, each the mean over texts.

    Args:
        texts: strings, or token ids as the model wrote them (prompts and padding cut off).
        tokenizer: splits strings: a transformers tokenizer (its special tokens are left out), or any callable from a
            string to a list. By default words and punctuation marks. Figures of different tokenizers do not compare,
            and neither do texts of different lengths: a longer text repeats more.

    Returns:
        `distinct_<n>` for n = 1..4, `diversity_mean` and `diversity_product`.

    Raises:
        ValueError: no texts, or an empty text.

    >>> scores = diversity_scores(["to be or not to be"])
    >>> scores["distinct_1"], scores["distinct_2"], scores["diversity_product"]
    (0.6666..., 0.8, 0.8)
    """
    totals: dict[str, float] = {}
    count = 0
    for index, text in enumerate(texts):
        tokens = _tokenize(text, tokenizer) if isinstance(text, str) else text
        if not len(tokens):
            raise ValueError(f"texts[{index}] ({text!r}) must hold a token; drop empty texts.")
        scores = {f"distinct_{n}": distinct_n(tokens, n) for n in (1, 2, 3, 4)}
        scores |= {"diversity_mean": diversity_mean(tokens), "diversity_product": diversity_product(tokens)}
        for name, score in scores.items():
            totals[name] = totals.get(name, 0.0) + score
        count += 1
    if not count:
        raise ValueError("texts must hold at least one text.")
    return {name: total / count for name, total in totals.items()}


def _distinct(tokens: Sequence[Hashable], ngrams: Sequence[int]) -> list[float]:
    if not len(ngrams):
        raise ValueError("ngrams must name at least one n; use (1, 2, 3, 4).")
    return [distinct_n(tokens, n) for n in ngrams]


# The same lines stand in every metric's folder, because each must load without the others.
def _tokenize(text: str, tokenizer: Callable[[str], Sequence[Hashable]] | None) -> Sequence[Hashable]:
    if tokenizer is None:
        return _WORDS.findall(text)
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # a transformers tokenizer
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(text)
