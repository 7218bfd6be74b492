"""Weights of the pLSTM authors' language model (`pLSTMLMModel` of their package) in our layout."""

import re

import torch

_LAYER = r"block_stack\.blocks\.(\d+)\."
_MIXER = _LAYER + r"interaction_module\."
_NAMES = {
    r"token_embedding\.weight": "model.embed_tokens.weight",
    r"post_blocks_norm\.scale": "model.norm.weight",
    r"lm_head\.weight": "lm_head.weight",
    _LAYER + r"norm\.scale": r"model.layers.\1.norm.weight",
    _LAYER + r"(up|down)proj\.(weight|bias)": r"model.layers.\1.\2_proj.\3",
    _MIXER + r"conv\._conv\.(weight|bias)": r"model.layers.\1.mixer.conv1d.\2",
    _MIXER + r"mhnorm\.scale": r"model.layers.\1.mixer.norm.weight",
    _MIXER + r"passthrough\.scale": r"model.layers.\1.mixer.skip",
    _MIXER + r"(q)uery\.(weight|bias)": r"model.layers.\1.mixer.\2_proj.\3",
    _MIXER + r"(k)ey\.(weight|bias)": r"model.layers.\1.mixer.\2_proj.\3",
    _MIXER + r"(v)alue_\.(weight|bias)": r"model.layers.\1.mixer.\2_proj.\3",
    _MIXER + r"(source|mark|direct)\.bias": r"model.layers.\1.mixer.\2.bias",
    _MIXER + r"(source|mark|direct)\.weight": r"model.layers.\1.mixer.\2.proj.weight",
    _MIXER + r"transition\.eigenvalues_bias": r"model.layers.\1.mixer.transition.eigenvalues.bias",
    _MIXER + r"transition\.eigenvalues_weight": r"model.layers.\1.mixer.transition.eigenvalues.proj.weight",
    _MIXER + r"transition\.inproj_(weight|bias)": r"model.layers.\1.mixer.transition.inner.\2",
    _MIXER + r"transition\.outproj_(weight|bias)": r"model.layers.\1.mixer.transition.outer.\2",
}
_PROJECTION = re.compile(r"mixer\.[qkv]_proj\.weight$")
_GATE = re.compile(r"mixer\.(source|mark|direct|transition)\..*weight$")


def convert_state_dict(reference_state_dict, config):
    """The authors' state dict -> one that `PLSTMForCausalLM(config)` loads.

    Gates that they left without weights get zeros, which is the same; gates that read a slice of the input each become
    dense. Their transitions use a series for the matrix exponential: `config.orthogonalization` should be "series".

    Raises:
        ValueError: a weight without a counterpart, or projections in other blocks than `config.qkv_block_size` says.
    """
    inner = config.inner_size
    converted = {}
    for key, value in reference_state_dict.items():
        name = next((re.sub(old, new, key) for old, new in _NAMES.items() if re.fullmatch(old, key)), None)
        if name is None:
            raise ValueError(
                f"{key!r} has no counterpart in {type(config).__name__}; convert a pLSTMLMModel (pre_up)."
            )
        if _PROJECTION.search(name):  # [heads or 1, rows, tracking, slices, in]
            if value.shape[3] != config.sub_heads:
                raise ValueError(
                    f"{key!r} {list(value.shape)} reads {value.shape[3]} slices, but qkv_block_size"
                    f" ({config.qkv_block_size}) makes {config.sub_heads}; use"
                    f" qkv_block_size={inner // value.shape[3]}."
                )
            value = value.movedim(3, 1).flatten(0, 3)
        elif _GATE.search(name):  # [heads / slices, slices, ..., in]
            value = _dense(value)
        elif name.endswith("bias"):
            value = value.flatten()
        converted[name] = value
    for index in range(config.num_hidden_layers):
        for gate in ("source", "mark", "direct"):
            name = f"model.layers.{index}.mixer.{gate}"
            bias = converted[f"{name}.bias"]
            converted.setdefault(f"{name}.proj.weight", bias.new_zeros(len(bias), inner))
    if config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"]
    return converted


def _dense(weight):
    """[groups, slices, ..., in] -> [groups * slices * ..., slices * in], zero outside of each head's slice."""
    groups, slices, size = weight.shape[0], weight.shape[1], weight.shape[-1]
    weight = weight.reshape(groups, slices, -1, size)
    dense = weight.new_zeros(groups, slices, weight.shape[2], slices, size)
    index = torch.arange(slices, device=weight.device)
    dense[:, index, :, index] = weight.movedim(1, 0)
    return dense.flatten(3).flatten(0, 2)


__all__ = ["convert_state_dict"]
