"""A recurrent cache as one safetensors file: what a model remembers of a text, kept for another process or machine.

A state has a fixed size however long the text was, so the file is small, and loading it replaces reading the text
again. It works for every model whose cache consists of `RecurrentStateLayer`s. States keep their dtype and every bit.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache

from .cache import RecurrentStateLayer

_FORMAT = "undersong_state"
_VALID = "valid_tokens"
# entries of a config that say how a model is trained, stored or stopped, and not what it computes
_NOT_THE_FUNCTION = {
    "architectures",
    "attn_implementation",
    "chunk_size",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "rescale_prenorm_residual",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_associative_scan",
    "use_cache",
    "use_mambapy",
}


def save_state(cache, path, *, model, overwrite=False, **metadata) -> Path:
    """Writes a cache to one safetensors file, in one step: an interrupted call leaves no half file.

    Args:
        cache: a cache of `RecurrentStateLayer`s that has seen at least one token, of any batch size.
        path: the file to write.
        model: the model that filled the cache (or its config); `load_state` compares it with the model that reads.
        overwrite: True replaces an existing file.
        metadata: what to keep beside the states, anything JSON can hold; `state_metadata` gives it back. After
            `generate()` the last token has not been through the model yet, so it belongs here.

    Returns:
        The path.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        ValueError: an empty cache, or one with layers that are not recurrent.

    >>> import tempfile, torch, undersong
    >>> config = undersong.AarenConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = undersong.AarenForCausalLM(config)
    >>> cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_state(cache, folder + "/state.safetensors", model=model, last_token=3)
    ...     state_metadata(path), load_state(path, model=model).get_seq_length()
    ({'last_token': 3}, 3)
    """
    tensors, seen = {}, []
    for index, layer in enumerate(_recurrent_layers(cache)):
        seen.append(layer.seen_tokens)
        # a copy of each, since layers share the count of valid tokens and safetensors refuses shared memory
        parts = {f"states.{name}": state for name, state in layer.states.items()} | {_VALID: layer.valid_tokens}
        for name, part in parts.items():
            if part is not None:
                tensors[f"layers.{index}.{name}"] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not tensors:
        raise ValueError("cache holds no state yet; run the model with use_cache=True before saving.")
    header = {
        _FORMAT: "1",
        "seen_tokens": json.dumps(seen),
        "config": json.dumps(_function_of(model), default=str),
        "metadata": json.dumps(metadata),
    }
    return write_tensors(tensors, path, header, overwrite)


def load_state(path, *, model=None, device=None) -> Cache:
    """Reads what `save_state` wrote, as a cache to pass as `past_key_values`.

    Args:
        path: the file.
        model: the model that will continue; a model whose configuration differs from the one that wrote is refused.
        device: where the states go; by default the model's device, or the CPU.

    Returns:
        A new `Cache`. The model writes its next states into it, so load again to continue twice from one point.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no state file, or `model` is not the kind that wrote it.
    """
    header = _header(path)
    if model is not None:
        _check_same(path, json.loads(header["config"]), _function_of(model))
        device = device if device is not None else getattr(model, "device", None)
    cache = Cache(layers=[])
    for seen in json.loads(header["seen_tokens"]):
        layer = RecurrentStateLayer()
        layer.seen_tokens = seen
        cache.layers.append(layer)
    states = [{} for _ in cache.layers]
    with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            _, index, name = key.split(".", 2)
            if name == _VALID:
                cache.layers[int(index)].valid_tokens = file.get_tensor(key)
            else:
                states[int(index)][name.removeprefix("states.")] = file.get_tensor(key)
    for layer, named in zip(cache.layers, states, strict=True):
        if named:
            layer.write(**named)
    return cache


def state_metadata(path) -> dict:
    """The keyword arguments that `save_state` was given to keep beside the states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no state file.
    """
    return json.loads(_header(path)["metadata"])


def write_tensors(tensors, path, metadata, overwrite) -> Path:
    """Writes one safetensors file in one step; an existing file is only replaced if `overwrite`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path ({path}) exists; pass overwrite=True to replace it, or another path.")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={"format": "pt"} | metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _recurrent_layers(cache):
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache ({type(cache).__name__}) must be a transformers Cache of recurrent layers, such as"
            " outputs.past_key_values."
        )
    for index, layer in enumerate(getattr(cache, "layers", [])):
        if not isinstance(layer, RecurrentStateLayer):
            raise ValueError(
                f"cache holds a {type(layer).__name__} at layer {index}, but only RecurrentStateLayer has a state of"
                " fixed size to save; caches of attention layers grow with the text."
            )
        yield layer


def _function_of(model) -> dict:
    """The config entries that decide what the model computes."""
    config = getattr(model, "config", model).to_dict()
    return {
        key: value
        for key, value in config.items()
        if key not in _NOT_THE_FUNCTION and not key.startswith("_") and not key.endswith("token_id")
    }


def _check_same(path, wrote, reads):
    # entries that only one side knows come and go with versions of transformers
    reads = json.loads(json.dumps(reads, default=str))
    different = [key for key in wrote if key in reads and wrote[key] != reads[key]]
    if different:
        different.sort(key=lambda key: key != "model_type")
        which = ", ".join(f"{key} {wrote[key]!r} (model: {reads[key]!r})" for key in different[:4])
        raise ValueError(
            f"path ({path}) holds the state of another model: {which}; load it with the model that wrote it."
        )


def _header(path) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"path ({path}) does not exist; write it with save_state.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"path ({path}) is not a safetensors file ({error}); write it with save_state.") from None
    if header.get(_FORMAT) != "1":
        raise ValueError(
            f"path ({path}) is a safetensors file without a recurrent state of format 1; write it with save_state."
        )
    return header


__all__ = ["load_state", "save_state", "state_metadata", "write_tensors"]
