"""Aaren: attention with one learned query per layer, computed as a many-to-many RNN (arXiv 2405.13956, section 3).

A layer is a Transformer encoder layer whose query is a parameter. Its attention over every prefix is then the running
softmax average o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i} with s_i = q . k_i / sqrt(head_dim), whose state is
(m, u, w): the maximum score, the sum of weights and the weighted sum of values. It has a fixed size and one update
costs O(1), while training sees the whole sequence at once.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
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

from ..._compat import use_kernel_forward_from_hub
from ...ops.cumulative_softmax_average import cumulative_softmax_average
from ..cache import RecurrentGenerationMixin, continue_cache, count_tokens
from ..sequences import find_packing, local_mask, positions_of
from .configuration_aaren import AarenConfig


@use_kernel_forward_from_hub("CumulativeSoftmaxAverage")
class CumulativeSoftmaxAverage(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(self, s, v, initial_state=None, mask=None, cu_seqlens=None, return_final_state=False):
        return cumulative_softmax_average(
            s,
            v,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


class AarenAttention(nn.Module):
    """Attention of a learned query over every prefix."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_token = nn.Parameter(torch.empty(config.hidden_size))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.average = CumulativeSoftmaxAverage()

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None):
        per_head = (-1, self.head_dim)
        # as a batch of one row, so that adapters on q_proj see the shape they expect
        query = self.q_proj(self.query_token[None])[0].unflatten(-1, per_head)  # [heads, head_dim]
        keys = self.k_proj(hidden_states).unflatten(-1, per_head)  # [batch, length, heads, head_dim]
        values = self.v_proj(hidden_states).unflatten(-1, per_head)
        wide = torch.promote_types(keys.dtype, torch.float32)
        scores = torch.einsum("bthd,hd->bth", keys.to(wide), query.to(wide)) / math.sqrt(self.head_dim)

        if packing is not None:
            output = self.average(packing.pack(scores), packing.pack(values), cu_seqlens=packing.cu_seqlens)
            output = packing.unpack(output, scores.shape[:2])
        elif past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            output, (m, u, w) = self.average(
                scores, values, initial_state=layer.read("m", "u", "w"), mask=mask, return_final_state=True
            )
            layer.write(m=m, u=u, w=w)
        else:
            output = self.average(scores, values, mask=mask)
        return self.o_proj(output.flatten(2))


class AarenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class AarenLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm_first = config.norm_first
        self.self_attn = AarenAttention(config, layer_idx)
        self.mlp = AarenMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None):
        context = {"mask": mask, "packing": packing, "past_key_values": past_key_values}
        if self.norm_first:
            attended = self.self_attn(self.attention_norm(hidden_states), **context)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states + self.dropout(self.self_attn(hidden_states, **context)))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class AarenPositionEmbedding(nn.Module):
    """Positions as sines and cosines of geometric frequencies, computed for any length, or as a learned table."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.position_embedding_type == "learned":
            self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids, dtype):
        if self.config.position_embedding_type == "learned":
            if position_ids.device.type == "cpu" and position_ids.numel() and not torch.compiler.is_compiling():
                last = int(position_ids.max())
                if last >= self.config.max_position_embeddings:
                    raise ValueError(
                        f"position {last} is beyond max_position_embeddings ({self.config.max_position_embeddings});"
                        " shorten the input or use position_embedding_type='sinusoidal', which has no limit."
                    )
            return self.embedding(position_ids)
        half = self.config.hidden_size // 2
        frequency = torch.exp(
            torch.arange(half, device=position_ids.device, dtype=torch.float32) * (-math.log(10000.0) / half)
        )
        angle = position_ids.unsqueeze(-1).float() * frequency
        # scaled to the spread of freshly initialised token embeddings, so that neither drowns the other
        scale = math.sqrt(2.0) * self.config.initializer_range
        return (torch.cat([angle.sin(), angle.cos()], dim=-1) * scale).to(dtype)


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
        self.post_init()

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
        if past_values.ndim != 3 or past_values.shape[-1] != self.config.input_size:
            raise ValueError(
                f"past_values has shape {tuple(past_values.shape)} but the model takes [batch, length, input_size="
                f"{self.config.input_size}]; add or select channels, or set input_size."
            )
        if past_observed_mask is not None:
            past_values = past_values.masked_fill(~past_observed_mask.bool(), 0.0)
            observed = past_observed_mask.bool().any(-1)
            attention_mask = observed if attention_mask is None else attention_mask.bool() & observed
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
]
