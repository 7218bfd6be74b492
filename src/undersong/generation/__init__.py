"""Decoding: logits processors, prompts and decoding loops for `generate()`, and one config for all of them.

Names are imported when they are first used, because each needs torch and transformers.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "decoding_config": ("DecodingConfig", "generate"),
        "document_state": ("answer", "branch", "twice_state"),
        "grammar_penalty": ("GrammarRepetitionPenalty",),
        "masks": ("gather_cache", "to_model_mask"),
        "mbr": ("MBR", "mbr_select"),
        "multiple_choice": ("mcq", "score_options"),
        "pipelines": ("DecodingPipeline", "ReadTwicePipeline"),
        "pointer_generate": ("generate_pointers",),
        "pointer_processors": (
            "HullLogitsProcessor",
            "PermutationLogitsProcessor",
            "TriangleLogitsProcessor",
            "decoding_steps",
        ),
        "read_twice": ("JustReadTwice",),
        "repeat_tokens": ("ReadTwice", "repeat_input_ids"),
        "repetition_cap": ("SelfReinforcementCapLogitsProcessor",),
        "set_cache": ("SetCache",),
        "set_generate": ("SetBasedGenerate", "set_prefill"),
        "set_prompt": ("SetPrompt", "SetPromptEncoding"),
        "top_p": ("TopPLogitsWarper",),
        "typical": ("LocallyTypicalLogitsWarper", "use_fast_typical"),
    },
)
