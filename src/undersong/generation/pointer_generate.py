"""`generate()` for pointer networks with the rules of a task: the answer is a tour, a hull, a triangulation."""

from __future__ import annotations

import copy

from transformers import GenerationConfig, LogitsProcessorList

from .pointer_processors import decoding_steps, pointer_processors

__all__ = ["generate_pointers"]

_INPUTS = ("input_values", "inputs_embeds", "input_ids")


def generate_pointers(model, inputs=None, *, task=None, strict_geometry=None, **arguments):
    """`model.generate(inputs, ...)` with the processors of a task, and as many steps as its longest answer has.

    Args:
        model: a pointer network: its ids are 0 for the end and 1..n for the items of the batch.
        inputs: `[batch, n, ...]` the items; or one of `input_values`, `inputs_embeds` and `input_ids` by name.
        task: one of `pointer_processors.TASKS`. None: that of `generation_config` (the call's, else the model's).
        strict_geometry: hulls must be convex as well. None: as `generation_config` says, else False.
        arguments: of `model.generate()`, `attention_mask` among them. Without a limit on the length, the task's.

    Returns:
        What `generate()` returns; rows begin with 0 and are padded with 0. Beam search that is asked for more
        sequences than there are answers leaves rows of zeros, with scores of -1e9.

    Raises:
        ValueError: no items, no task, or one that is unknown.

    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForSeq2SeqLM
    >>> model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("pointer-network", hidden_size=8))
    >>> generate_pointers(model, torch.rand(1, 4, 2), task="tour").sort().values
    tensor([[0, 0, 1, 2, 3, 4]])
    """
    if arguments.get("custom_generate") is not None:  # an explicit loop wins over one that a repository attached
        return type(model).generate(model, inputs, **arguments)
    arguments.pop("custom_generate", None)
    given = [inputs, *(arguments.get(name) for name in _INPUTS)]
    items = next((value for value in given if value is not None), None)
    if items is None:
        raise ValueError(f"inputs (None) must be the items to point at; pass them, or one of {', '.join(_INPUTS)}.")

    config = copy.deepcopy(arguments.pop("generation_config", None) or GenerationConfig())
    arguments = config.update(**arguments)  # what is left belongs to the model

    def setting(name):
        value = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if value is None else value

    # The config says what the processors do, for models that read the task there: another one would forbid everything.
    config.task = setting("task") if task is None else task
    config.strict_geometry = bool(setting("strict_geometry") if strict_geometry is None else strict_geometry)
    rules = pointer_processors(
        config.task, items, arguments.get("attention_mask"), strict_geometry=config.strict_geometry
    )
    if setting("max_length") is None and setting("max_new_tokens") is None:
        config.max_new_tokens = decoding_steps(config.task, items.shape[1])
    processors = LogitsProcessorList([*(arguments.pop("logits_processor", None) or ()), *rules])
    return type(model).generate(model, inputs, generation_config=config, logits_processor=processors, **arguments)
