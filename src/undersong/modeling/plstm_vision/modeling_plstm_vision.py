"""pLSTM on images: a linear recurrence over the grid of patches, from all four corners (arXiv 2506.11997, section 3).

No weight knows the size of the grid, only the position embeddings do, which are interpolated: a model reads images
larger than those it was trained on. Between layers patches are a sequence, row by row, as in other image models.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..._compat import use_kernel_forward_from_hub
from ...ops.plstm2d import plstm2d
from ..plstm_layers import BlockLinear, Gate, MultiHeadRMSNorm, small_init_
from ..precision import wide
from .configuration_plstm_vision import PLSTMVisionConfig

ORIENTATION_SCALE = 0.5  # of what a patch adds to its direction, and per channel: the authors' 0.5 / hidden_size


@use_kernel_forward_from_hub("PLSTM2D")
class PLSTM2D(nn.Module):
    """The op as a module, so that `undersong.kernelize` and `use_kernels=True` can swap its forward."""

    def forward(self, Q, K, V, S, T, M, D, mode="P", mask=None):
        return plstm2d(Q, K, V, S, T, M, D, mode=mode, mask=mask)


class PLSTMVisionOrientation(nn.Linear):
    """b + w x / (2 d), the logit of a patch's direction, for every head and orientation."""

    def forward(self, x):
        return wide(super().forward(x * (ORIENTATION_SCALE / self.in_features)))


class PropagationGates(nn.Module):
    """Gates of P mode: a share alpha of transition and source goes on along X, the rest along Y.

    T_r = alpha g,  T_d = 1 - alpha g,  S_r = alpha s,  S_d = 1 - alpha s ("reference"), or
    T_r = alpha |g|,  T_d = (1 - alpha) |g|,  S_d = (1 - alpha) s ("bounded"), with alpha = sigmoid(b + w x / (2 d)).
    """

    mode = "P"

    def __init__(self, config):
        super().__init__()
        self.variant, self.shape = config.pmode_variant, (config.num_attention_heads, config.orientations)
        size, gates = config.hidden_size, config.num_attention_heads * config.orientations
        self.orientation = PLSTMVisionOrientation(size, gates)
        self.source, self.mark = (Gate(size, (gates,), config.gate_slices, bias=config.gate_bias) for _ in range(2))
        self.transition = Gate(size, (gates,), config.gate_slices, "tanh", bias=1.0)

    def forward(self, x):
        alpha = self.orientation(x).sigmoid()
        transition, source = self.transition(x), self.source(x)
        along, written = alpha * transition, alpha * source
        if self.variant == "bounded":
            along, size = along.abs(), transition.abs()
            gates = written, source - written, along, size - along
        else:
            gates = written, 1 - written, along, 1 - along
        S_r, S_d, T_r, T_d, M = (gate.unflatten(-1, self.shape) for gate in (*gates, self.mark(x)))
        return (S_r, S_d), (T_r, T_d), (M,)


class DiffusionGates(nn.Module):
    """Gates of D mode, each its own: along X, along Y, and from Y to X."""

    mode = "D"

    def __init__(self, config):
        super().__init__()
        self.shape = config.num_attention_heads, config.orientations
        size, gates = config.hidden_size, config.num_attention_heads * config.orientations
        self.source_r, self.source_d, self.mark_l, self.mark_u = (
            Gate(size, (gates,), config.gate_slices, bias=config.gate_bias) for _ in range(4)
        )
        self.transition_r, self.transition_d, self.transition_rd = (
            Gate(size, (gates,), config.gate_slices, "tanh", bias=1.0) for _ in range(3)
        )

    def forward(self, x):
        sources, marks = (self.source_r, self.source_d), (self.mark_l, self.mark_u)
        transitions = self.transition_r, self.transition_d, self.transition_rd
        return tuple(tuple(gate(x).unflatten(-1, self.shape) for gate in group) for group in
                     (sources, transitions, marks))  # fmt: skip


class PLSTMVisionMixer(nn.Module):
    """Queries, keys, values and gates of every patch, the recurrence, a norm per head, and a projection.

    `[batch, patches, hidden_size]` and the grid they are on, (rows, columns), -> `[batch, patches, hidden_size]`.
    """

    def __init__(self, config, mode):
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.gates = (PropagationGates if mode == "P" else DiffusionGates)(config)
        self.direct = Gate(size, (self.num_heads,), bias=config.direct_bias, weight=False)
        self.recurrence = PLSTM2D()
        self.norm = MultiHeadRMSNorm(self.num_heads, size // self.num_heads, config.layer_norm_eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x, grid, mask=None):
        x = x.unflatten(1, grid)
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = self.recurrence(q, k, v, *self.gates(x), self.direct(x), self.gates.mode, mask)
        return self.o_proj(self.norm(y).flatten(-2).flatten(1, 2))


class PLSTMVisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = int(config.mlp_ratio * config.hidden_size)
        self.up_proj, self.down_proj = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


class PLSTMVisionLayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x):
        return x * self.weight


class PLSTMVisionDropPath(nn.Module):
    """In training, leaves a branch out for some images, and scales it up for the others."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[:1] + (1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)

    def extra_repr(self):
        return f"rate={self.rate:.3g}"


class PLSTMVisionLayer(GradientCheckpointingLayer):
    """x <- x + recurrence(norm(x)), x <- x + mlp(norm(x))."""

    def __init__(self, config, index):
        super().__init__()
        self.norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.mixer, self.mlp = PLSTMVisionMixer(config, config.layer_modes[index]), PLSTMVisionMLP(config)
        scaled = config.layerscale_value is not None
        self.scale, self.mlp_scale = (PLSTMVisionLayerScale(config) if scaled else nn.Identity() for _ in range(2))
        self.drop_path = PLSTMVisionDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(self, hidden_states, grid, mask=None):
        hidden_states = hidden_states + self.drop_path(self.scale(self.mixer(self.norm(hidden_states), grid, mask)))
        return hidden_states + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(hidden_states))))


def make_norm(config):
    return (nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm)(config.hidden_size, config.layer_norm_eps)


class PLSTMVisionEmbeddings(nn.Module):
    """Patches as vectors `[batch, patches, hidden_size]`, each with the embedding of its position; and their grid."""

    def __init__(self, config):
        super().__init__()
        size, self.patch_size, self.num_channels = config.hidden_size, config.patch_size, config.num_channels
        self.grid = tuple(side // config.patch_size for side in config.image_sides)
        self.projection = nn.Conv2d(config.num_channels, size, config.patch_size, config.patch_size)
        self.position_embeddings = None
        if config.use_position_embeddings:
            self.position_embeddings = nn.Parameter(torch.empty(1, *self.grid, size))

    def forward(self, pixel_values, interpolate_pos_encoding=True):
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values ({list(pixel_values.shape)}) must be [batch, {self.num_channels}, height, width], with"
                f" num_channels ({self.num_channels}) second; transpose or convert the images."
            )
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size or min(height, width) == 0:
            raise ValueError(
                f"pixel_values ({height} x {width}) must have sides divisible by patch_size ({self.patch_size});"
                " resize or crop the images."
            )
        x = self.projection(pixel_values.to(self.projection.weight.dtype)).permute(0, 2, 3, 1)
        grid = tuple(x.shape[1:3])
        if self.position_embeddings is not None:
            x = x + self.positions(grid, interpolate_pos_encoding)
        return x.flatten(1, 2), grid

    def positions(self, grid, interpolate):
        """The embeddings for a grid of any size."""
        if grid == self.grid:
            return self.position_embeddings
        if not interpolate:
            sides = " x ".join(str(side * self.patch_size) for side in self.grid)
            raise ValueError(
                f"pixel_values ({' x '.join(str(side * self.patch_size) for side in grid)}) must be {sides}, the"
                " config's image_size; pass interpolate_pos_encoding=True for other sizes."
            )
        channels_first = wide(self.position_embeddings).permute(0, 3, 1, 2)
        positions = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False)
        return positions.permute(0, 2, 3, 1).to(self.position_embeddings.dtype)


def first_and_last(there):
    """Indices of the first and the last True in rows `[batch, n]`."""
    return there.int().argmax(1), there.shape[1] - 1 - there.flip(1).int().argmax(1)


class PLSTMVisionPreTrainedModel(PreTrainedModel):
    config: PLSTMVisionConfig
    config_class = PLSTMVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLSTMVisionEmbeddings", "PLSTMVisionLayer"]
    _can_record_outputs = {"hidden_states": PLSTMVisionLayer}

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, Gate):
            module.init_weights(std or 0.0)
        elif isinstance(module, BlockLinear):
            pass  # only gates have them, which come after what they are made of
        elif isinstance(module, PLSTMVisionOrientation):
            init.normal_(module.weight, std=std or 0.0)
            # flat over (orientation, head) although the gates read it as (head, orientation): so the authors start
            spread = torch.linspace(-2.0, 2.0, self.config.num_attention_heads)
            init.copy_(module.bias, spread.repeat(self.config.orientations))
        elif isinstance(module, MultiHeadRMSNorm):
            module.init_weights()
        elif isinstance(module, PLSTMVisionLayerScale):
            init.constant_(module.weight, self.config.layerscale_value)
        elif isinstance(module, PLSTMVisionEmbeddings):
            if module.position_embeddings is not None:
                init.normal_(module.position_embeddings, std=std or (0.4 / self.config.hidden_size) ** 0.5)
        elif isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=std or (0.4 / module.weight[0].numel()) ** 0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and std is None:
            small_init_(module)
        else:
            super()._init_weights(module)


class PLSTMVisionModel(PLSTMVisionPreTrainedModel):
    """Reads images: one vector for every patch, and one for the image.

    Forward arguments:
        pixel_values: `[batch, channels, height, width]`; both sides divisible by `config.patch_size`.
        attention_mask: `[batch, patches]`, row by row, 1 for patches of the image and 0 for padding around it, which
            is neither read nor written. None: there is no padding.
        interpolate_pos_encoding: False refuses images that are not `config.image_size`; otherwise position embeddings
            are interpolated (bicubic) to their grid.

    Returns:
        `last_hidden_state` `[batch, patches, hidden_size]`, row by row; `pooler_output` `[batch, 4 * hidden_size]`,
        the corners top left, bottom left, top right and bottom right (of the smallest rectangle around patches that
        are not masked), or `[batch, hidden_size]` with pooling "mean".

    >>> model = PLSTMVisionModel(PLSTMVisionConfig(image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=2))
    >>> outputs = model(torch.randn(1, 3, 16, 12))
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
    (torch.Size([1, 12, 12]), torch.Size([1, 48]))
    """

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = PLSTMVisionEmbeddings(config)
        self.layers = nn.ModuleList([PLSTMVisionLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        hidden_states, grid = self.embeddings(pixel_values, interpolate_pos_encoding)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"attention_mask ({list(attention_mask.shape)}) must be [batch, patches] ="
                    f" {list(hidden_states.shape[:2])} because the images have {grid[0]} x {grid[1]} patches; give"
                    " every patch a 1 or a 0."
                )
            mask = attention_mask.bool().unflatten(1, grid)
        for layer in self.layers:
            hidden_states = layer(hidden_states, grid, mask)
        hidden_states = self.norm(hidden_states)
        pooled = self.pool(hidden_states.unflatten(1, grid), mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pool(self, x, mask):
        if self.config.pooling == "mean":
            if mask is None:
                return x.mean((1, 2))
            return x.where(mask.unsqueeze(-1), 0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1).unsqueeze(-1)
        if mask is None:
            return torch.cat([x[:, row, column] for column in (0, -1) for row in (0, -1)], -1)
        image = torch.arange(len(x), device=x.device)
        rows, columns = (first_and_last(mask.any(axis)) for axis in (2, 1))
        return torch.cat([x[image, row, column] for column in columns for row in rows], -1)


class PLSTMVisionForImageClassification(PLSTMVisionPreTrainedModel):
    """Classifies images, or predicts `num_labels` numbers with `problem_type="regression"`.

    >>> config = PLSTMVisionConfig(image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=2, num_labels=2)
    >>> model = PLSTMVisionForImageClassification(config)
    >>> model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).logits.shape
    torch.Size([2, 2])
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PLSTMVisionModel(config)
        width = config.hidden_size * (4 if config.pooling == "corners" else 1)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self.classifier and self.config.initializer_range is None:
            init.trunc_normal_(module.weight, std=2e-5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        outputs = self.model(pixel_values, attention_mask, interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class PLSTMVisionBackbone(BackboneMixin, PLSTMVisionPreTrainedModel):
    """Feature maps of the stages that the configuration names, for detection and segmentation heads.

    Returns:
        `feature_maps`, each `[batch, hidden_size, rows, columns]`, behind the norm.

    >>> config = PLSTMVisionConfig(image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=2,
    ...                            out_features=["stem", "stage2"])
    >>> [tuple(features.shape) for features in PLSTMVisionBackbone(config)(torch.randn(1, 3, 8, 12)).feature_maps]
    [(1, 12, 2, 3), (1, 12, 2, 3)]
    """

    has_attentions = False

    def __init__(self, config):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.model = PLSTMVisionModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        outputs = self.model(pixel_values, **kwargs)
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        stages = zip(self.stage_names, outputs.hidden_states, strict=True)
        chosen = [self.model.norm(states) for name, states in stages if name in self.out_features]
        maps = tuple(states.mT.unflatten(2, grid) for states in chosen)
        return BackboneOutput(feature_maps=maps, hidden_states=outputs.hidden_states)


__all__ = [
    "PLSTMVisionBackbone",
    "PLSTMVisionForImageClassification",
    "PLSTMVisionModel",
    "PLSTMVisionPreTrainedModel",
]
