"""Recformer's two heads: pretraining on histories (arXiv 2305.13731, section 2.3) and recommendation (section 2.4)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.longformer.modeling_longformer import LongformerLMHead
from transformers.utils import ModelOutput

from ...ops.linear_cross_entropy import linear_cross_entropy
from ...tokenization.item_vocab import ItemVocab
from ..recommend import RecommendMixin, check_item_ids, rank_items
from ..recommendation_losses import draw_negatives
from ..sequential_recommendation import SequentialRecOutput
from .histories import find_items, lay_out_histories
from .modeling_recformer import RecformerModel, RecformerPreTrainedModel

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "item_position_ids")


@dataclass
class RecformerForPreTrainingOutput(ModelOutput):
    """Output of `RecformerForPreTraining`.

    loss: scalar, contrastive + mlm_weight * masked language modelling; of the latter alone without targets.
    logits: `[batch, length, vocab_size]`, only where there are no targets.
    contrastive_logits: `[batch, items]`, cosine / temperature of every history and every target of the batch.
    hidden_states, attentions: of every layer, if asked for.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    contrastive_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class RecformerForPreTraining(RecformerPreTrainedModel):
    """Masked language modelling, and telling a history's next item from those of the batch.

    loss = CE(cos(z_i, z'_j) / tau, j = i) + lambda (MLM(histories) + MLM(items))

    z and z' are vectors of histories and of their next items; the items of all processes count as negatives, with
    gradients. `DataCollatorForRecformerPretraining` makes the inputs. To keep word embeddings fixed, as published:
    `model.get_input_embeddings().requires_grad_(False)`.

    Forward arguments that differ from other models:
        input_ids, attention_mask, token_type_ids, item_position_ids: the histories.
        labels: `[batch, length]`, the tokens that `masked_input_ids` hides, -100 elsewhere.
        masked_input_ids: the histories with masks; None takes `input_ids` as masked already.
        target_input_ids, ...: the next items likewise, with the same names behind `target_`. Without them, the model
            is a masked language model.

    >>> from undersong.modeling.recformer.configuration_recformer import RecformerConfig
    >>> config = RecformerConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = RecformerForPreTraining(config)
    >>> ids = torch.tensor([[0, 7, 8]])
    >>> model(ids, target_input_ids=ids).loss  # one item to choose from, and nothing masked
    tensor(0., grad_fn=<NllLossBackward0>)
    """

    accepts_loss_kwargs = False  # the contrastive part is a mean over histories, whatever tokens a Trainer counts

    def __init__(self, config):
        super().__init__(config)
        self.longformer = RecformerModel(config)
        self.lm_head = LongformerLMHead(config)
        words = self.longformer.get_input_embeddings()
        name = next(name for name, module in self.longformer.named_modules() if module is words)
        self._tied_weights_keys = {
            "lm_head.decoder.weight": f"longformer.{name}.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.lm_head:
            init.zeros_(module.bias)

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        item_position_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        masked_input_ids: torch.LongTensor | None = None,
        target_input_ids: torch.LongTensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_token_type_ids: torch.LongTensor | None = None,
        target_item_position_ids: torch.LongTensor | None = None,
        target_labels: torch.LongTensor | None = None,
        target_masked_input_ids: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> RecformerForPreTrainingOutput:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        history = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "item_position_ids": item_position_ids,
        }
        if target_input_ids is None:
            given = input_ids if masked_input_ids is None else masked_input_ids
            outputs = self.longformer(
                given, **history, position_ids=position_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
            )
            logits, loss = self.lm_head(outputs.last_hidden_state), None
            if labels is not None:
                loss = _mean_cross_entropy(logits.flatten(0, 1), labels.flatten())
            result = RecformerForPreTrainingOutput(
                loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
            )
        else:
            target = {
                "attention_mask": target_attention_mask,
                "token_type_ids": target_token_type_ids,
                "item_position_ids": target_item_position_ids,
            }
            logits = self._contrast(input_ids, history, target_input_ids, target)
            own = torch.arange(len(logits), device=logits.device) + len(logits) * _process()[0]
            loss = F.cross_entropy(logits, own)
            for masked, inputs, hidden in (
                (masked_input_ids, history, labels),
                (target_masked_input_ids, target, target_labels),
            ):
                if hidden is not None:
                    loss = loss + self.config.mlm_weight * self._masked_lm(masked, inputs, hidden)
            result = RecformerForPreTrainingOutput(loss=loss, contrastive_logits=logits)
        return result if return_dict else result.to_tuple()

    def _contrast(self, input_ids, history, target_input_ids, target):
        users, items = (
            unit_vectors(self.longformer(ids, **inputs, pooled_only=True, return_dict=True).pooler_output)
            for ids, inputs in ((input_ids, history), (target_input_ids, target))
        )
        if _process()[1] > 1:
            from torch.distributed.nn.functional import all_gather

            items = torch.cat(all_gather(items))
        return users @ items.T / self.config.temperature

    def _masked_lm(self, masked_input_ids, inputs, labels):
        """The vocabulary's logits are made for the masked tokens alone."""
        hidden = self.longformer(masked_input_ids, **inputs, return_dict=True).last_hidden_state
        chosen = labels != -100
        return _mean_cross_entropy(self.lm_head(hidden[chosen]), labels[chosen])


def _process():
    """(number of this process, how many there are)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _mean_cross_entropy(logits, labels):
    """0 with a gradient where there is no label, which would else be 0 / 0."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="sum") / (labels != -100).sum().clamp(min=1)


def unit_vectors(x):
    """Rows of length 1, in float32 at least: cosines over tau = 0.05 are beyond what half precision resolves."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _no_items(config):
    """Vectors, tokens and kinds of tokens of a catalogue without texts: every item has a direction of its own."""
    shape, width = (config.num_items, config.hidden_size), config.max_attr_num * config.max_attr_length
    vectors = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    tokens = torch.full((config.num_items, width), config.pad_token_id, dtype=torch.int32, device="cpu")
    return vectors, tokens, torch.zeros_like(tokens, dtype=torch.int8)


def _item_buffers(model):
    return model.item_embedding, model.item_tokens, model.item_token_types


class RecformerForSequentialRecommendation(RecommendMixin, RecformerPreTrainedModel):
    """Scores a catalogue by cosine: cos(history, item) / tau.

    `set_items` encodes a catalogue; its unit vectors, tokens and external ids are then part of the model, are saved
    with it, and make `recommend` work without a tokenizer. The vectors are a buffer that training leaves alone:
    `refresh_items` makes them again with the current encoder (`training.two_stage.TwoStageCallback` does).

    Forward arguments that differ from other models:
        input_ids, attention_mask, token_type_ids, item_position_ids: histories as `RecformerTokenizer` makes them.
        labels: `[batch]` the next item of each history, 1..num_items; 0 and -100 do not count. The loss is softmax
            over all items, or over the label and `num_negatives` items drawn uniformly.

    Returns:
        `SequentialRecOutput` with `logits` `[batch, num_items]`, column i the score of item i + 1; with labels the
        loss, which makes no logits.

    >>> from undersong.modeling.recformer.configuration_recformer import RecformerConfig
    >>> config = RecformerConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_items=5)
    >>> model = RecformerForSequentialRecommendation(config).eval()
    >>> model(torch.tensor([[0, 7, 8, 9]])).logits.shape
    torch.Size([1, 5])
    """

    accepts_loss_kwargs = False  # a mean over the batch's histories
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # of a pretrained model

    def __init__(self, config):
        super().__init__(config)
        self.longformer = RecformerModel(config)
        if config.num_items:
            self._set_item_buffers(*_no_items(config))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and self.config.num_items:
            for buffer, value in zip(_item_buffers(self), _no_items(self.config), strict=True):
                init.copy_(buffer, value)

    def _set_item_buffers(self, embedding, tokens, types):
        self.register_buffer("item_embedding", embedding)
        self.register_buffer("item_tokens", tokens)
        self.register_buffer("item_token_types", types)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        item_position_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SequentialRecOutput:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.longformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            item_position_ids=item_position_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pooled_only=True,
            return_dict=True,
            **kwargs,
        )
        table, _ = self.item_table()
        users, loss, logits = unit_vectors(outputs.pooler_output), None, None
        if labels is None:
            logits = users @ table.T / self.config.temperature
        else:
            loss = self._loss(users, table, labels.reshape(len(users)))
        result = SequentialRecOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return result if return_dict else result.to_tuple()

    def _loss(self, users, table, labels):
        if labels.device.type == "cpu":
            check_item_ids("labels", labels.clamp(min=0), self.config.num_items, self.config.num_items)
        rows = torch.where(labels > 0, labels - 1, -100)
        if self.config.num_negatives < 0:
            return linear_cross_entropy(users, table, rows, scale=1 / self.config.temperature)
        drawn = draw_negatives((len(rows), self.config.num_negatives), len(table), rows.device)
        candidates = table[torch.cat([rows.clamp(min=0)[:, None], drawn], 1)]
        logits = torch.einsum("bd,bnd->bn", users, candidates) / self.config.temperature
        return _mean_cross_entropy(logits, torch.where(rows < 0, rows, 0))

    def item_table(self):
        """`(unit vectors [num_items, hidden_size], None)`; a product with a history's vector is a score."""
        if not self.config.num_items:
            raise ValueError("num_items is 0: the model has no catalogue yet; call model.set_items(tokenizer, items).")
        return unit_vectors(self.item_embedding), None

    @torch.no_grad()
    def set_items(self, tokenizer, items, *, batch_size=128):
        """Makes `items` the catalogue, in place of what there was.

        Args:
            tokenizer: a `RecformerTokenizer`.
            items: {external id: {attribute: value}}, or a list of attribute dictionaries, which are then called by
                their numbers 1..N.
            batch_size: items encoded at once.

        Returns:
            The model.
        """
        texts = list(items.values()) if isinstance(items, Mapping) else list(items)
        tokens, types, _ = tokenizer.encode_items(texts)
        width = self.config.max_attr_num * self.config.max_attr_length
        if tokens.shape[1] > width:
            raise ValueError(
                f"items have up to {tokens.shape[1]} tokens, but the configuration allows max_attr_num x"
                f" max_attr_length = {width}; use RecformerTokenizer.from_config(tokenizer, model.config)."
            )
        tokens = F.pad(tokens, (0, width - tokens.shape[1]), value=self.config.pad_token_id)
        types = F.pad(types, (0, width - types.shape[1]))
        vectors = torch.zeros(len(texts), self.config.hidden_size)
        self._set_item_buffers(*(x.to(self.device) for x in (vectors, tokens.int(), types.to(torch.int8))))
        self.config.num_items = len(texts)
        self.item_vocab = ItemVocab(items) if isinstance(items, Mapping) else None
        return self.refresh_items(batch_size)

    @torch.no_grad()
    def refresh_items(self, batch_size=128):
        """Encodes the catalogue again, with the encoder as it is now; returns the model."""
        self.item_embedding = self.encode_items(batch_size=batch_size)
        return self

    @torch.no_grad()
    def encode_items(self, rows=None, *, batch_size=128):
        """Unit vectors `[items, hidden_size]` in float32 of items of the catalogue, dropout off, padding not computed.

        Args:
            rows: `[items]` int64, 1..num_items; None for all.
            batch_size: items encoded at once. Items of like length go together.
        """
        self.item_table()
        rows = torch.arange(1, self.config.num_items + 1, device=self.device) if rows is None else rows
        order = self.item_token_types[rows - 1].ne(0).sum(1).argsort(stable=True)
        vectors = self.item_embedding.new_empty(len(rows), self.config.hidden_size, dtype=torch.float32)
        for part in order.split(batch_size):
            vectors[part] = unit_vectors(self.encode_histories(rows[part, None])).to(vectors.dtype)
        return vectors

    @torch.no_grad()
    def recommend(self, histories, k=10, *, exclude_seen=True, exclude_ids=None, allow_ids=None):
        """The k items that a user is most likely to want next.

        Args:
            histories: item ids as for every recommender; or texts, as a `RecformerTokenizer` makes them into inputs:
                `model.recommend(tokenizer([[{"title": "Blue kettle"}]]))`. The texts need not be in the catalogue.
            k, exclude_ids, allow_ids: as for every recommender.
            exclude_seen: leave out the items of the history; of a history of texts, those that read the same.

        Returns:
            `Recommendations(item_ids, scores)`; lists of external ids if the model has an `item_vocab`, and ids did
            not come in as a tensor.
        """
        if not isinstance(histories, Mapping):
            return super().recommend(
                histories, k, exclude_seen=exclude_seen, exclude_ids=exclude_ids, allow_ids=allow_ids
            )
        table, bias = self.item_table()
        inputs = {name: histories[name].to(self.device) for name in _INPUTS}
        exclude = [find_items(inputs, self.item_tokens, self.item_token_types)] if exclude_seen else []
        if exclude_ids is not None:
            exclude.append(self._to_ids("exclude_ids", exclude_ids))
        if allow_ids is not None:
            allow_ids = self._to_ids("allow_ids", allow_ids[None] if torch.is_tensor(allow_ids) else [allow_ids])[0]
        exclude = torch.cat(exclude, 1) if exclude else None
        best = rank_items(self.encode_histories(inputs), table, k, bias=bias, exclude_ids=exclude, allow_ids=allow_ids)
        return best if self.item_vocab is None else self._to_names(best)

    def resize_item_embeddings(self, catalogue):
        raise ValueError("vectors of items are made from their texts; use set_items(tokenizer, items).")

    def resize_token_embeddings(self, *args, **kwargs):
        # tokens here are words, not items: the mixin's rule does not hold
        return RecformerPreTrainedModel.resize_token_embeddings(self, *args, **kwargs)

    @torch.no_grad()
    def encode_histories(self, histories):
        """Vectors over tau, `[batch, hidden_size]`, whose product with the item table is the score; dropout off.

        Args:
            histories: `[batch, length]` int64 item ids, oldest first, 0 for none; or tokenized histories.
        """
        if not isinstance(histories, Mapping):
            histories = lay_out_histories(
                histories,
                self.item_tokens,
                self.item_token_types,
                bos_token_id=self.config.bos_token_id,
                pad_token_id=self.config.pad_token_id,
                max_item_embeddings=self.config.max_item_embeddings,
                max_token_num=self.config.max_token_num,
            )
        inputs = {name: histories[name].to(self.device) for name in _INPUTS}
        training = self.training
        self.eval()
        pooled = self.longformer(**inputs, pooled_only=True, return_dict=True).pooler_output
        self.train(training)
        return unit_vectors(pooled) / self.config.temperature


__all__ = [
    "RecformerForPreTraining",
    "RecformerForPreTrainingOutput",
    "RecformerForSequentialRecommendation",
    "unit_vectors",
]
