"""Configuration of RMoE ("Layerwise Recurrent Router for Mixture-of-Experts", arXiv 2408.06793)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral.configuration_mixtral import MixtralConfig


@strict
class RMoEConfig(MixtralConfig):
    """Mixtral's configuration and how tokens find their experts.

    Args:
        router_type: "gru" (the paper's), "rnn" (an Elman cell) or "linear" (every layer for itself, as Mixtral).
        router_hidden_size: size of a token's routing state.
        norm_topk_prob: whether the weights of a token's experts add up to 1.
        detach_router_state: keeps gradients from flowing from a layer's router into those below (an ablation).
        moe_layer_start: layers before this one have a dense feed-forward block of `intermediate_size`; their tokens
            neither read nor write the state.
        moe_intermediate_size: width of an expert; None means `intermediate_size`.
        shared_expert_intermediate_size: width of an expert that sees every token; None means there is none.
        moe_weight, share_weight: what the chosen experts and the shared one count, where there is a shared one.
        router_aux_loss_per_layer: mean of the layers' balancing losses; False pools all layers first, as Mixtral.
        router_z_loss_coef: weight of the mean squared log-sum-exp of router logits in the loss.

    The other arguments are Mixtral's. The balancing loss (`router_aux_loss_coef`) counts whenever there are labels.

    Raises:
        ValueError: more experts for a token than there are, sizes below 1, or `moe_layer_start` past the last layer.

    >>> RMoEConfig(hidden_size=64, num_local_experts=4).router_hidden_size
    256
    """

    model_type = "rmoe"
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "router_state", "attention_mask"], ["hidden_states", "router_state"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    router_type: Literal["gru", "rnn", "linear"] = "gru"
    router_hidden_size: int = 256
    norm_topk_prob: bool = True
    detach_router_state: bool = False
    moe_layer_start: int = 0
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    moe_weight: float = 0.5
    share_weight: float = 0.5
    router_aux_loss_per_layer: bool = False
    router_z_loss_coef: float = 0.0

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_local_experts"
                f" ({self.num_local_experts})."
            )
        for name in ("router_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        if not 0 <= self.moe_layer_start < self.num_hidden_layers:
            raise ValueError(
                f"moe_layer_start ({self.moe_layer_start}) must lie between 0 and num_hidden_layers - 1"
                f" ({self.num_hidden_layers - 1}): at least one layer has experts."
            )
        if self.hidden_size % self.num_attention_heads and self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}), or head_dim be given."
            )


__all__ = ["RMoEConfig"]
