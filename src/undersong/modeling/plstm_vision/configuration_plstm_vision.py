"""Configuration of pLSTM on images (arXiv 2506.11997)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


@strict
class PLSTMVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a pLSTM whose states run over the grid of an image's patches.

    Args:
        image_size: side of the images in training, or (height, width); it sizes the position embeddings. Any other
            size works as well.
        patch_size: side of a patch, in pixels; it divides both sides of every image.
        num_channels: of the images.
        hidden_size, num_hidden_layers, num_attention_heads: as usual. The paper's sizes T, S and B are 192, 384 and
            768 wide with 3, 6 and 12 heads, all with 12 layers. Every layer is a recurrence over the grid and a
            feed-forward block of width `mlp_ratio * hidden_size` with `hidden_act`.
        block_mode: what layers do in turn. "P": propagate, with states that turn corners. "D": diffuse, along one axis
            and then along the other. "PD" and "DP": both, in turn.
        pmode_variant: the gates of "P". "reference": as the authors have them; a negative transition makes states
            grow. "bounded": shares of the transition's absolute value; states stay below what was written.
        orientations: from how many corners states start out, 1 to 4; with 1, patches see what is above and left.
        gate_sub_heads: equal slices of the hidden state, of which every gate reads one. None: a slice for each gate,
            the paper's choice; 1: gates read all of it.
        pooling: how an image's vector comes from its patches: the four "corners" side by side, or their "mean".
        use_position_embeddings: whether every patch has a learned embedding of its position.
        norm_type: "rmsnorm" or "layernorm", in front of every block and behind the last; `layer_norm_eps` is for both
            and for the norm of every head.
        layerscale_value: initial factor of what a block adds, a parameter per channel; None for no such factor.
        drop_path_rate: probability in training that an image passes over a block; it rises linearly up to the last
            layer.
        gate_bias, direct_bias: initial bias of source and mark gates, and of the direct gates; a sigmoid follows.
        initializer_range: deviation of initial weights. None takes what the authors take: sqrt(2 / (5 fan_in)), 0 for
            gates, which then start the same for all patches, and nearly 0 for the classifier.
        out_features, out_indices: the stages a backbone returns, "stem", "stage1", ..., the last layer by default.

    Raises:
        ValueError: numbers that make no model; the message names the fields.

    >>> PLSTMVisionConfig(num_hidden_layers=4, image_size=96, patch_size=8).layer_modes
    ['P', 'D', 'P', 'D']
    """

    model_type = "plstm_vision"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    block_mode: Literal["P", "D", "PD", "DP"] = "PD"
    pmode_variant: Literal["reference", "bounded"] = "reference"
    orientations: int = 4
    gate_sub_heads: int | None = None
    pooling: Literal["corners", "mean"] = "corners"
    use_position_embeddings: bool = True
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    layer_norm_eps: float = 1e-5
    layerscale_value: float | None = None
    drop_path_rate: float = 0.0
    gate_bias: float = -4.0
    direct_bias: float = -6.0
    initializer_range: float | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        for name in ("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        height, width = self.image_sides
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            raise ValueError(
                f"image_size ({height} x {width}) must be divisible by patch_size ({self.patch_size}); use multiples"
                " of it."
            )
        if not 1 <= self.orientations <= 4:
            raise ValueError(f"orientations ({self.orientations}) must lie in 1..4, the corners of a grid; use 4.")
        gates = self.num_attention_heads * self.orientations
        if self.gate_sub_heads is not None and (self.gate_sub_heads < 1 or gates % self.gate_sub_heads):
            raise ValueError(
                f"gate_sub_heads ({self.gate_sub_heads}) must divide num_attention_heads * orientations ({gates});"
                " use 1 or None."
            )
        for name, divisor in (
            ("num_attention_heads", self.num_attention_heads),
            ("gate_sub_heads" if self.gate_sub_heads else "num_attention_heads * orientations", self.gate_slices),
        ):
            if self.hidden_size % divisor:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be divisible by {name} ({divisor}); use hidden_size="
                    f"{gates * -(-self.hidden_size // gates)}."
                )
        if self.num_hidden_layers % len(self.block_mode):
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must be even for block_mode={self.block_mode!r}, whose"
                f" modes take turns; use {self.num_hidden_layers + 1}, or block_mode='P' or 'D'."
            )
        if int(self.mlp_ratio * self.hidden_size) < 1:
            raise ValueError(f"mlp_ratio ({self.mlp_ratio}) must give a width of at least 1; use 4.0.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate ({self.drop_path_rate}) must lie in [0, 1); use 0.0 for none.")

    @property
    def image_sides(self):
        """Height and width."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def gate_slices(self):
        """Slices of the hidden state that gates read, as a number."""
        return self.gate_sub_heads or self.num_attention_heads * self.orientations

    @property
    def layer_modes(self):
        """For every layer its mode, "P" or "D"."""
        return list(self.block_mode * self.num_hidden_layers)[: self.num_hidden_layers]


__all__ = ["PLSTMVisionConfig"]
