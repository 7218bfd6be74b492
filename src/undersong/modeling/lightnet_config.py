"""What LightNet's configurations share: the sizes of its layers and their checks (arXiv 2405.21022)."""

from typing import Literal

ROUND_TO = 256  # feed-forward blocks are multiples of it


class LightNetLayerConfig:
    """Mixin of `LightNetConfig` and `LightNetVisionConfig`; they declare the fields."""

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers

    def fill_in_sizes(self):
        """Derives what was left None: heads, key width and feed-forward width."""
        if self.num_attention_heads is None:
            if self.expand_ratio is None:
                raise ValueError(
                    "num_attention_heads (None) and expand_ratio (None) leave the heads open; set one of them."
                )
            self.num_attention_heads = max(self.hidden_size // self.expand_ratio, 1)
        if self.expand_ratio is None:
            self.expand_ratio = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            width = int(self.hidden_size * self.hidden_ratio * 2 / 3)
            self.intermediate_size = -(-width // ROUND_TO) * ROUND_TO

    def check_layers(self, axes):
        """`axes`: dimensions of the grid, over which MD-LRPE divides the channels of a key."""
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({heads}); use a multiple"
                f" such as hidden_size={-(-self.hidden_size // heads) * heads}."
            )
        if self.hidden_size % self.norm_num_groups:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by norm_num_groups ({self.norm_num_groups});"
                " use 1 or num_attention_heads."
            )
        if self.use_lrpe and self.lrpe_type == "rotate" and self.expand_ratio % (2 * axes):
            raise ValueError(
                f"expand_ratio ({self.expand_ratio}) must be divisible by {2 * axes} because lrpe_type 'rotate' turns"
                f" pairs of channels on each of {axes} axes; use a multiple, or lrpe_type='cosine'."
            )
        if self.use_tpe and self.tpe_rank < 1:
            raise ValueError(f"tpe_rank ({self.tpe_rank}) must be at least 1; use 1, or use_tpe=False.")


LRPEType = Literal["cosine", "rotate"]

__all__ = ["LRPEType", "LightNetLayerConfig"]
