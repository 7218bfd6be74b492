"""pLSTM on sequences: gated linear recurrences with state tracking (arXiv 2506.11997).

A layer is x + down(layer(u) * silu(z)) with [u, z] = up(norm(x)). Inside it, a causal convolution of u makes queries,
keys and all gates, and u itself the values; see `plstm1d` for the recurrence. The state of a layer is the matrix
`[batch, heads, key_dim, value_dim, transition_dim]` and the last inputs of the convolution, both float32.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..._compat import use_kernel_forward_from_hub
from ...ops.plstm1d import plstm1d
from ..cache import RecurrentGenerationMixin, continue_cache, count_tokens
from ..plstm_layers import BlockLinear, Gate, MultiHeadRMSNorm, Transition, small_init_
from ..precision import wide
from ..sequences import find_packing, is_all_valid, local_mask
from ..state_space import CausalConv1d
from .configuration_plstm import PLSTMConfig


@use_kernel_forward_from_hub("PLSTM1D")
class PLSTM1D(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(
        self,
        Q,
        K,
        V,
        S,
        T,
        M,
        D,
        chunk_size=64,
        initial_state=None,
        mask=None,
        cu_seqlens=None,
        return_final_state=False,
    ):
        return plstm1d(
            Q,
            K,
            V,
            S,
            T,
            M,
            D,
            chunk_size=chunk_size,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )


class PLSTMMixer(nn.Module):
    """Convolution, projections to heads, gates, recurrence, and a norm per head."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.chunk_size = layer_idx, config.chunk_size
        inner, heads, size = config.inner_size, config.num_attention_heads, config.conv_kernel
        JT, JV, JO = config.transition_dim, config.value_tracking_dim, config.output_tracking_dim
        JK, JQ = config.key_tracking_dim, config.query_tracking_dim
        self.shapes = (config.key_dim, JQ), (config.key_dim, JK), (config.value_dim, JV)
        self.conv1d = nn.Conv1d(inner, inner, size, groups=inner, padding=size - 1)

        def projection(dim, tracking):
            blocks = max(heads, config.sub_heads)
            return BlockLinear(inner, heads * dim * tracking, blocks, config.sub_heads)

        self.q_proj, self.k_proj, self.v_proj = (projection(*shape) for shape in self.shapes)
        self.source, self.mark, self.direct = (
            Gate(inner, (heads, *shape), bias=config.gate_bias)
            for shape in ((JT, JK, JV), (JO, JQ, JT), (JO, JQ, JK, JV))
        )
        self.transition = Transition(inner, heads, JT, orthogonalization=config.orthogonalization)
        self.norm = MultiHeadRMSNorm(heads, inner // heads, config.rms_norm_eps)
        self.skip = nn.Parameter(torch.empty(inner))
        self.convolution, self.recurrence = CausalConv1d(), PLSTM1D()

    def init_weights(self):
        init.ones_(self.skip)

    def forward(self, x, mask=None, packing=None, past_key_values=None):
        """`[batch, length, inner]` -> the same; padding anywhere in the row neither reads nor writes."""
        if packing is not None:
            y, _, _ = self.scan(packing.pack(x), cu_seqlens=packing.cu_seqlens)
            return packing.unpack(y, x.shape[:2])
        if past_key_values is None:
            return self.scan(x, mask=mask)[0]
        layer = past_key_values.layers[self.layer_idx]
        window, state = layer.read("conv", "state") or (None, None)
        y, window, state = self.scan(x, window, state, mask=mask)
        layer.write(conv=window, state=state)
        return y

    def scan(self, x, window=None, state=None, **context):
        taps = self.conv1d.weight.squeeze(1), self.conv1d.bias
        c, window = self.convolution(x, *taps, initial_state=window, return_final_state=True, **context)
        layers = (self.q_proj, c), (self.k_proj, c), (self.v_proj, x)
        q, k, v = (
            layer(given).unflatten(-1, (-1, *shape)) for (layer, given), shape in zip(layers, self.shapes, strict=True)
        )
        gates = self.source(c), self.transition(c), self.mark(c), self.direct(c)
        y, state = self.recurrence(
            q, k, v, *gates, self.chunk_size, initial_state=state, return_final_state=True, **context
        )
        return self.norm(y.flatten(-2)).flatten(-2) + self.skip.to(c.dtype) * c, window, state


class PLSTMLayer(GradientCheckpointingLayer):
    """x + down(mixer(u) * act(z)), [u, z] = up(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.inner_size)
        self.mixer = PLSTMMixer(config, layer_idx)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.inner_size, config.hidden_size)

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None):
        u, z = self.up_proj(self.norm(hidden_states)).chunk(2, -1)
        return hidden_states + self.down_proj(self.mixer(u, mask, packing, past_key_values) * self.act(z))


class PLSTMPreTrainedModel(PreTrainedModel):
    config: PLSTMConfig
    config_class = PLSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLSTMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": PLSTMLayer}
    # in bfloat16 a transition's bias could not say how close to 1 it is
    _keep_in_fp32_modules_strict = [r"source\.bias", r"mark\.bias", r"direct\.bias", r"eigenvalues\.bias"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            small_init_(module, self.config.initializer_range)
            if getattr(module, "padding_idx", None) is not None and not getattr(
                module.weight, "_is_hf_initialized", False
            ):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, (Gate, Transition)):
            module.init_weights(self.config.gate_initializer_range)
        elif isinstance(module, (MultiHeadRMSNorm, PLSTMMixer)):
            module.init_weights()
        elif isinstance(module, nn.Conv1d):
            bound = module.weight.shape[-1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class PLSTMModel(PLSTMPreTrainedModel):
    """The stack of pLSTM layers, over token ids or over embeddings.

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]` (or of everything so far), 1 for tokens, 0 for padding anywhere in the row.
        position_ids: `[batch, length]`; a restart at 0 begins a new sequence (packed input).
        seq_idx: `[batch, length]` integers that name the sequence of every token (packed input).
        cu_seq_lens_q: `[sequences + 1]` offsets of packed sequences, batch 1.
        past_key_values: a cache; `DynamicCache()` is adopted in place.

    >>> model = PLSTMModel(PLSTMConfig(vocab_size=11, hidden_size=32, num_hidden_layers=1))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([PLSTMLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = hidden_states.shape[:2]
        mask = local_mask(attention_mask, shape[1])
        packing = find_packing(shape, mask=mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q)
        past_key_values = continue_cache(
            past_key_values,
            self.config.layer_types,
            wanted=use_cache,
            packed=packing is not None,
            checkpointing=self.gradient_checkpointing and self.training,
        )
        hidden = None if mask is None or is_all_valid(mask) else mask
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask=hidden, packing=packing, past_key_values=past_key_values)
        if past_key_values is not None:
            count_tokens(past_key_values, shape, mask, hidden_states.device)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class PLSTMForCausalLM(PLSTMPreTrainedModel, RecurrentGenerationMixin):
    """pLSTM as a language model: `generate()` with a state of fixed size, however long the text.

    >>> model = PLSTMForCausalLM(PLSTMConfig(vocab_size=11, hidden_size=32, num_hidden_layers=1))
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PLSTMModel(config)
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
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * torch.tanh(wide(logits) / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class PLSTMForSequenceClassification(GenericForSequenceClassification, PLSTMPreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot (remote code
        # would have to be trusted a second time, inside the constructor).
        PLSTMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PLSTMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PLSTMForTokenClassification(GenericForTokenClassification, PLSTMPreTrainedModel):
    """A linear head over every token."""

    def __init__(self, config):
        PLSTMPreTrainedModel.__init__(self, config)  # as above
        self.num_labels = config.num_labels
        self.model = PLSTMModel(config)
        self.dropout = nn.Identity()
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "PLSTMForCausalLM",
    "PLSTMForSequenceClassification",
    "PLSTMForTokenClassification",
    "PLSTMModel",
    "PLSTMPreTrainedModel",
]
