"""One config for all decoding methods: it builds the processors and the loop, and lives beside a model.

`DecodingConfig` is plain data. `decoding_config.json` beside the weights makes a model carry its decoding as
`generation_config.json` makes it carry its sampling settings. Which methods go together says `decoding_pairs`; what
does not is refused when the config is made, or when it meets the model and the arguments of a call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import LogitsProcessorList
from transformers.utils import cached_file

from .decoding_loop import DecodingLoop, check_methods, continuous, run, without_padding
from .decoding_prompt import encode, is_chat
from .decoding_values import arguments_of, check_arguments, checked_generation, plain, stock_config
from .grammar_penalty import GrammarRepetitionPenalty
from .mbr import MBR
from .repetition_cap import SelfReinforcementCapLogitsProcessor
from .set_generate import SetBasedGenerate
from .typical import LocallyTypicalLogitsWarper

FILE_NAME = "decoding_config.json"


@dataclass(frozen=True)
class DecodingConfig:
    """How a model decodes.

    Args:
        typical_mass: probability that locally typical sampling keeps, in (0, 1]; switches sampling on.
        typical_reference: "processed" (behind temperature, top-k and top-p, where `typical_p` acts) or "model" (before
            them). Sampling has top_k=50 unless `generation` says otherwise.
        repetition_cap: how likely the next copy of a stretch may be at most, as a factor in [0, 1] on the copy before;
            or arguments of `SelfReinforcementCapLogitsProcessor` (`score_prompt=True` scores with the model itself).
        grammar_penalty: a language such as "python", or arguments of `GrammarRepetitionPenalty`.
        set_prompting: prompts may hold sets, `<|start_2d|>a<|split_2d|>b<|end_2d|>`, whose order has no influence.
        read_times: how often the prompt's `<document>...</document>` is read.
        mbr: number of samples to choose from, or arguments of `MBR`; switches sampling on.
        generation: fields of transformers' `GenerationConfig`, such as temperature, top_p or max_new_tokens.

    Processors act in this order: stock ones such as `repetition_penalty`, the caller's, the grammar penalty, the cap,
    typical sampling of the "model", temperature, top-k, top-p, min-p, typical sampling of what is "processed". The cap
    comes after everything that changes probabilities, because it must know the probability of the chosen token, and
    before everything that cuts tokens off, because it needs others to give probability to.

    Raises:
        ValueError: a value out of range, an unknown field, or two methods that do not compose.

    >>> config = DecodingConfig(typical_mass=0.9, repetition_cap=0.5, generation={"top_k": 0})
    >>> config.generation
    {'do_sample': True, 'top_k': 0}
    >>> DecodingConfig(repetition_cap=0.5, generation={"num_beams": 4})
    Traceback (most recent call last):
    ValueError: repetition_cap and num_beams do not compose because the cap remembers each row's history, and beam
    search moves rows; use num_beams=1, or no_repeat_ngram_size with beams.
    """

    typical_mass: float | None = None
    typical_reference: str = "processed"
    repetition_cap: float | dict | None = None
    grammar_penalty: str | dict | None = None
    set_prompting: bool = False
    read_times: int = 1
    mbr: int | dict | None = None
    generation: dict = field(default_factory=dict)

    def __post_init__(self):
        generation = checked_generation(self.generation)
        if self.typical_mass is not None or self.mbr is not None:
            generation = {"do_sample": True, **generation}
        # a frozen dataclass owns its values: later changes of the caller's dicts must not reach it
        for name in ("repetition_cap", "grammar_penalty", "mbr"):
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, plain(value, name))
        object.__setattr__(self, "generation", generation)
        self._check_values()
        check_methods(self.methods, stock_config(generation))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are switched on, by their names in `decoding_pairs.METHODS`."""
        switched_on = {
            "typical_mass": self.typical_mass is not None,
            "repetition_cap": self.repetition_cap is not None,
            "grammar_penalty": self.grammar_penalty is not None,
            "set_prompting": self.set_prompting,
            "read_times": self.read_times > 1,
            "mbr": self.mbr is not None,
        }
        return tuple(name for name, on in switched_on.items() if on)

    def processors(self, model, tokenizer) -> LogitsProcessorList:
        """New processors for `generate(logits_processor=...)`, for servers and loops of your own.

        There they act before temperature and the other warpers, so typical sampling needs `typical_reference="model"`.

        Raises:
            ValueError: typical sampling with `typical_reference="processed"`.
        """
        if self.typical_mass is not None and self.typical_reference == "processed":
            raise ValueError(
                "typical_reference ('processed') needs a place behind the warpers of generate(), which a list of"
                " processors does not have; use .loop(), or typical_reference='model'."
            )
        return LogitsProcessorList(self._processors(tokenizer, model, 1))

    def loop(
        self,
        model,
        tokenizer,
        streamer=None,
        *,
        assistant_model=None,
        assistant_tokenizer=None,
        synced_gpus: bool | None = None,
    ) -> DecodingLoop:
        """The loop for `model.generate(**inputs, **config.generation, custom_generate=loop)`.

        The inputs are those of `prepare`. Streamer and assistant are given here and not to `generate()`, which does
        not hand them on to loops.
        """
        decode = None
        if self.mbr is not None:
            decode = MBR(**arguments_of(self.mbr, "num_samples"), tokenizer=tokenizer, streamer=streamer)
        elif self.set_prompting:
            decode = SetBasedGenerate(streamer=streamer)
        if self.mbr is not None and self.set_prompting:
            decode = functools.partial(_choose_among_sets, decode)
        return DecodingLoop(
            self.methods,
            functools.partial(self._processors, tokenizer),
            decode,
            streamer=streamer,
            assistant_model=assistant_model,
            tokenizer=tokenizer,
            assistant_tokenizer=assistant_tokenizer,
            synced_gpus=synced_gpus,
        )

    def prepare(self, tokenizer, prompt, *, padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Model inputs of one prompt or several, after the prompt methods.

        Args:
            prompt: a text, a chat (list of messages), or a list of texts or of chats.
            padding_side: "right" for encoder-decoder models.

        Returns:
            `input_ids` and `attention_mask`, and with set prompting `position_ids` and `set_segment_ids`: what
            `generate()` takes.

        Raises:
            ValueError: texts and chats mixed, no document to read again, or several prompts without a padding token.
        """
        return encode(tokenizer, prompt, self.read_times, self.set_prompting, padding_side)

    def to_dict(self) -> dict:
        """The values that are not defaults, as JSON has them."""
        defaults = {f.name: f.default for f in fields(self)} | {"generation": {}}
        values = {name: copy.deepcopy(getattr(self, name)) for name in defaults}
        return {name: value for name, value in values.items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict) -> DecodingConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown fields, or whatever the class raises for a value.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict):
            raise ValueError(f"a decoding config must be an object of {', '.join(known)}, got {values!r}.")
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown fields {', '.join(unknown)}; a decoding config has {', '.join(known)}.")
        return cls(**values)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes `decoding_config.json` into a folder, which is made if need be; returns its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> DecodingConfig:
        """Reads `decoding_config.json` from a folder or a Hub repository.

        Raises:
            OSError: there is none.
            ValueError: it is not valid; the message names the file.
        """
        return cls.from_file(cached_file(os.fspath(folder_or_repo), FILE_NAME, revision=revision, token=token))

    @classmethod
    def beside(cls, model, revision: str | None = None) -> DecodingConfig:
        """What the folder or repository of a loaded model holds; the defaults if it holds none.

        A model does not know its revision, so name any but the main one. A repository is asked once per process.
        """
        name = getattr(model.config, "_name_or_path", "")
        path = Path(name, FILE_NAME) if name and os.path.isdir(name) else name and _in_repository(name, revision)
        return cls.from_file(path) if path and os.path.exists(path) else cls()

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> DecodingConfig:
        """Reads a JSON file.

        Raises:
            OSError: there is none.
            ValueError: it is not valid; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _processors(self, tokenizer, model, min_tokens_to_keep: int) -> list:
        processors = []
        if self.grammar_penalty is not None:
            processors.append(GrammarRepetitionPenalty(tokenizer, **arguments_of(self.grammar_penalty, "language")))
        if self.repetition_cap is not None:
            processors.append(_cap(self.repetition_cap, model, tokenizer))
        if self.typical_mass is not None:
            processors.append(
                LocallyTypicalLogitsWarper(
                    self.typical_mass, min_tokens_to_keep=min_tokens_to_keep, reference=self.typical_reference
                )
            )
        return processors

    def _check_values(self) -> None:
        if self.typical_mass is not None:
            if isinstance(self.typical_mass, bool) or not isinstance(self.typical_mass, int | float):
                raise ValueError(f"typical_mass ({self.typical_mass!r}) must be a number in (0, 1] or None.")
            LocallyTypicalLogitsWarper(self.typical_mass)
            if self.generation.get("typical_p") is not None:
                raise ValueError(
                    f"typical_mass ({self.typical_mass}) and generation's typical_p ({self.generation['typical_p']})"
                    " are the same method; give one."
                )
        if self.typical_reference not in ("processed", "model"):
            raise ValueError(f"typical_reference ({self.typical_reference!r}) must be 'processed' or 'model'.")
        if not isinstance(self.set_prompting, bool):
            raise ValueError(f"set_prompting ({self.set_prompting!r}) must be True or False.")
        if isinstance(self.read_times, bool) or not isinstance(self.read_times, int) or self.read_times < 1:
            raise ValueError(f"read_times ({self.read_times!r}) must be a positive integer; 2 reads a document twice.")
        if self.repetition_cap is not None:
            check_arguments(self.repetition_cap, (int, float), "repetition_cap", SelfReinforcementCapLogitsProcessor)
            _cap(self.repetition_cap, None, None)
        if self.grammar_penalty is not None:
            check_arguments(self.grammar_penalty, str, "grammar_penalty", GrammarRepetitionPenalty)
        if self.mbr is not None:
            check_arguments(self.mbr, int, "mbr", MBR)
            with contextlib.suppress(ImportError):  # of sacrebleu, which is missed only when it is to run
                MBR(**arguments_of(self.mbr, "num_samples"), tokenizer=object())


def generate(
    model,
    tokenizer,
    prompt: str | Sequence,
    config: DecodingConfig | None = None,
    *,
    streamer=None,
    return_ids: bool = False,
    **generation_kwargs,
):
    """Continues a prompt with all methods of a config.

    Args:
        prompt: a text, a chat (list of messages), or a list of texts or of chats.
        config: by default what the model's folder or repository holds (`decoding_config.json`, of the main revision),
            else plain decoding.
        streamer: a transformers streamer; when the call fails, it is ended, so that no reader waits for ever.
        return_ids: token ids instead of texts, without padding.
        generation_kwargs: arguments of `model.generate()` for this call, above the config's `generation`:
            max_new_tokens, num_return_sequences, assistant_model, logits_processor, stop_strings, ...
            `cache_implementation="paged"` batches continuously.

    Returns:
        The continuation; with `num_return_sequences` above 1 a list of them; for several prompts a list of that.

    Raises:
        ValueError: two methods that do not compose, here or in the config.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?")
    >>> size = dict(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**size, pad_token_id=0, eos_token_id=None))
    >>> config = DecodingConfig(repetition_cap=0.5, generation={"max_new_tokens": 3})
    >>> len(generate(model, tokenizer, "to be", config, return_ids=True))
    3
    """
    try:
        config = DecodingConfig.beside(model) if config is None else config
        arguments = {**config.generation, **generation_kwargs}
        settings = copy.deepcopy(arguments.get("generation_config") or model.generation_config)
        others = settings.update(**{name: value for name, value in arguments.items() if name != "generation_config"})
        given = (arguments.get(name) for name in ("assistant_model", "past_key_values"))
        check_methods(config.methods, settings, model, streamer, *given)
        if settings.cache_implementation == "paged" and config.typical_mass and config.typical_reference == "model":
            raise ValueError(
                "typical_reference ('model') needs a place before the warpers of generate(), which continuous batching"
                " does not offer; use typical_reference='processed'."
            )
        if settings.pad_token_id is None and tokenizer.pad_token_id is not None:
            arguments["pad_token_id"] = settings.pad_token_id = tokenizer.pad_token_id
        several, returned = not (isinstance(prompt, str) or is_chat(prompt)), settings.num_return_sequences or 1
        padding_side = "right" if model.config.is_encoder_decoder else "left"
        inputs = config.prepare(tokenizer, prompt, padding_side=padding_side)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        if settings.cache_implementation == "paged":
            settings.typical_p = config.typical_mass or settings.typical_p  # processors come from the settings alone
            new = continuous(model, inputs, settings, returned, others)
        else:
            loop = functools.partial(config.loop, model)
            output = run(model, loop, **inputs, **arguments, tokenizer=tokenizer, streamer=streamer)
            output = output if torch.is_tensor(output) else output.sequences
            start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            new = [without_padding(row, settings) for row in output[:, start:].tolist()]
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise
    results = new if return_ids else tokenizer.batch_decode(new, skip_special_tokens=True)
    if returned > 1:
        results = [results[i : i + returned] for i in range(0, len(results), returned)]
    return results if several else results[0]


@functools.cache
def _in_repository(name: str, revision: str | None) -> str | None:
    return cached_file(
        name,
        FILE_NAME,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


class _WithSets:
    """A model that samples from prompts with sets; everything else is the model's."""

    def __init__(self, model, segment_ids):
        self._model, self._segment_ids = model, segment_ids

    def __getattr__(self, name):
        return getattr(self._model, name)

    def _sample(self, *arguments, **model_kwargs):
        return SetBasedGenerate()(self._model, *arguments, set_segment_ids=self._segment_ids, **model_kwargs)


def _choose_among_sets(choose: MBR, model, input_ids, *, set_segment_ids=None, **arguments):
    return choose(_WithSets(model, set_segment_ids), input_ids, **arguments)


def _cap(value, model, tokenizer) -> SelfReinforcementCapLogitsProcessor:
    arguments = arguments_of(value, "penalty")
    arguments["score_prompt"] = model if arguments.get("score_prompt") else None
    if tokenizer is not None:
        arguments.setdefault("pad_token_id", tokenizer.pad_token_id)
    return SelfReinforcementCapLogitsProcessor(**arguments)
