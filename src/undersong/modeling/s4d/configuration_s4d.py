"""Configuration of S4D ("On the Parameterization and Initialization of Diagonal State Space Models", 2206.11893)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ..diagonal_ssm_config import DiagonalSSMConfig


@strict
class S4DConfig(DiagonalSSMConfig):
    """Configuration of every S4D model: language, sequence classification, time series.

    Args:
        state_init: the eigenvalues that a state space starts with: "lin" (-1/2 + i pi n), "inv", or "legs" (those of
            HiPPO-LegS's normal part).

    The other arguments are those of `DiagonalSSMConfig`: vocab_size, hidden_size, state_size (of one channel),
    num_hidden_layers, hidden_dropout_prob, layer_norm_eps, dt_min, dt_max, discretization, bidirectional, pooling,
    initializer_range, input_size, num_labels.

    >>> S4DConfig(hidden_size=64, state_size=16).layer_types[0]
    'linear_attention'
    """

    model_type = "s4d"

    state_init: Literal["lin", "inv", "legs"] = "lin"


__all__ = ["S4DConfig"]
