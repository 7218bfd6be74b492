"""Configuration of BERT4Rec (arXiv 1904.06690)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.models.bert.configuration_bert import BertConfig

from ..recommendation_config import LossType, NegativeSampler, check_recommendation, set_special_ids


@strict
class SequentialRecConfig(BertConfig):
    """Configuration of BERT4Rec: a BERT whose tokens are the items of a catalogue.

    Args:
        num_items: size N of the catalogue; items have ids 1..N, padding 0, the mask N + 1.
        vocab_size, mask_token_id: follow from `num_items`; None fills them in.
        max_position_embeddings: longest input, the mask that stands for the next item included.
        position_anchor: "right" counts positions so that the most recent slot has always the last one, and users of
            any history length share the position of the next item; "left" counts from the oldest item, as the authors'
            code and RecBole do.
        logits_over_items_only: logits and the softmax of the loss leave out padding and mask, which are no items.
            False keeps the columns of all ids, as the authors' code does.
        loss_type: "ce" over the whole catalogue; "sampled_softmax", "bce" or "gbce" over drawn negatives.
        num_negatives: negatives for each position, of the sampled losses.
        gbce_t: how far gBCE corrects overconfidence: 0 is BCE, 1 calibrates fully.
        negative_sampler: "uniform", or "popularity" by the counts of `set_item_counts` (sampled softmax).
        label_smoothing: of "ce".

    Everything else is as in `BertConfig`, with the sizes that this task takes.

    Raises:
        ValueError: special ids that contradict `num_items`, or options of the loss that contradict one another.

    >>> config = SequentialRecConfig(num_items=1682)
    >>> config.vocab_size, config.pad_token_id, config.mask_token_id
    (1684, 0, 1683)
    """

    model_type = "bert4rec"

    num_items: int = 1000
    vocab_size: int | None = None
    mask_token_id: int | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    hidden_dropout_prob: float | int = 0.2
    attention_probs_dropout_prob: float | int = 0.2
    max_position_embeddings: int = 200
    type_vocab_size: int = 1
    position_anchor: Literal["right", "left"] = "right"
    logits_over_items_only: bool = True
    loss_type: LossType = "ce"
    num_negatives: int = 256
    gbce_t: float | int = 0.75
    negative_sampler: NegativeSampler = "uniform"
    label_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs):
        set_special_ids(self)
        super().__post_init__(**kwargs)

    def validate_recommendation(self):
        """Called by `@strict` after construction."""
        check_recommendation(self)
        if not self.logits_over_items_only and self.loss_type != "ce":
            raise ValueError(
                f"logits_over_items_only (False) is for loss_type='ce'; with {self.loss_type!r} negatives are items."
            )


__all__ = ["SequentialRecConfig"]
