"""Gives a loaded mixture of experts a recurrent router, takes it off again, and keeps it as a small adapter."""

import json
from pathlib import Path

import torch

from .. import registry
from .recurrent_router import (
    MODULES,
    add_recurrent_router,
    change_class,
    remove_recurrent_router,
    sparse_layers,
    trunk_of,
)
from .recurrent_router_config import RecurrentRouterConfig

TYPES = "rmoe_mixtral", "rmoe_olmoe", "rmoe_qwen3_moe"
WEIGHTS, CONFIG = "recurrent_router.safetensors", "recurrent_router.json"


def attach_recurrent_router(
    model, router_hidden_size=128, *, mode="residual", router_type="gru", freeze_base=False, config=None
):
    """Lets a mixture of experts decide with a memory that travels up its layers (arXiv 2408.06793), in place.

    Models of transformers' types mixtral, olmoe and qwen3_moe become `rmoe_mixtral`, `rmoe_olmoe` and
    `rmoe_qwen3_moe`: saved whole, they load through the Auto classes with their router. Other models whose layers have
    `mlp.gate` and `mlp.experts`, and classification heads, get the router too; save theirs by `save_recurrent_router`.

    Args:
        model: the model, loaded. In mode "residual" its outputs stay bit-identical until the router is trained.
        router_hidden_size: size of a token's routing state.
        mode: "residual" adds to the scores of the routers that are there, "replace" does without them, as in the
            paper, for training from scratch.
        router_type: "gru" or "rnn".
        freeze_base: leaves only the new parameters trainable.
        config: a `RecurrentRouterConfig`, in place of the three arguments above.

    Returns:
        The model.

    Raises:
        ValueError: no layer with a router and experts, a router that works in another way, a second call, or values
            that `RecurrentRouterConfig` refuses.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4))
    >>> type(attach_recurrent_router(model, 4)).__name__
    'RMoEMixtralForCausalLM'
    """
    config = config or RecurrentRouterConfig(router_hidden_size=router_hidden_size, mode=mode, router_type=router_type)
    model_in = _unwrapped(model)
    trainable = {name for name, parameter in model_in.named_parameters() if parameter.requires_grad}
    add_recurrent_router(model_in, config)
    model_in.rmoe_config = config
    _change_type(model_in, to=True)
    if freeze_base:
        model_in.rmoe_frozen = trainable
        for name, parameter in model_in.named_parameters():
            if name in trainable:
                parameter.requires_grad_(False)
    elif config.mode == "replace":
        model_in.rmoe_frozen = set()
        for prefix, layer in _named_gates(model_in):
            if layer.weight.requires_grad:  # it takes no part, and some optimizers and DDP mind
                layer.weight.requires_grad_(False)
                model_in.rmoe_frozen.add(f"{prefix}.weight")
    return model


def detach_recurrent_router(model):
    """Takes the recurrent router off again: classes, configuration, and what was trainable, as before.

    Raises:
        ValueError: the model has no recurrent router, or is wrapped by PEFT, which holds its modules.
    """
    _check_attached(model)
    if _unwrapped(model) is not model:
        raise ValueError(
            f"model ({type(model).__name__}) is wrapped by PEFT; unload() or merge_and_unload() it first."
        )
    remove_recurrent_router(model)
    parameters = dict(model.named_parameters())
    for name in vars(model).pop("rmoe_frozen", ()):
        parameters[name].requires_grad_(True)
    _change_type(model, to=False)
    vars(model).pop("rmoe_config", None)
    return model


def recurrent_router_modules(model):
    """Names for `LoraConfig(modules_to_save=...)`: PEFT then trains and saves the recurrent router with an adapter.

    Raises:
        ValueError: the model has no recurrent router.
    """
    _check_attached(model)
    return list(MODULES)


def save_recurrent_router(model, folder):
    """Writes the recurrent router alone, a few MB: `recurrent_router.safetensors` and `recurrent_router.json`.

    Args:
        model: a model with a recurrent router.
        folder: where to write; it may hold other files. Publish it as it is: `load_recurrent_router` takes a
            repository's name.

    Returns:
        The folder as a `pathlib.Path`.

    Raises:
        ValueError: the model has no recurrent router.
    """
    from safetensors.torch import save_file

    _check_attached(model)
    model = _unwrapped(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    about = {"recurrent_router": _config_of(model).to_dict(), "base": _base(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load_recurrent_router(model, folder_or_repo, *, revision=None, token=None, freeze_base=False):
    """Attaches a recurrent router that `save_recurrent_router` wrote.

    Args:
        model: the model it was trained on, or one of the same sizes.
        folder_or_repo: the folder, or a repository on the Hub.
        revision, token: of the repository.
        freeze_base: as in `attach_recurrent_router`.

    Returns:
        The model.

    Raises:
        ValueError: the files are not there, or belong to a model of another type or other sizes.
    """
    from safetensors.torch import load_file

    paths = [_find(folder_or_repo, name, revision, token) for name in (CONFIG, WEIGHTS)]
    about = json.loads(paths[0].read_text(encoding="utf-8"))
    base = _base(_unwrapped(model))
    for name, value in about["base"].items():
        if name != "name_or_path" and base.get(name) != value:
            raise ValueError(
                f"{folder_or_repo} was made for a model with {name} = {value!r}, but the model's is"
                f" {base.get(name)!r}; load it onto {about['base'].get('name_or_path') or 'its own base model'}."
            )
    tensors = load_file(paths[1])
    attach_recurrent_router(model, config=RecurrentRouterConfig(**about["recurrent_router"]), freeze_base=freeze_base)
    own = _tensors(_unwrapped(model))
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        detach_recurrent_router(model)
        raise ValueError(f"{paths[1]} does not fit the model at {', '.join(wrong[:3])}; it is damaged or edited.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model


def _unwrapped(model):
    """The model inside a `PeftModel`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_attached(model):
    trunk = trunk_of(_unwrapped(model))
    if trunk is None or not hasattr(trunk, "rmoe_cell"):
        raise ValueError(
            f"model ({type(model).__name__}) has no recurrent router; attach_recurrent_router gives it one."
        )


def _named_gates(model):
    gates = {id(layer.mlp.gate) for layer in sparse_layers(trunk_of(model))}
    return [(name, module) for name, module in model.named_modules() if id(module) in gates]


def _config_of(model):
    saved = getattr(model.config, "recurrent_router", None)
    return RecurrentRouterConfig(**saved) if saved else model.rmoe_config


def _tensors(model):
    """The recurrent router's parameters by names that do not depend on the model around the trunk."""
    trunk = trunk_of(model)
    parts = {"cell": trunk.rmoe_cell}
    for index, layer in enumerate(sparse_layers(trunk)):
        parts[f"routers.{index}.input_proj"] = layer.mlp.gate.rmoe_input_proj
        parts[f"routers.{index}.score"] = layer.mlp.gate.rmoe_score
    return {
        f"{part}.{name}": getattr(module, name)  # by attribute: PEFT may have put a wrapper around the module
        for part, module in parts.items()
        for name in (("weight_ih", "weight_hh", "bias_ih", "bias_hh") if part == "cell" else ("weight",))
    }


def _base(model):
    gates = [layer.mlp.gate for layer in sparse_layers(trunk_of(model) or model)]
    return {
        "model_type": model.config.model_type.removeprefix("rmoe_"),
        "hidden_size": model.config.hidden_size,
        "num_routers": len(gates),
        "num_experts": gates[0].num_experts if gates else None,
        "name_or_path": model.config.name_or_path or None,
    }


def _change_type(model, *, to):
    """Between a family's classes and ours for them, head and trunk, together with the configuration, in place."""
    for row in map(registry.ARCHITECTURES.get, TYPES):
        ours = [row.model_class(head) for head in row.models]
        exchange = {cls.__mro__[2]: cls for cls in ours} if to else {cls: cls.__mro__[2] for cls in ours}
        if type(model) not in exchange:
            continue
        for module in model.modules():
            if type(module) in exchange:
                change_class(module, exchange[type(module)])
        registry.register_models(row)  # otherwise left to the first configuration that is built
        config = model.config
        config.__class__ = row.config_class() if to else row.config_class().__mro__[1]
        vars(config).pop("model_type", None)  # a loaded one repeats what its class says
        if to:
            config.recurrent_router = model.rmoe_config.to_dict()
        else:
            del config.recurrent_router
        # how the weights were read is keyed by the stock type; what we save keeps the names in memory
        vars(model).pop("_weight_conversions", None)


def _find(folder_or_repo, name, revision, token):
    path = Path(folder_or_repo) / name
    if path.is_file():
        return path
    if Path(folder_or_repo).is_dir():
        raise ValueError(f"{folder_or_repo} has no {name}; save_recurrent_router writes it.")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(folder_or_repo), name, revision=revision, token=token))


__all__ = [
    "attach_recurrent_router",
    "detach_recurrent_router",
    "load_recurrent_router",
    "recurrent_router_modules",
    "save_recurrent_router",
]
