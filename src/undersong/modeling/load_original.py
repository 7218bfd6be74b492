"""Loads the Mamba authors' own checkpoints (`state-spaces/mamba-130m`, `state-spaces/mamba2-130m`, ...).

Their folders hold `config.json` in the words of the `mamba_ssm` package and weights that differ from transformers'
layout in one name, the token table's. Of a pickle, only tensors are read (`torch.load(weights_only=True)`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

_WEIGHTS = "model.safetensors", "pytorch_model.bin"
# mamba_ssm's name in `ssm_cfg` -> transformers' name; what is not listed has no counterpart
_SSM = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias",
        "conv_bias": "use_conv_bias", "dt_min": "time_step_min", "dt_max": "time_step_max",
        "dt_init_floor": "time_step_floor"}  # fmt: skip
_SSM1 = _SSM | {"dt_rank": "time_step_rank", "dt_scale": "time_step_scale", "dt_init": "time_step_init_scheme"}
_SSM2 = _SSM | {
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "dt_limit": "time_step_limit",
}
# these only choose an initialisation or a kernel
_IGNORED = {"A_init_range", "conv_init", "use_fast_path", "use_mem_eff_path"}
# transformers' classes are built for these values
_FIXED = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
# mamba_ssm's defaults of Mamba2 where transformers' configuration has others
_DEFAULTS2 = {"state_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 64, "n_groups": 1, "chunk_size": 256}


def load_original(path, head=None):
    """Loads a checkpoint of the Mamba authors as `FastMambaForCausalLM` or `FastMamba2ForCausalLM`.

    Args:
        path: a folder with `config.json` and `pytorch_model.bin` or `model.safetensors`, or the Hub id of one, which
            is downloaded.
        head: another class to load into, such as `FastMambaModel` or `FastMambaForSequenceClassification`.

    Returns:
        The model in evaluation mode, in the dtype of the weights; its `save_pretrained` writes transformers' layout.

    Raises:
        FileNotFoundError: the folder has no weights under these names.
        ValueError: the configuration describes something that transformers' classes cannot express (hybrids with
            attention or feed-forward layers, several groups under a grouped norm), or its weights do not fit.

    ```python
    model = load_original("state-spaces/mamba2-130m")
    model.save_pretrained("mamba2-130m-hf")
    ```
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), allow_patterns=["config.json", *_WEIGHTS]))
    config = _config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    state_dict = {key.replace("embedding.", "embeddings."): value for key, value in _weights(folder).items()}
    table = state_dict.get("backbone.embeddings.weight")
    if table is None:
        raise ValueError(f"path ({path}) has no token table: its weights lack 'backbone.embedding.weight'.")
    config.vocab_size, config.dtype = len(table), table.dtype
    if head is None:
        head = _causal_lm(config)
    if not head.can_generate():
        state_dict.pop("lm_head.weight", None)
    model, info = head.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=table.dtype, output_loading_info=True
    )
    missing = {key for key in info["missing_keys"] if not key.startswith("score.")}
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"path ({path}) does not fit {head.__name__}: missing {sorted(missing)}, unexpected"
            f" {sorted(info['unexpected_keys'])}, other shapes {sorted(info['mismatched_keys'])}."
        )
    return model


def _causal_lm(config):
    from .mamba.modeling_mamba import FastMambaForCausalLM
    from .mamba2.modeling_mamba2 import FastMamba2ForCausalLM

    return FastMamba2ForCausalLM if config.model_type == "mamba2" else FastMambaForCausalLM


def _config(original):
    from transformers import Mamba2Config, MambaConfig

    ssm = dict(original.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg.layer ({layer!r}) must be 'Mamba1' or 'Mamba2'; no other layer is known here.")
    for name in ("attn_layer_idx", "attn_cfg", "d_intermediate"):
        if original.get(name):
            raise ValueError(
                f"{name} ({original[name]!r}) must be empty: attention and feed-forward layers have no place in"
                f" transformers' {layer}; use the authors' package for this checkpoint."
            )
    if original.get("rms_norm") is False:
        raise ValueError("rms_norm (False) must be True: transformers' Mamba has no LayerNorm.")
    names = _SSM2 if layer == "Mamba2" else _SSM1
    ssm = {k: v for k, v in ssm.items() if k not in _IGNORED and not (k in _FIXED and v == _FIXED[k])}
    if unknown := sorted(set(ssm) - set(names)):
        raise ValueError(
            f"ssm_cfg has {unknown}, which transformers' {layer} does not know; it knows {sorted(names)}."
        )
    values = {names[name]: value for name, value in ssm.items()}
    values |= {
        "hidden_size": original["d_model"],
        "num_hidden_layers": original["n_layer"],
        "vocab_size": original["vocab_size"],
        "tie_word_embeddings": original.get("tie_embeddings", True),
        "residual_in_fp32": original.get("residual_in_fp32", True),
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if layer == "Mamba1":
        return MambaConfig(**values)
    values = _DEFAULTS2 | values
    return Mamba2Config(**values, num_heads=int(values["expand"] * values["hidden_size"]) // values["head_dim"])


def _weights(folder):
    for name in _WEIGHTS:
        if (folder / name).is_file():
            if name.endswith(".safetensors"):
                return load_file(folder / name)
            return torch.load(folder / name, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{folder} holds neither {' nor '.join(_WEIGHTS)}.")


__all__ = ["load_original"]
