"""Configuration of the Decision Transformer whose trunk is Aaren (arXiv 2106.01345, arXiv 2405.13956)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class AarenDecisionTransformerConfig(PreTrainedConfig):
    """Configuration of `AarenDecisionTransformerModel`; the names of `DecisionTransformerConfig` are accepted too.

    Args:
        state_dim, act_dim: numbers in a state and in an action.
        max_ep_len: timesteps an episode may have; each has a learned embedding.
        action_tanh: whether actions are squashed into (-1, 1).
        hidden_size, num_hidden_layers, num_attention_heads: as everywhere; heads must divide the hidden size.
        intermediate_size: width of the feed-forward block; None means `4 * hidden_size`.
        hidden_act: activation of the feed-forward block.
        hidden_dropout_prob: dropout on the embeddings and on the output of both blocks of a layer.
        norm_first: layer norm before each block (True) or after its residual (False).
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of all initial weights, the learned queries included.

    Raises:
        ValueError: heads that do not divide the hidden size.

    >>> AarenDecisionTransformerConfig(state_dim=4, act_dim=2, n_layer=5).num_hidden_layers
    5
    """

    model_type = "aaren_decision_transformer"
    attribute_map = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "resid_pdrop": "hidden_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    }

    state_dim: int = 17
    act_dim: int = 4
    max_ep_len: int = 4096
    action_tanh: bool = True
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 1
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.1
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        if self.hidden_size % self.num_attention_heads:
            next_multiple = -(-self.hidden_size // self.num_attention_heads) * self.num_attention_heads
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}); use a multiple such as hidden_size={next_multiple}."
            )

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers


__all__ = ["AarenDecisionTransformerConfig"]
