"""Aaren over a stream without end: every update costs the same time and memory ("Attention as an RNN", section 3).

The whole past lives in one (m, u, w) per layer and head, the count of tokens, and the few numbers a head carries. A
step is a pure function of input and state without control flow that depends on data, so `torch.export` takes it.
"""

import torch
from torch import nn

from .cache import adopt_cache


class AarenStream(nn.Module):
    """Feeds a model of the Aaren family piece by piece.

    What `update` takes and gives, always for n >= 1 new steps and with an answer after every one of them:

    - `AarenForTimeSeriesClassification`: values `[batch, n, input_size]`; logits of the series so far.
    - `AarenForPrediction` (with `scaling=None`): values; forecasts `[batch, n, prediction_length, input_size]`.
    - `AarenForEventForecasting`: times and kinds `[batch, n]`; a dict with `type_logits`, `next_time_mean` and
      `gap_parameters`.
    - `AarenForCausalLM`, `AarenForSequenceClassification`: token ids `[batch, n]`; logits.
    - `AarenModel`: embeddings `[batch, n, hidden_size]`; hidden states.
    - `AarenDecisionTransformerModel`: return to go `[batch, 1]`, state `[batch, state_dim]`, the action before
      `[batch, act_dim]` (anything at the first step) and timestep `[batch]`, one step a call; the action to take.

    Answers equal those of the model's forward over the whole series.

    Args:
        model: any of these; it is put in eval mode.
        batch_size: streams that run beside each other.
        dtype: of what a head carries; float64 for events whose times need it.

    Attributes:
        state: what the next update starts from: `(m, u, w, tokens, carry)`.

    Raises:
        TypeError: a model that cannot stream.

    >>> from undersong import AarenConfig, AarenForTimeSeriesClassification
    >>> config = AarenConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, input_size=3, num_labels=5)
    >>> stream = AarenStream(AarenForTimeSeriesClassification(config))
    >>> for reading in torch.randn(100, 1, 1, 3):
    ...     logits = stream.update(reading)
    >>> logits.shape, stream.state[3].item()
    (torch.Size([1, 1, 5]), 100)
    """

    def __init__(self, model, batch_size=1, dtype=torch.float32):
        super().__init__()
        if not hasattr(model, "stream"):
            raise TypeError(
                f"model ({type(model).__name__}) cannot stream; pass an Aaren model, whose state has a fixed size."
            )
        self.model = model.eval()
        self.batch_size, self.dtype = batch_size, dtype
        self.reset()

    def reset(self):
        """Forgets everything: the next update begins new streams."""
        config = self.model.config
        heads = config.num_attention_heads
        shape = (config.num_hidden_layers, self.batch_size, heads)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        device = self.model.device

        def zeros(*shape, dtype=wide):
            return torch.zeros(shape, dtype=dtype, device=device)

        # u = 0 is an empty state, whatever m is
        m, u, w = zeros(*shape), zeros(*shape), zeros(*shape, config.hidden_size // heads)
        tokens = zeros(self.batch_size, dtype=torch.int64)
        self.state = (m, u, w, tokens, zeros(self.batch_size, self.model.stream_width, dtype=self.dtype))

    def forward(self, inputs, state):
        """One step as a pure function: `(inputs, state)` -> `(answer, state)`, with `inputs` a tuple."""
        *states, tokens, carry = state
        cache = adopt_cache(None, self.model.config.layer_types)
        for index, layer in enumerate(cache.layers):
            layer.write(**{name: tensors[index] for name, tensors in zip("muw", states, strict=True)})
            layer.valid_tokens = tokens
        answer, carry = self.model.stream(cache, carry, *inputs)
        states = [torch.stack([layer.states[name] for layer in cache.layers]) for name in "muw"]
        return answer, (*states, cache.layers[0].valid_tokens, carry)

    @torch.no_grad()
    def update(self, *inputs):
        """Reads what is new and answers; the state moves on."""
        answer, self.state = self(inputs, self.state)
        return answer

    def export(self, *inputs):
        """The step as a `torch.export.ExportedProgram` for inputs of these shapes.

        `program.module()(inputs, state)` gives `(answer, state)` and needs torch alone; `state` is where it starts.

        >>> from undersong import AarenConfig, AarenForCausalLM
        >>> config = AarenConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> stream = AarenStream(AarenForCausalLM(config))
        >>> token = torch.tensor([[3]])
        >>> step, state = stream.export(token).module(), stream.state
        >>> logits, state = step((token,), state)
        >>> torch.equal(logits, stream.update(token))
        True
        """
        with torch.no_grad():
            return torch.export.export(self, (inputs, self.state))


__all__ = ["AarenStream"]
