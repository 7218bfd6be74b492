"""Recurrent and repetition-aware sequence modelling for the Hugging Face ecosystem.

`import undersong` makes transformers' Auto classes and PEFT know every row of `undersong.registry.ARCHITECTURES`.
It loads neither torch nor transformers: the names below are imported when they are first used.

>>> import undersong
>>> from transformers import AutoConfig
>>> AutoConfig.for_model("aaren").model_type
'aaren'
"""

import importlib

from . import registry

__version__ = "0.1.0"

# public name -> "module:attribute" (or "module" for a submodule), both relative to undersong
_EXPORTS = {
    "DecodingConfig": "generation.decoding_config:DecodingConfig",
    "DecodingPipeline": "generation.pipelines:DecodingPipeline",
    "DittoDataCollator": "training.ditto_data:DittoDataCollator",
    "DittoLoss": "training.ditto:DittoLoss",
    "DittoTrainer": "training.ditto:DittoTrainer",
    "GrammarRepetitionPenalty": "generation.grammar_penalty:GrammarRepetitionPenalty",
    "JustReadTwice": "generation.read_twice:JustReadTwice",
    "LocalHub": "hub.local_hub:LocalHub",
    "LocallyTypicalLogitsWarper": "generation.typical:LocallyTypicalLogitsWarper",
    "MambaTrainer": "training.mamba:MambaTrainer",
    "MambaTrainerMixin": "training.mamba:MambaTrainerMixin",
    "ReadTwice": "generation.repeat_tokens:ReadTwice",
    "RecurrentStateLayer": "modeling.cache:RecurrentStateLayer",
    "SelfReinforcementCapLogitsProcessor": "generation.repetition_cap:SelfReinforcementCapLogitsProcessor",
    "SetBasedGenerate": "generation.set_generate:SetBasedGenerate",
    "SetPrompt": "generation.set_prompt:SetPrompt",
    "TopPLogitsWarper": "generation.top_p:TopPLogitsWarper",
    "add_state_tuning": "training.mamba:add_state_tuning",
    "build_kernel": "hub.build_kernel:build_kernel",
    "data": "data",
    "decode_graph": "modeling.decode_graph:decode_graph",
    "demo": "demo",
    "doctor": "diagnosis:doctor",
    "enable_fast_mamba": "modeling.enable_fast_mamba:enable_fast_mamba",
    "export": "hub.export:export",
    "export_custom_generate": "hub.custom_generate:export_custom_generate",
    "generate": "generation.decoding_config:generate",
    "generation": "generation",
    "hub": "hub",
    "kernelize": "hub.kernelize:kernelize",
    "kernel_report": "hub.kernelize:kernel_report",
    "load_original": "modeling.load_original:load_original",
    "load_state": "modeling.state_file:load_state",
    "mcq": "generation.multiple_choice:mcq",
    "metrics": "metrics",
    "model_card": "hub.cards:model_card",
    "modeling": "modeling",
    "ops": "ops",
    "publish": "hub.publish:publish",
    "register": "registry:register",
    "save_state": "modeling.state_file:save_state",
    "self_reinforcement": "metrics.self_reinforcement:self_reinforcement",
    "training": "training",
}
_EXPORTS |= {
    path.partition(":")[2]: path.removeprefix("undersong.")
    for row in registry.ARCHITECTURES.values()
    for path in (row.config, *row.models.values())
    if path.startswith("undersong.")
}

__all__ = ["__version__", "registry", *_EXPORTS]


def __getattr__(name):
    try:
        module, _, attribute = _EXPORTS[name].partition(":")
    except KeyError:
        raise AttributeError(f"module 'undersong' has no attribute {name!r}") from None
    value = importlib.import_module(f".{module}", __name__)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})


registry.register()
