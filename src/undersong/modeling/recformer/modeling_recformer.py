"""Recformer: recommendation from the texts of items alone ("Text Is All You Need", KDD 2023, arXiv 2305.13731).

An item is a flat list of attribute names and values, a history the texts of its items, newest first. One encoder maps
both to vectors, and the score of an item is cos(history, item) / tau (section 2.2). Beside word and position, every
token carries its kind and the place of its item in the history. As there are no item ids, items that nobody has
bought yet are recommended like any other.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.longformer.modeling_longformer import (
    LongformerEmbeddings,
    LongformerPreTrainedModel,
    create_position_ids_from_input_ids,
)

from .configuration_recformer import RecformerConfig
from .encoder import RecformerEncoder
from .packed_rows import PackedRows

IMPLEMENTATIONS = ("sdpa_band", "flex_band", "eager")


class RecformerEmbeddings(LongformerEmbeddings):
    """Word + position + kind of token + place of the item, normalised (section 2.2, equation 1)."""

    def __init__(self, config):
        super().__init__(config)
        self.token_type_embeddings = nn.Embedding(config.token_type_size, config.hidden_size)
        self.item_position_embeddings = nn.Embedding(config.max_item_embeddings, config.hidden_size)

    def forward(self, input_ids, token_type_ids, item_position_ids, position_ids=None, inputs_embeds=None):
        if position_ids is None and input_ids is not None:
            position_ids = create_position_ids_from_input_ids(input_ids, self.padding_idx)
        elif position_ids is None:
            position_ids = self.create_position_ids_from_inputs_embeds(inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        embeddings = inputs_embeds + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.item_position_embeddings(item_position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class RecformerItemEmbeddings(nn.Module):
    """Kind of token and place of the item, added to the words of an encoder that has its own positions and norm."""

    def __init__(self, config):
        super().__init__()
        self.token_type_embeddings = nn.Embedding(config.token_type_size, config.hidden_size)
        self.item_position_embeddings = nn.Embedding(config.max_item_embeddings, config.hidden_size)

    def forward(self, words, token_type_ids, item_position_ids):
        return words + self.token_type_embeddings(token_type_ids) + self.item_position_embeddings(item_position_ids)


class RecformerPreTrainedModel(LongformerPreTrainedModel):
    config: RecformerConfig
    config_class = RecformerConfig
    base_model_prefix = "longformer"
    _no_split_modules = ["RecformerLayer"]

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        if self.config.encoder_type != "longformer":  # the encoder inside checks for itself
            return requested_attention or "sdpa"
        if requested_attention not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attn_implementation ({requested_attention!r}) must be one of"
                f" {', '.join(map(repr, IMPLEMENTATIONS))}; use 'sdpa_band', or leave it out."
            )
        return requested_attention or IMPLEMENTATIONS[0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As for every model; from a Longformer, whose table of token types has another size, that table is new."""
        if pretrained_model_name_or_path is not None and "config" not in kwargs:
            stored, _ = RecformerConfig.get_config_dict(pretrained_model_name_or_path, **_hub_arguments(kwargs))
            if stored.get("model_type") == "longformer":
                kwargs.setdefault("ignore_mismatched_sizes", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_encoder(cls, encoder, **config):
        """A model that starts with the weights of a text encoder; kinds of tokens and item places start fresh.

        Args:
            encoder: a `LongformerModel`, `BertModel` or `ModernBertModel`.
            config: fields of `RecformerConfig` that differ from what the encoder's configuration says.

        Raises:
            ValueError: an encoder of another type.

        >>> from transformers import BertConfig, BertModel
        >>> bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> RecformerModel.from_encoder(bert).config.encoder_type
        'bert'
        """
        model = cls(recformer_config(encoder.config, **config))
        trunk = getattr(model, cls.base_model_prefix, model)
        if trunk.config.encoder_type == "longformer":
            weights = {
                name: weight
                for name, weight in encoder.state_dict().items()
                if name.startswith(("embeddings.", "encoder.")) and "token_type_embeddings" not in name
            }
            trunk.load_state_dict(weights, strict=False)
        else:
            trunk.encoder.load_state_dict(encoder.state_dict(), strict=False)  # a pooler, if any, stays behind
        return model.to(encoder.dtype)


def _hub_arguments(kwargs):
    names = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
)


def recformer_config(stock, **changes):
    """The `RecformerConfig` of a stock encoder's configuration."""
    kinds = ("longformer", "bert", "modernbert")
    if stock.model_type not in kinds:
        raise ValueError(
            f"encoder is a {stock.model_type!r}, but must be one of {', '.join(kinds)}; use one of these."
        )
    fields = {name: getattr(stock, name) for name in _SHARED}
    if stock.model_type == "longformer":
        for name in ("attention_window", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
                     "layer_norm_eps", "bos_token_id", "eos_token_id", "sep_token_id"):  # fmt: skip
            fields[name] = getattr(stock, name)
    else:
        own = {name: value for name, value in stock.to_diff_dict().items() if name not in (*_SHARED, "model_type")}
        fields["encoder_config"] = own
        # the first token of a history is what the encoder was trained to see first
        fields["bos_token_id"] = next((x for x in (stock.bos_token_id, getattr(stock, "cls_token_id", None)) if x), 0)
    return RecformerConfig(**{**fields, "encoder_type": stock.model_type, **changes})


class RecformerModel(RecformerPreTrainedModel):
    """The encoder of histories and items.

    Forward arguments that differ from other models:
        attention_mask: `[batch, length]`, 1 for tokens, 0 for padding, anywhere; None for no padding. The first token
            of every row is the global one and the row's vector.
        token_type_ids: 0 for the first token, 1 for attribute names, 2 for values, 3 for padding; None for all 0.
        item_position_ids: 0 for the first token, 1 for the most recent item, ...; None for all 0.
        pooled_only: leave `last_hidden_state` out. Without gradients, the last layer then only computes first tokens.

    Returns:
        `pooler_output` `[batch, hidden_size]` is the vector of a history, or of an item alone, as it is: scores are
        cosines.

    `attn_implementation` is "sdpa_band" (the default: `ops.band_attention`), "flex_band" (FlexAttention) or "eager"
    (transformers' own sliding chunks), all with equal results; "bert" and "modernbert" encoders take what they know.

    >>> config = RecformerConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> RecformerModel(config).eval()(torch.tensor([[0, 7, 8, 9]])).pooler_output.shape
    torch.Size([1, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        if config.encoder_type == "longformer":
            self.embeddings = RecformerEmbeddings(config)
            self.encoder = RecformerEncoder(config)
        else:
            self.embeddings = RecformerItemEmbeddings(config)
            stock = CONFIG_MAPPING[config.encoder_type](
                **{**{name: getattr(config, name) for name in _SHARED}, **(config.encoder_config or {})}
            )
            pooler = {"add_pooling_layer": False} if config.encoder_type == "bert" else {}
            self.encoder = AutoModel.from_config(
                stock, attn_implementation=config._attn_implementation or "sdpa", **pooler
            )
        self.post_init()

    def get_input_embeddings(self):
        longformer = self.config.encoder_type == "longformer"
        return self.embeddings.word_embeddings if longformer else self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        if self.config.encoder_type == "longformer":
            self.embeddings.word_embeddings = value
        else:
            self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        item_position_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pooled_only: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        shape, device = (
            (input_ids.shape, input_ids.device)
            if inputs_embeds is None
            else (inputs_embeds.shape[:2], inputs_embeds.device)
        )
        zeros = torch.zeros(shape, dtype=torch.long, device=device)
        token_type_ids = zeros if token_type_ids is None else token_type_ids
        item_position_ids = zeros if item_position_ids is None else item_position_ids
        self._check(shape, attention_mask, token_type_ids, item_position_ids)
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        return_dict = self.config.return_dict if return_dict is None else return_dict
        implementation = self.config._attn_implementation
        if self.config.encoder_type != "longformer":
            words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            outputs = self.encoder(
                inputs_embeds=self.embeddings(words, token_type_ids, item_position_ids),
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            )
            outputs = self._pool(outputs, attention_mask)
        else:
            embedded = self.embeddings(input_ids, token_type_ids, item_position_ids, position_ids, inputs_embeds)
            states = {"output_hidden_states": output_hidden_states}
            if implementation == "eager":
                outputs = self._sliding_chunks(embedded, attention_mask, output_attentions=output_attentions, **states)
            elif output_attentions:
                raise ValueError(
                    f"output_attentions (True) needs attn_implementation='eager', because {implementation!r} never"
                    " stores the weights; set it, or ask for hidden states."
                )
            else:
                outputs = self._packed(embedded, attention_mask, implementation, pooled_only, **states)
        return outputs if return_dict else outputs.to_tuple()

    def _packed(self, embedded, mask, implementation, pooled_only, output_hidden_states):
        shape = embedded.shape[:2]
        rows = PackedRows(mask, shape, embedded.device)
        first_token = self.config.pooler_type == "cls"
        # With gradients, the projections that go unused would get none, which data-parallel training refuses.
        first_only = pooled_only and first_token and not torch.is_grad_enabled() and not output_hidden_states
        outputs = self.encoder(embedded, rows, implementation, first_only, output_hidden_states)
        hidden, states = outputs.last_hidden_state, outputs.hidden_states
        if first_only:
            pooled = hidden[0]
        elif first_token:
            pooled = hidden[0, rows.starts]
        else:
            pooled = _mean(rows.spread(hidden), rows.inside)
        last = None
        if not pooled_only:
            last = rows.packing.unpack(hidden, shape) if states is None else states[-1]
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=states)

    def _sliding_chunks(self, embedded, mask, **recorded):
        """transformers' encoder: it wants whole windows, and negative, zero and positive for masked, local, global."""
        batch, length = embedded.shape[:2]
        mask = torch.ones(batch, length, device=embedded.device) if mask is None else mask
        valid = mask.bool()
        first = valid & (valid.cumsum(1) == 1)
        extra = -length % max(self.config.attention_windows)
        signs = F.pad(valid.to(embedded.dtype) - 1 + first, (0, extra), value=-1.0)
        outputs = self.encoder(
            F.pad(embedded, (0, 0, 0, extra)),
            attention_mask=signs * torch.finfo(embedded.dtype).max,
            padding_len=extra,
            **recorded,
        )
        return self._pool(outputs, mask)

    def _pool(self, outputs, mask):
        hidden = outputs.last_hidden_state
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
        if self.config.pooler_type == "avg":
            pooled = _mean(hidden, mask.bool())
        else:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.bool().long().argmax(1)]
        return BaseModelOutputWithPooling(hidden, pooled, outputs.hidden_states, outputs.attentions)

    def _check(self, shape, attention_mask, token_type_ids, item_position_ids):
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask ({list(attention_mask.shape)}) must be [batch, length] = {list(shape)}; pass 1 for"
                " tokens and 0 for padding, and no global attention: the first token alone is global."
            )
        if token_type_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking would wait for the device
        for name, ids, size, field in (
            ("token_type_ids", token_type_ids, self.config.token_type_size, "token_type_size"),
            ("item_position_ids", item_position_ids, self.config.max_item_embeddings, "max_item_embeddings"),
        ):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
                raise ValueError(f"{name} holds {wrong}, but {field} ({size}) allows 0..{size - 1}; cut the history.")


def _mean(hidden, inside):
    weights = inside.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


__all__ = ["RecformerModel", "RecformerPreTrainedModel", "recformer_config"]
