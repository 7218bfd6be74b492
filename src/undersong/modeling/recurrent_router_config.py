"""How a recurrent router is attached to a mixture of experts (arXiv 2408.06793)."""

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(kw_only=True)
class RecurrentRouterConfig:
    """How a recurrent router is attached.

    Args:
        router_hidden_size: size of a token's routing state.
        router_type: "gru" or "rnn" (an Elman cell).
        mode: "residual" adds to the scores of the router that is there; "replace" does without it, as in the paper,
            for models that are trained from scratch.

    Raises:
        ValueError: an unknown mode or cell, or a size below 1.

    >>> RecurrentRouterConfig(router_hidden_size=64).to_dict()
    {'router_hidden_size': 64, 'router_type': 'gru', 'mode': 'residual'}
    """

    router_hidden_size: int = 128
    router_type: Literal["gru", "rnn"] = "gru"
    mode: Literal["residual", "replace"] = "residual"

    def __post_init__(self):
        if not isinstance(self.router_hidden_size, int) or self.router_hidden_size < 1:
            raise ValueError(f"router_hidden_size ({self.router_hidden_size!r}) must be an integer of at least 1.")
        for name, known in {"router_type": ("gru", "rnn"), "mode": ("residual", "replace")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}.")

    def to_dict(self):
        return asdict(self)


__all__ = ["RecurrentRouterConfig"]
