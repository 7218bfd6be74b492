"""`generate()` for a vocabulary that differs from batch to batch.

transformers takes the vocabulary from the logits wherever a decoding loop runs; what still asks the configuration, or
expects token ids as the input of an encoder-decoder, is replaced here.
"""

import copy
from types import SimpleNamespace

import torch
from transformers.generation import GenerationMixin, LogitsProcessorList

from ...generation.pointer_processors import decoding_steps, pointer_processors
from ..cache import RecurrentGenerationMixin


class PointerGenerationMixin(RecurrentGenerationMixin):
    """Items in any of their forms as the prompt; as many new ids by default as the answer can need.

    `generate(task=...)`, or `model.generation_config.task` to keep and save it, makes every output a valid "tour",
    "permutation", "hull" (convex with `strict_geometry=True`) or "triangulation". Without `max_length` and
    `max_new_tokens` an answer to the task always fits; without a task that is n + 2 ids: every item once, one of them
    again (a closed polygon), and the end.
    """

    def _prepare_generation_config(self, generation_config, **kwargs):
        rules = {}
        for name in ("task", "strict_geometry"):  # the call decides, else its configuration, else the model's
            default = getattr(generation_config, name, None)
            rules[name] = kwargs.pop(name, getattr(self.generation_config, name, None) if default is None else default)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in rules.items():
            setattr(generation_config, name, value)
        return generation_config, model_kwargs

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        if inputs is not None and not inputs.is_floating_point():
            if model_kwargs.get("input_ids") is not None:
                raise ValueError("inputs and input_ids are both given; pass the items once.")
            inputs, model_kwargs = None, model_kwargs | {"input_ids": inputs}
        given = [name for name in ("input_values", "input_ids", "inputs_embeds") if model_kwargs.get(name) is not None]
        if inputs is not None:
            given.append("inputs")
        if len(given) > 1:
            raise ValueError(f"items are given as {' and '.join(given)}; pass exactly one of them.")
        if given and given[0] in ("input_ids", "inputs_embeds"):
            return model_kwargs.pop(given[0]), given[0], model_kwargs
        if not given and model_kwargs.get("encoder_outputs") is None:
            raise ValueError(
                "generate() got no items; pass input_values, input_ids, inputs_embeds, or encoder_outputs of them."
            )
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_special_tokens(self, generation_config, kwargs_has_attention_mask=None, **kwargs):
        # items without a mask are all valid: nothing has to be guessed from pad tokens, so no warning that it cannot
        super()._prepare_special_tokens(generation_config, True, **kwargs)

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, inputs_tensor, **kwargs):
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = decoding_steps(generation_config.task or "hull", inputs_tensor.shape[1])
        return super()._prepare_generated_length(
            generation_config, has_default_max_length, *args, inputs_tensor=inputs_tensor, **kwargs
        )

    def _get_logits_processor(
        self, generation_config, *args, encoder_input_ids=None, logits_processor=None, model_kwargs=None, **kwargs
    ):
        if generation_config.task is not None:
            rules = pointer_processors(
                generation_config.task,
                encoder_input_ids,
                model_kwargs.get("attention_mask"),
                strict_geometry=bool(generation_config.strict_geometry),
            )
            # in front of everything that looks at how likely an id is
            logits_processor = LogitsProcessorList([*rules, *(logits_processor or [])])
        return super()._get_logits_processor(
            generation_config,
            *args,
            encoder_input_ids=encoder_input_ids,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            **kwargs,
        )

    def compute_transition_scores(self, sequences, scores, beam_indices=None, normalize_logits=False):
        """As in transformers, with the vocabulary of these scores."""
        config = copy.copy(self.config)
        config.vocab_size = scores[0].shape[-1]
        view = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
        return GenerationMixin.compute_transition_scores(view, sequences, scores, beam_indices, normalize_logits)

    def prepare_decoder_input_ids_from_labels(self, labels):
        """Decoder inputs of teacher forcing: the start, then every label but the last, with 0 for -100."""
        ids = torch.cat([labels.new_zeros(len(labels), 1), labels[:, :-1]], 1)
        return ids.clamp(min=0)


__all__ = ["PointerGenerationMixin"]
