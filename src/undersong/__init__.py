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
    "AarenStream": "modeling.aaren_stream:AarenStream",
    "AutoModelForSequentialRecommendation": "modeling.auto_recommendation:AutoModelForSequentialRecommendation",
    "DataCollatorForCloze": "training.recommendation_data:DataCollatorForCloze",
    "DataCollatorForNextItem": "training.recommendation_data:DataCollatorForNextItem",
    "DataCollatorForRecformerFinetuning": "training.recformer_data:DataCollatorForRecformerFinetuning",
    "DataCollatorForRecformerPretraining": "training.recformer_data:DataCollatorForRecformerPretraining",
    "DecodingConfig": "generation.decoding_config:DecodingConfig",
    "DecodingPipeline": "generation.pipelines:DecodingPipeline",
    "DittoDataCollator": "training.ditto_data:DittoDataCollator",
    "DittoLoss": "training.ditto:DittoLoss",
    "DittoTrainer": "training.ditto:DittoTrainer",
    "FullRankEval": "training.full_rank_eval:FullRankEval",
    "GrammarRepetitionPenalty": "generation.grammar_penalty:GrammarRepetitionPenalty",
    "ItemVocab": "tokenization.item_vocab:ItemVocab",
    "JustReadTwice": "generation.read_twice:JustReadTwice",
    "LocalHub": "hub.local_hub:LocalHub",
    "LocallyTypicalLogitsWarper": "generation.typical:LocallyTypicalLogitsWarper",
    "MambaTrainer": "training.mamba:MambaTrainer",
    "MambaTrainerMixin": "training.mamba:MambaTrainerMixin",
    "OrderSearchLoss": "training.order_search:OrderSearchLoss",
    "OrderSearchTrainer": "training.order_search:OrderSearchTrainer",
    "OrderSearchTrainerMixin": "training.order_search:OrderSearchTrainerMixin",
    "PLSTMGraphCollator": "data.graph_collator:PLSTMGraphCollator",
    "PointerDataCollator": "data.pointer_collator:PointerDataCollator",
    "ReadTwice": "generation.repeat_tokens:ReadTwice",
    "RecformerTokenizer": "tokenization.recformer_tokenizer:RecformerTokenizer",
    "RecurrentRouterConfig": "modeling.recurrent_router_config:RecurrentRouterConfig",
    "RecurrentStateLayer": "modeling.cache:RecurrentStateLayer",
    "RouterStatsCallback": "training.router_stats:RouterStatsCallback",
    "SelfReinforcementCapLogitsProcessor": "generation.repetition_cap:SelfReinforcementCapLogitsProcessor",
    "Set2SetPooling": "modeling.set_encoder:Set2SetPooling",
    "SetBasedGenerate": "generation.set_generate:SetBasedGenerate",
    "SetPrompt": "generation.set_prompt:SetPrompt",
    "StateControlConfig": "modeling.state_control_config:StateControlConfig",
    "StateMonitor": "modeling.state_monitor:StateMonitor",
    "StatePassingTrainer": "training.state_passing:StatePassingTrainer",
    "StatePassingTrainerMixin": "training.state_passing:StatePassingTrainerMixin",
    "TopPLogitsWarper": "generation.top_p:TopPLogitsWarper",
    "TwoStageCallback": "training.two_stage:TwoStageCallback",
    "add_state_tuning": "training.mamba:add_state_tuning",
    "apply_state_control": "modeling.state_control:apply_state_control",
    "attach_recurrent_router": "modeling.attach_recurrent_router:attach_recurrent_router",
    "build_kernel": "hub.build_kernel:build_kernel",
    "calibrate_thresholds": "modeling.state_control:calibrate_thresholds",
    "data": "data",
    "decode_graph": "modeling.decode_graph:decode_graph",
    "demo": "demo",
    "detach_recurrent_router": "modeling.attach_recurrent_router:detach_recurrent_router",
    "doctor": "diagnosis:doctor",
    "enable_fast_mamba": "modeling.enable_fast_mamba:enable_fast_mamba",
    "export": "hub.export:export",
    "export_custom_generate": "hub.custom_generate:export_custom_generate",
    "find_collapse": "modeling.state_monitor:find_collapse",
    "full_ranks": "training.full_rank_eval:full_ranks",
    "generate": "generation.decoding_config:generate",
    "generation": "generation",
    "hub": "hub",
    "kernel_report": "hub.kernelize:kernel_report",
    "kernelize": "hub.kernelize:kernelize",
    "load_original": "modeling.load_original:load_original",
    "load_recurrent_router": "modeling.attach_recurrent_router:load_recurrent_router",
    "load_state": "modeling.state_file:load_state",
    "log_gap_statistics": "modeling.aaren.modeling_aaren_events:log_gap_statistics",
    "mcq": "generation.multiple_choice:mcq",
    "metrics": "metrics",
    "model_card": "hub.cards:model_card",
    "modeling": "modeling",
    "ops": "ops",
    "per_token_loss": "modeling.state_monitor:per_token_loss",
    "publish": "hub.publish:publish",
    "recurrent_router_modules": "modeling.attach_recurrent_router:recurrent_router_modules",
    "register": "registry:register",
    "remove_state_control": "modeling.state_control:remove_state_control",
    "save_recurrent_router": "modeling.attach_recurrent_router:save_recurrent_router",
    "save_state": "modeling.state_file:save_state",
    "self_reinforcement": "metrics.self_reinforcement:self_reinforcement",
    "state_control": "modeling.state_control:state_control",
    "tokenization": "tokenization",
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
