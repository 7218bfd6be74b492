"""Pointer networks: a decoder that answers with positions of its own input (Vinyals et al. 2015, arXiv 1506.03134).

An encoder turns n items into a memory, an LSTM decodes, and the additive attention between the two is the output
distribution itself. The vocabulary of a batch is therefore 0 for the end and 1 to n for the columns of its items; the
decoder reads the item it last pointed at, and a learned vector at the start. The state is (h, c) of the decoder's
LSTM; a cache holds it together with the projected memory.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing

from ..cache import adopt_cache, count_tokens
from .configuration_pointer_network import PointerNetworkConfig
from .decoding import PointerGenerationMixin
from .encoders import PointerNetworkEncoder, PointerNetworkEncoderOutput, make_lstm
from .pointing import Glimpse, PointerAttention, check_ids, may_point, shape_of, visited_before


class PointerNetworkPreTrainedModel(PreTrainedModel):
    config: PointerNetworkConfig
    config_class = PointerNetworkConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    supports_gradient_checkpointing = False  # an LSTM is one call; there are no layers to run again
    _no_split_modules = ["PointerNetworkEncoder", "LSTM"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module):
        bound = self.config.initializer_range
        if self.config.init_distribution == "uniform":
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, PointerAttention):
            init.normal_(module.v, std=bound)
        elif isinstance(module, PointerNetworkModel):
            init.normal_(module.go, std=bound)
            init.normal_(module.end, std=bound)

    def get_output_embeddings(self):
        """None: an output is compared with the items, not with a table."""
        return None

    def set_output_embeddings(self, value):
        raise NotImplementedError(f"{type(self).__name__} has no output embeddings: its vocabulary is its input.")

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            f"{type(self).__name__} has no vocabulary to resize: it is the items of each batch. For another table of"
            " item embeddings, set item_vocab_size, or assign model.set_input_embeddings(table)."
        )


class PointerNetworkModel(PointerNetworkPreTrainedModel):
    """Encoder and decoder without the output distribution.

    Forward arguments:
        input_values: `[batch, n, input_size]` float items; or `input_ids [batch, n]`, or `inputs_embeds` like
            `input_values`.
        attention_mask: `[batch, n]`, 0 for padding, on either side and never between items.
        decoder_input_ids: `[batch, T]`: 0 first, then the ids that were pointed at (an item's column + 1). Only the
            first step if left out.
        encoder_outputs: what the encoder returned for these items, instead of them.
        past_key_values: a cache; `DynamicCache()` is adopted in place.

    >>> model = PointerNetworkModel(PointerNetworkConfig(hidden_size=8))
    >>> model(torch.rand(2, 5, 2), decoder_input_ids=torch.tensor([[0, 3], [0, 1]])).last_hidden_state.shape
    torch.Size([2, 2, 8])
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder = PointerNetworkEncoder(config)
        width = config.hidden_size if config.encoder_type == "set" else config.input_size
        self.decoder = make_lstm(config, width, config.hidden_size)
        self.go = nn.Parameter(torch.empty(width))  # what the decoder reads first
        self.end = nn.Parameter(torch.empty(config.hidden_size))  # what it points at to end, in front of the memory
        self.glimpses = nn.ModuleList([Glimpse(config) for _ in range(config.num_glimpses)])
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self):
        return getattr(self.encoder, "embed_tokens", None)

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: PointerNetworkEncoderOutput | None = None,
        past_key_values=None,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        shape = shape_of(encoder_outputs, input_values, input_ids, inputs_embeds)
        if decoder_input_ids is None:
            decoder_input_ids = torch.zeros(shape[0], 1, dtype=torch.long, device=self.go.device)
        elif begins or decoder_input_ids.device.type == "cpu":  # while decoding, no step waits for the device
            check_ids("decoder_input_ids", decoder_input_ids, may_point(None, shape, decoder_input_ids.device))
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_values,
                attention_mask,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        if past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = adopt_cache(past_key_values, self.config.layer_types)
        layers = None if past_key_values is None else past_key_values.layers
        hidden_states = self.decode(decoder_input_ids, encoder_outputs, layers)
        valid = may_point(attention_mask, shape, hidden_states.device)
        hidden_states, attentions = self.look(hidden_states, encoder_outputs.last_hidden_state, valid, layers)
        if layers is not None:
            count_tokens(past_key_values, decoder_input_ids.shape, None, hidden_states.device)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return Seq2SeqModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            decoder_hidden_states=(hidden_states,) if output_hidden_states else None,
            cross_attentions=attentions if output_attentions else None,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def decode(self, ids, encoder_outputs, layers):
        """The LSTM over all steps at once: at each it reads what the id before points at."""
        values = encoder_outputs.item_values
        table = torch.cat([self.go.to(values.dtype).expand(len(values), 1, -1), values], 1)
        read = table.gather(1, ids.long()[..., None].expand(-1, -1, table.shape[2]))
        if layers is None or layers[0].read("h") is None:
            state = (x.transpose(0, 1).contiguous() for x in encoder_outputs.final_state.chunk(2, 1))
        else:
            state = (torch.stack([layer.states[name] for layer in layers]) for name in "hc")
        hidden_states, (h, c) = self.decoder(read, tuple(state))
        for index, layer in enumerate(layers or ()):
            layer.write(**layer.states | {"h": h[index], "c": c[index]})
        return self.dropout(hidden_states)

    def look(self, hidden_states, items, valid, layers):
        """All glimpses, one behind the other, and their attention maps `[batch, 1, T, 1 + n]`."""
        attentions = []
        for index, glimpse in enumerate(self.glimpses):
            keys = self.keys(glimpse.attention, items, layers, f"glimpse_{index}_keys")
            hidden_states, weights = glimpse(keys, self.memory(items), hidden_states, valid)
            attentions.append(weights.unsqueeze(1))
        return hidden_states, tuple(attentions)

    def memory(self, items):
        """`[batch, 1 + n, hidden_size]`: the slot that ends, then what the encoder made of the items."""
        return torch.cat([self.end.to(items.dtype).expand(len(items), 1, -1), items], 1)

    def keys(self, attention, items, layers, name):
        """The memory as `attention` compares it; computed once for all steps that share a cache."""
        if layers is None or name not in layers[0].states:
            keys = attention.key_proj(self.memory(items))
            if layers is not None:
                layers[0].write(**layers[0].states | {name: keys})
            return keys
        keys = layers[0].states[name]
        if len(keys) != len(items) or keys.shape[1] != 1 + items.shape[1]:
            raise ValueError(
                f"past_key_values continues a batch of {len(keys)} with {keys.shape[1] - 1} items, but the items are"
                f" [batch, n] = {list(items.shape[:2])}; pass the items that the cache was made with."
            )
        return keys


class PointerNetworkForConditionalGeneration(PointerNetworkPreTrainedModel, PointerGenerationMixin):
    """Points at items one after the other: `logits [batch, T, 1 + n]` over the end (0) and the columns of the items.

    `generate()` works as for any encoder-decoder (greedy, sampling, beams); what it returns starts with 0, and 0 ends
    and pads it. Items come as in `PointerNetworkModel`.

    Further forward arguments:
        labels: `[batch, T]` ids, one 0 at the end, then -100. Decoder inputs are made from them.

    Logits are float32 (float64 for a float64 model) and -inf at padding.

    >>> model = PointerNetworkForConditionalGeneration(PointerNetworkConfig(hidden_size=8))
    >>> points = torch.rand(2, 5, 2)
    >>> model(points, labels=torch.tensor([[2, 4, 5, 2, 0], [1, 3, 1, 0, -100]])).logits.shape
    torch.Size([2, 5, 6])
    >>> model.generate(points, max_new_tokens=4).shape[0]
    2
    """

    def __init__(self, config):
        super().__init__(config)
        self.model = PointerNetworkModel(config)
        self.attention = PointerAttention(config)
        if config.attention_mode == "blend":
            self.classifier = nn.Linear(2 * config.hidden_size, 1 + config.max_num_points)
        self.loss_type = "ForMaskedLM"  # the loss that does not shift: step t predicts label t
        self.post_init()
        self.generation_config._from_model_config = False  # or a saved `task` would be dropped when it is loaded

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: PointerNetworkEncoderOutput | None = None,
        past_key_values=None,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        shape = shape_of(encoder_outputs, input_values, input_ids, inputs_embeds)
        valid = may_point(attention_mask, shape, self.device)
        if labels is not None:
            check_ids("labels", labels, valid, ignored=-100)
            use_cache = bool(use_cache)
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            elif decoder_input_ids.shape != labels.shape:
                raise ValueError(
                    f"labels {list(labels.shape)} and decoder_input_ids {list(decoder_input_ids.shape)} must have one"
                    " shape; leave decoder_input_ids out, and they are made from labels."
                )
        outputs = self.model(
            input_values=input_values,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.point(outputs, valid)
        loss = None
        if labels is not None:
            if self.config.mask_visited_in_training:
                logits = self.leave_out_visited(logits, decoder_input_ids, labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
            if self.config.label_smoothing:
                loss = self.smooth(loss, logits, labels, kwargs.get("num_items_in_batch"))
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def point(self, outputs, valid):
        """Logits `[batch, T, 1 + n]`, -inf where there is nothing to point at."""
        queries, items, cache = outputs.last_hidden_state, outputs.encoder_last_hidden_state, outputs.past_key_values
        keys = self.model.keys(self.attention, items, None if cache is None else cache.layers, "keys")
        if self.config.attention_mode == "blend":
            content, _ = self.attention.read(keys, self.model.memory(items), queries, valid)
            logits = self.classifier(torch.cat([queries, content], -1))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # class k is the k-th item, whatever padding stands in front of it
            classes = (valid.cumsum(1) - 1)[:, None].expand(-1, logits.shape[1], -1)
            logits = logits.gather(2, classes)
        else:
            logits = self.attention(keys, queries, valid)
        if self.config.logit_clip is not None:
            logits = self.config.logit_clip * torch.tanh(logits)
        return logits.masked_fill(~valid[:, None], -torch.inf)

    def leave_out_visited(self, logits, decoder_input_ids, labels):
        visited = visited_before(decoder_input_ids, logits.shape[-1])
        repeated = visited.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        if not is_tracing(repeated) and repeated.any():
            row, step = repeated.nonzero()[0].tolist()
            raise ValueError(
                f"labels (row {row} points at {int(labels[row, step])} again at step {step}) must not repeat an item"
                " with mask_visited_in_training=True; set it to False for such targets."
            )
        return logits.masked_fill(visited, -torch.inf)

    def smooth(self, loss, logits, labels, num_items_in_batch):
        """(1 - s) NLL + s times the mean NLL of all ids that are not -inf; uniform over the rest would be infinite."""
        there = logits.isfinite()
        losses = -logits.log_softmax(-1).masked_fill(~there, 0.0).sum(-1) / there.sum(-1)
        losses = losses[labels != -100]
        uniform = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return loss + self.config.label_smoothing * (uniform - loss)


__all__ = [
    "PointerNetworkEncoderOutput",
    "PointerNetworkForConditionalGeneration",
    "PointerNetworkModel",
    "PointerNetworkPreTrainedModel",
]
