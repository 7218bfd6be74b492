"""Forecasting with Aaren ("Attention as an RNN", arXiv 2405.13956, section 4.3).

One time step is one token of all channels. The output at the last observed step, which has averaged over the whole
series, is read out into all future steps at once, as in direct multi-step forecasting.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .modeling_aaren import AarenModel, AarenPreTrainedModel, observed_values


@dataclass
class AarenForPredictionOutput(ModelOutput):
    """What `AarenForPrediction` returns.

    Attributes:
        loss: mean squared error against `future_values`, in the units of the data.
        prediction_outputs: `[batch, prediction_length, input_size]`, in the units of the data.
        hidden_states: of every layer, if asked for.
        loc, scale: `[batch, 1, input_size]`, what the series was normalised by.
    """

    loss: torch.FloatTensor | None = None
    prediction_outputs: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    loc: torch.FloatTensor | None = None
    scale: torch.FloatTensor | None = None


class AarenForPrediction(AarenPreTrainedModel):
    """Forecasts the next `prediction_length` steps of a multivariate series of any length.

    Forward arguments:
        past_values: `[batch, length, input_size]` float.
        past_observed_mask: like `past_values`, 0 where a value is missing: it counts as average, and a step without
            any observed channel is padding.
        future_values: `[batch, prediction_length, input_size]`, for the loss (`labels` is accepted for the same).
        attention_mask: `[batch, length]`, 0 for padded steps.

    `Trainer` computes the loss of an evaluation if it is told `label_names=["future_values"]`.

    Raises:
        ValueError: `prediction_length` is not set, or a shape does not fit the configuration.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "input_size": 3}
    >>> config = AarenForPrediction.config_class(**sizes, prediction_length=4)
    >>> AarenForPrediction(config)(torch.randn(2, 24, 3)).prediction_outputs.shape
    torch.Size([2, 4, 3])
    """

    main_input_name = "past_values"

    def __init__(self, config):
        super().__init__(config)
        if config.prediction_length is None:
            raise ValueError(
                "prediction_length (None) must be the number of steps to forecast; build the configuration with"
                " AarenConfig(prediction_length=24, ...)."
            )
        self.value_projection = nn.Linear(config.input_size, config.hidden_size)
        self.model = AarenModel(config, add_token_embeddings=False)
        self.head = nn.Linear(config.hidden_size, config.prediction_length * config.input_size)
        self.post_init()

    def read_out(self, hidden_states):
        """The forecast from every hidden state: `[..., hidden_size]` -> `[..., prediction_length, input_size]`."""
        return self.head(hidden_states).unflatten(-1, (self.config.prediction_length, self.config.input_size))

    def stream(self, cache, carry, past_values):
        """Continues a stream: `[batch, n, input_size]`, a forecast after every step; see `AarenStream`."""
        if self.config.scaling is not None:
            raise ValueError(
                f"scaling ({self.config.scaling!r}) looks at a whole series before its first step, which a stream"
                " cannot; train with scaling=None on values that are normalised by fixed figures."
            )
        embeds = self.value_projection(past_values)
        return self.read_out(self.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state), carry

    @can_return_tuple
    def forward(
        self,
        past_values: torch.FloatTensor,
        past_observed_mask: torch.Tensor | None = None,
        future_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AarenForPredictionOutput:
        config = self.config
        observed = observed_values(config, past_values, past_observed_mask, attention_mask)
        future_values = labels if future_values is None else future_values
        wanted = (len(past_values), config.prediction_length, config.input_size)
        if future_values is not None and future_values.shape != wanted:
            raise ValueError(
                f"future_values has shape {tuple(future_values.shape)} but the model forecasts [batch,"
                f" prediction_length, input_size] = {list(wanted)}; cut the future, or set prediction_length."
            )
        loc, scale = location_and_scale(past_values, observed, config.scaling)
        scaled = ((past_values - loc) / scale).to(self.head.weight.dtype)
        mask = None
        if observed is not None:
            scaled, mask = scaled.masked_fill(~observed, 0.0), observed.any(-1)

        kwargs["use_cache"] = False
        outputs = self.model(inputs_embeds=self.value_projection(scaled), attention_mask=mask, **kwargs)
        predictions = self.read_out(last_valid(outputs.last_hidden_state, mask)) * scale + loc
        loss = None
        if future_values is not None:
            loss = nn.functional.mse_loss(predictions, future_values.to(predictions.dtype))
        return AarenForPredictionOutput(
            loss=loss,
            prediction_outputs=predictions,
            hidden_states=outputs.hidden_states,
            loc=loc,
            scale=scale,
        )


def location_and_scale(values, observed, scaling):
    """`[batch, 1, channels]` each, in float32 or wider, over the observed values; 0 and 1 without any."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    weight = torch.ones_like(wide) if observed is None else observed.to(wide.dtype)
    wide = wide if observed is None else wide.masked_fill(~observed, 0.0)
    count = weight.sum(1, keepdim=True)
    loc, scale = torch.zeros_like(count), torch.ones_like(count)
    if scaling == "std":
        loc = wide.sum(1, keepdim=True) / count.clamp(min=1)
        variance = ((wide - loc).square() * weight).sum(1, keepdim=True) / count.clamp(min=1)
        scale = (variance + 1e-5).sqrt()  # a constant channel stays finite
    elif scaling == "mean":
        scale = (wide.abs().sum(1, keepdim=True) / count.clamp(min=1)).clamp(min=1e-5)
    return loc, torch.where(count > 0, scale, 1.0)


def last_valid(hidden_states, mask):
    """The hidden state of the last step that is not padding, `[batch, hidden_size]`; zeros for a row without one."""
    if mask is None:
        return hidden_states[:, -1]
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (steps * mask).amax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return hidden_states[rows, last].masked_fill(~mask.any(1, keepdim=True), 0.0)


__all__ = ["AarenForPrediction", "AarenForPredictionOutput"]
