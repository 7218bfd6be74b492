"""Reading a document twice, on token ids: the copies are identical, whatever a tokenizer would merge at their ends.

Arora et al., "Just read twice" (arXiv 2407.05483), section 3. `ReadTwice` repeats a span of every row inside
`generate()` and runs the stock loop on the longer prompt; it remembers nothing between calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    GenerationMode,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from .read_twice import check_times

# What counts from the beginning of the prompt and so moves when the prompt grows.
_PROMPT_LENGTHS = {
    MaxLengthCriteria: "max_length",
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    ForcedEOSTokenLogitsProcessor: "max_length",
    SuppressTokensAtBeginLogitsProcessor: "begin_index",
    ExponentialDecayLengthPenalty: "regulation_start",
    RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
}


def repeat_input_ids(ids, span, times=2, separator=()):
    """Repeats a span of token ids without tokenising again, so that the copies are identical.

    Args:
        ids: list of token ids, or a tensor of one dimension.
        span: first and one-past-last index of the document.
        times: copies.
        separator: token ids between two copies.

    Returns:
        The longer ids, a list or a tensor as given.

    Raises:
        ValueError: times below 1, or a span that is empty or leaves the ids.

    >>> repeat_input_ids([5, 6, 7, 8], (1, 3))
    [5, 6, 7, 6, 7, 8]
    """
    check_times(times)
    start, end = span
    if not 0 <= start < end <= len(ids):
        raise ValueError(f"span ({start}, {end}) must satisfy 0 <= start < end <= {len(ids)}, the number of tokens.")
    if isinstance(ids, torch.Tensor):
        return ids.new_tensor(repeat_input_ids(ids.tolist(), span, times, separator))
    copies = [token for _ in range(times - 1) for token in (*separator, *ids[start:end])]
    return [*ids[:end], *copies, *ids[end:]]


class ReadTwice:
    """Repeats a span of the prompt's tokens inside `generate()`: `model.generate(..., custom_generate=ReadTwice())`.

    `generate()` prepares everything for the prompt as given; then the span is repeated in every row, left padding,
    attention mask and positions are rebuilt, lengths counted from the prompt's beginning move along, and the stock
    loop (greedy, sampling, beams) runs. The span is given as `context_start` and `context_end` to `generate()`: ints,
    or one entry per prompt, counted in the row without its padding. With `times=1` it is stock `generate()`.

    Args:
        times: copies of the span.
        separator_ids: token ids between two copies.
        span: `(start, end)` for calls of `generate()` that name none.
        strip_repeat: return the prompt as it was given plus the continuation, not the longer prompt. Logits processors
            and stopping criteria see the longer prompt either way.
        streamer: receives the prompt that is returned, then every new token. Pass it here, not to `generate()`,
            which does not hand it to a custom loop.

    Raises:
        ValueError: times below 1. In `generate()`: no span or one outside the row, padding on the right, a prompt that
            would not fit `max_position_embeddings`, own `position_ids`, `inputs_embeds` or other input per token, a
            cache that is not empty or has a fixed size, encoder-decoder models, assisted and other special decoding.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> prompt = torch.tensor([[1, 5, 6, 7]])
    >>> output = LlamaForCausalLM(config).generate(
    ...     prompt, max_new_tokens=1, pad_token_id=0, custom_generate=ReadTwice(), context_start=1, context_end=3
    ... )
    >>> output[:, :-1]
    tensor([[1, 5, 6, 5, 6, 7]])
    """

    def __init__(
        self,
        times: int = 2,
        separator_ids: Sequence[int] = (),
        *,
        span: tuple[int, int] | None = None,
        strip_repeat: bool = False,
        streamer: BaseStreamer | None = None,
    ):
        check_times(times)
        self.times, self.separator_ids, self.span = times, list(separator_ids), span
        self.strip_repeat, self.streamer = strip_repeat, streamer

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        context_start=None,
        context_end=None,
        **model_kwargs,
    ):
        loop = self._loop(model, generation_config)
        prompt = input_ids
        if self.times > 1:
            self._check(model, input_ids, generation_config, model_kwargs)
            spans = self._spans(context_start, context_end, input_ids, generation_config)
            input_ids, model_kwargs = self._repeat(model, input_ids, spans, generation_config, model_kwargs)
            added = input_ids.shape[1] - prompt.shape[1]
            logits_processor = LogitsProcessorList(_moved(processor, added) for processor in logits_processor)
            stopping_criteria = StoppingCriteriaList(_moved(criterion, added) for criterion in stopping_criteria)
            generation_config = copy.copy(generation_config)
            generation_config.max_length += added
            generation_config._mask_length = input_ids.shape[1]
        if self.streamer is not None:
            self.streamer.put((prompt if self.strip_repeat else input_ids).cpu())
            model_kwargs["streamer"] = self.streamer
        output = loop(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )
        if not self.strip_repeat or input_ids is prompt:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        per_row = max(generation_config.num_beams, generation_config.num_return_sequences)
        given = prompt[::per_row].repeat_interleave(generation_config.num_return_sequences, 0)
        sequences = torch.cat([given, sequences[:, input_ids.shape[1] :]], 1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _loop(self, model, generation_config):
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model, whose encoder sees the whole document at once;"
                " ReadTwice needs a decoder-only model."
            )
        mode = generation_config.get_generation_mode()
        if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return type(model)._sample
        if mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE):
            if self.streamer is not None:
                raise ValueError(f"streamer cannot follow num_beams ({generation_config.num_beams}); use num_beams=1.")
            return type(model)._beam_search
        raise ValueError(f"ReadTwice cannot run {mode.value}; use greedy search, sampling or beams.")

    def _check(self, model, input_ids, generation_config, model_kwargs):
        for name in ("past_key_values", "cache_params"):
            cache = model_kwargs.get(name)
            if isinstance(cache, StaticCache):
                raise ValueError(
                    f"{name} ({type(cache).__name__}) was sized for the prompt as given, but ReadTwice makes it"
                    " longer; leave cache_implementation out."
                )
            if cache is not None and _holds_tokens(cache):
                raise ValueError(
                    f"{name} already holds tokens, in front of which nothing can be repeated; pass the whole prompt"
                    " without a cache, or use twice_state."
                )
        for name, value in model_kwargs.items():
            per_token = isinstance(value, torch.Tensor) and value.shape[:2] == input_ids.shape
            if per_token and name not in ("attention_mask", "position_ids"):
                raise ValueError(f"{name} has an entry per token, which ReadTwice does not repeat; leave it out.")
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            mask = model_kwargs.get("attention_mask")
            stock = model._prepare_position_ids_for_generation(input_ids, {"attention_mask": mask})
            if positions.shape[-1] != stock.shape[-1] or not (positions == stock).all():
                raise ValueError("position_ids cannot be given because ReadTwice makes its own; leave them out.")

    def _spans(self, start, end, input_ids, generation_config):
        """One `(start, end)` per row of the expanded batch."""
        if (start is None) != (end is None):
            raise ValueError("context_start and context_end must be given together.")
        if start is None:
            if self.span is None:
                raise ValueError(
                    "ReadTwice needs the document's place; pass context_start= and context_end= to generate(), or"
                    " ReadTwice(span=(start, end))."
                )
            start, end = self.span
        rows = input_ids.shape[0] // max(generation_config.num_beams, generation_config.num_return_sequences)
        columns = []
        for name, value in (("context_start", start), ("context_end", end)):
            value = torch.as_tensor(value).reshape(-1).tolist()
            if len(value) not in (1, rows):
                raise ValueError(f"{name} has {len(value)} entries but there are {rows} prompts; give one per prompt.")
            columns.append(value * rows if len(value) == 1 else value)
        return [pair for pair in zip(*columns, strict=True) for _ in range(input_ids.shape[0] // rows)]

    def _repeat(self, model, input_ids, spans, generation_config, model_kwargs):
        batch, length = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        pads = [0] * batch if mask is None else (mask == 0).sum(1).tolist()
        if mask is not None and any(not mask[row, pad:].all() for row, pad in enumerate(pads)):
            raise ValueError(
                "attention_mask must pad on the left only, so that the prompt's end meets the new tokens; use"
                " tokenizer.padding_side='left'."
            )
        rows = [
            repeat_input_ids(row[pad:], span, self.times, self.separator_ids)
            for row, pad, span in zip(input_ids.tolist(), pads, spans, strict=True)
        ]
        longest = max(map(len, rows))
        check_fits(model, longest, self.times, generation_config.max_length - length)
        pad_id = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        missing = [longest - len(row) for row in rows]
        longer = input_ids.new_tensor([[pad_id] * n + row for n, row in zip(missing, rows, strict=True)])
        own = {"attention_mask": None}
        if any(missing):
            valid = [[0] * n + [1] * (longest - n) for n in missing]
            own["attention_mask"] = torch.tensor(valid, device=input_ids.device)
        if "position_ids" in model_kwargs:
            own["position_ids"] = model._prepare_position_ids_for_generation(longer, own)
        return longer, model_kwargs | own


def check_fits(model, length, times, new_tokens=0):
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    # Aaren computes these for any length, whatever the size of a learned table would be
    if getattr(config, "position_embedding_type", None) in ("sinusoidal", "none"):
        limit = None
    if limit is not None and length + new_tokens > limit:
        raise ValueError(
            f"the prompt with its document {times} times ({length} tokens) and max_new_tokens ({new_tokens}) must fit"
            f" max_position_embeddings ({limit}) of {type(model).__name__}; shorten the document or use times=1."
        )


def _holds_tokens(cache):
    """Whether anything was written: attention layers count, linear attention only knows that it has a state."""
    return any(
        layer.get_seq_length() if hasattr(layer, "get_seq_length") else any(layer.has_previous_state.values())
        for layer in cache.layers
    )


def _moved(part, added):
    """A processor or criterion that counts from the prompt's beginning, as a copy that counts `added` tokens more."""
    for kind, name in _PROMPT_LENGTHS.items():
        if isinstance(part, kind) and getattr(part, name) is not None:
            part = copy.copy(part)
            setattr(part, name, getattr(part, name) + added)
    return part
