"""Configuration of Recformer ("Text Is All You Need", arXiv 2305.13731)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.models.longformer.configuration_longformer import LongformerConfig


@strict
class RecformerConfig(LongformerConfig):
    """Configuration of every Recformer model; the defaults are those of the published models.

    Args:
        encoder_type: "longformer" (band attention and one global token), "bert" or "modernbert".
        encoder_config: further arguments of the configuration of a "bert" or "modernbert" encoder. What this
            configuration names itself (sizes, dropout, vocabulary, padding) is passed on and need not be repeated.
        attention_window: keys that a token sees, half of them on each side, beside itself and the first token; an
            even number or one for each layer.
        token_type_size: kinds of tokens: 0 the first token, 1 attribute names, 2 attribute values, 3 padding.
        max_item_embeddings: rows of the item position table. Row 0 is the first token's, 1 the most recent item's; a
            history holds at most `max_item_embeddings - 1` items.
        max_attr_num: attributes of an item that are read, the first ones.
        max_attr_length: tokens of an attribute, its name included.
        max_token_num: tokens of a history, the first token included; None for 1024, or fewer if there are no more
            positions.
        pooler_type: a history's vector is the hidden state of its first token ("cls") or the mean of all ("avg").
        temperature: tau in score = cos(history, item) / tau.
        mlm_weight: lambda, what masked language modelling weighs in pretraining.
        num_items: rows of the item table (`RecformerForSequentialRecommendation`); 0 means that there is none yet.
        num_negatives: items drawn for each history's softmax in finetuning; -1 means all of them.

    Raises:
        ValueError: a field out of its range, or fields that contradict each other.

    >>> RecformerConfig(hidden_size=64, num_attention_heads=4, attention_window=32).max_item_embeddings
    51
    """

    model_type = "recformer"

    encoder_type: Literal["longformer", "bert", "modernbert"] = "longformer"
    encoder_config: dict | None = None
    vocab_size: int = 50265
    attention_window: list[int] | int = 64
    max_position_embeddings: int = 4098
    layer_norm_eps: float = 1e-5
    token_type_size: int = 4
    max_item_embeddings: int = 51
    max_attr_num: int = 3
    max_attr_length: int = 32
    max_token_num: int | None = None
    pooler_type: Literal["cls", "avg"] = "cls"
    temperature: float = 0.05
    mlm_weight: float = 0.1
    num_items: int = 0
    num_negatives: int = -1

    def __post_init__(self, **kwargs):
        if self.max_token_num is None:
            self.max_token_num = min(1024, self.position_room)
        super().__post_init__(**kwargs)

    def validate_recformer(self):
        """Called by `@strict` after construction."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}); use a multiple of it."
            )
        windows = self.attention_windows
        if len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"attention_window ({self.attention_window}) must name one window or num_hidden_layers"
                f" ({self.num_hidden_layers}) of them; use attention_window={windows[0] if windows else 64}."
            )
        for window in windows:
            if window < 2 or window % 2:
                raise ValueError(
                    f"attention_window ({window}) must be even and at least 2, half on each side; use"
                    f" {max(2, window + 1)}."
                )
        for name, least in (("token_type_size", 4), ("max_item_embeddings", 2), ("max_token_num", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}; use {least} or more.")
        for name in ("max_attr_num", "max_attr_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; items would have no tokens.")
        room = self.position_room
        if self.max_token_num > room:
            raise ValueError(
                f"max_token_num ({self.max_token_num}) must fit into the {room} positions that"
                f" max_position_embeddings ({self.max_position_embeddings}) leaves; use max_token_num={room}."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0; the published value is 0.05.")
        if self.mlm_weight < 0:
            raise ValueError(f"mlm_weight ({self.mlm_weight}) must not be negative; use 0 to leave the term out.")
        if self.num_items < 0:
            raise ValueError(f"num_items ({self.num_items}) must not be negative; use 0 for no item table.")
        if self.num_negatives == 0 or self.num_negatives < -1:
            raise ValueError(f"num_negatives ({self.num_negatives}) must be positive, or -1 for all items.")

    @property
    def position_room(self):
        """The longest input that the encoder has positions for; Longformer counts them from the padding id."""
        offset = (self.pad_token_id or 0) + 1 if self.encoder_type == "longformer" else 0
        return self.max_position_embeddings - offset

    @property
    def attention_windows(self):
        """One window for each layer."""
        window = self.attention_window
        return list(window) if isinstance(window, list | tuple) else [window] * self.num_hidden_layers


__all__ = ["RecformerConfig"]
