"""The decoding loop behind `DecodingConfig`: stock `generate()` with the processors of several methods in order.

`generate(custom_generate=loop)` hands over everything it prepared, but loses the streamer, the assistant model and
the tokenizer on the way; so the loop is an object that holds them. It puts our processors between the stock ones and
delegates to the stock loop that fits, or to one of ours. Processors are made anew for every call: nothing is
remembered between calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationMode,
    LogitNormalization,
    MinPLogitsWarper,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .decoding_pairs import METHODS, check_pairs
from .typical import LocallyTypicalLogitsWarper, use_fast_typical

# The two ends of the warpers in generate(): typical sampling stands between them.
_BEFORE_TYPICAL = (TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_AFTER_TYPICAL = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    WatermarkLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    LogitNormalization,
)
_SAMPLING = ("typical_mass", "mbr")
_PAGED_OPTIONS = ("continuous_batching_config", "warmup")
# What generate() does not hand on to a loop.
_LOST = ("streamer", "assistant_model", "tokenizer", "assistant_tokenizer", "synced_gpus")


class DecodingLoop:
    """A callable for `model.generate(**inputs, custom_generate=loop)`.

    Args:
        methods: what the loop does: names of `decoding_pairs.METHODS`.
        processors: `(model, min_tokens_to_keep) -> list` of new processors, in the order in which they act.
        decode: the loop to run instead of a stock one (`SetBasedGenerate`, `MBR`); it holds its own streamer.
        streamer: gets the prompt, every token and `end()`; give it to the loop and not to `generate()`.
        assistant_model, tokenizer, assistant_tokenizer: for assisted decoding, as in `generate()`.
        synced_gpus: as in `generate()`.

    The order of all processors: those of the stock configuration (repetition penalty, minimum length, ...), the
    user's, ours, then the stock warpers from temperature on. A `LocallyTypicalLogitsWarper` with
    `reference="processed"` moves to where `typical_p` acts, behind temperature, top-k, top-p and min-p.

    Raises:
        ValueError: when called: two methods that do not compose (`docs/decoding.md`), sampling methods without
            `do_sample`, or prompts with sets for a loop without set prompting.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**config, pad_token_id=0, eos_token_id=None))
    >>> loop = DecodingLoop(["typical_mass"], lambda model, keep: [LocallyTypicalLogitsWarper(0.5)])
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> model.generate(ids, custom_generate=loop, do_sample=True, top_k=0, max_new_tokens=4).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        methods: list[str] | tuple[str, ...] = (),
        processors: Callable[..., list[LogitsProcessor]] | None = None,
        decode: Callable | None = None,
        *,
        streamer: BaseStreamer | None = None,
        assistant_model=None,
        tokenizer=None,
        assistant_tokenizer=None,
        synced_gpus: bool | None = None,
    ):
        self.methods, self.processors, self.decode = tuple(methods), processors, decode
        self.streamer, self.assistant_model = streamer, assistant_model
        self.tokenizer, self.assistant_tokenizer = tokenizer, assistant_tokenizer
        self.synced_gpus = bool(synced_gpus)

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: torch.Tensor | None = None,
        set_segment_ids: torch.Tensor | None = None,
        **model_kwargs,
    ):
        self._check(model, generation_config, set_segment_ids, model_kwargs.get("past_key_values"))
        ours = [] if self.processors is None else self.processors(model, min_tokens_to_keep(generation_config))
        self._warn_of_top_k(model, ours, generation_config)
        arguments = {
            "logits_processor": arrange(logits_processor, ours),
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            **model_kwargs,
        }
        if self.decode is not None:
            if set_segment_ids is not None:
                arguments["set_segment_ids"] = set_segment_ids
            return self.decode(model, input_ids, **arguments)

        mode = generation_config.get_generation_mode(self.assistant_model)
        name = GENERATION_MODES_MAPPING[mode]
        if "/" in name:  # transformers moved these modes to repositories of their own
            raise ValueError(f"{mode.value} has a loop of its own ({name}), which other methods cannot join; drop it.")
        options = {"synced_gpus": self.synced_gpus}
        if self.streamer is not None:
            options["streamer"] = self.streamer
        if mode == GenerationMode.ASSISTED_GENERATION:
            options |= {
                name: getattr(self, name)
                for name in ("assistant_model", "tokenizer", "assistant_tokenizer")
                if getattr(self, name) is not None
            }
            if self.assistant_tokenizer is None:  # generate() takes two tokenizers for two vocabularies
                options.pop("tokenizer", None)
        model._validate_generation_mode(mode, generation_config, options)
        if mode == GenerationMode.ASSISTED_GENERATION:
            options["inputs_tensor"] = inputs_tensor
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        # the class's method, as generate() itself does it: an instance may carry another `generate`
        return getattr(type(model), name)(model, input_ids, **arguments, **options)

    def _check(self, model, generation_config: GenerationConfig, set_segment_ids, cache) -> None:
        check_methods(self.methods, generation_config, model, self.streamer, self.assistant_model, cache)
        if set_segment_ids is not None and "set_prompting" not in self.methods:
            raise ValueError(
                "set_segment_ids were given, but this loop reads prompts as plain text; use set_prompting=True."
            )

    @staticmethod
    def _warn_of_top_k(model, ours, generation_config: GenerationConfig) -> None:
        reads_model = any(isinstance(p, LocallyTypicalLogitsWarper) and p.reference == "model" for p in ours)
        by_default = generation_config.top_k == 50  # although GenerationConfig prints None
        if reads_model and by_default and model.generation_config.top_k is None:
            warnings.warn(
                f"top_k ({generation_config.top_k}, the default when sampling) cuts what typical sampling of the"
                " model's distribution has kept; pass top_k=0 to let it decide alone.",
                stacklevel=2,
            )


def arrange(prepared: LogitsProcessorList, ours: list[LogitsProcessor]) -> LogitsProcessorList:
    """The prepared processors of `generate()` with ours between them, and with fast typical and top-p warpers.

    A cap or a penalty must act before any token is cut off: what it takes from one token goes to the others, and there
    may be no others left. It also comes before temperature, so that it compares probabilities of the model.
    """
    end = len(prepared)
    while end and isinstance(prepared[end - 1], _AFTER_TYPICAL):
        end -= 1
    start = end
    while start and isinstance(prepared[start - 1], (*_BEFORE_TYPICAL, TypicalLogitsWarper)):
        start -= 1
    modifiers = [*prepared[:start], *ours]
    later = [p for p in modifiers if isinstance(p, LocallyTypicalLogitsWarper) and p.reference == "processed"]
    sooner = [p for p in modifiers if p not in later]
    return use_fast_typical([*sooner, *prepared[start:end], *later, *prepared[end:]])


def min_tokens_to_keep(generation_config: GenerationConfig) -> int:
    """As many tokens as beams need to have a continuation besides the ends of text; 1 without beams."""
    if (generation_config.num_beams or 1) == 1:
        return 1
    eos = generation_config.eos_token_id
    return 2 if eos is None or isinstance(eos, int) else len(eos) + 1


def check_methods(
    methods, generation_config: GenerationConfig, model=None, streamer=None, assistant_model=None, cache=None
):
    """Refuses what does not compose: the methods, and what the other arguments of a call add to them.

    Raises:
        ValueError: two methods that do not compose, or a sampling method without `do_sample`.
    """
    kind = (generation_config.cache_implementation or "").removeprefix("offloaded_")
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder pair
    settings = {
        "top_p": generation_config.do_sample and (generation_config.top_p or 1.0) < 1.0,
        "do_sample": generation_config.do_sample,
        "num_beams": (generation_config.num_beams or 1) > 1,
        "assistant_model": assistant_model is not None,
        "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens,
        "streamer": streamer is not None,
        "static": kind in ("static", "hybrid") or isinstance(cache, StaticCache),
        "paged": kind == "paged",
        "encoder_decoder": model is not None and model.config.is_encoder_decoder,
    }
    active = [name for name in METHODS if name in methods or settings.get(name)]
    check_pairs(active)
    for name in _SAMPLING:
        if name in active and not generation_config.do_sample:
            raise ValueError(f"do_sample (False) must be True because {name} needs samples; pass do_sample=True.")


def run(model, make_loop: Callable[..., DecodingLoop], inputs=None, **arguments):
    """`model.generate(inputs, **arguments)` with a loop of ours, from the arguments of any `generate()` call.

    What `generate()` would lose goes into the loop, stop strings become a stopping criterion, and methods that need
    samples switch sampling on unless the call says otherwise.

    Args:
        make_loop: called with `streamer`, `assistant_model`, `tokenizer`, `assistant_tokenizer` and `synced_gpus`.
    """
    if arguments.get("custom_generate") is not None:  # an explicit loop wins over one that a repository attached
        return type(model).generate(model, inputs, **arguments)
    arguments.pop("custom_generate", None)
    lost = {name: arguments.pop(name, None) for name in _LOST}
    loop = make_loop(**lost)
    sampling = any(name in _SAMPLING for name in getattr(loop, "methods", ()))
    if sampling and arguments.get("generation_config") is None:
        arguments.setdefault("do_sample", True)
    arguments = with_stop_strings(arguments, lost["tokenizer"])
    return type(model).generate(model, inputs, custom_generate=loop, **arguments)


def with_stop_strings(arguments: dict, tokenizer) -> dict:
    """Arguments of `generate()` with `stop_strings` as a stopping criterion, which needs the tokenizer."""
    arguments = dict(arguments)
    strings = arguments.pop("stop_strings", None)
    if strings is not None:
        if tokenizer is None:
            raise ValueError(f"tokenizer (None) must be given because stop_strings ({strings!r}) are texts.")
        criteria = [*(arguments.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    return arguments


def continuous(model, inputs: dict, settings: GenerationConfig, returned: int, options: dict) -> list[list[int]]:
    """New tokens of every prompt, `returned` times each, by transformers' continuous batching.

    Args:
        settings: changed on the way.
        options: further arguments of `model.generate_batch`.
    """
    for name, value in options.items():
        if name not in _PAGED_OPTIONS:
            raise ValueError(
                f"{name} ({value!r}) has no place in continuous batching; drop cache_implementation='paged'."
            )
    settings.num_return_sequences, settings.cache_implementation = 1, None
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    prompts = [row[mask.bool()].tolist() for row, mask in rows for _ in range(returned)]
    outputs = model.generate_batch(inputs=prompts, generation_config=settings, **options)
    return [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))]


def without_padding(row: list[int], settings: GenerationConfig) -> list[int]:
    """A row up to its end-of-text token, which stays."""
    eos = settings.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    for length, token in enumerate(row, start=1):
        if token in ends:
            return row[:length]
    while row and ends and row[-1] == settings.pad_token_id:  # a stop string ended it before the others
        row = row[:-1]
    return row
