"""Backbone, heads and loading that Mamba and Mamba-2 share, as mixins in front of transformers' own classes.

Padding anywhere equals the compacted row, a packed batch equals its sequences apart, and any split of a sequence
equals one pass: the mask and the offsets reach every op, and the cache holds the whole state. Caches go by two names,
`past_key_values` as everywhere and `cache_params` as transformers' Mamba has it.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput, MambaOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache import continue_cache, count_tokens
from .precision import wide
from .sequences import find_packing, is_all_valid, local_mask
from .state_space import ThinLinear, exchange_class, exchange_linear

# the Mamba authors' name for the token table -> transformers'
_OLD_NAMES = {r"(^|\.)embedding\.weight$": r"\1embeddings.weight"}


@dataclass
class StateSpaceOutput(MambaOutput):
    """transformers' output; the cache also answers to `past_key_values`."""

    @property
    def past_key_values(self):
        return self.cache_params


@dataclass
class StateSpaceCausalLMOutput(MambaCausalLMOutput):
    """transformers' output; the cache also answers to `past_key_values`."""

    @property
    def past_key_values(self):
        return self.cache_params


def exchange_classes(module, classes):
    """Gives every module below `module` (itself included) our class for its own, in place; parameters stay.

    Args:
        classes: transformers' class -> ours, which derives from it.
    """
    for part in module.modules():
        if type(part) in classes:
            exchange_class(part, classes[type(part)])
            if hasattr(part, "add_ops"):  # mixers and language models
                part.add_ops()


class StateSpacePreTrained:
    """Loading and saving in both directions between transformers' classes and ours.

    Decays and the bias of time steps stay float32 when a model is loaded in half precision, which would change them by
    percents (`_keep_in_fp32_modules_strict` of the derived classes).
    """

    _skip_keys_device_placement = ["past_key_values", "cache_params"]
    _supports_context_parallel = False

    @classmethod
    def from_pretrained(cls, *args, key_mapping=None, **kwargs):
        loaded = super().from_pretrained(*args, key_mapping=_OLD_NAMES | (key_mapping or {}), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if (used := getattr(model, "_weight_conversions", None)) is not None:
            # saving would bring the old name back, and transformers' own classes leave the table random then
            model._weight_conversions = [item for item in used if item.source_patterns != list(_OLD_NAMES)]
        return loaded

    def save_pretrained(self, *args, **kwargs):
        ours = type(self)
        stock = next((base for base in ours.__mro__ if base.__module__.startswith("transformers.models.")), ours)
        if ours.__name__.removeprefix("FSDP") != f"Fast{stock.__name__}" or self.is_remote_code():
            return super().save_pretrained(*args, **kwargs)
        # `architectures` is taken from the class's name; a head that transformers has is saved as transformers' own
        self.__class__ = type(stock.__name__, (ours,), {"__module__": ours.__module__})
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = ours


class StateSpaceBackbone:
    """The stack of blocks over token ids or embeddings.

    Forward arguments that transformers' Mamba lacks or treats otherwise:
        attention_mask: `[batch, length]` (or of everything so far), 1 for tokens, 0 for padding anywhere in the row.
        position_ids: `[batch, length]`; a restart at 0 begins a new sequence (packed input).
        seq_idx: `[batch, length]` integers that name the sequence of every token (packed input).
        cu_seq_lens_q: `[sequences + 1]` offsets of packed sequences, batch 1.
        past_key_values, cache_params: one cache under either name; `DynamicCache()` is adopted in place.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache_params=None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StateSpaceOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if past_key_values is not None and cache_params is not None and past_key_values is not cache_params:
            raise ValueError(
                "past_key_values and cache_params are two names of one argument but hold different caches; pass one."
            )
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        shape = hidden_states.shape[:2]
        mask = local_mask(attention_mask, shape[1])
        packing = find_packing(shape, mask=mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q)
        cache = continue_cache(
            cache_params if past_key_values is None else past_key_values,
            self.config.layer_types,
            wanted=not self.training and self.config.use_cache if use_cache is None else use_cache,
            packed=packing is not None,
            checkpointing=self.gradient_checkpointing and self.training,
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        valid, cu_seqlens = mask, None
        if packing is not None:
            hidden_states, cu_seqlens, mask = packing.pack(hidden_states), packing.cu_seqlens, None
        elif mask is not None and is_all_valid(mask):
            mask = None
        states = []
        for block in self.layers:
            hidden_states = block(hidden_states, mask=mask, cu_seqlens=cu_seqlens, past_key_values=cache)
            if output_hidden_states:
                states.append(hidden_states)
        hidden_states = self.norm_f(hidden_states)
        states.append(hidden_states)  # as transformers: after every block, the last one once more, normed
        if packing is not None:
            states = [packing.unpack(state, shape) for state in states]
        if cache is not None:
            count_tokens(cache, shape, valid, hidden_states.device)
        return StateSpaceOutput(
            last_hidden_state=states[-1],
            cache_params=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class StateSpaceForCausalLM:
    """A language model over a `StateSpaceBackbone`."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.add_ops()

    def add_ops(self):
        exchange_linear(self, ThinLinear, "lm_head")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache_params=None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StateSpaceCausalLMOutput:
        if labels is not None and use_cache is None:
            use_cache = False  # a loss needs no state, and Trainer would gather one with the logits
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            return_dict=True,
        )
        logits = wide(self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return StateSpaceCausalLMOutput(
            loss=loss, logits=logits, cache_params=outputs.cache_params, hidden_states=outputs.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,  # named for generate(), which looks for it here
        use_cache=None,
        is_first_iteration=False,
        **kwargs,
    ):
        if use_cache and next_sequence_length == 1 and not is_first_iteration:
            kwargs["attention_mask"] = None  # a token that was just generated is not padding
        # past transformers' own override, which drops the mask of every chunk of a chunked prefill
        return GenerationMixin.prepare_inputs_for_generation(
            self,
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


class StateSpaceClassifier:
    """What the classification heads share: a backbone of `backbone_class` and a linear `score`."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.score_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.backbone.set_input_embeddings(value)


class StateSpaceForSequenceClassification(StateSpaceClassifier):
    score_bias = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = self.last_token(hidden_states, input_ids, attention_mask)
        logits = self.score(hidden_states[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )

    def last_token(self, hidden_states, input_ids, attention_mask):
        """`[batch]` position of the last token that is not padding, by the mask or else by the padding id."""
        batch, length = hidden_states.shape[:2]
        device, pad = hidden_states.device, self.config.pad_token_id
        if attention_mask is not None:
            valid = local_mask(attention_mask, length)
        elif batch == 1 or input_ids is None:
            return torch.full((batch,), length - 1, device=device)
        elif pad is None:
            raise ValueError(
                f"the batch has {batch} rows but pad_token_id is None, so their ends are unknown; pass attention_mask"
                " or set config.pad_token_id."
            )
        else:
            valid = input_ids != pad
        return (valid * torch.arange(length, device=device)).argmax(-1)


class StateSpaceForTokenClassification(StateSpaceClassifier):
    score_bias = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "StateSpaceBackbone",
    "StateSpaceCausalLMOutput",
    "StateSpaceForCausalLM",
    "StateSpaceForSequenceClassification",
    "StateSpaceForTokenClassification",
    "StateSpaceOutput",
    "StateSpacePreTrained",
    "exchange_classes",
]
