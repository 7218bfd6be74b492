"""Controls on the state of Mamba-2 past its training length, without training ("Stuffed Mamba", arXiv 2410.07145).

A mixer's class is exchanged for one that transforms the inputs of the recurrence ("rescale") or runs it by
`controlled_ssd` ("normalize", "window"); parameters stay. What a control remembers lies in the layer's cache beside
the state, and where it is in the sequence says the cache's count of valid tokens: so prefill, chunks, decoding, beams
and padding agree.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import Mamba2Model

from ..ops.ssd_control import THRESHOLD_STATE, WINDOW_STATE, controlled_ssd
from .borrow_mamba import give_back, make_fast, matrix_mixers
from .precision import wide
from .state_control_config import RESCALE, StateControlConfig
from .state_space import may_write

_STORED = "state_control"  # the entry of a generation config
_MISSING = object()


def apply_state_control(model, config=None):
    """Controls the states of a model, in place, until `remove_state_control`.

    Everything that runs the model is controlled alike: `generate()` in every mode, forwards with or without a cache,
    packed and padded batches. A model of transformers' own is upgraded by `enable_fast_mamba`, as long as the control
    lasts. The config goes into `model.generation_config`, so that a model saved meanwhile carries it.

    Args:
        model: a Mamba-2 model, stock or ours, of any head, or what holds one, such as a `PeftModel`.
        config: a `StateControlConfig` or its dictionary; None for the one that the model's generation config carries.

    Returns:
        The model.

    Raises:
        ValueError: the model has no layers with a matrix state, none or unfitting values for its layers and heads.
        RuntimeError: the model is controlled already, or inside a `decode_graph` block.

    >>> from transformers import Mamba2Config, Mamba2ForCausalLM
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> model = Mamba2ForCausalLM(config)
    >>> _ = apply_state_control(model, StateControlConfig("window", window=256))
    >>> tokens = model.generate(torch.tensor([[1, 3]]), max_new_tokens=4)
    >>> type(remove_state_control(model)).__name__
    'Mamba2ForCausalLM'
    """
    mixers = matrix_mixers(model)
    _check_ready(model, mixers)
    generation = getattr(model, "generation_config", None)  # heads that cannot generate have none
    config = _given(config, generation)
    controls = _controls(config, mixers)
    record = _Record(make_fast(model), generation, {})
    for mixer, control in zip(mixers, controls, strict=True):
        if control is not None:
            mixer.state_control, control.record = control, record
            mixer.__class__ = _controlled(type(mixer))
    if generation is not None:
        # entries that transformers does not know are dropped when a config that came from a model's is loaded
        entries = {_STORED: config.to_dict(), "_from_model_config": False}
        record.entries = {name: vars(generation).get(name, _MISSING) for name in entries}
        vars(generation).update(entries)
    return model


def remove_state_control(model):
    """Ends what `apply_state_control` began: classes, attributes and the generation config are what they were.

    Args:
        model: the model that was given to `apply_state_control`, or what holds it.

    Returns:
        The model.

    Raises:
        RuntimeError: the model is not controlled.
    """
    mixers = [part for part in model.modules() if _is_controlled(part)]
    if not mixers:
        raise RuntimeError(
            f"model ({type(model).__name__}) has no state control to remove; apply_state_control begins one."
        )
    record = mixers[0].state_control.record
    for mixer in mixers:
        mixer.__class__ = type(mixer).__bases__[1]
        del mixer.state_control
    give_back(record.changes)
    for name, value in record.entries.items():
        if value is _MISSING:
            vars(record.generation).pop(name, None)
        else:
            setattr(record.generation, name, value)
    return model


@contextlib.contextmanager
def state_control(model, config=None):
    """`apply_state_control` for the length of a block; whatever happens, it ends with `remove_state_control`.

    A cache that was filled inside the block goes on inside such a block.

    Yields:
        The model.

    >>> from transformers import Mamba2Config, Mamba2ForCausalLM
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> model = Mamba2ForCausalLM(config)
    >>> with state_control(model, StateControlConfig("rescale", decay_mult=2.0, insert_mult=0.9)):
    ...     model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 6])
    """
    apply_state_control(model, config)
    try:
        yield model
    finally:
        remove_state_control(model)


def calibrate_thresholds(model, input_ids, attention_mask=None, multiplier=2.0):
    """Measures how large states are while all is well, as the thresholds of "normalize".

    Args:
        model: as for `apply_state_control`, not controlled; it is given back as it came.
        input_ids: `[batch, length]` ordinary text of at most the training length.
        attention_mask: `[batch, length]`, 0 for padding.
        multiplier: `threshold_multiplier` of the result.

    Returns:
        A `StateControlConfig` of mode "normalize" whose `threshold` is, per layer and head, the Frobenius norm of the
        state after the last token, averaged over the rows. `dataclasses.replace` changes the rest.

    Raises:
        ValueError: the model has no layers with a matrix state, a multiplier that is not above 0, or a state of zeros.
        RuntimeError: the model is controlled.

    >>> from transformers import Mamba2Config, Mamba2ForCausalLM
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> control = calibrate_thresholds(Mamba2ForCausalLM(config), torch.tensor([[1, 2, 3, 4]]))
    >>> len(control.threshold), len(control.threshold[0])
    (1, 4)
    """
    config = StateControlConfig("normalize", threshold=1.0, threshold_multiplier=multiplier)
    _check_ready(model, matrix_mixers(model))
    changes = make_fast(model)
    try:
        backbone = next(part for part in model.modules() if isinstance(part, Mamba2Model))
        with torch.no_grad():
            cache = backbone(input_ids, attention_mask=attention_mask, use_cache=True).cache_params
    finally:
        give_back(changes)
    norms = torch.stack([layer.read("ssm").flatten(-2).norm(dim=-1).mean(0).cpu() for layer in cache.layers])
    if not norms.all():
        raise ValueError(
            f"input_ids ({list(input_ids.shape)}) leave heads of the model with a state of zeros, which is no"
            " threshold; calibrate on ordinary text."
        )
    return replace(config, threshold=norms.tolist())


class ControlledMixer:
    """Stands in front of a mixer's class; `state_control` holds the `LayerControl`."""

    def recurrence_inputs(self, xBC, dt):
        return self.state_control.rescale(*super().recurrence_inputs(xBC, dt))

    def recur(self, inputs, layer, mask, cu_seqlens):
        if not self.state_control.bounds:
            return super().recur(inputs, layer, mask, cu_seqlens)
        return self.state_control.run(inputs, layer, mask, cu_seqlens)

    def recur_step(self, inputs, layer, mask):
        if not self.state_control.bounds:
            return super().recur_step(inputs, layer, mask)
        x, dt, A, B, C, *rest = inputs
        x, dt, B, C = (tensor.unsqueeze(1) for tensor in (x, dt, B, C))
        mask = None if mask is None else mask[:, None]
        y, states = self.state_control.run((x, dt, A, B, C, *rest), layer, mask, step=True)
        return y.squeeze(1), states


class LayerControl:
    """The control of one layer, as tensors beside those that they meet.

    They are no buffers: they belong into no state dict, and casting a model must not round them.

    Attributes:
        config: the `StateControlConfig`.
        bounds: whether the recurrence itself is another one, by a threshold or a window.
        record: what `remove_state_control` restores, shared by all layers.
    """

    def __init__(self, config, values):
        self.config, self.values, self.record = config, values, None
        self.bounds = config.mode != "rescale"
        self._placed, self._where = {}, None

    def at(self, like):
        """The values by name on the device and in the dtype of `like`; moved once, since a step must not wait."""
        where = like.device, like.dtype
        if self._where != where:
            with torch.inference_mode(False):  # what inference mode makes can be of no use to a gradient later
                self._placed = {name: value.clone().to(*where) for name, value in self.values.items()}
            self._where = where
        return self._placed

    def rescale(self, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
        """The inputs of a recurrence that forgets more and inserts less, for any kernel.

        A write is delta x B^T and a decay exp(delta A): delta times s and A over s scale the one and keep the other.
        """
        values = self.at(A)
        if "raw_dt_mult" in values:
            dt = wide(dt) * values["raw_dt_mult"]
        if "dt_mult" in values or "insert_mult" in values:
            dt = F.softplus(wide(dt) + dt_bias).clamp(*dt_limit)
            dt_bias, dt_softplus, dt_limit = None, False, (float("-inf"), float("inf"))
        if "dt_mult" in values:
            dt = dt * values["dt_mult"]
        if "decay_mult" in values:
            A = A * values["decay_mult"]
        if "decay_offset" in values:
            A = A + values["decay_offset"]
        if "insert_mult" in values:
            dt, A = dt * values["insert_mult"], A / values["insert_mult"]
        if "insert_clip" in values:
            B = B.clamp(max=values["insert_clip"].to(B.dtype))
        return x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit

    def run(self, inputs, layer, mask=None, cu_seqlens=None, step=False):
        """(y, the states by name) of the bounded recurrence over a sequence; a `step` is one token onto a cache."""
        config, x, state = self.config, inputs[0], self.held(layer)
        bound = {"window": config.window} if config.window else {"threshold": self.at(inputs[2])["threshold"]}
        result = controlled_ssd(
            *inputs,
            granularity=config.granularity,
            **bound,
            state=state,
            position=None if state is None else layer.valid_tokens.to(x.device),
            mask=mask,
            cu_seqlens=cu_seqlens,
            inplace=step and may_write(state["ssm"]),
            return_final_state=layer is not None,
        )
        return (result, {}) if layer is None else result

    def held(self, layer):
        """The states that the recurrence goes on from, or None at the start."""
        if layer is None or not layer.states:
            return None
        names = WINDOW_STATE if self.config.window else THRESHOLD_STATE
        chunks = layer.states["ring"].shape[1] if "ring" in layer.states else None
        if self.config.window and chunks != self.config.window // self.config.granularity:
            raise ValueError(
                f"past_key_values was filled {_filled(chunks)}, and its states say nothing about the last window"
                f" ({self.config.window}) tokens; read the whole text under one control, from an empty cache."
            )
        return {name: layer.states[name] for name in names}


@dataclass
class _Record:
    """What there was before a control: of modules (`make_fast`), and in the generation config."""

    changes: list
    generation: object
    entries: dict


@functools.cache
def _controlled(kind):
    return type(f"Controlled{kind.__name__}", (ControlledMixer, kind), {"__module__": __name__})


def _filled(chunks):
    return "without a window" if chunks is None else f"with a window of {chunks} chunks"


# Both by names and not by classes: exported to a repository, this module may meet an undersong that is installed.


def _is_controlled(part):
    return "state_control" in vars(part)


def _check_ready(model, mixers):
    if any(_is_controlled(mixer) for mixer in mixers):
        raise RuntimeError(
            f"model ({type(model).__name__}) has a state control already; call remove_state_control(model) first."
        )
    if any(type(vars(part).get("forward")).__name__ == "DecodeGraphs" for part in model.modules()):
        raise RuntimeError(
            f"model ({type(model).__name__}) is inside a decode_graph block, whose recordings a control would not"
            " reach; apply the control before the block."
        )


def _given(config, generation):
    """The config as a `StateControlConfig`: an object, a dictionary, or what the generation config carries."""
    if config is None:
        config = getattr(generation, _STORED, None)
        if config is None:
            raise ValueError(
                "config (None) means the one in model.generation_config.state_control, which there is not; pass a"
                " StateControlConfig."
            )
    return config if isinstance(config, StateControlConfig) else StateControlConfig.from_dict(config)


def _controls(config, mixers):
    """A `LayerControl` per mixer, or None where the control leaves the layer alone."""
    chosen = range(len(mixers)) if config.layers is None else config.layers
    if max(chosen) >= len(mixers):
        raise ValueError(
            f"layers ({list(chosen)}) must lie in 0 to {len(mixers) - 1}: the model has {len(mixers)} layers with a"
            " matrix state."
        )
    heads = mixers[0].num_heads
    values = {}
    for name in (*RESCALE, "threshold"):
        if (value := getattr(config, name)) is not None:
            values[name] = _per_layer(name, value, len(mixers), heads)
    if "threshold" in values:
        limits = values["threshold"] * config.threshold_multiplier
        values["threshold"] = (limits if limits.dim() == 2 else limits[:, None]).expand(-1, heads).contiguous()
    return [
        LayerControl(config, {name: value[index] for name, value in values.items()}) if index in chosen else None
        for index in range(len(mixers))
    ]


def _per_layer(name, value, layers, heads):
    """`[layers]` (or, with values per head, `[layers, heads]`) float64 of a number or nested lists."""
    if not isinstance(value, list):
        return torch.full((layers,), value, dtype=torch.float64)
    if len(value) != layers:
        raise ValueError(f"{name} has {len(value)} entries, but the model has {layers} layers; give one per layer.")
    if not any(isinstance(entry, list) for entry in value):
        return torch.tensor(value, dtype=torch.float64)
    for index, entry in enumerate(value):
        if isinstance(entry, list) and len(entry) != heads:
            raise ValueError(
                f"{name}[{index}] has {len(entry)} entries, but the layer has {heads} heads; give one per head."
            )
    rows = [entry if isinstance(entry, list) else [entry] * heads for entry in value]
    return torch.tensor(rows, dtype=torch.float64)


__all__ = [
    "ControlledMixer",
    "LayerControl",
    "StateControlConfig",
    "apply_state_control",
    "calibrate_thresholds",
    "remove_state_control",
    "state_control",
]
