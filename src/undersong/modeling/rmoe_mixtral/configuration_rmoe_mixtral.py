"""Configuration of Mixtral with a recurrent router."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from ..recurrent_router_config import RecurrentRouterConfig


@strict
class RMoEMixtralConfig(MixtralConfig):
    """Mixtral's configuration and `recurrent_router`, the fields of a `RecurrentRouterConfig`.

    >>> RMoEMixtralConfig(recurrent_router={"router_hidden_size": 64}).recurrent_router["router_hidden_size"]
    64
    """

    model_type = "rmoe_mixtral"

    recurrent_router: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        self.recurrent_router = RecurrentRouterConfig(**self.recurrent_router).to_dict()
        super().__post_init__(**kwargs)


__all__ = ["RMoEMixtralConfig"]
