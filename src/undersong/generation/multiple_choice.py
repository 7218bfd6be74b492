"""Multiple-choice questions whose answer does not depend on the order of the options.

The options stand in the prompt as a set (set-based prompting, McIlroy-Young et al., arXiv 2406.06581), without labels
like "A)", which would be an order again. The answer is the option that the model finds most likely as a continuation.
Pointwise mutual information as a score: Holtzman et al., "Surface Form Competition" (arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .set_cache import SetCache
from .set_encoding import SetPromptEncoding
from .set_generate import set_prefill
from .set_prompt import Pieces, SetPrompt

METHODS = ("logprob", "logprob_norm", "pmi", "authors_mean_logit")


@dataclass(frozen=True)
class MultipleChoice:
    """The answer to one question; per-option values are in the caller's order.

    Attributes:
        probs: `[options]`, softmax of the scores.
        choice: index of the best option.
        per_option_logprob: `[options]`, the scores.
    """

    probs: torch.Tensor
    choice: int
    per_option_logprob: torch.Tensor


def mcq(
    model,
    tokenizer,
    question: str,
    options: Sequence[str],
    context: str | None = None,
    *,
    method: str = "logprob",
    set_cache: SetCache | None = None,
) -> MultipleChoice:
    """Let a model choose among options that it sees in no order.

    Args:
        options: as they would be written, without labels.
        context: text that the question is about.
        method: see `score_options`.
        set_cache: remembers options from call to call.

    Raises:
        ValueError: fewer than two options; and see `score_options`.
    """
    if isinstance(options, str) or len(options) < 2:
        raise ValueError(f"options ({options!r}) must be a list of at least 2 strings.")
    scores = score_options(
        model,
        tokenizer,
        mcq_prompt(question, options, context),
        [f" {option}" for option in options],
        method,
        set_cache=set_cache,
    )
    order = scores.argsort()  # neither the sum in softmax nor a tie may depend on the caller's order
    probs = torch.empty_like(scores).index_copy_(0, order, scores[order].softmax(0))
    choice = max(range(len(options)), key=lambda i: (scores[i].item(), options[i]))
    return MultipleChoice(probs=probs, choice=choice, per_option_logprob=scores)


def mcq_prompt(question: str, options: Sequence[str], context: str | None = None) -> SetPrompt:
    """The prompt of `mcq`: options as a set of lines, context, question, and the beginning of the answer.

    The context comes after the options: it is read knowing them, which makes small models answer far more often right
    than the other order does.
    """
    text = f"\n\nText: {context}" if context else ""
    return SetPrompt(["Options:", [f"\n- {option}" for option in options], f"{text}\n\nQuestion: {question}\nAnswer:"])


@torch.no_grad()
def score_options(
    model,
    tokenizer,
    prompt: SetPrompt | str | SetPromptEncoding | Sequence[SetPrompt | str],
    options: Sequence[str] | Sequence[Sequence[str]],
    method: str = "logprob",
    *,
    null_prompt: str = "Answer:",
    set_cache: SetCache | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Score strings as continuations of a prompt.

    Every prompt is read once and continued by all its options in one batch, sorted by their tokens: an option's score
    is bit for bit the same wherever it stands in the list.

    Args:
        prompt: one prompt, or several (as a list or an encoding) with as many lists of options.
        options: continuations as they follow the prompt, usually with a space in front.
        method: "logprob": log p(option | prompt). "logprob_norm": the same per token. "pmi": log p(option | prompt) -
            log p(option | `null_prompt`), which forgives options for being rare. "authors_mean_logit": the mean logit
            of the option's t-th token at the t-th step of greedy decoding.

    Returns:
        Scores in the order given, float32 on the CPU: `[options]`, or a list of such tensors, one per prompt.

    Raises:
        ValueError: an unknown method, an option without tokens, or lists that do not match the prompts.
    """
    if method not in METHODS:
        raise ValueError(f"method ({method!r}) must be one of {METHODS}.")
    encoding = prompt if isinstance(prompt, SetPromptEncoding) else SetPrompt.encode(tokenizer, prompt)
    single = bool(options) and isinstance(options[0], str)
    lists = [options] if single else options
    prompts = len(encoding.input_ids)
    if len(lists) != prompts or not all(lists):
        sizes = [len(of_prompt) for of_prompt in lists]
        raise ValueError(f"options (lists of {sizes}) must be one list, not empty, for each of {prompts} prompts.")
    pieces = Pieces(tokenizer)
    tokens = [[pieces(option, first=False) for option in of_prompt] for of_prompt in lists]
    for of_prompt, ids in zip(lists, tokens, strict=True):
        if not all(ids):
            raise ValueError(f"option {of_prompt[ids.index(())]!r} has no tokens under this tokenizer; drop it.")
    orders = [sorted(range(len(ids)), key=ids.__getitem__) for ids in tokens]
    rows = torch.tensor([row for row, order in enumerate(orders) for _ in order], device=model.device)
    ordered = [torch.tensor(ids[i]) for ids, order in zip(tokens, orders, strict=True) for i in order]
    lengths = torch.tensor([len(ids) for ids in ordered], device=model.device)
    padded = pad_sequence(ordered, batch_first=True).to(model.device)  # [options of all prompts, longest]

    score = _mean_logits if method == "authors_mean_logit" else _log_probs
    scores = score(model, encoding.to(model.device), padded, lengths, rows, set_cache)
    if method == "logprob_norm":
        scores = scores / lengths
    if method == "pmi":
        null = SetPrompt.encode(tokenizer, null_prompt).to(model.device)
        scores = scores - _log_probs(model, null, padded, lengths, torch.zeros_like(rows), None)
    parts = scores.cpu().split([len(order) for order in orders])
    given = [part[torch.tensor(order).argsort()] for part, order in zip(parts, orders, strict=True)]
    return given[0] if single else given


def _log_probs(model, encoding, tokens, lengths, rows, set_cache) -> torch.Tensor:
    """log p(option) after prompt `rows[i]` for each row of `tokens`."""
    width = tokens.shape[1]
    cache, logits, position = set_prefill(model, encoding, set_cache=set_cache, new_tokens=width)
    total = logits.float().log_softmax(-1)[rows, tokens[:, 0]]
    if width == 1:
        return total
    cache.batch_select_indices(rows)
    seen = encoding.attention_mask[rows]
    logits = model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([seen, torch.ones_like(tokens[:, 1:])], 1),
        position_ids=position[rows, None] + torch.arange(width - 1, device=rows.device),
        past_key_values=cache,
    ).logits
    later = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    written = torch.arange(1, width, device=rows.device) < lengths[:, None]
    return total + later.where(written, 0.0).sum(1)


def _mean_logits(model, encoding, tokens, lengths, rows, set_cache) -> torch.Tensor:
    width = tokens.shape[1]
    cache, logits, position = set_prefill(model, encoding, set_cache=set_cache, new_tokens=width)
    mask, total = encoding.attention_mask, 0.0
    for step in range(width):
        if step:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = model(
                input_ids=logits.argmax(-1, keepdim=True),
                attention_mask=mask,
                position_ids=position[:, None] + step - 1,
                past_key_values=cache,
            ).logits[:, -1]
        total = total + logits.float()[rows, tokens[:, step]].where(step < lengths, 0.0)
    return total / lengths
