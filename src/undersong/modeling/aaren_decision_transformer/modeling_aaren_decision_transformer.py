"""The Decision Transformer (Chen et al. 2021, arXiv 2106.01345) with Aaren layers (arXiv 2405.13956, section 4.1).

An episode is the sequence (R_1, s_1, a_1, R_2, s_2, a_2, ...) of returns to go, states and actions; the action is read
off the state's token. The state of the layers has a fixed size, so acting costs the same at every step of an episode.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.decision_transformer.modeling_decision_transformer import DecisionTransformerOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..aaren_layers import AarenAttention, AarenLayer
from ..cache import count_tokens
from .configuration_aaren_decision_transformer import AarenDecisionTransformerConfig


@dataclass
class AarenDecisionTransformerOutput(DecisionTransformerOutput):
    """The output of transformers' Decision Transformer, and `loss` when `labels` were given.

    Attributes:
        loss: mean squared error of the actions over the steps that are not padding.
    """

    loss: torch.FloatTensor | None = None


class AarenDecisionTransformerPreTrainedModel(PreTrainedModel):
    config: AarenDecisionTransformerConfig
    config_class = AarenDecisionTransformerConfig
    base_model_prefix = "decision_transformer"
    main_input_name = "states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AarenLayer"]
    _is_stateful = True
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": AarenLayer}
    stream_width = 0  # numbers carried from update to update beside the layers' states

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AarenAttention):
            init.normal_(module.query_token, std=self.config.initializer_range)


class AarenDecisionTransformerModel(AarenDecisionTransformerPreTrainedModel):
    """Acts so as to reach a wanted return.

    Forward arguments, those of `DecisionTransformerModel`:
        states: `[batch, steps, state_dim]` float.
        actions: `[batch, steps, act_dim]` float; the one of a step that is still to be decided may be anything.
        rewards: not read, as there.
        returns_to_go: `[batch, steps, 1]` float, the sum of rewards from this step on.
        timesteps: `[batch, steps]` int64, places in the episode.
        attention_mask: `[batch, steps]`, 0 for padding anywhere in the row.
        labels: `[batch, steps, act_dim]`, the actions to learn, for the loss; usually the same as `actions`.

    Raises:
        ValueError: shapes that do not fit the configuration, and (on the CPU) a timestep beyond `max_ep_len`.

    >>> sizes = {"state_dim": 4, "act_dim": 2, "hidden_size": 8, "num_hidden_layers": 1, "max_ep_len": 16}
    >>> model = AarenDecisionTransformerModel(AarenDecisionTransformerConfig(**sizes))
    >>> episode = {"states": torch.randn(1, 3, 4), "actions": torch.randn(1, 3, 2)}
    >>> model(**episode, returns_to_go=torch.ones(1, 3, 1), timesteps=torch.arange(3)[None]).action_preds.shape
    torch.Size([1, 3, 2])
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_timestep = nn.Embedding(config.max_ep_len, config.hidden_size)
        self.embed_return = nn.Linear(1, config.hidden_size)
        self.embed_state = nn.Linear(config.state_dim, config.hidden_size)
        self.embed_action = nn.Linear(config.act_dim, config.hidden_size)
        self.embed_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([AarenLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.predict_state = nn.Linear(config.hidden_size, config.state_dim)
        self.predict_action = nn.Sequential(
            nn.Linear(config.hidden_size, config.act_dim), *([nn.Tanh()] if config.action_tanh else [])
        )
        self.predict_return = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, tokens, mask=None, past_key_values=None):
        """Runs the layers over `[batch, tokens, hidden_size]`; `mask` `[batch, tokens]` False is padding."""
        hidden_states = self.dropout(self.embed_ln(tokens))
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask=mask, past_key_values=past_key_values)
        if past_key_values is not None:
            count_tokens(past_key_values, tokens.shape[:2], mask, tokens.device)
        return self.norm(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        states: torch.FloatTensor,
        actions: torch.FloatTensor,
        rewards: torch.FloatTensor | None = None,
        returns_to_go: torch.FloatTensor | None = None,
        timesteps: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AarenDecisionTransformerOutput:
        self._check(states, actions, returns_to_go, timesteps)
        time = self.embed_timestep(timesteps)
        # (R_1, s_1, a_1, R_2, ...): [batch, steps, 3, hidden] -> [batch, 3 * steps, hidden]
        parts = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        tokens = torch.stack([part + time for part in parts], 2).flatten(1, 2)
        mask = None if attention_mask is None else attention_mask.bool()
        hidden_states = self.encode(tokens, None if mask is None else mask.repeat_interleave(3, dim=1))

        _, of_state, of_action = hidden_states.unflatten(1, (-1, 3)).unbind(2)
        action_preds = self.predict_action(of_state)
        loss = None
        if labels is not None:
            error = (action_preds - labels.to(action_preds.dtype)).square().mean(-1)
            loss = error.mean() if mask is None else error[mask].sum() / mask.sum().clamp(min=1)
        return AarenDecisionTransformerOutput(
            state_preds=self.predict_state(of_action),
            action_preds=action_preds,
            return_preds=self.predict_return(of_action),
            last_hidden_state=hidden_states,
            loss=loss,
        )

    def stream(self, cache, carry, returns_to_go, states, previous_actions, timesteps):
        """The action of one more step, `[batch, act_dim]`; see `AarenStream`. The step before had `timesteps - 1`."""
        time = self.embed_timestep(timesteps)
        before = self.embed_timestep((timesteps - 1).clamp(min=0))
        tokens = torch.stack(
            [
                self.embed_action(previous_actions) + before,
                self.embed_return(returns_to_go) + time,
                self.embed_state(states) + time,
            ],
            1,
        )
        has_previous = cache.layers[0].valid_tokens > 0  # at the first step no action came before
        new = torch.ones_like(has_previous)
        hidden_states = self.encode(tokens, torch.stack([has_previous, new, new], 1), cache)
        return self.predict_action(hidden_states[:, -1]), carry

    def _check(self, states, actions, returns_to_go, timesteps):
        config, (batch, steps) = self.config, states.shape[:2]
        given = {"states": states, "actions": actions, "returns_to_go": returns_to_go}
        for (name, value), size in zip(given.items(), (config.state_dim, config.act_dim, 1), strict=True):
            if value is None or value.shape != (batch, steps, size):
                shape = "is missing" if value is None else f"has shape {list(value.shape)}"
                raise ValueError(
                    f"{name} {shape} but the model takes [batch, steps, {size}] = {[batch, steps, size]}; reshape it,"
                    " or set state_dim and act_dim."
                )
        if timesteps is None or timesteps.shape != (batch, steps):
            shape = "is missing" if timesteps is None else f"has shape {list(timesteps.shape)}"
            raise ValueError(f"timesteps {shape} but must be [batch, steps] = {[batch, steps]}; give one a step.")
        if timesteps.device.type == "cpu" and not is_tracing(timesteps) and timesteps.numel():
            last = int(timesteps.max())
            if last >= config.max_ep_len:
                raise ValueError(
                    f"timesteps reach {last} but max_ep_len is {config.max_ep_len}; cut the episode, or set"
                    f" max_ep_len={last + 1}."
                )


__all__ = [
    "AarenDecisionTransformerModel",
    "AarenDecisionTransformerOutput",
    "AarenDecisionTransformerPreTrainedModel",
]
