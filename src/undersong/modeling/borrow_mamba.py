"""A stock Mamba-2 that runs our code for a while, and is given back as it came: for controls and measurements."""

from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .enable_fast_mamba import enable_fast_mamba

_MISSING = object()


def matrix_mixers(model):
    """The mixers below a model whose state is a matrix, in order; ValueError if there are none."""
    mixers = [
        part
        for part in model.modules()
        if isinstance(part, Mamba2Mixer) and (type(part) is Mamba2Mixer or hasattr(part, "recurrence_inputs"))
    ]
    if not mixers:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"model ({type(model).__name__}, model_type {model_type!r}) has no layers with a matrix state to control;"
            " those of mamba2 have one."
        )
    return mixers


def make_fast(model):
    """`enable_fast_mamba` if the model is transformers' own; returns what it changed, for `give_back`."""
    if not any(type(part) is Mamba2Mixer for part in model.modules()):
        return []
    before = [(part, type(part), dict(vars(part)), dict(part._modules)) for part in model.modules()]
    enable_fast_mamba(model)
    changes = []
    for part, kind, attributes, children in before:
        now = vars(part)
        changed = {name: value for name, value in attributes.items() if now.get(name, _MISSING) is not value}
        added = [name for name in now if name not in attributes]
        children = [name for name in part._modules if name not in children]
        if type(part) is not kind or changed or added or children:
            changes.append((part, kind, changed, added, children))
    return changes


def give_back(changes):
    """Undoes `make_fast`: every module is of the class, and has the attributes, that it had."""
    for part, kind, changed, added, children in changes:
        part.__class__ = kind
        for name in children:
            part._modules.pop(name, None)
        for name in added:
            vars(part).pop(name, None)
        vars(part).update(changed)


__all__ = ["give_back", "make_fast", "matrix_mixers"]
