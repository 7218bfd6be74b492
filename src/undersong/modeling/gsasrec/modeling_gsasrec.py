"""gSASRec: a causal Transformer over item ids, trained with many negatives and gBCE (arXiv 2308.07192).

The hidden state at a position is multiplied with an item table of its own to score the item that follows. With
`block_type="sasrec"` a layer computes what the authors' does, their checkpoints included.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..recommend import check_item_ids, cut_histories
from ..sequential_recommendation import SequentialRecMixin, SequentialRecOutput, check_length, history_positions
from .configuration_gsasrec import GSASRecConfig


class GSASRecAttention(nn.Module):
    """Causal attention whose queries may come from elsewhere than its keys and values."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        has_output = config.block_type == "pre_norm"
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size) if has_output else nn.Identity()

    def forward(self, queries, states, attention_mask=None, **kwargs):
        per_head = (*states.shape[:2], -1, self.head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            self.q_proj(queries).view(per_head).transpose(1, 2),
            self.k_proj(states).view(per_head).transpose(1, 2),
            self.v_proj(states).view(per_head).transpose(1, 2),
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(states.shape).contiguous()), weights


class GSASRecMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states):
        return self.dropout(self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states)))))


class GSASRecLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.block_type = config.block_type
        self.self_attn = GSASRecAttention(config, layer_idx)
        self.mlp = GSASRecMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, attention_mask=None, valid=None, **kwargs):
        queries = self.attention_norm(hidden_states)
        if self.block_type == "sasrec":
            attended, _ = self.self_attn(queries, hidden_states, attention_mask, **kwargs)
            attended = self.mlp_norm(attended + queries)
            hidden_states = attended + self.mlp(attended)
        else:
            attended, _ = self.self_attn(queries, queries, attention_mask, **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states if valid is None else hidden_states.masked_fill(~valid, 0.0)


class GSASRecPreTrainedModel(PreTrainedModel):
    config: GSASRecConfig
    config_class = GSASRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GSASRecLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GSASRecLayer, "attentions": GSASRecAttention}


class GSASRecModel(GSASRecPreTrainedModel):
    """The stack of layers over item ids.

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]`; None takes every id that is not padding. Padded positions hold zeros before
            the last norm.
        position_ids: None counts as `config.position_anchor` says.

    >>> model = GSASRecModel(GSASRecConfig(num_items=9, hidden_size=8)).eval()
    >>> model(torch.tensor([[0, 3, 5]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([GSASRecLayer(config, index) for index in range(config.num_hidden_layers)])
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
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is not None:
            if input_ids.device.type == "cpu":
                check_item_ids("input_ids", input_ids, self.config.mask_token_id, self.config.num_items)
            if attention_mask is None:
                attention_mask = input_ids.ne(self.config.pad_token_id)
            inputs_embeds = self.embed_tokens(input_ids)
        shape = inputs_embeds.shape[:2]
        check_length(shape[1], self.config.max_position_embeddings)
        valid = None
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()
            valid = attention_mask.unsqueeze(-1)
        if position_ids is None:
            mask = attention_mask if valid is not None else attention_mask.new_ones(shape)
            position_ids = history_positions(mask, self.config.max_position_embeddings, self.config.position_anchor)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=None
        )
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        if valid is not None:
            hidden_states = hidden_states.masked_fill(~valid, 0.0)
        for layer in self.layers:
            hidden_states = layer(hidden_states, causal_mask, valid, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class GSASRecForSequentialRecommendation(SequentialRecMixin, GSASRecPreTrainedModel):
    """gSASRec, or SASRec by its configuration: scores the item that follows each position.

    Forward arguments that differ from other models:
        input_ids: `[batch, length]` item ids 1..N, 0 for padding.
        labels: `[batch, length]`, the item that follows each position (already shifted); 0 and -100 do not count.
            With labels there are no logits.
        logits_to_keep: how many last positions, or which, get logits; 0 is all.
        num_items_in_batch: divides the sum of losses, which is else averaged.

    >>> model = GSASRecForSequentialRecommendation(GSASRecConfig(num_items=9, hidden_size=8)).eval()
    >>> model(torch.tensor([[3, 5, 7]]), logits_to_keep=1).logits.shape
    torch.Size([1, 1, 9])
    >>> model.recommend([[3, 5], [7]], k=4).item_ids.shape
    torch.Size([2, 4])
    """

    _tied_weights_keys = {"output_embedding.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = GSASRecModel(config)
        self.output_embedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.add_item_counts()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.init_item_counts()

    def get_output_embeddings(self):
        return self.output_embedding

    def set_output_embeddings(self, new_embeddings):
        self.output_embedding = new_embeddings

    def head_states(self, states):
        return states

    def output_weights(self):
        """`[vocab_size, d]` and no bias, padding and mask included."""
        return self.output_embedding.weight, None

    def item_parameters(self):
        """(module, name) of every parameter that has a row for each id."""
        return [(self.model.embed_tokens, "weight"), (self.output_embedding, "weight")]

    def encode_histories(self, input_ids):
        """`[batch, d]`: the state at the last item of each history; input ids as for `recommend`."""
        ids = cut_histories(input_ids, self.config.max_position_embeddings)
        last = (ids.ne(0) * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
        states = self.model(ids).last_hidden_state
        return states[torch.arange(len(ids), device=ids.device), last]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequentialRecOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self.score(outputs, labels, logits_to_keep, num_items_in_batch)


__all__ = ["GSASRecForSequentialRecommendation", "GSASRecModel", "GSASRecPreTrainedModel"]
