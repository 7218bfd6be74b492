"""What the configurations of S4D and S5 share: sizes, time steps, reading direction, heads."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class DiagonalSSMConfig(PreTrainedConfig):
    """Configuration of a stack of diagonal state space layers.

    Args:
        vocab_size: number of tokens (text models).
        hidden_size, num_hidden_layers: as everywhere.
        state_size: real numbers of a state (of every channel in S4D, of a layer in S5); even, for it is kept as
            conjugate pairs.
        hidden_dropout_prob: dropout before and after the output projection of a layer.
        layer_norm_eps: epsilon of the layer norms.
        dt_min, dt_max: time steps start log-uniform between them. A layer remembers about 1 / dt steps.
        discretization: "zoh" (zero-order hold) or "bilinear".
        bidirectional: add a reading from the end with a read-out of its own. No cache and no language model then.
        pooling: what a time series head reads: the "mean" of the valid steps, or the "last" one.
        initializer_range: standard deviation of the initial weights around the state spaces.
        input_size: channels of a time series (series heads).
        num_labels: classes (classification heads).

    Raises:
        ValueError: sizes or time steps that make no state space.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {"layers.*.out_proj": "colwise_gather_output"}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    state_size: int = 64
    num_hidden_layers: int = 6
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    discretization: Literal["zoh", "bilinear"] = "zoh"
    bidirectional: bool = False
    pooling: Literal["mean", "last"] = "mean"
    initializer_range: float = 0.02
    input_size: int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(
                f"state_size ({self.state_size}) must be a positive even number, for it is kept as conjugate pairs;"
                f" use {max(2, self.state_size + self.state_size % 2)}."
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max}); use 0.001 and 0.1, or"
                " 1 / length and 0.1 for a long series."
            )

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers


__all__ = ["DiagonalSSMConfig"]
