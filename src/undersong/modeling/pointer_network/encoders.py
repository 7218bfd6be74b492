"""Encoders of a pointer network: from a padded batch of items to a memory of them and a state to decode from.

Each encoder takes `items [batch, n, input_size]` and `mask [batch, n]` (bool; None if all items are valid). It gives
the memory `[batch, n, hidden_size]`, the decoder's initial state `[batch, 2 * layers, hidden_size]` (h of all layers,
then c) and a tuple of attention maps or None. Padding lies on either side; no result depends on it.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple, is_tracing

from ..set_encoder import ReadProcess
from .pointing import check_mask


class LSTMEncoder(nn.Module):
    """An LSTM over the items in their order, or one in each direction (arXiv 1506.03134, section 2.3)."""

    def __init__(self, config):
        super().__init__()
        directions = 2 if config.encoder_type == "bilstm" else 1
        self.lstm = make_lstm(config, config.input_size, config.hidden_size // directions, directions == 2)

    def forward(self, items, mask=None, output_attentions=False):
        if mask is None:
            memory, state = self.lstm(items)
        else:
            memory, state = self.run_padded(items, mask)
        # [layers * directions, batch, width] -> [batch, layers, directions * width]
        h, c = (x.transpose(0, 1).reshape(len(items), self.lstm.num_layers, -1) for x in state)
        return memory, torch.cat([h, c], 1), None

    def run_padded(self, items, mask):
        """Only valid items advance the state, whichever side the padding is on."""
        n, lengths, first = items.shape[1], mask.sum(1), mask.int().argmax(1)
        columns = torch.arange(n, device=items.device)
        to_front = (columns + first[:, None]) % n
        packed = pack_padded_sequence(
            items.gather(1, to_front[..., None].expand_as(items)),
            lengths.clamp(
                min=1
            ).cpu(),  # packing knows no empty rows: they read one item, whose effect is undone below
            batch_first=True,
            enforce_sorted=False,
        )
        packed, state = self.lstm(packed)
        memory = pad_packed_sequence(packed, batch_first=True, total_length=n)[0]
        back = (columns - first[:, None]) % n
        some = (lengths > 0)[:, None]
        return memory.gather(1, back[..., None].expand_as(memory)), tuple(x * some for x in state)


class SetEncoder(nn.Module):
    """Reads a memory of independent items several times: permuted items give a permuted memory and the same state.

    The Read and Process blocks of "Order Matters" (arXiv 1511.06391, section 4.1).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.read = nn.Sequential(nn.Linear(config.input_size, width), nn.ReLU(), nn.Linear(width, width))
        self.process = ReadProcess(width, config.num_process_steps)
        self.state_proj = nn.Linear(2 * width, 2 * config.num_hidden_layers * width)

    def forward(self, items, mask=None, output_attentions=False):
        memory = self.read(items)
        query, attentions = self.process(memory, mask)
        return memory, self.state_proj(query).view(len(items), -1, memory.shape[2]), attentions


class TransformerEncoder(nn.Module):
    """Any encoder that `AutoModel` knows, fed through `inputs_embeds`; its mean output gives the state."""

    def __init__(self, config):
        super().__init__()
        if config.encoder_config.is_encoder_decoder:
            raise ValueError(
                f"encoder_config ({config.encoder_config.model_type}) has a decoder of its own; use the configuration"
                " of an encoder, such as BertConfig()."
            )
        self.encoder = AutoModel.from_config(config.encoder_config)
        inner = self.encoder.config.hidden_size
        self.input_proj = nn.Linear(config.input_size, inner)
        self.output_proj = nn.Linear(inner, config.hidden_size)
        self.state_proj = nn.Linear(config.hidden_size, 2 * config.num_hidden_layers * config.hidden_size)

    def forward(self, items, mask=None, output_attentions=False):
        context = {}
        if mask is not None:
            seen = mask | ~mask.any(1, keepdim=True)  # a softmax over nothing would be NaN
            context["attention_mask"] = seen.long()
            if "position_ids" in signature(self.encoder.forward).parameters:
                context["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        outputs = self.encoder(inputs_embeds=self.input_proj(items), output_attentions=output_attentions, **context)
        memory = self.output_proj(outputs.last_hidden_state)
        if mask is None:
            mean = memory.mean(1)
        else:
            mean = (memory * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return memory, self.state_proj(mean).view(len(items), -1, memory.shape[2]), outputs.attentions


def make_lstm(config, input_size, hidden_size, bidirectional=False):
    layers = config.num_hidden_layers
    return nn.LSTM(
        input_size,
        hidden_size,
        layers,
        batch_first=True,
        dropout=config.dropout if layers > 1 else 0.0,  # torch has it between layers only
        bidirectional=bidirectional,
    )


ENCODERS = {"lstm": LSTMEncoder, "bilstm": LSTMEncoder, "set": SetEncoder, "transformer": TransformerEncoder}


@dataclass
class PointerNetworkEncoderOutput(ModelOutput):
    """What an encoder hands to the decoder; every tensor has the batch first, so that `generate()` can repeat it.

    Attributes:
        last_hidden_state: `[batch, n, hidden_size]`, the memory; zeros at padding.
        item_values: `[batch, n, width]`, what the decoder reads when it pointed at an item.
        final_state: `[batch, 2 * layers, hidden_size]`, the decoder's first h of every layer, then c.
        hidden_states: the memory once more, if asked for.
        attentions: the attention maps of the encoder, if asked for and if it has any.
    """

    last_hidden_state: torch.FloatTensor | None = None
    item_values: torch.FloatTensor | None = None
    final_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PointerNetworkEncoder(nn.Module):
    """Items in one of their three forms -> `PointerNetworkEncoderOutput`; checks what goes in."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.item_vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.item_vocab_size, config.input_size)
        self.layers = ENCODERS[config.encoder_type](config)
        self.dropout = nn.Dropout(config.dropout)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ):
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        items = self.items_of(input_values, input_ids, inputs_embeds)
        mask = check_mask(attention_mask, items.shape[:2])
        self.check_count(items, mask)
        hidden = None if mask is None else ~mask[..., None]
        if hidden is not None:
            items = items.masked_fill(hidden, 0.0)  # padding may hold anything, NaN included
        memory, state, attentions = self.layers(items, mask, output_attentions)
        if hidden is not None:
            memory = memory.masked_fill(hidden, 0.0)
        if self.config.encoder_type == "set":
            items = memory  # "Order Matters" feeds the memory of what was pointed at, the pointer network its input
        memory = self.dropout(memory)
        return PointerNetworkEncoderOutput(
            last_hidden_state=memory,
            item_values=items,
            final_state=state,
            hidden_states=(memory,) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def items_of(self, input_values, input_ids, inputs_embeds):
        forms = {"input_values": input_values, "input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"items are given as {' and '.join(given) or 'nothing'}; pass exactly one of input_values, input_ids"
                " and inputs_embeds."
            )
        if input_ids is not None:
            if self.config.item_vocab_size is None:
                raise ValueError(
                    "input_ids need an embedding table, but item_vocab_size is None; set it, or pass input_values."
                )
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids have shape {list(input_ids.shape)}; pass [batch, n], one id per item.")
            return self.embed_tokens(input_ids)
        items = forms[given[0]]
        if items.ndim != 3 or items.shape[2] != self.config.input_size:
            raise ValueError(
                f"{given[0]} has shape {list(items.shape)} but the model takes [batch, n, input_size="
                f"{self.config.input_size}]; reshape it, or set input_size."
            )
        return items.to(self.dtype)

    def check_count(self, items, mask):
        most = self.config.max_num_points
        if most is None or items.shape[1] <= most or (mask is not None and is_tracing(mask)):
            return
        count = items.shape[1] if mask is None else int(mask.sum(1).max())
        if count > most:
            raise ValueError(
                f"a row has {count} items but max_num_points is {most}; pass fewer, or build the model with a larger"
                " max_num_points (None has no limit, but attention_mode='blend' needs one)."
            )

    @property
    def dtype(self):
        return next(self.parameters()).dtype


__all__ = ["PointerNetworkEncoder", "PointerNetworkEncoderOutput", "make_lstm"]
