"""Makes a Mamba model of transformers that exists already, loaded, adapted or quantised, run our code, in place."""

from .state_space_model import exchange_classes


def enable_fast_mamba(model):
    """Gives a model of transformers our forward for its Mamba layers: right for padding, packing and chunks, and fast.

    Classes are exchanged in place; no weight is touched, so optimizers, tied weights, PEFT adapters and quantised
    projections go on as they are. A second call changes nothing.

    Args:
        model: a model of type mamba, mamba2, falcon_mamba or jamba (there its Mamba layers), or anything that holds
            one, such as a `PeftModel`.

    Returns:
        The model.

    Raises:
        ValueError: nothing in `model` can be replaced.

    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    >>> type(enable_fast_mamba(model)).__name__
    'FastMambaForCausalLM'
    """
    from .mamba.modeling_mamba import FAST_CLASSES as MAMBA
    from .mamba.relatives import FAST_CLASSES as RELATIVES
    from .mamba2.modeling_mamba2 import FAST_CLASSES as MAMBA2

    classes = MAMBA | MAMBA2 | RELATIVES
    known = {*classes, *classes.values()}
    if not any(type(part) in known for part in model.modules()):
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"model ({type(model).__name__}, model_type {model_type!r}) has no layers that enable_fast_mamba can"
            " replace; it knows transformers' mamba, mamba2, falcon_mamba and jamba."
        )
    exchange_classes(model, classes)
    for part in model.modules():
        # PEFT remembers the method it found when it wrapped the model
        if "base_model_prepare_inputs_for_generation" in vars(part):
            part.base_model_prepare_inputs_for_generation = part.base_model.prepare_inputs_for_generation
    return model


__all__ = ["enable_fast_mamba"]
