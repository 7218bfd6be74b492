"""S4D: one diagonal state space a channel, trained as a convolution, decoded as a recurrence (arXiv 2206.11893).

dx/dt = A x + u, y = 2 Re(C x) + D u, in steps of dt. All channels have their own A, dt and C; the state is
`[batch, hidden_size, state_size / 2]` complex numbers, kept as real pairs.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification

from ...ops.diagonal_ssm import diagonal_ssm
from ...ops.hippo import diagonal_init, discretise
from ..cache import RecurrentGenerationMixin
from ..diagonal_ssm import (
    DiagonalBackbone,
    DiagonalCausalLM,
    DiagonalLayer,
    DiagonalMixer,
    DiagonalPreTrainedModel,
    DiagonalTimeSeriesClassifier,
    as_complex,
    wide,
)
from .configuration_s4d import S4DConfig


class S4DMixer(DiagonalMixer):
    """`hidden_size` state spaces with one input and one output each."""

    def __init__(self, config, layer_idx):
        shape = (config.hidden_size, config.state_size // 2)
        super().__init__(config, layer_idx, shape, config.hidden_size)
        self.C = nn.Parameter(torch.empty(*shape, 2))
        if config.bidirectional:
            self.C_reverse = nn.Parameter(torch.empty(*shape, 2))

    def reset(self, config):
        self.init_weights(config, diagonal_init(config.state_size, config.state_init))
        for C in (self.C, self.C_reverse) if self.bidirectional else (self.C,):
            init.normal_(C, std=0.5**0.5)  # a complex number of variance 1

    def scan(self, u, step_sizes, **context):
        if step_sizes is not None:
            raise ValueError(
                "step_sizes were given, but S4D is a convolution, which needs equal steps; use an S5 model, or"
                " resample the series."
            )
        log_a, B = discretise(self.A, wide(self.log_dt).exp().unsqueeze(1), self.discretization)
        y = diagonal_ssm(u, log_a, B, as_complex(self.C), wide(self.D), **context)
        if self.bidirectional:
            y = y + diagonal_ssm(u, log_a, B, as_complex(self.C_reverse), reverse=True, **context)
        return y


class S4DLayer(DiagonalLayer):
    mixer_class = S4DMixer


class S4DPreTrainedModel(DiagonalPreTrainedModel):
    config: S4DConfig
    config_class = S4DConfig
    _no_split_modules = ["S4DLayer"]
    _can_record_outputs = {"hidden_states": S4DLayer}


class S4DModel(DiagonalBackbone, S4DPreTrainedModel):
    __doc__ = DiagonalBackbone.__doc__
    layer_class = S4DLayer


class S4DForCausalLM(DiagonalCausalLM, S4DPreTrainedModel, RecurrentGenerationMixin):
    """S4D as a language model: `generate()` with a state of fixed size, however long the text.

    >>> model = S4DForCausalLM(S4DConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1))
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    model_class = S4DModel


class S4DForSequenceClassification(GenericForSequenceClassification, S4DPreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot (remote code
        # would have to be trusted a second time, inside the constructor).
        S4DPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = S4DModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class S4DForTimeSeriesClassification(DiagonalTimeSeriesClassifier, S4DPreTrainedModel):
    __doc__ = DiagonalTimeSeriesClassifier.__doc__
    model_class = S4DModel


__all__ = [
    "S4DForCausalLM",
    "S4DForSequenceClassification",
    "S4DForTimeSeriesClassification",
    "S4DModel",
    "S4DPreTrainedModel",
]
