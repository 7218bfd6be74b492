"""RMoE: a mixture of experts whose router has a memory (arXiv 2408.06793, section 3).

A Mixtral in which every token carries a small state up the layers, through one cell that all layers share; each layer
chooses its experts from that state:

    u_i = W1_i x_i,   h_i = GRU(u_i, h_{i-1}),   h_0 = 0,   p_i = softmax(W2_i h_i)

The state lives inside one forward pass and never moves along the sequence: it is no part of the cache, and padding or
packing need nothing for it. Routing is computed in float32 whatever the model's dtype is, because the choice jumps.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralExperts,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    load_balancing_loss_func,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..checkpointing import refuse_reentrant
from ..recurrent_router_layer import RecurrentRouter
from .configuration_rmoe import RMoEConfig

CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell}
AUTO = "auto"  # of experts_implementation
FEW_PAIRS = 8  # (token, expert) pairs for which a CPU goes from pair to pair


class RMoERouter(nn.Module):
    """Chooses experts: `forward` gives `(logits, weights, experts, state)`, one row for each token."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob


class RMoELinearRouter(RMoERouter):
    """Scores linear in the hidden state, as Mixtral's."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, hidden_states, state, cell):
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(self.weight.dtype), self.weight)
            probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probabilities.topk(self.top_k, -1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), experts, None


class RMoERecurrentRouter(RMoERouter):
    """Scores linear in a state that the cell, which belongs to the model, takes from layer to layer."""

    def __init__(self, config):
        super().__init__(config)
        self.detach = config.detach_router_state
        self.input_proj = nn.Linear(config.hidden_size, config.router_hidden_size, bias=False)
        self.score = nn.Linear(config.router_hidden_size, config.num_local_experts, bias=False)
        self.route = RecurrentRouter()

    def forward(self, hidden_states, state, cell):
        with torch.autocast(hidden_states.device.type, enabled=False):
            u = self.input_proj(hidden_states.to(self.input_proj.weight.dtype))
        if self.detach and state is not None:
            state = state.detach()
        state, logits, weights, experts = self.route(
            u, state, cell, self.score.weight, self.top_k, None, self.norm_topk_prob
        )
        return logits, weights.to(hidden_states.dtype), experts, state


class RMoEExperts(MixtralExperts):
    """Mixtral's experts. With `experts_implementation="auto"`, the default here, the way to compute them follows the
    device and the number of tokens; any of transformers' names chooses that one."""

    def __init__(self, config):
        super().__init__(config)
        if config.moe_intermediate_size is not None:
            self.intermediate_dim = config.moe_intermediate_size
            shape = self.num_experts, 2 * self.intermediate_dim, self.hidden_dim
            self.gate_up_proj = nn.Parameter(torch.empty(shape))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.config._experts_implementation != AUTO:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or self._is_expert_parallel:
            return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if top_k_index.numel() <= FEW_PAIRS:
            return self._by_pair(hidden_states, top_k_index, top_k_weights)
        return self._by_expert(hidden_states, top_k_index, top_k_weights)

    def _expert(self, x, expert):
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])

    def _by_pair(self, x, experts, weights):
        """Reads the chosen experts and does nothing else: what decoding needs."""
        rows = [
            sum(weights[token, k] * self._expert(x[token], expert) for k, expert in enumerate(chosen))
            for token, chosen in enumerate(experts.tolist())
        ]
        return torch.stack(rows) if rows else torch.zeros_like(x)

    def _by_expert(self, x, experts, weights):
        """One product for the tokens of an expert, which lie together after a sort."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.num_experts).tolist()
        token, weight = order // experts.shape[1], weights.flatten()[order]
        chunks = x[token].split(counts)
        done = [self._expert(chunk, e) if len(chunk) else chunk for e, chunk in enumerate(chunks)]
        # back in the order of the tokens, so that each adds up its own experts, always in the same order
        done = (torch.cat(done) * weight[:, None])[order.argsort()]
        return done.view(*experts.shape, -1).sum(1).to(x.dtype)


class RMoEMLP(nn.Module):
    """A dense feed-forward block: of the first layers, or the expert that every token shares."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RMoESparseBlock(nn.Module):
    """Router, experts, and the shared expert where the configuration has one."""

    def __init__(self, config):
        super().__init__()
        self.jitter_noise = config.router_jitter_noise
        self.moe_weight, self.share_weight = config.moe_weight, config.share_weight
        self.gate = RMoELinearRouter(config) if config.router_type == "linear" else RMoERecurrentRouter(config)
        self.experts = RMoEExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = None if width is None else RMoEMLP(config, width)

    def forward(self, hidden_states, router_state, cell):
        if self.training and self.jitter_noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(
                1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            )
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts, router_state = self.gate(tokens, router_state, cell)
        output = self.experts(tokens, experts, weights).view(hidden_states.shape)
        if self.shared_expert is not None:
            output = self.moe_weight * output + self.share_weight * self.shared_expert(hidden_states)
        return output, router_state


class RMoEDecoderLayer(GradientCheckpointingLayer):
    """Mixtral's layer; takes the routing state and hands it on."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = MixtralAttention(config, layer_idx)
        self.sparse = layer_idx >= config.moe_layer_start
        self.mlp = RMoESparseBlock(config) if self.sparse else RMoEMLP(config, config.intermediate_size)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, router_state=None, router_cell=None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if self.sparse:
            output, router_state = self.mlp(normed, router_state, router_cell)
        else:
            output = self.mlp(normed)
        return hidden_states + output, router_state


class RMoEPreTrainedModel(MixtralPreTrainedModel):
    config_class = RMoEConfig
    config: RMoEConfig
    _no_split_modules = ["RMoEDecoderLayer"]
    _keep_in_fp32_modules_strict = [r"mlp\.gate", "rnn_router"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(RMoERouter, index=0),
        "hidden_states": RMoEDecoderLayer,
        "attentions": MixtralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, RMoELinearRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.RNNCellBase):
            for weight in (module.weight_ih, module.weight_hh):
                init.normal_(weight, mean=0.0, std=std)
            for bias in (module.bias_ih, module.bias_hh):
                init.zeros_(bias)

    @classmethod
    def _can_set_experts_implementation(cls):
        return True

    def get_correct_experts_implementation(self, requested_experts):
        if requested_experts in (None, AUTO):
            return AUTO
        return super().get_correct_experts_implementation(requested_experts)


class RMoEModel(RMoEPreTrainedModel):
    """Mixtral's trunk with recurrent routers; see `RMoEForCausalLM`.

    >>> config = RMoEConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, router_hidden_size=4)
    >>> outputs = RMoEModel(config)(torch.tensor([[1, 2, 3]]), output_router_logits=True)
    >>> outputs.last_hidden_state.shape, [logits.shape for logits in outputs.router_logits]
    (torch.Size([1, 3, 8]), [torch.Size([3, 4]), torch.Size([3, 4])])
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        cell = CELLS.get(config.router_type)
        self.rnn_router = None if cell is None else cell(config.router_hidden_size, config.router_hidden_size)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        refuse_reentrant(self.layers[0])
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states, router_state, cell = inputs_embeds, None, None
        if self.rnn_router is not None:
            cell = self.rnn_router
            cell = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
        for layer in self.layers:
            hidden_states, router_state = layer(
                hidden_states,
                router_state,
                router_cell=cell,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def router_losses(router_logits, config, attention_mask=None):
    """`(balancing, z)`: the load-balancing loss (Fedus et al., arXiv 2101.03961, equations 4 to 6) and the mean
    squared log-sum-exp of router logits (Zoph et al., arXiv 2202.08906, equation 5), padding left out.

    Args:
        router_logits: tuple of `[batch * length, experts]`, a layer each.
        attention_mask: `[batch, keys]`, 0 for padding; the last `length` columns count. None: all tokens are real.
    """
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            attention_mask = None  # a prepared mask says who sees whom, not what is padding
        else:
            length = router_logits[0].shape[0] // attention_mask.shape[0]
            attention_mask = attention_mask[:, -length:]
    groups = [(logits,) for logits in router_logits] if config.router_aux_loss_per_layer else [router_logits]
    arguments = config.num_local_experts, config.num_experts_per_tok, attention_mask
    balancing = torch.stack([load_balancing_loss_func(group, *arguments) for group in groups]).mean()
    if not config.router_z_loss_coef:
        return balancing, None
    z = torch.stack([logits.float().logsumexp(-1).square().to(balancing.device) for logits in router_logits]).mean(0)
    if attention_mask is None:
        return balancing, z.mean()
    real = attention_mask.reshape(-1).to(z)
    return balancing, (z * real).sum() / real.sum()


class RMoEForCausalLM(RMoEPreTrainedModel, GenerationMixin):
    """RMoE as a language model.

    With labels, the loss contains `router_aux_loss_coef` times the balancing loss and `router_z_loss_coef` times the
    z-loss, whether router logits are returned or not; `aux_loss` is the balancing loss alone.

    >>> config = RMoEConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, router_hidden_size=4)
    >>> RMoEForCausalLM(config).generate(torch.tensor([[1, 3]]), max_new_tokens=3, min_new_tokens=3).shape
    torch.Size([1, 5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = RMoEModel(config)
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        loss_needs_them = labels is not None and bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or loss_needs_them,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        if outputs.router_logits is not None:
            aux_loss, z_loss = router_losses(outputs.router_logits, config, attention_mask)
        if loss_needs_them:
            extra = config.router_aux_loss_coef * aux_loss
            extra = extra if z_loss is None else extra + config.router_z_loss_coef * z_loss
            if (items := kwargs.get("num_items_in_batch")) is not None:
                # of an accumulated batch this is a part, and its losses are added up
                extra = extra * ((labels[:, 1:] != -100).sum() / items).to(extra.device)
            loss = loss + extra.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class RMoEForSequenceClassification(GenericForSequenceClassification, RMoEPreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot.
        RMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class RMoEForTokenClassification(GenericForTokenClassification, RMoEPreTrainedModel):
    """A linear head over every token."""

    def __init__(self, config):
        RMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RMoEModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "RMoEForCausalLM",
    "RMoEForSequenceClassification",
    "RMoEForTokenClassification",
    "RMoEModel",
    "RMoEPreTrainedModel",
]
