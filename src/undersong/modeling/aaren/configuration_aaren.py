"""Configuration of Aaren ("Attention as an RNN", arXiv 2405.13956)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class AarenConfig(PreTrainedConfig):
    """Configuration of every Aaren model: language, sequence classification, time series, events.

    Args:
        vocab_size: number of tokens (text models).
        hidden_size, num_hidden_layers, num_attention_heads: as everywhere; heads must divide the hidden size.
        intermediate_size: width of the feed-forward block; None means `4 * hidden_size`.
        hidden_act: activation of the feed-forward block.
        hidden_dropout_prob: dropout on the output of both blocks of a layer.
        norm_first: layer norm before each block (True) or after its residual (False).
        layer_norm_eps: epsilon of the layer norms.
        position_embedding_type: "sinusoidal" (any length), "learned" (`max_position_embeddings` of them) or "none".
        max_position_embeddings: size of the learned position table.
        initializer_range: standard deviation of all initial weights, the learned queries included.
        input_size: channels of a time series (series heads).
        prediction_length: steps that `AarenForPrediction` forecasts; it needs one.
        scaling: how `AarenForPrediction` normalises every channel of every series it sees: "std" (zero mean, unit
            variance), "mean" (unit mean of the absolute values) or None (not at all).
        num_event_types: kinds of events (`AarenForEventForecasting`).
        num_mixtures: log-normal components of the density of the time to the next event.
        log_gap_mean, log_gap_std: mean and standard deviation of the logarithm of the times between events in the
            training data, by which they are standardised; exp(log_gap_mean) is also the unit of time of the positions.
        num_labels: classes (classification heads).

    Raises:
        ValueError: heads that do not divide the hidden size; lengths, counts or deviations that are not positive.

    >>> AarenConfig(hidden_size=64, num_attention_heads=4).intermediate_size
    256
    """

    model_type = "aaren"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    position_embedding_type: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    input_size: int = 1
    prediction_length: int | None = None
    scaling: Literal["mean", "std"] | None = "std"
    num_event_types: int = 1
    num_mixtures: int = 64
    log_gap_mean: float = 0.0
    log_gap_std: float = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        if self.hidden_size % self.num_attention_heads:
            next_multiple = -(-self.hidden_size // self.num_attention_heads) * self.num_attention_heads
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}); use a multiple such as hidden_size={next_multiple}."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be even for sinusoidal positions; use another hidden_size or"
                " position_embedding_type='learned'."
            )
        for name in ("prediction_length", "num_event_types", "num_mixtures", "log_gap_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be positive; use {name}=1.")

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers


__all__ = ["AarenConfig"]
