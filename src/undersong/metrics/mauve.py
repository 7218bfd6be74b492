"""MAUVE, the area under the divergence curve between generated and human text, through the mauve-text package.

Pillutla et al., "MAUVE: Measuring the Gap Between Neural Text and Human Text", NeurIPS 2021 (arXiv 2102.01454). Texts
are embedded by a language model and the embeddings are clustered, so scores compare only for the same embedding model,
numbers of texts and length; about a thousand texts a side are usual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mauve_score(
    texts: Sequence[str],
    references: Sequence[str],
    model=None,
    tokenizer=None,
    *,
    max_length: int = 256,
    **options,
) -> float:
    """MAUVE of generated against human text, in (0, 1]; 1 if they cannot be told apart.

        model = AutoModelForCausalLM.from_pretrained(folder)
        mauve_score(generated, human, model, tokenizer)

    Args:
        texts, references: generated and human texts, as many of one as of the other.
        model, tokenizer: embed the texts: the last layer's state of each text's last token. Any transformers causal
            language model; without them mauve-text loads its default, gpt2-large, from the Hub.
        max_length: tokens of a text that are read.
        options: further arguments of `mauve.compute_mauve`, e.g. `num_buckets`, `seed`.

    Raises:
        ImportError: mauve-text is missing.
        ValueError: no texts, an empty text, or a model without its tokenizer.
    """
    for name, group in (("texts", texts), ("references", references)):
        if not len(group):
            raise ValueError(f"{name} must hold at least one text.")
        for index, text in enumerate(group):
            if not text.strip():
                raise ValueError(f"{name}[{index}] ({text!r}) must hold a word; drop empty texts.")
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer must be given together; pass both, or neither for mauve-text's default.")
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError("MAUVE needs mauve-text; pip install 'undersong[mauve]'.") from error
    if model is None:
        result = compute_mauve(
            p_text=list(texts), q_text=list(references), max_text_length=max_length, verbose=False, **options
        )
    else:
        features = (_features(group, model, tokenizer, max_length) for group in (texts, references))
        result = compute_mauve(
            **dict(zip(("p_features", "q_features"), features, strict=True)), verbose=False, **options
        )
    return float(result.mauve)


@torch.no_grad()
def _features(texts, model, tokenizer, max_length):
    """`[texts, hidden]` float32: one text at a time, so that no padding can change a state."""
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(
            model.device
        )
        rows.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].float().cpu())
    return torch.stack(rows).numpy()
