"""Minimum-Bayes-risk decoding: of several samples, the one that the others agree with most.

Eikema and Aziz, "Is MAP Decoding All You Need?", COLING 2020 (arXiv 2005.10283), section 5: with samples y_1..y_n of
the model, choose the candidate of largest expected utility (1/n) sum_j u(y_i, y_j), estimated on the same samples.
`MBR` samples with whatever warpers `generate()` has prepared and keeps no state between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

Utility = Callable[[list, list], Sequence[float]]


def mbr_select(
    candidates: Sequence, utility: str | Utility = "chrf", batch_size: int = 256
) -> tuple[int, torch.Tensor]:
    """The candidate with the largest mean utility against all candidates, itself included.

    A candidate that was sampled twice counts twice: the list stands for the model's distribution.

    Args:
        candidates: texts, or whatever `utility` compares.
        utility: "chrf" or "bleu" (sentence scores of sacrebleu, 0 to 100), or a callable
            `(hypotheses, references) -> scores` on two lists of equal length, larger is better. It is called with
            `batch_size` pairs at most, so that a neural utility can score them in one pass.
        batch_size: pairs per call of `utility`; n candidates make n^2 pairs.

    Returns:
        `(index, matrix)`: the first best candidate, and `[n, n]` float64 with `matrix[i, j]` the utility of i when j
        is the reference. `matrix.mean(1)` is what was compared.

    Raises:
        ValueError: no candidates, an unknown utility, or a utility that returns another number of scores.
        ImportError: sacrebleu is missing and a named utility is asked for.

    >>> def shared_words(hypotheses, references):
    ...     return [len({*h.split()} & {*r.split()}) for h, r in zip(hypotheses, references)]
    >>> index, matrix = mbr_select(["a cat sat", "a cat ran off", "the end"], shared_words)
    >>> index, matrix.mean(1)
    (1, tensor([1.6667, 2.0000, 0.6667], dtype=torch.float64))
    """
    candidates = list(candidates)
    if not candidates:
        raise ValueError("candidates must hold at least one candidate.")
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1.")
    utility = _utility(utility)
    count = len(candidates)
    pairs = [(i, j) for i in range(count) for j in range(count)]
    scores = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        new = utility([candidates[i] for i, _ in batch], [candidates[j] for _, j in batch])
        if len(new) != len(batch):
            raise ValueError(
                f"utility returned {len(new)} scores for {len(batch)} pairs; return one score per pair, in order."
            )
        scores.extend(float(score) for score in new)
    matrix = torch.tensor(scores, dtype=torch.float64).view(count, count)
    return _ranking(matrix)[0], matrix


class MBR:
    """Minimum-Bayes-risk decoding for `generate(custom_generate=MBR(...))`.

    Draws `num_samples` continuations of every prompt in one batch, exactly those that
    `generate(num_return_sequences=num_samples)` would draw after the same seed, and returns the one with the largest
    expected utility; with `num_return_sequences=k` the k best ones per prompt, best first. Temperature, top-p, typical
    sampling and own logits processors act as usual. With `return_dict_in_generate=True` everything in the output
    (scores, logits, cache) belongs to the chosen sequences.

    Args:
        num_samples: candidates per prompt; memory is that of a batch `num_samples` times as large.
        utility: see `mbr_select`.
        tokenizer: turns candidates into texts for the utility (special tokens left out). Without it a callable utility
            gets lists of token ids, end-of-text included.
        batch_size: pairs per call of the utility.
        streamer: gets the prompt, then the chosen sequence, then `end()`; pass it here, because `generate()` does not
            hand its own `streamer` on. Nothing can be streamed before all candidates are complete.

    Raises:
        ValueError: arguments out of range or a named utility without a tokenizer; when called: greedy decoding, beams,
            or `num_samples` that is no multiple of `num_return_sequences`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**config, pad_token_id=0))
    >>> longest = MBR(num_samples=4, utility=lambda hypotheses, references: [len(h) for h in hypotheses])
    >>> prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    >>> model.generate(**prompt, custom_generate=longest, do_sample=True, max_new_tokens=6).shape[0]
    1
    """

    def __init__(
        self,
        num_samples: int = 8,
        utility: str | Utility = "chrf",
        tokenizer=None,
        batch_size: int = 256,
        streamer: BaseStreamer | None = None,
    ):
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples ({num_samples}) must be a positive integer; 8 to 64 are usual.")
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1.")
        if isinstance(utility, str) and tokenizer is None:
            raise ValueError(
                f"tokenizer (None) must be given because utility={utility!r} compares texts; "
                "pass MBR(tokenizer=tokenizer)."
            )
        self.num_samples = num_samples
        self.utility = _utility(utility)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.streamer = streamer

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ):
        returned = generation_config.num_return_sequences or 1
        self._check(generation_config, returned)
        rows, length = input_ids.shape  # every prompt is there `returned` times already, and so are its candidates
        repeats = self.num_samples // returned
        prompts = input_ids
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            cache.reorder_cache(torch.arange(rows, device=input_ids.device).repeat_interleave(repeats))
        input_ids, model_kwargs = model._expand_inputs_for_generation(
            repeats, model.config.is_encoder_decoder, input_ids, **model_kwargs
        )
        output = model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        sequences = output if torch.is_tensor(output) else output.sequences

        new = sequences[:, length:]
        lengths = _lengths(new, generation_config)
        texts = self._texts(new, lengths)
        chosen = []
        for start in range(0, len(texts), self.num_samples):
            _, matrix = mbr_select(texts[start : start + self.num_samples], self.utility, self.batch_size)
            chosen += [start + index for index in _ranking(matrix)[:returned]]
        steps = max(lengths[row] for row in chosen)  # longer candidates were not chosen
        chosen = torch.tensor(chosen, device=sequences.device)
        sequences = sequences[chosen, : length + steps]

        if cache is not None:  # the caller may hold it
            cache.reorder_cache(chosen)
            if steps < new.shape[1]:
                cache = cache if cache.is_croppable else None
                if cache is not None:
                    cache.crop(steps - new.shape[1])
        if self.streamer is not None:
            self._stream(prompts, sequences[:, length:])
        if torch.is_tensor(output):
            return sequences
        return self._of_chosen(output, sequences, chosen, steps, cache)

    def _check(self, generation_config: GenerationConfig, returned: int) -> None:
        if generation_config.num_beams > 1:
            raise ValueError(
                f"num_beams ({generation_config.num_beams}) must be 1 because MBR chooses among samples, not beams; "
                "drop num_beams or MBR."
            )
        if not generation_config.do_sample:
            raise ValueError(
                "do_sample (False) must be True because MBR chooses among samples and greedy decoding has only one; "
                "pass do_sample=True."
            )
        if self.num_samples % returned:
            more = -(-self.num_samples // returned) * returned
            raise ValueError(
                f"num_samples ({self.num_samples}) must be a multiple of num_return_sequences ({returned}); "
                f"use num_samples={more}."
            )

    def _texts(self, new: torch.Tensor, lengths: list[int]) -> list:
        ids = [row[:count] for row, count in zip(new.tolist(), lengths, strict=True)]
        return ids if self.tokenizer is None else self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _stream(self, prompts: torch.Tensor, new: torch.Tensor) -> None:
        """What a streamer gets from stock `generate()`: the prompt, then every step's tokens `[batch]`."""
        self.streamer.put(prompts.cpu())
        for tokens in new.cpu().unbind(1):
            self.streamer.put(tokens)
        self.streamer.end()

    @staticmethod
    def _of_chosen(output, sequences, chosen, steps, cache):
        """The output of `_sample` with the chosen rows only, and no steps after the last chosen sequence's end."""
        fields = {"sequences": sequences, "past_key_values": cache}
        for name, value in output.items():
            if name not in fields:  # encoder_*: one entry per layer; the others: one per step
                fields[name] = _rows(value if name.startswith("encoder_") else value[:steps], chosen)
        return type(output)(**fields)


def _ranking(matrix: torch.Tensor) -> list[int]:
    """Candidates by expected utility, the best first; equal ones in the order of the list."""
    return matrix.mean(1).argsort(descending=True, stable=True).tolist()


def _lengths(new: torch.Tensor, generation_config: GenerationConfig) -> list[int]:
    """Number of new tokens of every row, its end-of-text token included, the padding after it not."""
    width = new.shape[1]
    eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    if eos is None:  # then no row ends before the others
        return [width] * new.shape[0]
    ends = torch.isin(new, eos.to(new.device))
    padding = (new == pad.to(new.device)).flip(1).cumprod(1).sum(1)  # of rows that a stop string ended
    return torch.where(ends.any(1), ends.int().argmax(1) + 1, width - padding).tolist()


def _rows(value, rows: torch.Tensor):
    """Rows of tensors in nested tuples."""
    if torch.is_tensor(value):
        return value.index_select(0, rows.to(value.device))
    return tuple(_rows(item, rows) for item in value)


def _utility(utility: str | Utility) -> Utility:
    if callable(utility):
        return utility
    if utility not in ("chrf", "bleu"):
        raise ValueError(
            f"utility ({utility!r}) must be 'chrf', 'bleu' or a callable (hypotheses, references) -> scores."
        )
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(
            f"utility={utility!r} needs sacrebleu; pip install 'undersong[metrics]', or pass a callable."
        ) from error
    # effective_order: a sentence shorter than four words has no 4-grams to match
    metric = CHRF() if utility == "chrf" else BLEU(effective_order=True)

    def scores(hypotheses: list[str], references: list[str]) -> list[float]:
        return [metric.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]

    return scores
