"""Set2Set: sets of vectors or token ids as one vector each ("Order Matters", arXiv 1511.06391, sec. 4).

Read: every element goes through the same small network into a memory. Process: an LSTM reads that memory several
times. Nothing depends on the order of the elements, and there is no state between calls.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...ops._validate import check_mask
from ..set_encoder import ReadProcess
from .configuration_set2set import Set2SetConfig


class Set2SetReadLayer(GradientCheckpointingLayer):
    """One layer of the network that every element goes through; the last one is linear."""

    def __init__(self, config, index):
        super().__init__()
        self.dense = nn.Linear(*config.read_sizes[index : index + 2])
        self.act = nn.Identity() if index == config.num_hidden_layers - 1 else ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.act(self.dense(hidden_states))


class Set2SetPreTrainedModel(PreTrainedModel):
    config: Set2SetConfig
    config_class = Set2SetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Set2SetReadLayer", "ReadProcess"]
    _can_record_outputs = {"hidden_states": Set2SetReadLayer}

    def __init__(self, config):
        super().__init__(config)
        if config.input_size is not None:
            self.main_input_name = "input_values"


class Set2SetModel(Set2SetPreTrainedModel):
    """The encoder: a memory, and the vector q* of what was asked last and read last.

    Forward arguments:
        input_values: `[batch, n, input_size]` float, if `config.input_size` is set.
        input_ids: `[batch, n]`, or inputs_embeds `[batch, n, hidden_size]`, if it is not.
        attention_mask: `[batch, n]`, 1 for elements, 0 for padding anywhere in the row, whatever stands there. A set
            may be empty.
        output_attentions: also return what every step read, as `num_process_steps` maps `[batch, n]`.

    Returns:
        `last_hidden_state` `[batch, n, hidden_size]`, the memory; `pooler_output` `[batch, 2 * hidden_size]`, q*.

    >>> model = Set2SetModel(Set2SetConfig(input_size=3, hidden_size=8))
    >>> outputs = model(input_values=torch.randn(2, 4, 3), output_attentions=True)
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape, len(outputs.attentions)
    (torch.Size([2, 4, 8]), torch.Size([2, 16]), 5)
    """

    def __init__(self, config):
        super().__init__(config)
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Set2SetReadLayer(config, index) for index in range(config.num_hidden_layers)])
        self.process = ReadProcess(config.hidden_size, config.num_process_steps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        elements = self.elements(input_values, input_ids, inputs_embeds)
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None:
            check_mask(mask, elements.shape[:2], "batch, n")
            # or gradients of weights would be what stands at the padding, times zero
            elements = elements.masked_fill(~mask.unsqueeze(-1), 0.0)
        for layer in self.layers:
            elements = layer(elements)
        q_star, attentions = self.process(elements, mask)
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        return BaseModelOutputWithPooling(
            last_hidden_state=elements, pooler_output=q_star, attentions=attentions if wanted else None
        )

    def elements(self, input_values, input_ids, inputs_embeds):
        """The one input there is, as `[batch, n, width]`."""
        given = {"input_values": input_values, "input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = [name for name, value in given.items() if value is not None]
        allowed = [["input_ids"], ["inputs_embeds"]] if self.config.input_size is None else [["input_values"]]
        if given not in allowed:
            raise ValueError(
                f"inputs ({', '.join(given) or 'none'}) must be exactly one of"
                f" {' or '.join(name for (name,) in allowed)} because input_size is {self.config.input_size}; give"
                " that one alone, or make a configuration with another input_size."
            )
        if input_ids is not None:
            return self.embed_tokens(input_ids)
        elements = input_values if inputs_embeds is None else inputs_embeds
        if elements.ndim != 3 or elements.shape[2] != self.config.read_sizes[0]:
            raise ValueError(
                f"{given[0]} has shape {tuple(elements.shape)} but the model takes [batch, n,"
                f" {self.config.read_sizes[0]}]; select or project the numbers of an element."
            )
        return elements


class Set2SetForSequenceClassification(Set2SetPreTrainedModel):
    """Classifies whole sets, or predicts `num_labels` numbers with `problem_type="regression"`, from q*.

    An empty set has an answer of its own, which does not depend on what stands at its padding.

    >>> model = Set2SetForSequenceClassification(Set2SetConfig(input_size=3, hidden_size=8, num_labels=2))
    >>> model(input_values=torch.randn(4, 5, 3), labels=torch.tensor([0, 1, 1, 0])).logits.shape
    torch.Size([4, 2])
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Set2SetModel(config)
        self.score = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        outputs = self.model(input_ids, attention_mask, input_values, inputs_embeds, **kwargs)
        logits = self.score(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["Set2SetForSequenceClassification", "Set2SetModel", "Set2SetPreTrainedModel"]
