"""Text-generation pipelines that decode by a `DecodingConfig`.

`pipeline("text-generation", ..., pipeline_class=DecodingPipeline, decoding=config)` is the stock pipeline with the
config's prompt methods in front of the tokenizer and its loop in `generate()`. Importing this module also registers
the task "read-twice-text-generation". Pipelines hold no state beside the config.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.chat_template_utils import Chat

from .decoding_config import DecodingConfig
from .decoding_loop import with_stop_strings
from .decoding_prompt import read

_LAYOUT = ("truncation", "handle_long_generation", "tools", "documents", "tokenizer_encode_kwargs")


class DecodingPipeline(TextGenerationPipeline):
    """`TextGenerationPipeline` that decodes by a `DecodingConfig`: strings, chats, and lists of them, with batching.

    Args:
        decoding: by default what the model's folder or repository holds (`decoding_config.json`), else plain decoding.

    Arguments of a call count above `decoding.generation`, and that above the model's generation config; other than in
    the stock pipeline, nothing switches sampling on behind them. Each result's `generated_text` begins with the prompt
    as it was given, however often a document in it was read; `return_full_text=False` leaves it out.

    Raises:
        ValueError: when called: two methods that do not compose, or an option of the stock pipeline that would cut a
            prompt with sets.
    """

    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args, decoding: DecodingConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoding = DecodingConfig.beside(self.model) if decoding is None else decoding

    def preprocess(self, prompt_text, prefix="", **parameters):
        prompt = prompt_text.messages if isinstance(prompt_text, Chat) else prefix + prompt_text
        if not self.decoding.set_prompting:
            prompt = read(prompt, self.decoding.read_times)
            inputs = super().preprocess(Chat(prompt) if isinstance(prompt_text, Chat) else prompt, **parameters)
        else:
            for name in _LAYOUT:
                if parameters.get(name) is not None:
                    raise ValueError(
                        f"{name} ({parameters[name]!r}) cannot be used with set_prompting, which lays out the prompt"
                        " itself; leave it out."
                    )
            inputs = self.decoding.prepare(self.tokenizer, prompt)
            # as wide as the deepest set of its own prompt: batches are made in _forward
            inputs["set_segment_ids"] = (inputs["set_segment_ids"],)
        return {**inputs, "prompt_text": prompt_text}

    def _forward(self, model_inputs, **arguments):
        own = {}
        if "set_segment_ids" in model_inputs:
            segments = model_inputs.pop("set_segment_ids")
            own["set_segment_ids"] = _batched(segments, model_inputs["input_ids"].shape[1])
            own["position_ids"] = model_inputs.pop("position_ids")
        arguments.pop("tokenizer", None)
        held = {name: arguments.pop(name, None) for name in ("streamer", "assistant_model", "assistant_tokenizer")}
        loop = self.decoding.loop(self.model, self.tokenizer, **held)
        # the stock pipeline puts the arguments of its construction under those of a call; the config goes below both
        arguments = {**self.decoding.generation, **self._generate_kwargs, **arguments}
        arguments = with_stop_strings(arguments, self.tokenizer)
        return super()._forward(model_inputs, **arguments, **own, custom_generate=loop)


def _batched(segments, length: int) -> torch.Tensor:
    """Segment ids of single prompts as one left-padded batch; -1 is outside all sets."""
    rows = [row[0] if isinstance(row, tuple) else row for row in segments]  # each [1, its length, 2 * its levels]
    width = max(row.shape[2] for row in rows)
    pads = ((0, width - row.shape[2], length - row.shape[1], 0) for row in rows)
    return torch.cat([torch.nn.functional.pad(row, pad, value=-1) for row, pad in zip(rows, pads, strict=True)])


class ReadTwicePipeline(DecodingPipeline):
    """`DecodingPipeline` that reads the prompt's `<document>...</document>` twice, if its config says nothing else.

    Registered as the task "read-twice-text-generation".
    """

    def __init__(self, *args, decoding: DecodingConfig | None = None, **kwargs):
        super().__init__(*args, decoding=decoding, **kwargs)
        if self.decoding.read_times == 1:
            self.decoding = dataclasses.replace(self.decoding, read_times=2)


PIPELINE_REGISTRY.register_pipeline(
    "read-twice-text-generation", pipeline_class=ReadTwicePipeline, pt_model=AutoModelForCausalLM, type="text"
)
