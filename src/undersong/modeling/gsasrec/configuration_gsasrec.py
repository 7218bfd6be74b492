"""Configuration of gSASRec (arXiv 2308.07192) and, with other losses, SASRec (arXiv 1808.09781)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..recommendation_config import LossType, NegativeSampler, check_recommendation, set_special_ids


@strict
class GSASRecConfig(PreTrainedConfig):
    """Configuration of gSASRec: a causal Transformer over item ids that predicts the next item at every position.

    The defaults are gSASRec; SASRec is `loss_type="bce", num_negatives=1, tie_word_embeddings=True`.

    Args:
        num_items: size N of the catalogue; items have ids 1..N, padding 0. N + 1, the mask of other models over the
            same vocabulary, is not used.
        vocab_size, mask_token_id: follow from `num_items`; None fills them in.
        intermediate_size: width of the feed-forward block; None means `4 * hidden_size`, or `hidden_size` for the
            "sasrec" block.
        hidden_act: of the feed-forward block; None means "gelu", or "relu" for the "sasrec" block.
        hidden_dropout_prob: on embeddings and in the feed-forward block; attention_probs_dropout_prob: on attention.
        max_position_embeddings: longest history.
        block_type: "pre_norm", the common Transformer block, or "sasrec", the authors': queries are normed and stand
            in the residual, keys and values are raw, attention has no output projection.
        tie_word_embeddings: score with the input table (True) or with one of its own.
        position_anchor, loss_type, num_negatives, gbce_t, negative_sampler, label_smoothing: as for
            `SequentialRecConfig`.

    Raises:
        ValueError: heads that do not divide the hidden size, special ids that contradict `num_items`, or options of
            the loss that contradict one another.

    >>> GSASRecConfig(num_items=1682, hidden_size=64, block_type="sasrec").intermediate_size
    64
    """

    model_type = "gsasrec"

    num_items: int = 1000
    vocab_size: int | None = None
    pad_token_id: int | None = 0
    mask_token_id: int | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    hidden_act: str | None = None
    hidden_dropout_prob: float | int = 0.2
    attention_probs_dropout_prob: float | int = 0.2
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 200
    initializer_range: float = 0.02
    block_type: Literal["pre_norm", "sasrec"] = "pre_norm"
    tie_word_embeddings: bool = False
    position_anchor: Literal["right", "left"] = "right"
    loss_type: LossType = "gbce"
    num_negatives: int = 256
    gbce_t: float | int = 0.75
    negative_sampler: NegativeSampler = "uniform"
    label_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs):
        set_special_ids(self)
        authors = self.block_type == "sasrec"
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * (1 if authors else 4)
        if self.hidden_act is None:
            self.hidden_act = "relu" if authors else "gelu"
        super().__post_init__(**kwargs)

    def validate_recommendation(self):
        """Called by `@strict` after construction."""
        check_recommendation(self)
        if self.hidden_size % self.num_attention_heads:
            next_multiple = -(-self.hidden_size // self.num_attention_heads) * self.num_attention_heads
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}); use a multiple such as hidden_size={next_multiple}."
            )


__all__ = ["GSASRecConfig"]
