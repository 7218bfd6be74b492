"""Configuration of OLMoE with a recurrent router."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig

from ..recurrent_router_config import RecurrentRouterConfig


@strict
class RMoEOlmoeConfig(OlmoeConfig):
    """OLMoE's configuration and `recurrent_router`, the fields of a `RecurrentRouterConfig`.

    >>> RMoEOlmoeConfig(recurrent_router={"router_hidden_size": 64}).recurrent_router["router_hidden_size"]
    64
    """

    model_type = "rmoe_olmoe"

    recurrent_router: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        self.recurrent_router = RecurrentRouterConfig(**self.recurrent_router).to_dict()
        super().__post_init__(**kwargs)


__all__ = ["RMoEOlmoeConfig"]
