"""Mamba-2 (arXiv 2405.21060, sections 6 and 7) on transformers' own checkpoints, configuration and parameters.

A mixer is [z, xBC, dt] = in_proj(u), (x, B, C) = silu(conv(xBC)), and per head, whose decay is one number,

    h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T,   y_t = h_t C_t + D x_t,   delta = clamp(softplus(dt + dt_bias))

followed by out_proj(rms(y * silu(z))), the rms over each of the groups that share B and C. The state of a layer is h,
`[batch, heads, head_dim, state]`, and the last inputs of the convolution.
"""

from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2Model,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from ..cache import RecurrentGenerationMixin
from ..state_space import SSD, GatedRMSNorm, RMSNorm, StateSpaceBlock, StateSpaceMixer, may_write
from ..state_space_model import (
    StateSpaceBackbone,
    StateSpaceForCausalLM,
    StateSpaceForSequenceClassification,
    StateSpaceForTokenClassification,
    StateSpacePreTrained,
    exchange_classes,
)


class FastMamba2Mixer(StateSpaceMixer, Mamba2Mixer):
    """`Mamba2Mixer` over undersong's ops."""

    recurrence_class = SSD

    def add_ops(self):
        super().add_ops()
        # every group has a norm of its own, as the authors have it; transformers 5.22 norms all of them together
        self.norm.group_size = self.intermediate_size // self.n_groups

    def project(self, hidden_states):
        return self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

    def heads_and_groups(self, xBC):
        states = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, states, states], dim=-1)
        per_head, per_group = (self.num_heads, self.head_dim), (self.n_groups, self.ssm_state_size)
        return x.unflatten(-1, per_head), B.unflatten(-1, per_group), C.unflatten(-1, per_group)

    def recurrence_inputs(self, xBC, dt):
        """What either op takes, up to the state; no result depends on config.chunk_size, which tunes other kernels."""
        x, B, C = self.heads_and_groups(xBC)
        return x, dt, self.decay, B, C, self.D, None, self.dt_bias, True, self.time_step_limit

    def recur(self, inputs, layer, mask, cu_seqlens):
        """(y, the recurrence's states by name) over a sequence; without a cache layer there is no state to keep."""
        if layer is None:
            return self.recurrence(*inputs, mask=mask, cu_seqlens=cu_seqlens), {}
        y, h = self.recurrence(*inputs, initial_state=layer.read("ssm"), mask=mask, return_final_state=True)
        return y, {"ssm": h}

    def recur_step(self, inputs, layer, mask):
        """`recur` over one token, whose inputs have no axis of time."""
        h = layer.read("ssm")
        y, h = self.recurrence_step(h, *inputs, mask=mask, inplace=may_write(h))
        return y, {"ssm": h}

    def scan(self, hidden_states, layer, mask, cu_seqlens):
        z, xBC, dt = self.project(hidden_states)
        xBC, window = self.convolve(xBC, layer, mask, cu_seqlens)
        y, states = self.recur(self.recurrence_inputs(xBC, dt), layer, mask, cu_seqlens)
        if layer is not None:
            layer.write(conv=window, **states)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def step(self, hidden_states, layer, mask):
        z, xBC, dt = self.project(hidden_states.squeeze(1))
        mask = None if mask is None else mask.squeeze(1)
        xBC, window = self.convolve(xBC, layer, mask, step=True)
        y, states = self.recur_step(self.recurrence_inputs(xBC, dt), layer, mask)
        layer.write(conv=window, **states)
        return self.out_proj(self.norm(y.flatten(-2), z)).unsqueeze(1)


class FastMamba2RMSNorm(RMSNorm, Mamba2RMSNorm):
    """`Mamba2RMSNorm`, in float64 where the model is."""


class FastMambaRMSNormGated(GatedRMSNorm, MambaRMSNormGated):
    """`MambaRMSNormGated`, in float64 where the model is."""


class FastMamba2Block(StateSpaceBlock, Mamba2Block):
    """`Mamba2Block` that passes masks, packing and states on."""


class FastMamba2PreTrainedModel(StateSpacePreTrained, Mamba2PreTrainedModel):
    _keep_in_fp32_modules_strict = ["A_log", r"mixer\.D", "dt_bias"]
    _no_split_modules = ["FastMamba2Block"]


class FastMamba2Model(StateSpaceBackbone, FastMamba2PreTrainedModel, Mamba2Model):
    """`Mamba2Model`: same configuration, parameters and checkpoints; see `FastMamba2ForCausalLM`.

    >>> import torch
    >>> from transformers import Mamba2Config
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> FastMamba2Model(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastMamba2ForCausalLM(
    StateSpaceForCausalLM, RecurrentGenerationMixin, FastMamba2PreTrainedModel, Mamba2ForCausalLM
):
    """`Mamba2ForCausalLM` that is right for padding, packing and any split of the sequence, and fast everywhere.

    It reads and writes transformers' checkpoints: a saved folder names `Mamba2ForCausalLM`. Its forward also takes
    packed batches (`position_ids` that restart, `seq_idx`, `cu_seq_lens_q`), masks with padding anywhere, and its
    cache as `past_key_values` or `cache_params`.

    >>> import torch
    >>> from transformers import Mamba2Config
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> model = FastMamba2ForCausalLM(config)
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastMamba2ForSequenceClassification(StateSpaceForSequenceClassification, FastMamba2PreTrainedModel):
    """Mamba-2 under a linear head over the last token that is not padding."""

    backbone_class = FastMamba2Model


class FastMamba2ForTokenClassification(StateSpaceForTokenClassification, FastMamba2PreTrainedModel):
    """Mamba-2 under a linear head over every token."""

    backbone_class = FastMamba2Model


# What stands in for what of transformers; the parameters are the same.
FAST_CLASSES = {
    Mamba2Mixer: FastMamba2Mixer,
    Mamba2RMSNorm: FastMamba2RMSNorm,
    MambaRMSNormGated: FastMambaRMSNormGated,
    Mamba2Block: FastMamba2Block,
    Mamba2Model: FastMamba2Model,
    Mamba2ForCausalLM: FastMamba2ForCausalLM,
}

__all__ = [
    "FastMamba2ForCausalLM",
    "FastMamba2ForSequenceClassification",
    "FastMamba2ForTokenClassification",
    "FastMamba2Model",
    "FastMamba2PreTrainedModel",
]
