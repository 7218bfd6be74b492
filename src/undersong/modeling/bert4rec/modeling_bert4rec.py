"""BERT4Rec: the next item as a masked word of a BERT over items (arXiv 1904.06690).

Encoder and head are transformers' BERT, tensor names included, so that a `BertForMaskedLM` over items loads as it is.
What is added: positions counted from the most recent item, a softmax over items only, losses that score just the
masked positions, and `recommend`, which appends the mask that stands for the next item.
"""

import torch
from transformers.models.bert.modeling_bert import BertModel, BertOnlyMLMHead, BertPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..recommend import check_item_ids, cut_histories
from ..sequential_recommendation import SequentialRecMixin, SequentialRecOutput, check_length, history_positions
from .configuration_bert4rec import SequentialRecConfig


class SequentialRecPreTrainedModel(BertPreTrainedModel):
    config: SequentialRecConfig
    config_class = SequentialRecConfig


class SequentialRecModel(BertModel):
    """The encoder: transformers' `BertModel` whose padding and positions follow from the item ids.

    Forward arguments that differ:
        attention_mask: `[batch, length]`; None takes every id that is not padding.
        position_ids: None counts as `config.position_anchor` says.

    >>> model = SequentialRecModel(SequentialRecConfig(num_items=9, hidden_size=8)).eval()
    >>> model(torch.tensor([[0, 3, 5, 10]])).last_hidden_state.shape
    torch.Size([1, 4, 8])
    """

    config: SequentialRecConfig
    config_class = SequentialRecConfig

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            check_length(given.shape[1], self.config.max_position_embeddings)
        if input_ids is not None:
            if input_ids.device.type == "cpu":
                check_item_ids("input_ids", input_ids, self.config.mask_token_id, self.config.num_items)
            if attention_mask is None:
                attention_mask = input_ids.ne(self.config.pad_token_id)
        if position_ids is None and given is not None:
            mask = given.new_ones(given.shape[:2]) if attention_mask is None else attention_mask
            if mask.dim() == 2:
                anchor = self.config.position_anchor
                position_ids = history_positions(mask.bool(), self.config.max_position_embeddings, anchor)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class BertForSequentialRecommendation(SequentialRecMixin, SequentialRecPreTrainedModel):
    """BERT4Rec: fills masks in histories, the one behind the end above all.

    Forward arguments that differ from other models:
        input_ids: `[batch, length]` item ids 1..N, 0 for padding, N + 1 for the mask.
        labels: `[batch, length]` item ids to fill in; 0 and -100 do not count. With labels there are no logits.
        logits_to_keep: how many last positions, or which, get logits; 0 is all.
        num_items_in_batch: divides the sum of losses, which is else averaged.

    >>> model = BertForSequentialRecommendation(SequentialRecConfig(num_items=9, hidden_size=8)).eval()
    >>> model(torch.tensor([[3, 5, 10]]), logits_to_keep=1).logits.shape
    torch.Size([1, 1, 9])
    >>> model.recommend([[3, 5], []], k=4).item_ids.shape
    torch.Size([2, 4])
    """

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config):
        super().__init__(config)
        self.bert = SequentialRecModel(config)
        self.cls = BertOnlyMLMHead(config)
        self.add_item_counts()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.init_item_counts()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def head_states(self, states):
        return self.cls.predictions.transform(states)

    def output_weights(self):
        """`[vocab_size, d]` and `[vocab_size]`, padding and mask included."""
        return self.cls.predictions.decoder.weight, self.cls.predictions.decoder.bias

    def item_parameters(self):
        """(module, name) of every parameter that has a row for each id."""
        predictions = self.cls.predictions
        return [
            (self.bert.embeddings.word_embeddings, "weight"),
            (predictions.decoder, "weight"),
            (predictions.decoder, "bias"),
            (predictions, "bias"),
        ]

    def encode_histories(self, input_ids):
        """`[batch, d]`: what the head makes of a mask behind each history; input ids as for `recommend`."""
        ids = cut_histories(input_ids, self.config.max_position_embeddings - 1)
        mask = torch.full_like(ids[:, :1], self.config.mask_token_id)
        return self.head_states(self.bert(torch.cat([ids, mask], 1)).last_hidden_state[:, -1])

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
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self.score(outputs, labels, logits_to_keep, num_items_in_batch)


__all__ = ["BertForSequentialRecommendation", "SequentialRecModel", "SequentialRecPreTrainedModel"]
