"""Configuration of Set2Set, the set encoder of "Order Matters: Sequence to sequence for sets" (arXiv 1511.06391)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class Set2SetConfig(PreTrainedConfig):
    """Configuration of a Set2Set encoder, over sets of vectors or of token ids.

    Args:
        input_size: width of the elements; None for sets of token ids.
        vocab_size: number of token ids (where `input_size` is None).
        hidden_size: width of the memory and of the LSTM that reads it; the set's vector is twice as wide.
        read_hidden_sizes: widths of the hidden layers of the small network that every element goes through on its way
            into the memory. Without any, vectors go through one linear layer, and embeddings are the memory.
        hidden_act: activation between these layers.
        num_process_steps: how often the memory is read; 0 gives zeros for every set.
        initializer_range: standard deviation of initial weights; those of the LSTM are Xavier-uniform.
        num_labels: classes (classification head).

    Raises:
        ValueError: a size or a number of steps that makes no encoder.

    >>> Set2SetConfig(input_size=3, hidden_size=16, read_hidden_sizes=[32]).num_hidden_layers
    2
    """

    model_type = "set2set"

    input_size: int | None = None
    vocab_size: int = 32000
    hidden_size: int = 128
    read_hidden_sizes: list[int] | tuple[int, ...] = ()
    hidden_act: str = "relu"
    num_process_steps: int = 5
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        if min(self.read_sizes) < 1:
            raise ValueError(
                f"input_size ({self.input_size}), hidden_size ({self.hidden_size}) and read_hidden_sizes"
                f" ({list(self.read_hidden_sizes)}) must be at least 1; use input_size=None for token ids and"
                " read_hidden_sizes=[] for no hidden layer."
            )
        if self.num_process_steps < 0:
            raise ValueError(
                f"num_process_steps ({self.num_process_steps}) must be 0 or more; use 5, or 0 for no processing."
            )

    @property
    def read_sizes(self):
        """Widths in front of, between and behind the layers that elements go through."""
        if self.input_size is None and not self.read_hidden_sizes:
            return [self.hidden_size]
        first = self.hidden_size if self.input_size is None else self.input_size
        return [first, *self.read_hidden_sizes, self.hidden_size]

    @property
    def num_hidden_layers(self):
        return len(self.read_sizes) - 1

    @num_hidden_layers.setter
    def num_hidden_layers(self, value):
        raise NotImplementedError("num_hidden_layers follows from read_hidden_sizes; set those.")


__all__ = ["Set2SetConfig"]
