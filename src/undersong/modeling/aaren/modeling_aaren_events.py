"""Aaren for streams of events in continuous time, each of a kind: a marked temporal point process.

After every event the model gives the density of the time to the next one, a mixture of log-normals (arXiv 1909.12127),
and the probabilities of its kind, as in the experiments of "Attention as an RNN" (arXiv 2405.13956, section 4.2). The
state of the layers summarises all events so far.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, is_tracing

from ..aaren_layers import sinusoids
from ..log_normal_mixture import LogNormalMixture
from .modeling_aaren import AarenModel, AarenPreTrainedModel


@dataclass
class AarenForEventForecastingOutput(ModelOutput):
    """What `AarenForEventForecasting` returns; position i speaks of the event after event i, if i is not padding.

    Attributes:
        loss: negative log-likelihood of a next event, its time and its kind, in nats, averaged over all of them.
        type_logits: `[batch, length, num_event_types]`, of the kind of the next event.
        next_time_mean: `[batch, length]`, expected time of the next event. A heavy tail can make it large: the median,
            `model.next_gap(outputs.gap_parameters).quantile(0.5)` after the event, is the sturdier forecast.
        log_likelihood: `[batch, length]`, of each event given those before it; 0 at a row's first one and at padding.
        gap_parameters: `[batch, length, 3 * num_mixtures]`, of the density of the time to the next event, float32.
        hidden_states: of every layer, if asked for.
    """

    loss: torch.FloatTensor | None = None
    type_logits: torch.FloatTensor | None = None
    next_time_mean: torch.FloatTensor | None = None
    log_likelihood: torch.FloatTensor | None = None
    gap_parameters: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class AarenForEventForecasting(AarenPreTrainedModel):
    """When will the next event come, and of what kind?

    Forward arguments:
        event_times: `[batch, length]` float, strictly increasing where not padded, in any unit, float64 for long
            streams. Only differences matter.
        event_types: `[batch, length]` int64 in `[0, num_event_types)`; all 0 if None.
        attention_mask: `[batch, length]`, 0 for padding anywhere in the row, whatever stands there.

    The loss is of every event but the first of a row. `config.log_gap_mean` and `config.log_gap_std` should be those
    of the training data (`log_gap_statistics`). `Trainer` evaluates if it is told `label_names=["event_times"]`.

    Raises:
        ValueError: shapes that disagree, and (on the CPU) times that do not increase or kinds out of range.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_event_types": 2}
    >>> model = AarenForEventForecasting(AarenForEventForecasting.config_class(**sizes))
    >>> outputs = model(torch.tensor([[0.5, 0.7, 1.9]]), torch.tensor([[0, 1, 1]]))
    >>> outputs.type_logits.shape, outputs.next_time_mean[0, -1].item() > 1.9
    (torch.Size([1, 3, 2]), True)
    """

    main_input_name = "event_times"
    stream_width = 3  # the first event's time, the last one's, and whether there was any

    def __init__(self, config):
        super().__init__(config)
        self.embed_types = nn.Embedding(config.num_event_types, config.hidden_size)
        self.gap_projection = nn.Linear(1, config.hidden_size)
        self.model = AarenModel(config, add_token_embeddings=False)
        self.gap_head = nn.Linear(config.hidden_size, 3 * config.num_mixtures)
        self.type_head = nn.Linear(config.hidden_size, config.num_event_types)
        self.post_init()

    def embed(self, gaps, elapsed, event_types):
        """What the layers read of an event.

        Args:
            gaps: `[batch, length]`, time since the event before; 0 where there is none, which counts as typical.
            elapsed: `[batch, length]`, time since the first event.
            event_types: `[batch, length]` int64.
        """
        config = self.config
        log_gaps = gaps.masked_fill(gaps == 0, 1.0).log()
        z = ((log_gaps - config.log_gap_mean) / config.log_gap_std).masked_fill(gaps == 0, 0.0)
        dtype = self.gap_projection.weight.dtype
        # a clock in typical gaps, so that positions neither rush nor stand still
        clock = elapsed / math.exp(config.log_gap_mean)
        return (
            self.embed_types(event_types)
            + self.gap_projection(z.to(dtype).unsqueeze(-1))
            + sinusoids(clock, config.hidden_size, config.initializer_range).to(dtype)
        )

    def next_gap(self, gap_parameters):
        """The `LogNormalMixture` of the time from an event to the next, from that output of the model."""
        log_weights, means, log_stds = gap_parameters.chunk(3, -1)
        return LogNormalMixture(
            log_weights.log_softmax(-1), means, log_stds, self.config.log_gap_mean, self.config.log_gap_std
        )

    @can_return_tuple
    def forward(
        self,
        event_times: torch.FloatTensor,
        event_types: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AarenForEventForecastingOutput:
        mask = torch.ones_like(event_times, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        event_types = torch.zeros_like(mask, dtype=torch.long) if event_types is None else event_types
        _check_events(event_times, event_types, mask, self.config.num_event_types)
        event_types = event_types.masked_fill(~mask, 0)
        gaps, elapsed, has_previous = gaps_and_elapsed(event_times, mask)

        kwargs["use_cache"] = False
        embeds = self.embed(gaps, elapsed, event_types)
        outputs = self.model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        result = self.read_out(hidden_states, event_times)
        result.hidden_states = outputs.hidden_states

        # position i forecasts the next valid event, which need not be its neighbour
        source = previous_valid(mask)
        wide = result.gap_parameters.dtype
        law = self.next_gap(take(result.gap_parameters, source))
        time = law.log_prob(gaps.masked_fill(~has_previous, 1.0).to(wide))
        kind = take(result.type_logits, source).to(wide).log_softmax(-1).gather(-1, event_types.unsqueeze(-1))
        result.log_likelihood = (time + kind.squeeze(-1)).masked_fill(~has_previous, 0.0)
        result.loss = -result.log_likelihood.sum() / has_previous.sum().clamp(min=1)
        return result

    def stream(self, cache, carry, event_times, event_types):
        """Continues a stream: `[batch, n]` times and kinds; see `AarenStream`."""
        first, last, any_before = carry.unbind(-1)
        first = torch.where(any_before > 0, first, event_times[:, 0])
        last = torch.where(any_before > 0, last, event_times[:, 0])
        gaps = event_times - torch.cat([last.unsqueeze(1), event_times[:, :-1]], 1)
        embeds = self.embed(gaps, event_times - first.unsqueeze(1), event_types)
        hidden_states = self.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        return (
            dict(self.read_out(hidden_states, event_times)),
            torch.stack([first, event_times[:, -1], torch.ones_like(first)], -1),
        )

    def read_out(self, hidden_states, event_times):
        """What is forecast from hidden states `[..., hidden_size]` after events at `event_times` `[...]`."""
        parameters = self.gap_head(hidden_states)
        # likelihoods need float32, float64 stays as it is
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        return AarenForEventForecastingOutput(
            type_logits=self.type_head(hidden_states),
            next_time_mean=event_times + self.next_gap(parameters).mean(),
            gap_parameters=parameters,
        )


def previous_valid(mask):
    """Index of the last valid position before each one, `[batch, length]`; 0 where there is none."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    latest = (steps * mask).cummax(1).values
    return nn.functional.pad(latest[:, :-1], (1, 0))


def take(values, index):
    """`values[batch, index[batch, t]]` for `values` `[batch, length, ...]`."""
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(*index.shape, *values.shape[2:])
    return values.gather(1, index)


def gaps_and_elapsed(event_times, mask):
    """Time since the valid event before and since the row's first one, in the dtype of the times; 0 without.

    Returns:
        `(gaps, elapsed, has_previous)`, all `[batch, length]`, the last one bool.
    """
    has_previous = mask & (mask.cumsum(1) > 1)
    gaps = (event_times - take(event_times, previous_valid(mask))).masked_fill(~has_previous, 0.0)
    first = event_times.gather(1, mask.int().argmax(1, keepdim=True))
    return gaps, (event_times - first).masked_fill(~has_previous, 0.0), has_previous


def log_gap_statistics(event_times, attention_mask=None):
    """Mean and standard deviation of the logarithm of the times between events, for the configuration.

    >>> log_gap_statistics(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    {'log_gap_mean': 0.0, 'log_gap_std': 1.0}
    """
    mask = torch.ones_like(event_times, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    gaps, _, has_previous = gaps_and_elapsed(event_times, mask)
    log_gaps = gaps[has_previous].double().log()
    std = log_gaps.std(correction=0).item() if len(log_gaps) > 1 else 0.0
    # events that come like clockwork leave nothing to standardise by
    return {"log_gap_mean": log_gaps.mean().item(), "log_gap_std": std if std > 0 else 1.0}


def _check_events(event_times, event_types, mask, num_event_types):
    if event_times.ndim != 2 or not event_times.is_floating_point():
        raise ValueError(
            f"event_times ({event_times.dtype} {list(event_times.shape)}) must be a float [batch, length]; reshape or"
            " cast it."
        )
    for name, value in (("event_types", event_types), ("attention_mask", mask)):
        if value.shape != event_times.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but event_times has {tuple(event_times.shape)}; give one entry"
                " per event."
            )
    if event_times.device.type != "cpu" or is_tracing(event_times):
        return  # to look at values would wait for the device, or break the graph
    gaps, _, has_previous = gaps_and_elapsed(event_times, mask)
    if (wrong := has_previous & ~(gaps > 0)).any():
        row, at = wrong.nonzero()[0].tolist()
        time = event_times[row, at].item()
        raise ValueError(
            f"event_times must increase, but in row {row} event {at} is at {time:g} and the one before it at"
            f" {time - gaps[row, at].item():g}; sort the events, and spread those at the same time."
        )
    if (wrong := mask & ((event_types < 0) | (event_types >= num_event_types))).any():
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"event_types holds {int(event_types[row, at])} in row {row}, but num_event_types is {num_event_types};"
            f" use kinds from 0 to {num_event_types - 1}."
        )


__all__ = ["AarenForEventForecasting", "AarenForEventForecastingOutput", "log_gap_statistics"]
