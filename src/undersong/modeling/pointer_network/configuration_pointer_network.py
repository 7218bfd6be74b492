"""Configuration of pointer networks (Vinyals et al. 2015, arXiv 1506.03134)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class PointerNetworkConfig(PreTrainedConfig):
    """Configuration of a decoder whose vocabulary is the items of its own input.

    Args:
        input_size: numbers per item (2 for points in the plane); the width of `input_values` and `inputs_embeds`.
        item_vocab_size: size of an embedding table, for items that are given as `input_ids`; None for no table.
        hidden_size: width of encoder outputs, decoder states and attention.
        num_hidden_layers: LSTM layers of the decoder, and of an LSTM encoder.
        encoder_type: "lstm" (the paper's), "bilstm" (half the width in each direction), "set" (does not depend on the
            order of the items: "Order Matters", arXiv 1511.06391) or "transformer" (any model given by
            `encoder_config`).
        encoder_config: configuration, or its dictionary with a `model_type`, of the "transformer" encoder. Items reach
            it as `inputs_embeds`; its token table is not used.
        num_process_steps: how often the "set" encoder reads its memory.
        num_glimpses: how often the decoder reads the memory before it points ("Order Matters", section 4.2).
        attention_mode: "pointer": the attention is the output distribution. "blend": the paper's baseline, where the
            attention mixes the memory and a layer over `max_num_points + 1` fixed classes follows.
        logit_clip: C for logits C tanh(u), as reinforcement learning uses them (10 is usual); None for plain u.
        max_num_points: largest number of items; None for any. "blend" needs it.
        mask_visited_in_training: under teacher forcing, leave out what the targets already pointed at. Only for
            targets without repetitions.
        label_smoothing: part of the loss spread over all ids that can be pointed at. (The Trainer's own smoothing also
            counts padding, whose logits are -inf.)
        dropout: on encoder outputs and decoder outputs, and between LSTM layers.
        init_distribution: "uniform" (all weights from +-`initializer_range`, as in the paper) or "normal" (as
            transformers initialises).
        initializer_range: bound, or standard deviation.
        vocab_size: a placeholder; the vocabulary of a batch is its number of items + 1.
        eos_token_id, pad_token_id, decoder_start_token_id: all 0. Items are numbered from 1.

    Raises:
        ValueError: combinations that cannot work; the message names the fields.

    >>> PointerNetworkConfig(hidden_size=64, encoder_type="set").eos_token_id
    0
    """

    model_type = "pointer-network"
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state"]
    sub_configs = {"encoder_config": PreTrainedConfig}

    input_size: int = 2
    item_vocab_size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 1
    encoder_type: Literal["lstm", "bilstm", "set", "transformer"] = "lstm"
    encoder_config: dict | PreTrainedConfig | None = None
    num_process_steps: int = 5
    num_glimpses: int = 0
    attention_mode: Literal["pointer", "blend"] = "pointer"
    logit_clip: float | None = None
    max_num_points: int | None = None
    mask_visited_in_training: bool = False
    label_smoothing: float = 0.0
    dropout: float = 0.0
    init_distribution: Literal["uniform", "normal"] = "uniform"
    initializer_range: float = 0.08
    use_cache: bool = True
    is_encoder_decoder: bool = True
    vocab_size: int = 1
    eos_token_id: int = 0
    pad_token_id: int = 0
    decoder_start_token_id: int = 0

    def __post_init__(self, **kwargs):
        if isinstance(self.encoder_config, dict):
            from transformers import AutoConfig  # which, when it loads first, wants this very class

            values = dict(self.encoder_config)
            if "model_type" not in values:
                raise ValueError(
                    f"encoder_config ({sorted(values)}) has no model_type; add one, such as 'bert', or pass a"
                    " configuration."
                )
            self.encoder_config = AutoConfig.for_model(**values)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` after construction."""
        for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
            if getattr(self, name) != 0:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be 0: id 0 starts, ends and pads, and ids from 1 on are the"
                    " items."
                )
        for name, least in (("input_size", 1), ("hidden_size", 1), ("num_hidden_layers", 1), ("num_glimpses", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}.")
        if self.encoder_type == "bilstm" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be even for encoder_type='bilstm', which has half of it in"
                f" each direction; use hidden_size={self.hidden_size + 1}."
            )
        if (self.encoder_type == "transformer") != (self.encoder_config is not None):
            raise ValueError(
                f"encoder_type ({self.encoder_type!r}) and encoder_config ({type(self.encoder_config).__name__}) do"
                " not fit: 'transformer' needs a configuration, such as BertConfig(), and the others take none."
            )
        if self.attention_mode == "blend" and self.max_num_points is None:
            raise ValueError(
                "max_num_points (None) must be given for attention_mode='blend', whose output layer has"
                " max_num_points + 1 classes."
            )
        if self.logit_clip is not None and self.logit_clip <= 0:
            raise ValueError(f"logit_clip ({self.logit_clip}) must be positive; use 10.0, or None for no clipping.")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie in [0, 1); use 0.0 for none.")

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers


__all__ = ["PointerNetworkConfig"]
