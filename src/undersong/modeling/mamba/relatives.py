"""Mamba mixers inside other architectures of transformers: Falcon Mamba and the hybrid Jamba (arXiv 2403.19887).

Both norm (dt, B, C) before the scan. Of Jamba only the Mamba layers are replaced; its attention layers, experts and
model stay as they are, and a cache that generate() made gets our layers as the mixers meet it.
"""

from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaForCausalLM,
    FalconMambaMixer,
    FalconMambaModel,
    FalconMambaPreTrainedModel,
    FalconMambaRMSNorm,
)
from transformers.models.jamba.modeling_jamba import JambaMambaDecoderLayer, JambaMambaMixer

from ..cache import RecurrentGenerationMixin, adopt_layer
from ..sequences import find_packing
from ..state_space import RMSNorm, StateSpaceBlock
from ..state_space_model import StateSpaceBackbone, StateSpaceForCausalLM, StateSpacePreTrained, exchange_classes
from .modeling_mamba import SelectiveMixer


class NormedSelectiveMixer(SelectiveMixer):
    def normalise(self, dt, B, C):
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


class FastFalconMambaMixer(NormedSelectiveMixer, FalconMambaMixer):
    """`FalconMambaMixer` over undersong's ops."""


class FastFalconMambaRMSNorm(RMSNorm, FalconMambaRMSNorm):
    """`FalconMambaRMSNorm`, in float64 where the model is."""


class FastFalconMambaBlock(StateSpaceBlock, FalconMambaBlock):
    """`FalconMambaBlock` that passes masks, packing and states on."""


class FastFalconMambaPreTrainedModel(StateSpacePreTrained, FalconMambaPreTrainedModel):
    _keep_in_fp32_modules_strict = ["A_log", r"mixer\.D", r"dt_proj\.bias"]
    _no_split_modules = ["FastFalconMambaBlock", "FastFalconMambaMixer"]


class FastFalconMambaModel(StateSpaceBackbone, FastFalconMambaPreTrainedModel, FalconMambaModel):
    """`FalconMambaModel` over `FastFalconMambaBlock`."""

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastFalconMambaForCausalLM(
    StateSpaceForCausalLM, RecurrentGenerationMixin, FastFalconMambaPreTrainedModel, FalconMambaForCausalLM
):
    """`FalconMambaForCausalLM` over `FastFalconMambaModel`."""

    def __init__(self, config):
        super().__init__(config)
        exchange_classes(self, FAST_CLASSES)


class FastJambaMambaMixer(NormedSelectiveMixer, JambaMambaMixer):
    """`JambaMambaMixer` over undersong's ops."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, cu_seqlens=None, **kwargs):
        if cache_params is not None:
            adopt_layer(cache_params, self.layer_idx)
        output = super().forward(hidden_states, cache_params, attention_mask, cu_seqlens)
        if cache_params is not None:
            batch, length = hidden_states.shape[:2]
            valid = hidden_states.new_full((batch,), length, dtype=int) if attention_mask is None else attention_mask
            cache_params.layers[self.layer_idx].advance(length, valid if valid.ndim == 1 else valid.long().sum(1))
        return output


class FastJambaMambaDecoderLayer(JambaMambaDecoderLayer):
    """`JambaMambaDecoderLayer` whose state starts anew where `position_ids` do, as the attention layers' masks do."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        shape = hidden_states.shape[:2]
        mask = None if attention_mask is None else attention_mask.bool()
        packing = find_packing(shape, mask=mask, position_ids=position_ids)
        if packing is not None and past_key_values is not None:
            raise ValueError(
                "packed input (position_ids that restart) needs use_cache=False: with a cache, transformers' masks do"
                " not keep the sequences apart in the attention layers."
            )
        normed = self.input_layernorm(hidden_states)
        if packing is None:
            mixed = self.mamba(normed, cache_params=past_key_values, attention_mask=attention_mask)
        else:
            mixed = packing.unpack(self.mamba(packing.pack(normed), cu_seqlens=packing.cu_seqlens), shape)
        hidden_states = hidden_states + mixed
        return hidden_states + self.feed_forward(self.pre_ff_layernorm(hidden_states))


# What stands in for what of transformers; the parameters are the same.
FAST_CLASSES = {
    FalconMambaMixer: FastFalconMambaMixer,
    FalconMambaRMSNorm: FastFalconMambaRMSNorm,
    FalconMambaBlock: FastFalconMambaBlock,
    FalconMambaModel: FastFalconMambaModel,
    FalconMambaForCausalLM: FastFalconMambaForCausalLM,
    JambaMambaMixer: FastJambaMambaMixer,
    JambaMambaDecoderLayer: FastJambaMambaDecoderLayer,
}

__all__ = ["FAST_CLASSES"]
