"""OLMoE with a recurrent router: the family's classes, and routers that remember (arXiv 2408.06793).

`attach_recurrent_router` turns a loaded OLMoE into these; what it then saves loads as them.
"""

from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel

from ..recurrent_router import RecurrentRouterModel
from .configuration_rmoe_olmoe import RMoEOlmoeConfig


class RMoEOlmoeModel(RecurrentRouterModel, OlmoeModel):
    """OLMoE's trunk with a recurrent router."""

    config_class = RMoEOlmoeConfig
    config: RMoEOlmoeConfig


class RMoEOlmoeForCausalLM(RecurrentRouterModel, OlmoeForCausalLM):
    """OLMoE as a language model, with a recurrent router."""

    config_class = RMoEOlmoeConfig
    config: RMoEOlmoeConfig
    trunk_class = RMoEOlmoeModel


__all__ = ["RMoEOlmoeForCausalLM", "RMoEOlmoeModel"]
