"""Configuration of S5 ("Simplified State Space Layers for Sequence Modeling", arXiv 2208.04933)."""

from huggingface_hub.dataclasses import strict

from ..diagonal_ssm_config import DiagonalSSMConfig


@strict
class S5Config(DiagonalSSMConfig):
    """Configuration of every S5 model: language, sequence classification, time series.

    Args:
        num_blocks: HiPPO-N matrices on the diagonal of the initial state matrix; they divide the state into blocks of
            even size.

    The other arguments are those of `DiagonalSSMConfig`: vocab_size, hidden_size, state_size (of a whole layer),
    num_hidden_layers, hidden_dropout_prob, layer_norm_eps, dt_min, dt_max, discretization, bidirectional, pooling,
    initializer_range, input_size, num_labels.

    >>> S5Config(hidden_size=64, state_size=64, num_blocks=4).state_size
    64
    """

    model_type = "s5"

    num_blocks: int = 1

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        super().validate_architecture()
        if self.num_blocks < 1 or self.state_size % (2 * self.num_blocks):
            block = 2 * max(1, self.num_blocks)
            raise ValueError(
                f"num_blocks ({self.num_blocks}) must divide state_size ({self.state_size}) into blocks of even size;"
                f" use 1, or state_size={block * -(-self.state_size // block)}."
            )


__all__ = ["S5Config"]
