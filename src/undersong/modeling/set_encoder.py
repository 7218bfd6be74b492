"""A set as one vector: the Process block of "Order Matters: Sequence to sequence for sets" (arXiv 1511.06391, sec. 4).

An LSTM without inputs of its own reads a memory by content attention, several times; what it asked last and what it
read last are the set's vector. The state is `[batch, hidden]` twice (h and c) during the steps, and none afterwards.
What was asked and read returns as the LSTM's input: the form known as Set2Set, whose weights fit here unchanged.
"""

from torch import nn

from ..ops._validate import check_layout, check_mask
from ..ops.set2set import set2set


class ReadProcess(nn.Module):
    """Reads a set several times with an LSTM; the result does not depend on the order of the elements.

    q*_0 = 0,   q_t = LSTM(q*_{t-1}),   a_t = softmax_i(m_i . q_t),   r_t = sum_i a_{t,i} m_i,   q*_t = [q_t ; r_t]

    Scores and softmax are computed in float32 (float64 for float64). Masked elements may hold anything.

    Args:
        hidden_size: width of the memory and of the LSTM.
        num_steps: how often the memory is read; 0 gives zeros.

    Raises:
        ValueError: `hidden_size` below 1 or `num_steps` below 0.

    >>> import torch
    >>> q_star, attentions = ReadProcess(8, num_steps=3)(torch.randn(2, 5, 8))
    >>> q_star.shape, len(attentions), attentions[0].shape
    (torch.Size([2, 16]), 3, torch.Size([2, 5]))
    """

    def __init__(self, hidden_size, num_steps=5):
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size ({hidden_size}) must be at least 1; use the width of the memory.")
        if num_steps < 0:
            raise ValueError(f"num_steps ({num_steps}) must be 0 or more; use 5, or 0 for no processing.")
        self.hidden_size = hidden_size
        self.num_steps = num_steps
        self.lstm = nn.LSTM(2 * hidden_size, hidden_size)

    def extra_repr(self):
        return f"num_steps={self.num_steps}"

    def forward(self, memory, mask=None):
        """Reads `memory`.

        Args:
            memory: `[batch, n, hidden_size]`.
            mask: `[batch, n]` bool, False for elements that are not there; a set may be empty.

        Returns:
            q* `[batch, 2 * hidden_size]`: the last query, then the last readout (zeros for an empty set); and the
            tuple of attention maps `[batch, n]`, one a step, zero at masked elements.

        Raises:
            ValueError: a memory of another width, or a mask of another shape or dtype.
        """
        check_layout("memory", memory, "batch, n, hidden_size")
        if memory.shape[2] != self.hidden_size:
            raise ValueError(
                f"memory ({memory.shape[2]} wide) must be {self.hidden_size} wide; project it, or use"
                f" hidden_size={memory.shape[2]}."
            )
        if mask is not None:
            check_mask(mask, memory.shape[:2], "batch, n")
        lstm = self.lstm
        weights = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
        q_star, attention = set2set(memory, *weights, steps=self.num_steps, mask=mask)
        return q_star, attention.unbind(1)


class Set2SetPooling(nn.Module):
    """One vector for the hidden states of any encoder, whatever their order: `ReadProcess` as a pooling layer.

    Args:
        hidden_size: width of the hidden states.
        num_steps: how often they are read.
        output_size: width of the result, by a linear map of q*; None leaves q*, twice `hidden_size`.

    >>> import torch
    >>> pool = Set2SetPooling(8, output_size=3)
    >>> pool(torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).shape
    torch.Size([2, 3])
    """

    def __init__(self, hidden_size, num_steps=5, output_size=None):
        super().__init__()
        self.process = ReadProcess(hidden_size, num_steps)
        self.out_proj = nn.Identity() if output_size is None else nn.Linear(2 * hidden_size, output_size)

    def forward(self, hidden_states, attention_mask=None):
        """`[batch, n, hidden_size]` and `[batch, n]` (1 or True for elements that count) -> one vector a row."""
        mask = None if attention_mask is None else attention_mask.bool()
        return self.out_proj(self.process(hidden_states, mask)[0])


__all__ = ["ReadProcess", "Set2SetPooling"]
