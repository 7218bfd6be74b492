"""Mamba (arXiv 2312.00752, sections 3.2-3.4) on transformers' own checkpoints, configuration and parameters.

A mixer is [x, z] = in_proj(u), x = silu(conv(x)), (dt, B, C) = x_proj(x), and per channel d and state n

    h_t[d,n] = exp(delta_t[d] A[d,n]) h_{t-1}[d,n] + delta_t[d] B_t[n] x_t[d],    delta = softplus(dt_proj(dt))
    y_t[d]   = silu(z_t[d]) (sum_n C_t[n] h_t[d,n] + D[d] x_t[d])

followed by out_proj. The state of a layer is h and the last inputs of the convolution.
"""

from transformers.models.mamba.modeling_mamba import (
    MambaBlock,
    MambaForCausalLM,
    MambaMixer,
    MambaModel,
    MambaPreTrainedModel,
    MambaRMSNorm,
)

from ..cache import RecurrentGenerationMixin
from ..state_space import (
    RMSNorm,
    SelectiveScan,
    StateSpaceBlock,
    StateSpaceMixer,
    TimeStepProjection,
    exchange_linear,
    may_write,
)
from ..state_space_model import (
    StateSpaceBackbone,
    StateSpaceForCausalLM,
    StateSpaceForSequenceClassification,
    StateSpaceForTokenClassification,
    StateSpacePreTrained,
    exchange_classes,
)


class SelectiveMixer(StateSpaceMixer):
    """Mamba's mixer, put in front of transformers' own; relatives add norms on (dt, B, C)."""

    recurrence_class = SelectiveScan

    def add_ops(self):
        super().add_ops()
        exchange_linear(self, TimeStepProjection, "dt_proj")

    def normalise(self, dt, B, C):
        return dt, B, C

    def selection(self, x):
        """x `[.., channels]` -> delta and its bias, B, C."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.normalise(*self.x_proj(x).split(sizes, dim=-1))
        if isinstance(self.dt_proj, TimeStepProjection):
            return self.dt_proj(dt, with_bias=False), self.dt_proj.bias, B, C
        return self.dt_proj(dt), None, B, C

    def scan(self, hidden_states, layer, mask, cu_seqlens):
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x, window = self.convolve(x, layer, mask, cu_seqlens)
        delta, bias, B, C = self.selection(x)
        inputs = x, delta, self.decay, B, C, self.D, z, bias, True
        if layer is None:
            return self.out_proj(self.recurrence(*inputs, mask=mask, cu_seqlens=cu_seqlens))
        y, h = self.recurrence(*inputs, initial_state=layer.read("ssm"), mask=mask, return_final_state=True)
        layer.write(conv=window, ssm=h)
        return self.out_proj(y)

    def step(self, hidden_states, layer, mask):
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        mask = None if mask is None else mask.squeeze(1)
        x, window = self.convolve(x, layer, mask, step=True)
        delta, bias, B, C = self.selection(x)
        h = layer.read("ssm")
        y, h = self.recurrence_step(
            h, x, delta, self.decay, B, C, self.D, z, bias, True, mask=mask, inplace=may_write(h)
        )
        layer.write(conv=window, ssm=h)
        return self.out_proj(y).unsqueeze(1)


class FastMambaMixer(SelectiveMixer, MambaMixer):
    """`MambaMixer` over undersong's ops."""


class FastMambaRMSNorm(RMSNorm, MambaRMSNorm):
    """`MambaRMSNorm`, in float64 where the model is."""


class FastMambaBlock(StateSpaceBlock, MambaBlock):
    """`MambaBlock` that passes masks, packing and states on."""


class FastMambaPreTrainedModel(StateSpacePreTrained, MambaPreTrainedModel):
    _keep_in_fp32_modules_strict = ["A_log", r"mixer\.D", r"dt_proj\.bias"]
    _no_split_modules = ["FastMambaBlock", "FastMambaMixer"]


class FastMambaModel(StateSpaceBackbone, FastMambaPreTrainedModel, MambaModel):
    """`MambaModel`: same configuration, parameters and checkpoints; see `FastMambaForCausalLM`.

    >>> import torch
    >>> from transformers import MambaConfig
    >>> model = FastMambaModel(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastMambaForCausalLM(
    StateSpaceForCausalLM, RecurrentGenerationMixin, FastMambaPreTrainedModel, MambaForCausalLM
):
    """`MambaForCausalLM` that is right for padding, packing and any split of the sequence, and fast everywhere.

    It reads and writes transformers' checkpoints: a saved folder names `MambaForCausalLM`. Its forward also takes
    packed batches (`position_ids` that restart, `seq_idx`, `cu_seq_lens_q`), masks with padding anywhere, and its
    cache as `past_key_values` or `cache_params`.

    >>> import torch
    >>> from transformers import MambaConfig
    >>> model = FastMambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, eos_token_id=None))
    >>> model.generate(torch.tensor([[1, 3]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 6])
    """

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastMambaForSequenceClassification(StateSpaceForSequenceClassification, FastMambaPreTrainedModel):
    """Mamba under a linear head over the last token that is not padding."""

    backbone_class = FastMambaModel


class FastMambaForTokenClassification(StateSpaceForTokenClassification, FastMambaPreTrainedModel):
    """Mamba under a linear head over every token."""

    backbone_class = FastMambaModel


# What stands in for what of transformers; the parameters are the same.
FAST_CLASSES = {
    MambaMixer: FastMambaMixer,
    MambaRMSNorm: FastMambaRMSNorm,
    MambaBlock: FastMambaBlock,
    MambaModel: FastMambaModel,
    MambaForCausalLM: FastMambaForCausalLM,
}

__all__ = [
    "FastMambaForCausalLM",
    "FastMambaForSequenceClassification",
    "FastMambaForTokenClassification",
    "FastMambaModel",
    "FastMambaPreTrainedModel",
]
