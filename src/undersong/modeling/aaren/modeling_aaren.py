"""Aaren: attention with one learned query per layer, computed as a many-to-many RNN (arXiv 2405.13956, section 3).

The stack of layers, and its heads for text and for series that are classified. The state has a fixed size and one
update costs O(1), while training sees the whole sequence at once.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..aaren_layers import AarenAttention, AarenLayer, AarenPositionEmbedding
from ..cache import RecurrentGenerationMixin, continue_cache, count_tokens
from ..sequences import find_packing, local_mask, positions_of
from .configuration_aaren import AarenConfig


class AarenPreTrainedModel(PreTrainedModel):
    config: AarenConfig
    config_class = AarenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AarenLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": AarenLayer}
    stream_width = 0  # numbers a head carries from update to update beside the layers' states

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AarenAttention):
            init.normal_(module.query_token, std=self.config.initializer_range)


class AarenModel(AarenPreTrainedModel):
    """The stack of Aaren layers, over token ids or over embeddings.

    Args:
        add_token_embeddings: False leaves the token table out (series heads, which only pass `inputs_embeds`).

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]` (or of everything so far), 1 for tokens, 0 for padding anywhere in the row.
        position_ids: `[batch, length]`; a restart at 0 begins a new sequence (packed input).
        seq_idx: `[batch, length]` integers that name the sequence of every token (packed input).
        cu_seq_lens_q: `[sequences + 1]` offsets of packed sequences, batch 1.
        past_key_values: a cache; `DynamicCache()` is adopted in place.

    >>> model = AarenModel(AarenConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config, add_token_embeddings=True):
        super().__init__(config)
        if add_token_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        has_positions = config.position_embedding_type != "none"
        self.embed_positions = AarenPositionEmbedding(config) if has_positions else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([AarenLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def stream(self, cache, carry, inputs_embeds):
        """Continues a stream: `[batch, n, hidden_size]` embeddings; see `AarenStream`."""
        return self(inputs_embeds=inputs_embeds, past_key_values=cache).last_hidden_state, carry

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        shape, device = inputs_embeds.shape[:2], inputs_embeds.device

        mask = local_mask(attention_mask, shape[1])
        packing = find_packing(shape, mask=mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q)
        past_key_values = continue_cache(
            past_key_values,
            self.config.layer_types,
            wanted=use_cache,
            packed=packing is not None,
            checkpointing=self.gradient_checkpointing and self.training,
        )

        if self.embed_positions is not None:
            if position_ids is None:
                past = past_key_values.layers[0].valid_tokens if past_key_values is not None else None
                position_ids = positions_of(shape, mask=mask, packing=packing, past=past, device=device)
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids, inputs_embeds.dtype)

        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask=mask, packing=packing, past_key_values=past_key_values)
        if past_key_values is not None:
            count_tokens(past_key_values, shape, mask, device)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class AarenForCausalLM(AarenPreTrainedModel, RecurrentGenerationMixin):
    """Aaren as a language model: `generate()` with a state of fixed size, however long the text.

    >>> model = AarenForCausalLM(AarenConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = AarenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def stream(self, cache, carry, input_ids):
        """Continues a stream: `[batch, n]` token ids, logits after every one; see `AarenStream`."""
        return self(input_ids, past_key_values=cache).logits, carry

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class AarenForSequenceClassification(GenericForSequenceClassification, AarenPreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot (remote code
        # would have to be trusted a second time, inside the constructor).
        AarenPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = AarenModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def stream(self, cache, carry, input_ids):
        """Continues a stream: `[batch, n]` token ids, logits after every one; see `AarenStream`."""
        return self.score(self.model(input_ids, past_key_values=cache).last_hidden_state), carry


def observed_values(config, past_values, past_observed_mask, attention_mask):
    """Which values of a series count: `[batch, length, input_size]` bool, or None when all do.

    Args:
        past_observed_mask: like `past_values`, 0 where a value is missing, or None.
        attention_mask: `[batch, length]`, 0 for padded steps, or None.

    Raises:
        ValueError: `past_values` is not `[batch, length, input_size]`.
    """
    if past_values.ndim != 3 or past_values.shape[-1] != config.input_size:
        raise ValueError(
            f"past_values has shape {tuple(past_values.shape)} but the model takes [batch, length, input_size="
            f"{config.input_size}]; add or select channels, or set input_size."
        )
    if attention_mask is None:
        return None if past_observed_mask is None else past_observed_mask.bool()
    valid = attention_mask.bool().unsqueeze(-1).expand(past_values.shape)
    return valid if past_observed_mask is None else valid & past_observed_mask.bool()


class AarenForTimeSeriesClassification(AarenPreTrainedModel):
    """Classifies a multivariate time series: one step is one token, the valid steps are averaged, a linear head reads.

    Forward arguments:
        past_values: `[batch, length, input_size]` float.
        labels: `[batch]` int64 class of every series (`target_values` is accepted for the same).
        past_observed_mask: `[batch, length, input_size]`, 0 where a value is missing: it counts as 0, and a step
            without any observed channel is padding.
        attention_mask: `[batch, length]`, 0 for padded steps.

    A series without a single valid step gets the head's bias as logits, never NaN.

    >>> config = AarenConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, input_size=3, num_labels=5)
    >>> AarenForTimeSeriesClassification(config)(torch.randn(2, 7, 3)).logits.shape
    torch.Size([2, 5])
    """

    main_input_name = "past_values"

    def __init__(self, config):
        super().__init__(config)
        self.value_projection = nn.Linear(config.input_size, config.hidden_size)
        self.model = AarenModel(config, add_token_embeddings=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForSequenceClassification"  # transformers infers it from class names it knows
        self.stream_width = config.hidden_size  # the sum of what is averaged
        self.post_init()

    def stream(self, cache, carry, past_values):
        """Continues a stream: `[batch, n, input_size]`, logits of the series so far; see `AarenStream`."""
        embeds = self.value_projection(past_values)
        hidden_states = self.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        sums = carry.unsqueeze(1) + hidden_states.cumsum(1)
        before = cache.layers[0].valid_tokens.unsqueeze(1) - past_values.shape[1]
        counts = before + torch.arange(1, past_values.shape[1] + 1, device=before.device)
        return self.score((sums / counts.unsqueeze(-1)).to(hidden_states.dtype)), sums[:, -1]

    @can_return_tuple
    def forward(
        self,
        past_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_values: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        observed = observed_values(self.config, past_values, past_observed_mask, attention_mask)
        if observed is not None:
            past_values, attention_mask = past_values.masked_fill(~observed, 0.0), observed.any(-1)
        kwargs["use_cache"] = False
        outputs = self.model(inputs_embeds=self.value_projection(past_values), attention_mask=attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            weight = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits = self.score(pooled)
        labels = target_values if labels is None else labels
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "AarenForCausalLM",
    "AarenForSequenceClassification",
    "AarenForTimeSeriesClassification",
    "AarenModel",
    "AarenPreTrainedModel",
    "observed_values",
]
