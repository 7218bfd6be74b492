"""Which decoding methods go together: one table, read by the code that refuses, by the tests and by the docs.

Every pair of `METHODS` composes unless `REFUSED` names it. A refusal is raised before any computation, and says why
and what to do instead. Plain data: this module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

METHODS = {
    "typical_mass": "locally typical sampling",
    "top_p": "nucleus sampling",
    "repetition_cap": "cap on the probability of repetitions",
    "grammar_penalty": "penalty on structural repetitions in code",
    "set_prompting": "order-free prompts",
    "read_times": "reading the document several times",
    "mbr": "minimum-Bayes-risk choice among samples",
    "do_sample": "sampling",
    "num_beams": "beam search",
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "streamer": "streaming",
    "static": "static cache",
    "paged": "continuous batching",
    "encoder_decoder": "encoder-decoder models",
}
SHORT = {
    "typical_mass": "typical",
    "repetition_cap": "cap",
    "grammar_penalty": "grammar",
    "set_prompting": "set",
    "read_times": "read",
    "do_sample": "sample",
    "num_beams": "beams",
    "assistant_model": "assisted",
    "prompt_lookup_num_tokens": "lookup",
    "encoder_decoder": "enc-dec",
}

_DRAFTS = "verifies several drafted tokens in one pass"
_ONE_ROW = "works on one sequence at a time"
_PAGED = "continuous batching regroups the rows at every step"
_NO_PAGED = "drop cache_implementation='paged'"

# (method, method) in the order of METHODS -> (why not, what to do)
REFUSED = {
    ("repetition_cap", "num_beams"): (
        "the cap remembers each row's history, and beam search moves rows",
        "use num_beams=1, or no_repeat_ngram_size with beams",
    ),
    ("repetition_cap", "paged"): (f"{_PAGED}, and the cap remembers each row's history", _NO_PAGED),
    ("grammar_penalty", "paged"): (f"{_PAGED}, and the penalty keeps each row's syntax tree", _NO_PAGED),
    ("set_prompting", "assistant_model"): (
        f"assisted decoding {_DRAFTS} and takes positions for consecutive",
        "drop assistant_model",
    ),
    ("set_prompting", "prompt_lookup_num_tokens"): (
        f"prompt lookup {_DRAFTS} and takes positions for consecutive",
        "drop prompt_lookup_num_tokens",
    ),
    ("set_prompting", "static"): (
        "the prompt's attention mask is made for a cache that grows",
        "drop cache_implementation='static'",
    ),
    ("set_prompting", "paged"): ("continuous batching makes its own attention masks", _NO_PAGED),
    ("set_prompting", "encoder_decoder"): (
        "the order-free mask is one of causal self-attention",
        "use a decoder-only model",
    ),
    ("mbr", "num_beams"): ("MBR chooses among independent samples", "use num_beams=1"),
    ("mbr", "assistant_model"): (f"assisted decoding {_ONE_ROW}, and MBR draws several", "drop assistant_model"),
    ("mbr", "prompt_lookup_num_tokens"): (
        f"prompt lookup {_ONE_ROW}, and MBR draws several",
        "drop prompt_lookup_num_tokens",
    ),
    ("mbr", "paged"): ("continuous batching runs its own loop", _NO_PAGED),
    ("num_beams", "assistant_model"): (f"assisted decoding {_ONE_ROW}", "use num_beams=1"),
    ("num_beams", "prompt_lookup_num_tokens"): (f"prompt lookup {_ONE_ROW}", "use num_beams=1"),
    ("num_beams", "streamer"): ("a beam may still be dropped after its tokens were shown", "use num_beams=1"),
    ("num_beams", "paged"): (_PAGED, _NO_PAGED),
    ("assistant_model", "prompt_lookup_num_tokens"): ("both propose the drafts", "drop one of them"),
    ("assistant_model", "static"): ("rejected drafts must leave the cache", "drop cache_implementation='static'"),
    ("assistant_model", "paged"): (f"assisted decoding {_ONE_ROW}", _NO_PAGED),
    ("prompt_lookup_num_tokens", "static"): (
        "rejected drafts must leave the cache",
        "drop cache_implementation='static'",
    ),
    ("prompt_lookup_num_tokens", "paged"): (f"prompt lookup {_ONE_ROW}", _NO_PAGED),
    ("streamer", "paged"): (
        "requests finish in any order",
        f"{_NO_PAGED}, or use model.continuous_batching_context_manager",
    ),
    ("static", "paged"): ("both are kinds of cache", "choose one"),
    ("paged", "encoder_decoder"): ("continuous batching has no cross-attention cache", _NO_PAGED),
}


def pairs() -> list[tuple[str, str]]:
    """Every pair of methods, in the order of `METHODS`."""
    return list(combinations(METHODS, 2))


def refusal(first: str, second: str) -> str | None:
    """The message for a pair that does not compose, else None.

    >>> refusal("num_beams", "repetition_cap")
    "repetition_cap and num_beams do not compose because the cap remembers each row's history, and beam search moves
    rows; use num_beams=1, or no_repeat_ngram_size with beams."
    """
    names = list(METHODS)
    first, second = sorted((first, second), key=names.index)
    if (first, second) not in REFUSED:
        return None
    why, remedy = REFUSED[first, second]
    return f"{first} and {second} do not compose because {why}; {remedy}."


def check_pairs(active: Iterable[str]) -> None:
    """Raises the first refusal among the active methods.

    Raises:
        ValueError: two of them do not compose.
    """
    for first, second in combinations(active, 2):
        message = refusal(first, second)
        if message is not None:
            raise ValueError(message)


def pair_table() -> str:
    """The table of `docs/decoding.md`: a dot where two methods compose, else the number of the reason below."""
    names = list(METHODS)
    labels = {name: SHORT.get(name, name) for name in names}
    numbers: dict[tuple[str, str], int] = {}
    for reason in REFUSED.values():
        numbers.setdefault(reason, len(numbers) + 1)

    def cell(a, b):
        if a == b:
            return ""
        reason = REFUSED.get((a, b)) or REFUSED.get((b, a))
        return str(numbers[reason]) if reason else "·"

    lines = [
        "| | " + " | ".join(labels.values()) + " |",
        "|---" * (len(names) + 1) + "|",
        *(f"| **{labels[a]}** | " + " | ".join(cell(a, b) for b in names) + " |" for a in names),
        "",
        *(f"{number}. {why[0].upper()}{why[1:]}: {remedy}." for (why, remedy), number in numbers.items()),
    ]
    return "\n".join(lines)
