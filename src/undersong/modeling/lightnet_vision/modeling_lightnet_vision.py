"""LightNet over images: every patch reads all others in one pass of linear cost (arXiv 2405.21022).

The core has no order, so one pass serves the whole grid where recurrences with decays scan it two or four times.
Positions enter through MD-TPE behind the patch embedding and MD-LRPE inside the attention, both computed from the
grid; images of any size divisible by the patch work without a table to interpolate. There is no state.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..lightnet_layers import LightNetLayer, initialise_lightnet
from ..lightnet_positions import GridToeplitzEncoding
from .configuration_lightnet_vision import LightNetVisionConfig


class LightNetPatchEmbeddings(nn.Module):
    """One token a patch: `[batch, channels, height, width]` -> `[batch, rows, columns, hidden]`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values):
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)} but the model takes [batch, num_channels="
                f"{config.num_channels}, height, width]; convert the images, or set num_channels."
            )
        for name, size in zip(("height", "width"), pixel_values.shape[2:], strict=True):
            if size % config.patch_size or size == 0:
                raise ValueError(
                    f"{name} ({size}) of pixel_values must be a positive multiple of patch_size"
                    f" ({config.patch_size}); resize or pad the images."
                )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).permute(0, 2, 3, 1)


class LightNetVisionPreTrainedModel(PreTrainedModel):
    config: LightNetVisionConfig
    config_class = LightNetVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightNetLayer"]
    _can_record_outputs = {"hidden_states": LightNetLayer}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        initialise_lightnet(module)


class LightNetVisionModel(LightNetVisionPreTrainedModel):
    """The stack of LightNet layers over the patches of an image.

    Forward arguments:
        pixel_values: `[batch, num_channels, height, width]`, height and width multiples of the patch size.
        attention_mask: `[batch, patches]`, row by row, 0 for patches that are not there (padded images).

    `pooler_output` is the mean over the patches that are there (zeros where there are none).

    >>> config = LightNetVisionConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, expand_ratio=4)
    >>> LightNetVisionModel(config)(torch.rand(2, 3, 8, 12)).last_hidden_state.shape
    torch.Size([2, 6, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        self.patch_embeddings = LightNetPatchEmbeddings(config)
        self.tpe = None
        if config.use_tpe:
            self.tpe = GridToeplitzEncoding(
                config.hidden_size,
                config.num_attention_heads,
                axes=2,
                rank=config.tpe_rank,
                eps=config.rms_norm_eps,
                bidirectional=config.tpe_bidirectional,
            )
        self.layers = nn.ModuleList(
            [LightNetLayer(config, index, causal=False, axes=2) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        grid = self.patch_embeddings(pixel_values)
        batch, rows, columns, _ = grid.shape
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, rows * columns):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)} but there are {rows} x {columns} patches;"
                    f" pass [batch, patches] = [{batch}, {rows * columns}] with 1 for patches and 0 for padding."
                )
            mask = attention_mask.bool()
            grid = grid.masked_fill(~mask.view(batch, rows, columns, 1), 0.0)  # nothing for MD-TPE to spread
        if self.tpe is not None:
            grid = grid + self.tpe(grid)
        hidden_states = grid.flatten(1, 2)
        positions = torch.cartesian_prod(
            torch.arange(rows, device=grid.device), torch.arange(columns, device=grid.device)
        )[None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions=positions, mask=mask)
        hidden_states = self.norm(hidden_states)
        if mask is None:
            pooled = hidden_states.mean(1)
        else:
            weights = mask.to(hidden_states.dtype).unsqueeze(-1)
            pooled = (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class LightNetVisionForImageClassification(LightNetVisionPreTrainedModel):
    """A linear head over the mean of the patches.

    >>> config = LightNetVisionConfig(
    ...     image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, expand_ratio=4, num_labels=5
    ... )
    >>> LightNetVisionForImageClassification(config)(torch.rand(2, 3, 8, 8)).logits.shape
    torch.Size([2, 5])
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LightNetVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        outputs = self.model(pixel_values, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["LightNetVisionForImageClassification", "LightNetVisionModel", "LightNetVisionPreTrainedModel"]
