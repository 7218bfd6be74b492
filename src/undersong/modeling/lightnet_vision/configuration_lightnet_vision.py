"""Configuration of LightNet over images ("You Only Scan Once", arXiv 2405.21022)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..lightnet_config import LightNetLayerConfig, LRPEType


@strict
class LightNetVisionConfig(LightNetLayerConfig, PreTrainedConfig):
    """Configuration of LightNet over images; the defaults are about the size of ViT-S.

    Args:
        image_size: side of the images that image processors make; the model takes any height and width that are
            multiples of `patch_size`, as its positions come from the grid.
        patch_size, num_channels: of the patches that become tokens.
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
        use_lrpe: position encoding inside the attention (MD-LRPE), of `lrpe_type` "cosine" or "rotate".
        use_tpe: position encoding behind the embedding (MD-TPE), a sum of `tpe_rank` decaying exponentials a head and
            axis; towards one end of each axis, or with `tpe_bidirectional` to both.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError: sizes that do not divide.

    >>> LightNetVisionConfig(image_size=32, patch_size=4).num_attention_heads
    3
    """

    model_type = "lightnet_vision"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    expand_ratio: int | None = 128
    intermediate_size: int | None = None
    hidden_ratio: int | float = 4
    hidden_act: str = "silu"
    gate_low_rank_dim: int = 128
    gate_act: str = "silu"
    norm_num_groups: int = 1
    rms_norm_eps: float = 1e-6
    use_lrpe: bool = True
    lrpe_type: LRPEType = "cosine"
    use_tpe: bool = True
    tpe_rank: int = 1
    tpe_bidirectional: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.fill_in_sizes()

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        self.check_layers(axes=2)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size ({self.image_size}) must be divisible by patch_size ({self.patch_size}); use a multiple"
                f" such as image_size={-(-self.image_size // self.patch_size) * self.patch_size}."
            )


__all__ = ["LightNetVisionConfig"]
