"""What S4D (arXiv 2206.11893) and S5 (arXiv 2208.04933) share: layer, stack, heads, cache, padding and packing.

A layer is x + dropout(GLU(W dropout(gelu(y)))) with y the state space of norm(x). Its state is complex and diagonal;
caches and checkpoints hold it and every other complex number as pairs of real ones, in float32 or wider.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
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

from .cache import continue_cache, count_tokens
from .precision import wide
from .sequences import find_packing, is_all_valid, local_mask


def as_complex(pairs):
    """Real pairs `[..., 2]` as complex numbers `[...]`."""
    return torch.view_as_complex(wide(pairs).contiguous())


class DiagonalMixer(nn.Module):
    """The state space of a layer: A = -exp(log_A_real) + i A_imag, time steps exp(log_dt), skip D.

    Subclasses hold the inputs and outputs of the state and implement `scan`.

    Args:
        state_shape: of log_A_real and A_imag, and of the complex state.
        dt_shape: of log_dt.
    """

    def __init__(self, config, layer_idx, state_shape, dt_shape):
        super().__init__()
        self.layer_idx = layer_idx
        self.discretization = config.discretization
        self.bidirectional = config.bidirectional
        self.log_dt = nn.Parameter(torch.empty(dt_shape))
        self.log_A_real = nn.Parameter(torch.empty(state_shape))  # through exp, the real part stays negative
        self.A_imag = nn.Parameter(torch.empty(state_shape))
        self.D = nn.Parameter(torch.empty(config.hidden_size))

    @property
    def A(self):
        return torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag))

    def scan(self, u, step_sizes, **context):
        """y like u, or (y, state) with `return_final_state`; `context` is what the recurrent ops take."""
        raise NotImplementedError

    def init_weights(self, config, A):
        """A: initial eigenvalues, which broadcast to the state's shape."""
        init.uniform_(self.log_dt, math.log(config.dt_min), math.log(config.dt_max))
        init.copy_(self.log_A_real, (-A.real).log().expand_as(self.log_A_real))
        init.copy_(self.A_imag, A.imag.expand_as(self.A_imag))
        init.normal_(self.D)

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None, step_sizes=None):
        if packing is not None:
            steps = None if step_sizes is None else packing.pack(step_sizes)
            y = self.scan(packing.pack(hidden_states), steps, cu_seqlens=packing.cu_seqlens)
            return packing.unpack(y, hidden_states.shape[:2])
        if past_key_values is None:
            return self.scan(hidden_states, step_sizes, mask=mask)
        layer = past_key_values.layers[self.layer_idx]
        state = layer.read("state")
        y, state = self.scan(
            hidden_states,
            step_sizes,
            initial_state=None if state is None else as_complex(state),
            mask=mask,
            return_final_state=True,
        )
        layer.write(state=torch.view_as_real(state))
        return y


class DiagonalLayer(GradientCheckpointingLayer):
    """A mixer between a norm and a gated projection."""

    mixer_class = None

    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = self.mixer_class(config, layer_idx)
        self.out_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, mask=None, packing=None, past_key_values=None, step_sizes=None):
        y = self.mixer(self.norm(hidden_states), mask, packing, past_key_values, step_sizes)
        y = F.glu(self.out_proj(self.dropout(F.gelu(y))))
        return hidden_states + self.dropout(y)


class DiagonalPreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_context_parallel = False
    # phases are dt * A_imag * length: half precision would turn them around within a few hundred steps
    _keep_in_fp32_modules_strict = ["log_dt", "log_A_real", "A_imag"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DiagonalMixer):
            module.reset(self.config)
        elif isinstance(module, DiagonalTimeSeriesClassifier):
            # from zero, the norm in front of the first layer would leave a single channel nothing but its sign
            init.normal_(module.value_projection.bias, std=self.config.initializer_range)


class DiagonalBackbone:
    """The stack of layers, over token ids or over embeddings.

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]` (or of everything so far), 1 for tokens, 0 for padding anywhere in the row.
        position_ids: `[batch, length]`; a restart at 0 begins a new sequence (packed input).
        seq_idx: `[batch, length]` integers that name the sequence of every token (packed input).
        cu_seq_lens_q: `[sequences + 1]` offsets of packed sequences, batch 1.
        past_key_values: a cache; `DynamicCache()` is adopted in place. None for a bidirectional model.
        step_sizes: `[batch, length]` positive, the time from the token before, in steps (S5): it multiplies dt.
    """

    layer_class = None

    def __init__(self, config, add_token_embeddings=True):
        super().__init__(config)
        if add_token_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([self.layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        step_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if self.config.bidirectional and past_key_values is not None:
            raise ValueError(
                "past_key_values cannot be used by a bidirectional model: what follows changes every state; leave it"
                " out, or set bidirectional=False."
            )
        hidden_states = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        shape = hidden_states.shape[:2]
        self.check_step_sizes(step_sizes, shape)
        mask = local_mask(attention_mask, shape[1])
        packing = find_packing(shape, mask=mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q)
        past_key_values = continue_cache(
            past_key_values,
            self.config.layer_types,
            wanted=use_cache and not self.config.bidirectional,
            packed=packing is not None,
            checkpointing=self.gradient_checkpointing and self.training,
        )
        hidden = None if mask is None or is_all_valid(mask) else mask
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, mask=hidden, packing=packing, past_key_values=past_key_values, step_sizes=step_sizes
            )
        if past_key_values is not None:
            count_tokens(past_key_values, shape, mask, hidden_states.device)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def check_step_sizes(self, step_sizes, shape):
        if step_sizes is not None and step_sizes.shape != shape:
            raise ValueError(
                f"step_sizes has shape {tuple(step_sizes.shape)} but the input is [batch, length] = {list(shape)};"
                " pass one positive number per token."
            )


class DiagonalCausalLM:
    """A language model over `model_class`."""

    model_class = None
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        if config.bidirectional:
            raise ValueError(
                f"bidirectional (True) makes {type(self).__name__} see the token it predicts; use bidirectional=False."
            )
        super().__init__(config)
        self.model = self.model_class(config)
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


class DiagonalTimeSeriesClassifier:
    """Classifies a multivariate time series: one step is one token, a linear head reads the pooled valid steps.

    With `problem_type="regression"` the head predicts `num_labels` numbers.

    Forward arguments:
        past_values: `[batch, length, input_size]` float.
        labels: `[batch]` int64 class of every series (`target_values` is accepted for the same).
        past_observed_mask: `[batch, length, input_size]`, 0 where a value is missing: it counts as 0, and a step
            without any observed channel is padding.
        attention_mask: `[batch, length]`, 0 for padded steps, whatever stands there.
        step_sizes: `[batch, length]`, time since the step before (S5).

    A series without a single valid step gets the head's bias as logits, never NaN.
    """

    main_input_name = "past_values"
    model_class = None

    def __init__(self, config):
        super().__init__(config)
        self.value_projection = nn.Linear(config.input_size, config.hidden_size)
        self.model = self.model_class(config, add_token_embeddings=False)
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
        mask = None if attention_mask is None else attention_mask.bool()
        if past_observed_mask is not None:
            past_values = past_values.masked_fill(~past_observed_mask.bool(), 0.0)
            observed = past_observed_mask.bool().any(-1)
            mask = observed if mask is None else mask & observed
        if mask is not None:
            past_values = past_values.masked_fill(~mask.unsqueeze(-1), 0.0)
        kwargs["use_cache"] = False
        outputs = self.model(inputs_embeds=self.value_projection(past_values), attention_mask=mask, **kwargs)
        logits = self.score(self.pool(outputs.last_hidden_state, mask))
        labels = target_values if labels is None else labels
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def pool(self, hidden_states, mask):
        """`[batch, hidden]`; zeros for a row without a valid step."""
        if self.config.pooling == "mean":
            if mask is None:
                return hidden_states.mean(1)
            weight = mask.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        if mask is None:
            return hidden_states[:, -1]
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * steps).argmax(1)[:, None, None].expand(-1, 1, hidden_states.shape[2])
        return hidden_states.gather(1, last).squeeze(1) * mask.any(1, keepdim=True)


__all__ = [
    "DiagonalBackbone",
    "DiagonalCausalLM",
    "DiagonalLayer",
    "DiagonalMixer",
    "DiagonalPreTrainedModel",
    "DiagonalTimeSeriesClassifier",
    "as_complex",
]
