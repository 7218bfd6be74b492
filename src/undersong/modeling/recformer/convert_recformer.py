"""The Recformer authors' checkpoints in our layout.

Their recommender's names are `longformer.*` and `lm_head.*`, those of their bare encoder lack the prefix, and
training checkpoints put `_forward_module.model.` before either and leave the word embeddings out, which were frozen.
"""

import torch

_WRAPPERS = ("_forward_module.model.", "_forward_module.", "module.", "model.")
_OURS = ("longformer.", "lm_head.")
_ENCODER = ("embeddings.", "encoder.")
_WORDS = "longformer.embeddings.word_embeddings.weight"


def convert_state_dict(reference_state_dict, config, *, word_embeddings=None):
    """The state dict of a `RecformerForPreTraining` with this configuration.

    A `RecformerForSequentialRecommendation` takes its `longformer.*` part, a `RecformerModel` that part without the
    prefix. Published checkpoints are pickles: read them with `torch.load(path, weights_only=True)`.

    Args:
        reference_state_dict: name -> tensor.
        config: a `RecformerConfig` with `encoder_type="longformer"`.
        word_embeddings: `[vocab_size, hidden_size]`, for checkpoints without; those of the Longformer that training
            began with (`allenai/longformer-base-4096`).

    Returns:
        A state dict for `load_state_dict`; what the source lacks of `lm_head` is left out (`strict=False`).

    Raises:
        ValueError: names of something else, a table that does not fit the configuration, or no word embeddings.

    >>> from undersong.modeling.recformer.configuration_recformer import RecformerConfig
    >>> config = RecformerConfig(vocab_size=9, hidden_size=2, num_attention_heads=1)
    >>> list(convert_state_dict({"embeddings.word_embeddings.weight": torch.zeros(9, 2)}, config))
    ['longformer.embeddings.word_embeddings.weight']
    """
    state = {}
    for name, value in reference_state_dict.items():
        wrapper = next((w for w in _WRAPPERS if name.startswith(w)), "")
        name = name.removeprefix(wrapper)
        if name.startswith(_ENCODER):
            name = "longformer." + name
        if not name.startswith(_OURS):
            if name == "item_embedding.weight":
                continue  # a table over the authors' own item numbers; `set_items` makes ours
            raise ValueError(
                f"{name!r} is no name of a Recformer checkpoint, which has {', '.join((*_OURS, *_ENCODER))}; pass its"
                " state dict."
            )
        if not name.endswith("position_ids"):
            state[name] = value
    if _WORDS not in state:
        if word_embeddings is None:
            raise ValueError(
                "the checkpoint has no word embeddings, since training left them as they were; pass"
                " word_embeddings=LongformerModel.from_pretrained('allenai/longformer-base-4096')"
                ".get_input_embeddings().weight."
            )
        state[_WORDS] = word_embeddings.detach()
    for table, rows in (
        ("word", config.vocab_size),
        ("position", config.max_position_embeddings),
        ("token_type", config.token_type_size),
        ("item_position", config.max_item_embeddings),
    ):
        weight = state.get(f"longformer.embeddings.{table}_embeddings.weight")
        if weight is not None and weight.shape != torch.Size((rows, config.hidden_size)):
            raise ValueError(
                f"{table}_embeddings ({list(weight.shape)}) must be {[rows, config.hidden_size]} for this"
                " configuration; change it."
            )
    if "lm_head.dense.weight" in state:  # the decoder is the word table, and its bias has two names
        state.setdefault("lm_head.decoder.weight", state[_WORDS])
        state.setdefault("lm_head.decoder.bias", state["lm_head.bias"])
    return state
