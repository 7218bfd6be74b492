"""Qwen3-MoE with a recurrent router: the family's classes, and routers that remember (arXiv 2408.06793).

`attach_recurrent_router` turns a loaded Qwen3-MoE into these; what it then saves loads as them.
"""

from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel

from ..recurrent_router import RecurrentRouterModel
from .configuration_rmoe_qwen3_moe import RMoEQwen3MoeConfig


class RMoEQwen3MoeModel(RecurrentRouterModel, Qwen3MoeModel):
    """Qwen3-MoE's trunk with a recurrent router."""

    config_class = RMoEQwen3MoeConfig
    config: RMoEQwen3MoeConfig


class RMoEQwen3MoeForCausalLM(RecurrentRouterModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE as a language model, with a recurrent router."""

    config_class = RMoEQwen3MoeConfig
    config: RMoEQwen3MoeConfig
    trunk_class = RMoEQwen3MoeModel


__all__ = ["RMoEQwen3MoeForCausalLM", "RMoEQwen3MoeModel"]
