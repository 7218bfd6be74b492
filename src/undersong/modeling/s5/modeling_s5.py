"""S5: one diagonal state space a layer, with many inputs and outputs, as a parallel scan (arXiv 2208.04933).

dx/dt = A x + B u, y = 2 Re(C x) + D u, in steps of dt, of which every state has its own and which may differ from
token to token. The state is `[batch, state_size / 2]` complex numbers, kept as real pairs.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification

from ...ops._complex import exp
from ...ops.diagonal_scan import diagonal_scan
from ...ops.hippo import discretise, hippo_blocks
from ..cache import RecurrentGenerationMixin
from ..diagonal_ssm import (
    DiagonalBackbone,
    DiagonalCausalLM,
    DiagonalLayer,
    DiagonalMixer,
    DiagonalPreTrainedModel,
    DiagonalTimeSeriesClassifier,
    wide,
)
from .configuration_s5 import S5Config


class S5Mixer(DiagonalMixer):
    """One state space of all channels."""

    def __init__(self, config, layer_idx):
        size = config.state_size // 2
        super().__init__(config, layer_idx, size, size)
        self.B = nn.Parameter(torch.empty(size, config.hidden_size, 2))
        self.C = nn.Parameter(torch.empty(config.hidden_size, size, 2))
        if config.bidirectional:
            self.C_reverse = nn.Parameter(torch.empty(config.hidden_size, size, 2))

    def reset(self, config):
        """In the basis of A's eigenvectors V, where B is V^H B and C is C V, of real B and C."""
        A, V = hippo_blocks(config.state_size, config.num_blocks)
        self.init_weights(config, A)
        V = V.to(self.B.device)
        B = torch.randn(config.state_size, config.hidden_size, dtype=V.real.dtype, device=V.device)
        init.copy_(self.B, torch.view_as_real(V.mH @ (B / config.hidden_size**0.5).to(V.dtype)))
        for C in (self.C, self.C_reverse) if self.bidirectional else (self.C,):
            real = torch.randn(config.hidden_size, config.state_size, dtype=V.real.dtype, device=V.device)
            init.copy_(C, torch.view_as_real(real.to(V.dtype) @ V))

    def scan(self, u, step_sizes, mask=None, return_final_state=False, **context):
        if mask is not None:  # padding may hold anything
            u = u.masked_fill(~mask.unsqueeze(-1), 0.0)
            step_sizes = None if step_sizes is None else step_sizes.masked_fill(~mask, 1.0)
        dt = wide(self.log_dt).exp()
        if step_sizes is not None:
            dt = dt * step_sizes.to(dt.dtype).unsqueeze(-1)  # [batch, length, state]
        log_a, scale = discretise(self.A, dt, self.discretization)
        a = exp(log_a).view(*(1,) * (3 - log_a.dim()), *log_a.shape)
        # projections in the dtype of the layer, states in float32
        Bu = wide(F.linear(u, self.B.permute(2, 0, 1).flatten(0, 1).to(u.dtype)))
        Bu = scale * torch.complex(*Bu.chunk(2, -1))
        x, state = diagonal_scan(a, Bu, mask=mask, return_final_state=True, **context)
        y = self.read(x, self.C, u.dtype)
        if self.bidirectional:
            y = y + self.read(diagonal_scan(a, Bu, mask=mask, reverse=True, **context), self.C_reverse, u.dtype)
        y = y + (wide(self.D) * u).to(u.dtype)
        return (y, state) if return_final_state else y

    def read(self, x, C, dtype):
        """2 Re(C x) as one real product."""
        x = torch.cat([x.real, x.imag], -1).to(dtype)
        return F.linear(x, torch.cat([2 * C[..., 0], -2 * C[..., 1]], -1).to(dtype))


class S5Layer(DiagonalLayer):
    mixer_class = S5Mixer


class S5PreTrainedModel(DiagonalPreTrainedModel):
    config: S5Config
    config_class = S5Config
    _no_split_modules = ["S5Layer"]
    _can_record_outputs = {"hidden_states": S5Layer}


class S5Model(DiagonalBackbone, S5PreTrainedModel):
    __doc__ = DiagonalBackbone.__doc__
    layer_class = S5Layer


class S5ForCausalLM(DiagonalCausalLM, S5PreTrainedModel, RecurrentGenerationMixin):
    """S5 as a language model: `generate()` with a state of fixed size, however long the text.

    >>> model = S5ForCausalLM(S5Config(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1))
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    model_class = S5Model


class S5ForSequenceClassification(GenericForSequenceClassification, S5PreTrainedModel):
    """A linear head over the last token that is not padding."""

    def __init__(self, config):
        # Past the mixin's __init__: it builds the trunk through AutoModel, which an exported model cannot (remote code
        # would have to be trusted a second time, inside the constructor).
        S5PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = S5Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class S5ForTimeSeriesClassification(DiagonalTimeSeriesClassifier, S5PreTrainedModel):
    __doc__ = DiagonalTimeSeriesClassifier.__doc__
    model_class = S5Model


__all__ = [
    "S5ForCausalLM",
    "S5ForSequenceClassification",
    "S5ForTimeSeriesClassification",
    "S5Model",
    "S5PreTrainedModel",
]
