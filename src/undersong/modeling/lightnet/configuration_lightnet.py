"""Configuration of LightNet as a language model ("You Only Scan Once", arXiv 2405.21022)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..lightnet_config import LightNetLayerConfig, LRPEType


@strict
class LightNetConfig(LightNetLayerConfig, PreTrainedConfig):
    """Configuration of every LightNet over text: causal, masked, sequence classification.

    The names that flash-linear-attention's checkpoints use (`num_heads`, `norm_eps`) are read as well.

    Args:
        vocab_size: number of tokens.
        hidden_size, num_hidden_layers: as everywhere.
        num_attention_heads: divides the hidden size; None means `hidden_size // expand_ratio`.
        expand_ratio: channels of queries and keys in a head; None means `hidden_size // num_attention_heads`.
        intermediate_size: width of the feed-forward block; None means two thirds of `hidden_ratio * hidden_size`,
            rounded up to a multiple of 256.
        hidden_act: activation inside the gated feed-forward block.
        gate_low_rank_dim: rank of the output gate.
        gate_act: activation of the output gate ("silu", "sigmoid").
        norm_num_groups: groups over which the output of the attention is normalised (1, or one a head).
        rms_norm_eps: epsilon of all norms.
        is_causal: None lets the head decide: masked language models read both ways, everything else from left to
            right. True or False fixes it, also for the bare model.
        use_lrpe: position encoding inside the attention (MD-LRPE), of `lrpe_type` "cosine" or "rotate".
        use_tpe: position encoding behind the embedding (MD-TPE), a sum of `tpe_rank` decaying exponentials a head,
            added to the embedding (`tpe_residual`) or instead of it.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError: sizes that do not divide, or an option of other implementations that is not available here.

    >>> LightNetConfig(hidden_size=768).num_attention_heads, LightNetConfig(num_heads=4).num_attention_heads
    (6, 4)
    """

    model_type = "lightnet"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_heads": "num_attention_heads", "norm_eps": "rms_norm_eps"}
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int | None = None
    expand_ratio: int | None = 128
    intermediate_size: int | None = None
    hidden_ratio: int | float = 4
    hidden_act: str = "silu"
    gate_low_rank_dim: int = 128
    gate_act: str = "silu"
    norm_num_groups: int = 1
    rms_norm_eps: float = 1e-6
    is_causal: bool | None = None
    use_lrpe: bool = False
    lrpe_type: LRPEType = "cosine"
    use_tpe: bool = False
    tpe_rank: int = 1
    tpe_residual: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.fill_in_sizes()

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        self.check_layers(axes=1)
        for name, why in (("use_short_conv", "short convolutions"), ("attn", "layers of full attention")):
            if (value := getattr(self, name, None)) not in (None, False):
                raise ValueError(
                    f"{name} ({value!r}) asks for {why}, which LightNet here does not have; leave it out, or run this"
                    " checkpoint with flash-linear-attention."
                )


__all__ = ["LightNetConfig"]
