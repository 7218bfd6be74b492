"""The state after a document was read twice, from which any number of questions branch.

Arora et al., "Just read twice" (arXiv 2407.05483), in the form that serves many questions: nothing before the second
copy depends on the question, so the cache after D sep D is made once and a question costs its own length. The state
is the model's own cache, of batch 1.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch

from .repeat_tokens import check_fits, repeat_input_ids

# transformers 5.22 hands no initial state to their scan when several tokens continue a cache, so the state is lost and
# a question would be answered without the document.
_FORGET_THEIR_STATE = ("mamba", "falcon_mamba", "jamba", "zamba")


def twice_state(
    model,
    doc_ids: torch.LongTensor | Sequence[int],
    *,
    times: int = 2,
    separator_ids: Sequence[int] = (),
    prefix_ids: Sequence[int] = (),
):
    """The cache after `prefix D sep D`, from which any number of questions continue.

    The document is paid for once: a question then costs its own length. This is the form without an intro, since
    nothing before the question may depend on it.

    Args:
        model: a decoder-only model; attention, or recurrent with a cache that multi-token input continues.
        doc_ids: token ids of the document.
        times: copies.
        separator_ids: token ids between two copies.
        prefix_ids: token ids before the first copy, such as a begin-of-text token.

    Returns:
        A cache of batch 1. `branch(cache, n)` copies it for n questions; `answer` generates from it.

    Raises:
        ValueError: stock Mamba-1, Falcon-Mamba, Jamba or Zamba, which forget the state when several tokens continue
            it; a document that is empty or does not fit `max_position_embeddings`; times below 1.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> cache = twice_state(model, [5, 6, 7])
    >>> answers = answer(model, cache, [[3], [4, 8]], min_new_tokens=2, max_new_tokens=2, pad_token_id=0)
    >>> [tokens.shape for tokens in answers]
    [torch.Size([2]), torch.Size([2])]
    """
    stock = type(model).__module__.startswith("transformers.models.")
    if stock and model.config.model_type in _FORGET_THEIR_STATE:
        raise ValueError(
            f"{type(model).__name__} drops its state when several tokens continue a cache, so questions would be"
            " answered without the document; use FastMambaForCausalLM or a Mamba-2 model, or ReadTwice, which reads"
            " the prompt in one piece."
        )
    doc = torch.as_tensor(doc_ids).reshape(-1).tolist()
    ids = [*prefix_ids, *repeat_input_ids(doc, (0, len(doc)), times, separator_ids)]
    check_fits(model, len(ids), times)
    with torch.no_grad():
        output = model(torch.tensor([ids], device=model.device), use_cache=True)
    return getattr(output, _cache_name(model))


def branch(cache, copies: int):
    """`copies` rows that continue a cache of batch 1; the cache itself stays as it is."""
    cache = copy.deepcopy(cache)
    # not batch_repeat_interleave, which transformers' linear attention layers lack
    cache.reorder_cache(torch.zeros(copies, dtype=torch.long))
    return cache


def answer(model, cache, questions: Sequence[Sequence[int]], **generate_kwargs) -> list[torch.LongTensor]:
    """Generates from a state of `twice_state`, one continuation per question; the state can be used again.

    Questions of equal length run as one batch. Padding between the document and a shorter question is avoided on
    purpose: stock Mamba-2 lets its state decay over padding.

    Args:
        model: the model that made the cache.
        cache: what `twice_state` returned.
        questions: token ids per question.
        generate_kwargs: arguments of `generate()`; it must return one sequence per question.

    Returns:
        The new token ids of each question, in order.

    Raises:
        ValueError: an empty question.
    """
    lengths = [len(question) for question in questions]
    if 0 in lengths:
        raise ValueError(f"questions[{lengths.index(0)}] must hold a token, because generation starts from its end.")
    name = _cache_name(model)
    past = cache.get_seq_length() if name == "past_key_values" else 0  # transformers' Mamba caches do not count
    answers = [None] * len(questions)
    for length in sorted(set(lengths)):
        rows = [row for row, size in enumerate(lengths) if size == length]
        ids = torch.tensor([list(questions[row]) for row in rows], device=model.device)
        mask = torch.ones(len(rows), past + length, dtype=torch.long, device=model.device)
        output = model.generate(ids, attention_mask=mask, **{name: branch(cache, len(rows))}, **generate_kwargs)
        for row, tokens in zip(rows, output[:, length:], strict=True):
            answers[row] = tokens
    return answers


def _cache_name(model):
    return "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache_params"
