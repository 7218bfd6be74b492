"""Mixtral with a recurrent router: the family's classes, and routers that remember (arXiv 2408.06793).

`attach_recurrent_router` turns a loaded Mixtral into these; what it then saves loads as them.
"""

from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralModel

from ..recurrent_router import RecurrentRouterModel
from .configuration_rmoe_mixtral import RMoEMixtralConfig


class RMoEMixtralModel(RecurrentRouterModel, MixtralModel):
    """Mixtral's trunk with a recurrent router."""

    config_class = RMoEMixtralConfig
    config: RMoEMixtralConfig


class RMoEMixtralForCausalLM(RecurrentRouterModel, MixtralForCausalLM):
    """Mixtral as a language model, with a recurrent router."""

    config_class = RMoEMixtralConfig
    config: RMoEMixtralConfig
    trunk_class = RMoEMixtralModel


__all__ = ["RMoEMixtralForCausalLM", "RMoEMixtralModel"]
