"""LightNet over text: causal and masked language models, sequence classification (arXiv 2405.21022).

Attention in which every channel of the keys is a softmax over positions. Read from left to right it is a recurrence
with a state of fixed size; read both ways it is one pass of linear cost. The state of a layer is (S, m, u) of
`lightnet_attention`, and with MD-TPE there is one vector a rank and head more, in a cache layer of its own.
"""

import copy

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..cache import RecurrentGenerationMixin, continue_cache, count_tokens
from ..lightnet_layers import LightNetLayer, initialise_lightnet
from ..lightnet_positions import ToeplitzAxis
from ..sequences import find_packing, local_mask, positions_of
from .configuration_lightnet import LightNetConfig


class LightNetPreTrainedModel(PreTrainedModel):
    config: LightNetConfig
    config_class = LightNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightNetLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": LightNetLayer}
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        initialise_lightnet(module)


class LightNetModel(LightNetPreTrainedModel):
    """The stack of LightNet layers; reads both ways with `config.is_causal=False`, else from left to right.

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]` (or of everything so far), 1 for tokens, 0 for padding anywhere in the row.
        position_ids: `[batch, length]`; a restart at 0 begins a new sequence (packed input).
        seq_idx: `[batch, length]` integers that name the sequence of every token (packed input).
        cu_seq_lens_q: `[sequences + 1]` offsets of packed sequences, batch 1.
        past_key_values: a cache (causal models); `DynamicCache()` is adopted in place.

    >>> config = LightNetConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_heads=2, expand_ratio=4)
    >>> LightNetModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        self.causal = config.is_causal is not False
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.tpe = None
        if config.use_tpe:
            self.tpe = ToeplitzAxis(
                config.hidden_size, config.num_attention_heads, config.tpe_rank, config.rms_norm_eps
            )
        self.layers = nn.ModuleList(
            [LightNetLayer(config, index, self.causal) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        if past_key_values is not None and not self.causal:
            raise ValueError(
                "past_key_values cannot be used with is_causal=False: every position reads those after it as well;"
                " leave it out."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        shape, device = inputs_embeds.shape[:2], inputs_embeds.device

        mask = local_mask(attention_mask, shape[1])
        packing = find_packing(shape, mask=mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q)
        past_key_values = continue_cache(
            past_key_values,
            self.config.layer_types + ["linear_attention"] * self.config.use_tpe,
            wanted=use_cache and self.causal,
            packed=packing is not None,
            checkpointing=self.gradient_checkpointing and self.training,
        )

        positions = None
        if self.config.use_lrpe:
            if position_ids is None:
                past = past_key_values.layers[0].valid_tokens if past_key_values is not None else None
                position_ids = positions_of(shape, mask=mask, packing=packing, past=past, device=device)
            positions = position_ids.unsqueeze(-1)

        hidden_states = (
            inputs_embeds if self.tpe is None else self._encode(inputs_embeds, mask, packing, past_key_values)
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, positions=positions, mask=mask, packing=packing, past_key_values=past_key_values
            )
        if past_key_values is not None:
            count_tokens(past_key_values, shape, mask, device)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _encode(self, embeddings, mask, packing, past_key_values):
        """MD-TPE; its state is the last layer of the cache."""
        if packing is not None:
            encoded, _ = self.tpe.scan(packing.pack(embeddings), cu_seqlens=packing.cu_seqlens)
            encoded = packing.unpack(encoded, embeddings.shape[:2])
        else:
            layer = None if past_key_values is None else past_key_values.layers[self.config.num_hidden_layers]
            held = None if layer is None else layer.read("tpe")
            encoded, held = self.tpe.scan(embeddings, initial_state=held, mask=mask)
            if layer is not None:
                layer.write(tpe=held)
        return embeddings + encoded if self.config.tpe_residual else encoded


class LightNetForCausalLM(LightNetPreTrainedModel, RecurrentGenerationMixin):
    """LightNet as a language model: `generate()` with a state of fixed size, however long the text.

    >>> config = LightNetConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_heads=2, expand_ratio=4)
    >>> model = LightNetForCausalLM(config)
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        if config.is_causal is False:
            raise ValueError(
                "is_causal (False) cannot make a causal language model; use LightNetForMaskedLM, or is_causal=None."
            )
        super().__init__(config)
        self.model = LightNetModel(config)
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


class LightNetForMaskedLM(LightNetPreTrainedModel):
    """LightNet that reads both ways and fills masked tokens in, at linear cost.

    >>> config = LightNetConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_heads=2, expand_ratio=4)
    >>> LightNetForMaskedLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        if config.is_causal:
            raise ValueError(
                "is_causal (True) cannot make a masked language model, whose positions read both ways; use"
                " LightNetForCausalLM, or is_causal=None."
            )
        config = copy.deepcopy(config)  # the caller's stays open for other heads
        config.is_causal = False
        super().__init__(config)
        self.model = LightNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class LightNetForSequenceClassification(GenericForSequenceClassification, LightNetPreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot (remote code
        # would have to be trusted a second time, inside the constructor).
        LightNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LightNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "LightNetForCausalLM",
    "LightNetForMaskedLM",
    "LightNetForSequenceClassification",
    "LightNetModel",
    "LightNetPreTrainedModel",
]
