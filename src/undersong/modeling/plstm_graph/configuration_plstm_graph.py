"""Configuration of pLSTM on graphs (arXiv 2506.11997)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class PLSTMGraphConfig(PreTrainedConfig):
    """Configuration of a pLSTM whose states live on the edges of a graph.

    Args:
        node_feature_dim: numbers per node, the width of `node_features`.
        edge_feature_dim: numbers per edge, which gates see; 0 for edges without features.
        hidden_size, num_hidden_layers, num_attention_heads: as usual. Every layer is a recurrence along the graph and
            a feed-forward block of width `mlp_ratio * hidden_size` with `hidden_act`.
        block_mode: what layers do in turn. "P": propagate, along all pairs of consecutive edges; transitions out of an
            edge have absolute values that sum to less than 1. "D": diffuse, along a multitree of them, on which a
            transition below 1 each is enough. "PD" and "DP": both, in turn.
        directed: False turns every edge from its lower to its higher node; True takes edges as they are, which must
            not make a cycle.
        alternate_direction: layers 1, 2, 5, 6, ... run against the edges, so that both modes run both ways. False: all
            layers run along them.
        p_norm: which transitions "P" normalises together: "paper", those out of the same edge, which bounds the
            states; "reference", those into the same edge, as the authors' code does for edges with features.
        pooling: how a graph's vector comes from its nodes: "mean", "sum" or "max".
        gate_bias: initial bias of source, mark and direct gates; a sigmoid follows.
        transition_bias_range: deviation of the initial biases of transitions, some of them negative.
        hidden_dropout_prob: on what either part of a layer adds.
        rms_norm_eps: of all norms.
        initializer_range: deviation of initial weights. None takes what the authors take: sqrt(2 / (5 fan_in)), and 0
            for gates, which then start the same for all edges.

    Raises:
        ValueError: numbers that make no model; the message names the fields.

    >>> PLSTMGraphConfig(node_feature_dim=5, num_hidden_layers=4).layer_plan
    [('P', False), ('D', True), ('P', True), ('D', False)]
    """

    model_type = "plstm_graph"

    node_feature_dim: int = 16
    edge_feature_dim: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    block_mode: Literal["P", "D", "PD", "DP"] = "PD"
    directed: bool = False
    alternate_direction: bool = True
    p_norm: Literal["paper", "reference"] = "paper"
    pooling: Literal["mean", "sum", "max"] = "mean"
    gate_bias: float | int = -1.0
    transition_bias_range: float | int = 3.0
    hidden_dropout_prob: float = 0.0
    rms_norm_eps: float = 1e-5
    initializer_range: float | None = None
    tie_word_embeddings: bool = False

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        for name, least in (
            ("node_feature_dim", 1),
            ("edge_feature_dim", 0),
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads"
                f" ({self.num_attention_heads}); use hidden_size="
                f"{self.num_attention_heads * -(-self.hidden_size // self.num_attention_heads)}."
            )
        if self.num_hidden_layers % len(self.block_mode):
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must be even for block_mode={self.block_mode!r}, whose"
                f" modes take turns; use {self.num_hidden_layers + 1}, or block_mode='P' or 'D'."
            )
        if int(self.mlp_ratio * self.hidden_size) < 1:
            raise ValueError(f"mlp_ratio ({self.mlp_ratio}) must give a width of at least 1; use 4.0.")
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"hidden_dropout_prob ({self.hidden_dropout_prob}) must lie in [0, 1); use 0.0 for none.")

    @property
    def layer_plan(self):
        """For every layer its mode, "P" or "D", and whether it runs against the edges."""
        modes = self.block_mode * self.num_hidden_layers
        return [(modes[i], self.alternate_direction and (i + i // 2) % 2 == 1) for i in range(self.num_hidden_layers)]


__all__ = ["PLSTMGraphConfig"]
