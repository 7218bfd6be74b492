"""How much a language model's certainty of a sentence grows with every repetition of it: the curves of Xu et al.,
"Learning to Break the Loop", NeurIPS 2022, arXiv 2206.02369, section 3. Teacher forced, nothing is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_MEASURES = {"tp": "probability", "ip": "share above the first occurrence", "wr": "share most likely"}
_POSITIONS = ("first", "middle", "end")


@torch.no_grad()
def self_reinforcement(
    model,
    tokenizer,
    sentences: Sequence[str | Sequence[int]],
    prefixes: Sequence[str | Sequence[int]],
    max_repeats: int = 20,
    batch_size: int = 4,
) -> dict:
    """Probabilities of sentences that are repeated again and again after a prefix.

    The n-th copy's token x_{n,l} is read in the context prefix, x_0, ..., x_{n-1}, x_{n,<l} (n = 0 is the first
    occurrence). Means over tokens and sentences:

        TP_n: of P(x_{n,l})    IP_n: of [P(x_{n,l}) > P(x_{0,l})]    WR_n: of [x_{n,l} is the most likely token]

    Args:
        model: a causal LM, in evaluation mode, on any device.
        tokenizer: of the model. Sentences are tokenized with a space before them and without special tokens, so that
            copies join as in running text, prefixes with special tokens.
        sentences, prefixes: texts or lists of token ids. Sentence i follows prefix i mod len(prefixes). For phrases or
            words instead of sentences, pass those.
        max_repeats: N, the number of copies after the first occurrence. A sentence has fewer if the model's context
            (`max_position_embeddings`) ends before; its tokens then count in the copies that fit.
        batch_size: rows of one forward pass.

    Returns:
        Dict of lists over n = 0 .. N (plain floats): `tp`, `ip`, `wr`; `sentences`, how many reached copy n (means are
        NaN where none did); `positions`, {"first", "middle", "end"}: the same three lists over the sentences' first
        token, last token and those between.

    Raises:
        ValueError: nothing to measure, or a sentence that the context does not hold twice.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    >>> curves = self_reinforcement(model, None, sentences=[[5, 6, 7]], prefixes=[[1, 2]], max_repeats=4)
    >>> len(curves["tp"]), curves["ip"][0], curves["sentences"]
    (5, 0.0, [1, 1, 1, 1, 1])
    """
    if max_repeats < 1:
        raise ValueError(f"max_repeats ({max_repeats}) must be at least 1: one copy after the first occurrence.")
    if not len(sentences) or not len(prefixes):
        raise ValueError(f"sentences ({len(sentences)}) and prefixes ({len(prefixes)}) must not be empty.")
    rows = _rows(model, tokenizer, sentences, prefixes, max_repeats)
    device = next(model.parameters()).device
    measured = []  # per sentence: [measures, copies, tokens]
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        width = max(len(ids) for ids, _, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in batch], device=device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, (tokens, start, length) in enumerate(batch):
            part = logits[row, start - 1 : len(tokens) - 1]
            target = ids[row, start : len(tokens), None]
            p = (part.gather(1, target).squeeze(1).float() - part.float().logsumexp(-1)).exp().view(-1, length)
            won = (part.argmax(-1, keepdim=True) == target).float().view(-1, length)
            measured.append(torch.stack([p, (p > p[0]).float(), won]).double().cpu())

    means = {position: [[] for _ in _MEASURES] for position in ("all", *_POSITIONS)}
    for n in range(max_repeats + 1):
        copies = [values[:, n] for values in measured if values.shape[1] > n]  # [measures, tokens]
        parts = {
            "all": copies,
            "first": [values[:, :1] for values in copies],
            "middle": [values[:, 1:-1] for values in copies],
            "end": [values[:, -1:] for values in copies if values.shape[1] > 1],
        }
        for position, values in parts.items():
            values = torch.cat([torch.empty(len(_MEASURES), 0), *values], 1).mean(1).tolist()
            for curve, value in zip(means[position], values, strict=True):
                curve.append(value)
    named = {position: dict(zip(_MEASURES, curves, strict=True)) for position, curves in means.items()}
    reached = [sum(values.shape[1] > n for values in measured) for n in range(max_repeats + 1)]
    return named.pop("all") | {"sentences": reached, "positions": named}


def plot_self_reinforcement(result: Mapping, path=None):
    """Draws TP, IP and WR against the number of repetitions; needs matplotlib.

    Args:
        result: what `self_reinforcement` returned, or a dict from names to such results, drawn side by side.
        path: where to save the figure, if anywhere; the suffix chooses the format.

    Returns:
        The matplotlib `Figure`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_self_reinforcement needs matplotlib; pip install 'undersong[demo]'.") from error
    results = {"": result} if "tp" in result else result
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (measure, meaning) in zip(figure.subplots(1, len(_MEASURES)), _MEASURES.items(), strict=True):
        for index, (name, curves) in enumerate(results.items()):
            axes.plot(curves[measure], color=f"C{index}", label=name or "all tokens")
            for position, style in zip(_POSITIONS, (":", "--", "-."), strict=True):
                line = curves["positions"][position][measure]
                label = None if index else f"{position} tokens"
                axes.plot(line, style, color=f"C{index}", linewidth=0.8, alpha=0.6, label=label)
        axes.set(xlabel="repetitions before", title=f"{measure.upper()}: {meaning}", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path)
    return figure


def _rows(model, tokenizer, sentences, prefixes, max_repeats) -> list[tuple[list[int], int, int]]:
    """(tokens, where the first occurrence starts, tokens of the sentence) of every sentence."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    heads = [tokenizer(x)["input_ids"] if isinstance(x, str) else list(x) for x in prefixes]
    rows = []
    for index, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            unit = tokenizer(" " + sentence.strip(), add_special_tokens=False)["input_ids"]
        else:
            unit = list(sentence)
        head = heads[index % len(heads)]
        if not unit or not head:
            raise ValueError(
                f"sentences[{index}] ({sentence!r}) and its prefix ({prefixes[index % len(heads)]!r}) must have a "
                "token each; the first token of a text has no probability."
            )
        copies = int(min(max_repeats + 1, (context - len(head)) // len(unit)))
        if copies < 2:
            raise ValueError(
                f"sentences[{index}] ({len(unit)} tokens after {len(head)} of its prefix) must fit twice into the "
                f"model's context of {context} tokens; shorten it."
            )
        rows.append((head + unit * copies, len(head), len(unit)))
    return rows
