"""What a decoding config accepts: plain JSON values, and dicts of the arguments that a method's class takes."""

from __future__ import annotations

import inspect
import json

from transformers import GenerationConfig


def arguments_of(value, main: str) -> dict:
    """Keyword arguments from a dict of them, or from the value of the main one."""
    return dict(value) if isinstance(value, dict) else {main: value}


def check_arguments(value, kind, name: str, cls) -> None:
    """Refuses values that are neither of the simple kind nor a dict of the class's arguments."""
    if isinstance(value, dict):
        known = [n for n in inspect.signature(cls).parameters if n not in ("tokenizer", "streamer")]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"{name} has no {', '.join(unknown)}; it takes {', '.join(known)}.")
    elif isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} ({value!r}) must be a {_names(kind)} or a dict of arguments of {cls.__name__}.")


def _names(kind) -> str:
    return {str: "language name", int: "number of samples"}.get(kind, "number")


def checked_generation(generation) -> dict:
    """A copy of `generation` with known fields and plain values only."""
    if not isinstance(generation, dict):
        raise ValueError(f"generation ({generation!r}) must be a dict of GenerationConfig fields.")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    unknown = sorted(set(generation) - known)
    if unknown:
        raise ValueError(
            f"generation has unknown fields {', '.join(unknown)}; it takes fields of transformers' GenerationConfig."
        )
    return plain(generation, "generation")


def stock_config(generation: dict) -> GenerationConfig:
    try:
        return GenerationConfig(**generation)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation: {error}") from error


def plain(value: dict, name: str) -> dict:
    """A copy as JSON gives it back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold plain JSON values, because it is saved: {error}.") from None
