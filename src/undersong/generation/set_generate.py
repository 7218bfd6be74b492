"""Generation from prompts with sets: one forward pass over the prompt, then stock decoding.

Set-based prompting (McIlroy-Young et al., "Order-Independence Without Fine Tuning", NeurIPS 2024, arXiv 2406.06581).
Tokens after the last set see everything before them, so only the prompt needs a mask; afterwards the only trace of the
sets are positions that lie below the number of tokens. The loops are the model's own. No state but the arguments.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .masks import attention_window, base_model, check_custom_attention, empty_cache, to_model_mask
from .set_cache import SetCache
from .set_encoding import SetPromptEncoding, set_attention

_SAMPLE_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_BEAM_MODES = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


class SetBasedGenerate:
    """`model.generate(**encoding.generate_kwargs(), custom_generate=SetBasedGenerate())`: sets have no order.

    Logits processors, warpers, stopping criteria, sampling, several sequences and beams are those of `generate()`.
    Without a set of at least two members it does exactly what `generate()` does.

    Args:
        streamer: gets the prompt, every token and `end()`. Give it here: `generate()` does not hand on its own, nor an
            `assistant_model`, which would silently go unused.
        decode_positions: "logical": new tokens follow the longest member. "physical": they are numbered by all tokens
            before them, as by the authors' code.
        set_cache: remembers members from call to call.

    Raises:
        ValueError: when made: an unknown value. When called: models, caches and decoding modes that do not allow for
            it, a prompt that ends with a set, or positions that do not belong to the sets.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> config = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**config, pad_token_id=0, eos_token_id=None))
    >>> encoding = SetPromptEncoding(  # 3, {4 5, 6}, 7
    ...     input_ids=torch.tensor([[3, 4, 5, 6, 7]]),
    ...     attention_mask=torch.ones(1, 5, dtype=torch.long),
    ...     position_ids=torch.tensor([[0, 1, 2, 1, 3]]),
    ...     segment_ids=torch.tensor([[[-1, -1], [0, 0], [0, 0], [0, 1], [-1, -1]]]),
    ...     permutation=[[(0, 1)]],
    ... )
    >>> model.generate(**encoding.generate_kwargs(), custom_generate=SetBasedGenerate(), max_new_tokens=2).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        streamer: BaseStreamer | None = None,
        decode_positions: str = "logical",
        set_cache: SetCache | None = None,
    ):
        if decode_positions not in ("logical", "physical"):
            raise ValueError(f"decode_positions ({decode_positions!r}) must be 'logical' or 'physical'.")
        self.streamer, self.decode_positions, self.set_cache = streamer, decode_positions, set_cache

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        set_segment_ids: torch.Tensor | None = None,
        **model_kwargs,
    ):
        loop = self._loop(model, generation_config)
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            **({} if self.streamer is None else {"streamer": self.streamer}),
        }
        prefilled = model
        if set_segment_ids is not None and _has_choice(set_segment_ids):
            _check_call(model, input_ids, generation_config, set_segment_ids, model_kwargs)
            prefilled = self._prefill(model, input_ids, set_segment_ids.to(input_ids.device), model_kwargs)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        return loop(prefilled, input_ids, **arguments, **model_kwargs)

    def _loop(self, model, generation_config: GenerationConfig):
        mode = generation_config.get_generation_mode()
        if mode in _SAMPLE_MODES:
            return type(model)._sample
        if mode not in _BEAM_MODES:
            raise ValueError(f"set-based prompting cannot run {mode.value}; use sampling, greedy or beam search.")
        if self.streamer is not None:
            raise ValueError(f"streamer needs num_beams=1 (got {generation_config.num_beams}): beams change the past.")
        return type(model)._beam_search

    def _prefill(self, model, input_ids, segment_ids, model_kwargs: dict) -> _Prefilled:
        """Reads every prompt once, whatever the number of beams and sequences; sets the positions to go on from."""
        copies = len(input_ids) // len(segment_ids)
        mask, positions = model_kwargs["attention_mask"], model_kwargs["position_ids"]
        mask = torch.ones_like(input_ids) if mask is None else mask
        options = {
            name: value[::copies] if torch.is_tensor(value) and value.ndim and len(value) == len(input_ids) else value
            for name, value in model_kwargs.items()
            if name not in ("attention_mask", "position_ids", "past_key_values", "use_cache")
        }
        outputs = _forward(
            model,
            input_ids[::copies],
            mask[::copies],
            positions[::copies],
            segment_ids,
            model_kwargs["past_key_values"],
            self.set_cache,
            options,
        )
        if copies > 1:
            outputs.past_key_values.batch_repeat_interleave(copies)
            for name, value in outputs.items():
                if name != "past_key_values":
                    outputs[name] = _repeated(value, copies)
        if self.decode_positions == "physical":
            positions = positions.clone()
            positions[:, -1] = mask.sum(1) - 1
            model_kwargs["position_ids"] = positions
        return _Prefilled(model, outputs)


def set_prefill(
    model, encoding: SetPromptEncoding, *, set_cache: SetCache | None = None, new_tokens: int = 0
) -> tuple[DynamicCache, torch.Tensor, torch.LongTensor]:
    """Read prompts with sets, for decoding loops of one's own.

    Args:
        encoding: on the model's device; every prompt ends with text.
        set_cache: remembers members from call to call (then without gradients).
        new_tokens: how many tokens will follow; models with sliding windows are checked for them.

    Returns:
        The filled cache, logits `[batch, vocabulary]` of the first new token, and its position `[batch]`. Further
        tokens need `position_ids` that count up from there and the 2-D `attention_mask`, extended by ones.

    Raises:
        ValueError: see `SetBasedGenerate`.
    """
    check_custom_attention(model)
    choice = _has_choice(encoding.segment_ids)
    if choice:
        _check_prompt(model, encoding.segment_ids, encoding.input_ids.shape[1] + new_tokens)
    cache = empty_cache(model)
    options = {"logits_to_keep": 1} if base_model(model)._supports_logits_to_keep() else {}
    tensors = (encoding.input_ids, encoding.attention_mask, encoding.position_ids, encoding.segment_ids)
    outputs = _forward(model, *tensors, cache, set_cache if choice else None, options)
    return cache, outputs.logits[:, -1], encoding.position_ids[:, -1] + 1


class _Prefilled:
    """A model whose prompt has been read already; everything else is the model's."""

    def __init__(self, model, outputs):
        self._model, self._outputs = model, outputs

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)

    def _prefill(self, *args, **kwargs):
        outputs, self._outputs = self._outputs, None  # the logits of a long prompt should not live on
        return outputs


def _forward(model, input_ids, attention_mask, position_ids, segment_ids, cache, set_cache, options: dict):
    if set_cache is not None:
        tensors = (input_ids, attention_mask, position_ids, segment_ids)
        return set_cache.prefill(model, *tensors, cache, **options)
    mask = attention_mask
    if _has_choice(segment_ids):
        mask = to_model_mask(set_attention(segment_ids, attention_mask), model)
    return model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        **options,
    )


def _has_choice(segment_ids: torch.Tensor) -> bool:
    """Whether there is a set of at least two members: members are numbered from 0."""
    return bool((segment_ids[..., 1::2] > 0).any())


def _check_prompt(model, segment_ids: torch.Tensor, tokens: int) -> None:
    ends_with_set = (segment_ids[:, -1, 0] >= 0).nonzero().flatten().tolist()
    if ends_with_set:
        raise ValueError(
            f"prompt {ends_with_set[0]} ends with a set, so there is no last token to go on from; add text after it."
        )
    window = attention_window(model)
    if window is not None and tokens > window:
        raise ValueError(
            f"prompt and new tokens come to {tokens}, but {type(base_model(model)).__name__} has layers that keep the "
            f"last {window} tokens, which depends on the order of members; use at most {window}."
        )


def _check_call(model, input_ids, generation_config, segment_ids, model_kwargs: dict) -> None:
    check_custom_attention(model)
    rows, length = input_ids.shape
    if segment_ids.ndim != 3 or rows % len(segment_ids) or segment_ids.shape[1] != length:
        raise ValueError(
            f"set_segment_ids (shape {list(segment_ids.shape)}) do not fit input_ids (shape {[rows, length]}); pass "
            "**encoding.generate_kwargs()."
        )
    cache = model_kwargs.get("past_key_values")
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    if not isinstance(cache, DynamicCache) or cache.offloading or not set(map(type, cache.layers)) <= known:
        kind = "none, use_cache=False" if cache is None else type(cache).__name__
        raise ValueError(f"the cache ({kind}) must be a DynamicCache of attention layers, not offloaded.")
    if cache.get_seq_length():
        raise ValueError(f"past_key_values hold {cache.get_seq_length()} tokens; sets need an empty cache.")
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size ({generation_config.prefill_chunk_size}) would cut sets apart; leave it None."
        )
    # The last new token is never read.
    _check_prompt(model, segment_ids, generation_config.max_length - 1)
    mask, positions = model_kwargs["attention_mask"], model_kwargs["position_ids"]
    usual = (torch.ones_like(input_ids) if mask is None else mask).cumsum(1) - 1
    if torch.equal(positions.where(usual >= 0, usual), usual):
        raise ValueError("position_ids do not restart in the members of a set; pass **encoding.generate_kwargs().")
    prepared = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1, **model_kwargs, is_first_iteration=False
    )
    if prepared.get("position_ids") is None or not torch.equal(prepared["position_ids"], positions[:, -1:]):
        raise ValueError(f"{type(model).__name__} makes position_ids of its own while generating; use another model.")


def _repeated(value, copies: int):
    if torch.is_tensor(value):
        return value.repeat_interleave(copies, 0)
    return tuple(_repeated(item, copies) for item in value) if isinstance(value, tuple) else value
