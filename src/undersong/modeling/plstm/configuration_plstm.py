"""Configuration of pLSTM on sequences ("pLSTM: parallelizable Linear Source Transition Mark networks", 2506.11997)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

ROUND_TO = 64  # of the inner size


@strict
class PLSTMConfig(PreTrainedConfig):
    """Configuration of every pLSTM model on sequences: language, sequence and token classification.

    Args:
        vocab_size, hidden_size, num_hidden_layers: as everywhere.
        num_attention_heads: heads of a layer, each with a state of its own.
        expand: the recurrence is `expand * hidden_size` wide, rounded up to a multiple of 64 (`inner_size`).
        conv_kernel: taps of the causal convolution in front of the gates.
        transition_dim: size of the matrices that carry the state from token to token (J_T of the paper). With 1 they
            are numbers, and a layer cannot follow a permutation of more than two things.
        value_tracking_dim, output_tracking_dim: J_V and J_O, what of values is written to and read from that axis.
        key_tracking_dim, query_tracking_dim: J_K and J_Q.
        qkv_block_size: queries, keys and values are computed in blocks of so many channels; None for dense layers.
        orthogonalization: how the matrices of a transition become orthogonal: "matrix_exp", or "series" (the authors'
            sum of 16 terms, for weights trained with it).
        gate_bias: initial bias of source, mark and direct gates before their sigmoid.
        gate_initializer_range: standard deviation of the initial weights of all gates; 0 as in the paper.
        chunk_size: tokens that are computed by matrix products at once; it steers speed, not the result.
        logit_softcap: logits are cap * tanh(logits / cap); None leaves them as they are.
        hidden_act: activation of the gate around a layer.
        rms_norm_eps: epsilon of all norms.
        initializer_range: standard deviation of all other weights; None for sqrt(2 / (5 fan_in)), as in the paper.
        num_labels: classes (classification heads).

    Raises:
        ValueError: sizes that do not divide the inner size.

    >>> config = PLSTMConfig(hidden_size=96, num_attention_heads=4)
    >>> config.inner_size, config.key_dim, config.value_dim
    (192, 48, 12)
    """

    model_type = "plstm"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.up_proj": "colwise_gather_output",
        "layers.*.down_proj": "colwise_gather_output",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    expand: float = 2.0
    conv_kernel: int = 4
    transition_dim: int = 4
    value_tracking_dim: int = 4
    output_tracking_dim: int = 4
    key_tracking_dim: int = 1
    query_tracking_dim: int = 1
    qkv_block_size: int | None = 4
    orthogonalization: Literal["matrix_exp", "series"] = "matrix_exp"
    gate_bias: float = -5.0
    gate_initializer_range: float = 0.0
    chunk_size: int = 64
    logit_softcap: float | None = 10.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        tracking = ("transition", "value_tracking", "output_tracking", "key_tracking", "query_tracking")
        for name in (*(f"{name}_dim" for name in tracking), "num_attention_heads", "conv_kernel", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; use {name}=1.")
        for name in ("output_tracking_dim", "key_tracking_dim"):
            if self.inner_size % (self.num_attention_heads * getattr(self, name)):
                raise ValueError(
                    f"num_attention_heads ({self.num_attention_heads}) times {name} ({getattr(self, name)}) must"
                    f" divide the inner size ({self.inner_size}: expand * hidden_size rounded up to {ROUND_TO}); use"
                    " num_attention_heads=4 and powers of two."
                )
        if self.qkv_block_size is not None and (
            self.qkv_block_size < 1
            or self.inner_size % self.qkv_block_size
            or self.num_attention_heads % self.sub_heads * (self.sub_heads % self.num_attention_heads)
        ):
            raise ValueError(
                f"qkv_block_size ({self.qkv_block_size}) must divide the inner size ({self.inner_size}) into a"
                f" multiple or a divisor of num_attention_heads ({self.num_attention_heads}) slices; use 4, or None"
                " for dense projections."
            )

    @property
    def inner_size(self):
        """Width of the recurrence, all heads together."""
        return -(-int(self.expand * self.hidden_size) // ROUND_TO) * ROUND_TO

    @property
    def key_dim(self):
        """Of a head."""
        return self.inner_size // (self.num_attention_heads * self.key_tracking_dim)

    @property
    def value_dim(self):
        """Of a head."""
        return self.inner_size // (self.num_attention_heads * self.output_tracking_dim)

    @property
    def sub_heads(self):
        """Slices that queries, keys and values read."""
        return 1 if self.qkv_block_size is None else self.inner_size // self.qkv_block_size

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers


__all__ = ["PLSTMConfig"]
