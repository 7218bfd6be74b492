"""How typical a text is under a language model. Needs torch and the model, nothing else.

At position t the model expects H_t = -sum_v p(v | y_<t) log p(v | y_<t) nats of information and token y_t brings
I_t = -log p(y_t | y_<t). Human text keeps |H_t - I_t| small (Meister et al., "Locally Typical Sampling", TACL 2023,
arXiv 2202.00666, section 4: the epsilon of the expected-information hypothesis); its mean is the epsilon gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def token_information(
    texts: Iterable[str | Sequence[int]],
    model,
    tokenizer=None,
    *,
    contexts: Sequence[str | Sequence[int]] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
) -> list[torch.Tensor]:
    """Entropy and information of every token of every text, in nats, at temperature 1.

    Args:
        texts: strings, or token ids of the model.
        model: a transformers causal language model; used as it is (mode, dtype, device). Sums are float32.
        tokenizer: the model's; needed for strings. What it puts before a text (`<bos>`) counts as context.
        contexts: what stood before each text, e.g. the prompts: read by the model, not scored. Tokenised apart from
            the text, so that texts keep their tokens.
        batch_size: texts, or windows of long texts, in one forward pass.
        max_length: tokens the model reads at once, at most; by default its `max_position_embeddings`. Longer inputs
            are read in overlapping windows.
        stride: tokens a window scores before the next one takes over; every token after the first window then has at
            least `max_length - stride` tokens before it. Default: half of `max_length`.

    Returns:
        One float32 CPU tensor `[2, tokens]` per text: row 0 the entropy before the token, row 1 its information. A
        text without any context (no `contexts`, no `<bos>`) is scored from its second token on, because nothing
        predicts the first.

    Raises:
        ValueError: no texts; a text without a token to score; strings without a tokenizer; numbers out of range.
    """
    texts = list(texts)
    inputs, starts = _encode(texts, tokenizer, contexts)
    if max_length is None:
        max_length = getattr(model.config, "max_position_embeddings", None) or max(map(len, inputs))
    if max_length < 2:
        raise ValueError(f"max_length ({max_length}) must be at least 2: one token read, one scored.")
    stride = max_length // 2 if stride is None else stride
    if not 1 <= stride < max_length:
        raise ValueError(
            f"stride ({stride}) must lie in [1, max_length - 1 = {max_length - 1}]; windows must overlap."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1.")

    results = [torch.zeros(2, len(ids) - start) for ids, start in zip(inputs, starts, strict=True)]
    windows = [
        (text, *window)
        for text, ids in enumerate(inputs)
        for window in _windows(len(ids), starts[text], max_length, stride)
    ]
    windows.sort(key=lambda window: window[2] - window[1])  # like lengths together: little padding
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        scored = _score(model, [inputs[text][begin:end] for text, begin, end, _ in batch])
        for (text, begin, end, first), values in zip(batch, scored, strict=True):
            # values[:, j] belongs to token begin + 1 + j
            results[text][:, first - starts[text] : end - starts[text]] = values[:, first - begin - 1 :]
    return results


def epsilon_gap_scores(texts: Iterable[str | Sequence[int]], model, tokenizer=None, **options) -> dict[str, float]:
    """Mean over all tokens of |entropy - information|, with the means of both.

    Takes the arguments of `token_information`.

    Returns:
        `epsilon_gap`, `nll` (mean information: the log of the perplexity) and `entropy`, in nats; `tokens`, how many
        were scored.

    >>> from types import SimpleNamespace as Space
    >>> def coin(input_ids, **_):  # after every token: 1/2, 1/4, 1/4, an entropy of 1.5 bits = 1.04 nats
    ...     return Space(logits=torch.tensor([0.5, 0.25, 0.25]).log().expand(*input_ids.shape, 3))
    >>> coin.config, coin.device = Space(max_position_embeddings=8), "cpu"
    >>> scores = epsilon_gap_scores([[1, 0, 2, 1]], coin)  # 1, 2, 2 bits: every token is half a bit off
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'epsilon_gap': 0.347, 'nll': 1.155, 'entropy': 1.04, 'tokens': 3}
    """
    entropy, information = torch.cat(token_information(texts, model, tokenizer, **options), 1).double()
    return {
        "epsilon_gap": (entropy - information).abs().mean().item(),
        "nll": information.mean().item(),
        "entropy": entropy.mean().item(),
        "tokens": information.numel(),
    }


def _encode(texts, tokenizer, contexts) -> tuple[list[list[int]], list[int]]:
    """Token ids of context + text, and the index of the first token to score."""
    if not texts:
        raise ValueError("texts must hold at least one text.")
    if contexts is not None and len(contexts) != len(texts):
        raise ValueError(f"contexts ({len(contexts)} of them) must be as many as texts ({len(texts)}).")
    if tokenizer is None and any(isinstance(item, str) for item in [*texts, *(contexts or ())]):
        raise ValueError("tokenizer (None) must be the model's tokenizer when texts or contexts are strings.")
    inputs, starts = [], []
    for index, text in enumerate(texts):
        context = ("" if isinstance(text, str) else []) if contexts is None else contexts[index]
        before = tokenizer(context)["input_ids"] if isinstance(context, str) else list(context)
        own = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else list(text)
        start = max(1, len(before))
        if not own or len(before) + len(own) <= start:
            raise ValueError(
                f"texts[{index}] ({text!r}) must hold a token that has another one before it; drop empty texts, or "
                "pass contexts."
            )
        inputs.append([*before, *own])
        starts.append(start)
    return inputs, starts


def _windows(length: int, start: int, max_length: int, stride: int):
    """(begin, end, first scored token) of windows that together score tokens start..length-1 once each."""
    first = start
    while first < length:
        end = min(length, max(max_length, first + stride))
        yield max(0, end - max_length), end, first
        first = end


@torch.no_grad()
def _score(model, rows: list[list[int]]) -> list[torch.Tensor]:
    """`[2, len(row) - 1]` per row: entropy and information of all tokens but the first, float32 on the CPU."""
    width = max(map(len, rows))
    # Padding on the right: no token of a causal model sees it, and positions count from the row's first token.
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scored = []
    for row, tokens in enumerate(rows):  # row by row: a float32 copy of all logits would be the largest tensor here
        log_p = logits[row, : len(tokens) - 1].float().log_softmax(-1)
        information = -log_p.gather(1, ids[row, 1 : len(tokens), None]).squeeze(1)
        # The clamp turns 0 * -inf into 0.
        entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
        scored.append(torch.stack([entropy, information]).cpu())
    return scored
