"""Weights of the pLSTM authors' image model (`pLSTMVisionModel` of their package) in our layout."""

import re

import torch

_BLOCK = r"block_stack\.blocks\.(\d+)\.block([01])\."
_MIXER = _BLOCK + r"interaction_module\."
_OURS = r"model.layers.{layer}."
_NAMES = {
    r"patch_embed\.proj\.(weight|bias)": r"model.embeddings.projection.\1",
    r"pos_embed\.embed": "model.embeddings.position_embeddings",
    r"norm\.scale": "model.norm.weight",
    r"head\.(weight|bias)": r"classifier.\1",
    _BLOCK + r"norm\.scale": _OURS + "norm.weight",
    _BLOCK + r"norm2\.scale": _OURS + "mlp_norm.weight",
    _BLOCK + r"(up|down)proj\.(weight|bias)": _OURS + r"mlp.\3_proj.\4",
    _MIXER + r"orientation_(weight|bias)": _OURS + r"mixer.gates.orientation.\3",
    _MIXER + r"(source|mark)(_[rdlu])?\.bias": _OURS + r"mixer.gates.\3\4.bias",
    _MIXER + r"(source|mark)(_[rdlu])?\.weight": _OURS + r"mixer.gates.\3\4.proj.weight",
    _MIXER + r"(transition)(_r|_d|_rd)?\.eigenvalues_bias": _OURS + r"mixer.gates.\3\4.bias",
    _MIXER + r"(transition)(_r|_d|_rd)?\.eigenvalues_weight": _OURS + r"mixer.gates.\3\4.proj.weight",
    _MIXER + r"direct\.bias": _OURS + "mixer.direct.bias",
    _MIXER + r"(q)uery\.(weight|bias)": _OURS + r"mixer.\3_proj.\4",
    _MIXER + r"(k)ey\.(weight|bias)": _OURS + r"mixer.\3_proj.\4",
    _MIXER + r"(v)alue_\.(weight|bias)": _OURS + r"mixer.\3_proj.\4",
    _MIXER + r"mhnorm\.scale": _OURS + "mixer.norm.weight",
    _MIXER + r"outprojection\.weight": _OURS + "mixer.o_proj.weight",
}


def convert_state_dict(reference_state_dict, config):
    """The authors' state dict -> one that `PLSTMVisionForImageClassification(config)` loads.

    Gates without weights get zeros, which is the same; projections that read a slice of the input for each head become
    dense. Their model takes images as [batch, height, width, channels] and ours as [batch, channels, height, width].

    Raises:
        ValueError: a weight without a counterpart, or of another size than the configuration says.
    """
    size, heads = config.hidden_size, config.num_attention_heads
    gates, slices = heads * config.orientations, config.gate_slices
    converted = {}
    for key, value in reference_state_dict.items():
        pattern = next((old for old in _NAMES if re.fullmatch(old, key)), None)
        if pattern is None:
            raise ValueError(f"{key!r} has no counterpart in {type(config).__name__}; convert a pLSTMVisionModel.")
        match = re.fullmatch(pattern, key)
        name = match.expand(_NAMES[pattern])
        if "{layer}" in name:
            name = name.replace("{layer}", str(2 * int(match[1]) + int(match[2])))
        if re.search(r"mixer\.[qkv]_proj\.weight", name):
            value = _dense(value, heads)
        elif name.endswith("proj.weight") and ".gates." in name:
            if value.shape[1] != slices:
                raise ValueError(
                    f"{key!r} {list(value.shape)} reads {value.shape[1]} slices of the input, but gate_sub_heads"
                    f" ({config.gate_sub_heads}) makes {slices}; use gate_sub_heads={value.shape[1]}."
                )
            value = value.reshape(gates, size // slices)
        elif name.endswith("orientation.weight"):
            value = value.reshape(gates, size)
        elif name.endswith("mixer.norm.weight"):
            value = value.reshape(heads, size // heads)
        elif name.endswith("bias"):
            value = value.flatten()
        converted[name] = value
    for name in [name for name in converted if ".gates." in name and name.endswith(".bias")]:
        weight = name.removesuffix("bias") + "proj.weight"
        if "orientation" not in name and weight not in converted:
            converted[weight] = converted[name].new_zeros(gates, size // slices)
    for name in [name for name in converted if re.search(r"mixer\.[qkv]_proj\.weight", name)]:
        converted.setdefault(name.replace("weight", "bias"), converted[name].new_zeros(size))
    return converted


def _dense(weight, heads):
    """[heads / slices or 1, rows, 1, slices, in] -> [out, slices * in], zeros where a row does not read a slice."""
    major, rows, _, slices, width = weight.shape
    blocks = torch.zeros(major, slices, rows, slices, width, dtype=weight.dtype, device=weight.device)
    index = torch.arange(slices, device=weight.device)
    blocks[:, index, :, index] = weight[:, :, 0].permute(2, 0, 1, 3)
    return blocks.reshape(major * slices * rows, slices * width)


__all__ = ["convert_state_dict"]
