"""What a state control does to a Mamba-2 model, as plain data that lives in `generation_config.json`.

The controls are the training-free remedies of "Stuffed Mamba" (arXiv 2410.07145) for states that grow past
what training has seen: forget more and insert less, a bound on the state's norm, a sliding window over the past.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import MISSING, dataclass, fields

MODES = ("rescale", "normalize", "window")
RESCALE = ("decay_mult", "decay_offset", "insert_mult", "insert_clip", "dt_mult", "raw_dt_mult")

# field -> (what a number must satisfy, in code and in words, levels of nesting: 1 for layers, 2 for their heads)
_NUMBERS = {
    "decay_mult": (lambda v: v > 0, "above 0; more than 1 forgets faster", 2),
    "decay_offset": (lambda v: v <= 0, "at most 0; below 0 forgets faster", 2),
    "insert_mult": (lambda v: v > 0, "above 0; less than 1 inserts less", 2),
    "insert_clip": (lambda v: v > 0, "above 0; None leaves B as it is", 1),
    "dt_mult": (lambda v: v > 0, "above 0; less than 1 takes smaller steps", 2),
    "raw_dt_mult": (lambda v: v > 0, "above 0; use dt_mult to scale the step itself", 2),
    "threshold": (lambda v: v > 0, "above 0; calibrate_thresholds measures it", 2),
    "threshold_multiplier": (lambda v: v > 0, "above 0; 2.0 lets a state grow to twice its threshold", 0),
}


@dataclass(frozen=True)
class StateControlConfig:
    """Which control, and how strong. With delta = dt_mult * clamp(softplus(raw_dt_mult * dt + dt_bias)), a head does

    h_t = exp(delta_t (decay_mult A + decay_offset)) h_{t-1} + insert_mult delta_t x_t min(B_t, insert_clip)^T

    and "normalize" or "window" act on that. A number holds for the model, a list gives one per layer, a list of lists
    one per layer and head; lists cover all layers of the model, also those that `layers` leaves alone.

    Args:
        mode: "rescale" (forget more, insert less), "normalize" (a head's state whose Frobenius norm exceeds
            `threshold_multiplier * threshold` is scaled down to that) or "window" (a state of only the last tokens).
        decay_mult: factor on the rate A, above 0; more than 1 forgets faster. Like every factor, in any mode.
        decay_offset: added to A, at most 0.
        insert_mult: factor on what is written, above 0.
        insert_clip: highest entry of B, above 0; for the model or per layer.
        dt_mult: factor on the step size behind softplus and limits.
        raw_dt_mult: factor on the projected dt before bias and softplus, which shifts the step rather than scales it.
        threshold: norm of a healthy state, above 0, what `calibrate_thresholds` measures; for "normalize".
        threshold_multiplier: how many times `threshold` a norm may reach.
        granularity: tokens between two looks at the state, counted from each row's first token that is not padding;
            1 looks after every token. Prefill, chunks and decoding look at the same positions.
        window: how many tokens the state remembers, for "window", beside those since the last look; rounded up to a
            multiple of `granularity`. The cache grows by window / granularity + 1 states per layer.
        layers: indices of the layers to control; None for all.

    Raises:
        ValueError: a number out of range, a field that the mode lacks or has no use for, or an unknown mode.

    >>> StateControlConfig("window", window=512, decay_mult=1.5).to_dict()
    {'mode': 'window', 'decay_mult': 1.5, 'window': 512}
    >>> StateControlConfig("normalize", threshold=-1.0)
    Traceback (most recent call last):
    ValueError: threshold (-1.0) must be a finite number above 0; calibrate_thresholds measures it.
    """

    mode: str
    decay_mult: float | list | None = None
    decay_offset: float | list | None = None
    insert_mult: float | list | None = None
    insert_clip: float | list | None = None
    dt_mult: float | list | None = None
    raw_dt_mult: float | list | None = None
    threshold: float | list | None = None
    threshold_multiplier: float = 2.0
    granularity: int = 128
    window: int | None = None
    layers: list | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode ({self.mode!r}) must be one of {', '.join(map(repr, MODES))}.")
        for name, (holds, words, depth) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name == "threshold_multiplier":
                # a frozen dataclass owns its values, and JSON knows lists only
                object.__setattr__(self, name, _plain(name, value, holds, words, depth))
        for name in ("granularity", "window"):
            value = getattr(self, name)
            if (value is not None or name == "granularity") and not _is_count(value):
                raise ValueError(f"{name} ({value!r}) must be an integer of at least 1, in tokens.")
        self._check_layers()
        self._check_mode()
        if self.window is not None and self.window % self.granularity:
            window = math.ceil(self.window / self.granularity) * self.granularity
            warnings.warn(
                f"window ({self.window}) is not a multiple of granularity ({self.granularity}) and becomes {window};"
                " give a multiple, or a smaller granularity.",
                stacklevel=3,
            )
            object.__setattr__(self, "window", window)

    def _check_layers(self):
        if self.layers is None:
            return
        layers = list(self.layers) if isinstance(self.layers, list | tuple | range) else None
        if not layers or not all(_is_count(index, lowest=0) for index in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers ({self.layers!r}) must be a list of different layer indices, or None for all.")
        object.__setattr__(self, "layers", layers)

    def _check_mode(self):
        for name, mode in (("threshold", "normalize"), ("window", "window")):
            value = getattr(self, name)
            if self.mode == mode and value is None:
                how = "measure it with calibrate_thresholds" if name == "threshold" else "give a number of tokens"
                raise ValueError(f"{name} (None) must be given for mode {mode!r}; {how}.")
            if self.mode != mode and value is not None:
                raise ValueError(f"{name} belongs to mode {mode!r} and mode is {self.mode!r}; give one of the two.")
        if self.mode == "rescale" and all(getattr(self, name) is None for name in RESCALE):
            raise ValueError(f"mode 'rescale' changes nothing here; give at least one of {', '.join(RESCALE)}.")

    def to_dict(self) -> dict:
        """The values that are not defaults, as JSON has them."""
        return {
            f.name: copy.deepcopy(getattr(self, f.name))
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_dict(cls, values: dict) -> StateControlConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: no dictionary, unknown fields, no mode, or whatever the class raises for a value.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or "mode" not in values:
            raise ValueError(f"a state control must be an object with a mode and other {', '.join(known)}: {values!r}")
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown fields {', '.join(unknown)}; a state control has {', '.join(known)}.")
        return cls(**values)


def _plain(name, value, holds, words, depth, place=""):
    """A number, or lists of numbers down to `depth`, as JSON has them; every number checked."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and depth and value:
        return [_plain(name, item, holds, words, depth - 1, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name}{place} ({value!r}) must be a finite number {words}.")
    return value


def _is_count(value, lowest=1):
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


__all__ = ["RESCALE", "StateControlConfig"]
