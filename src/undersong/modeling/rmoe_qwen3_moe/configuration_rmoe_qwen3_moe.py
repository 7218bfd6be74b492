"""Configuration of Qwen3-MoE with a recurrent router."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from ..recurrent_router_config import RecurrentRouterConfig


@strict
class RMoEQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration and `recurrent_router`, the fields of a `RecurrentRouterConfig`.

    >>> RMoEQwen3MoeConfig(recurrent_router={"router_hidden_size": 64}).recurrent_router["router_hidden_size"]
    64
    """

    model_type = "rmoe_qwen3_moe"

    recurrent_router: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        self.recurrent_router = RecurrentRouterConfig(**self.recurrent_router).to_dict()
        super().__post_init__(**kwargs)


__all__ = ["RMoEQwen3MoeConfig"]
