"""Random models of a few thousand weights, one per way of building a decoder, by name."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
_ROTARY = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_EXTRA = {
    "llama": _ROTARY,
    "qwen3": _ROTARY,
    "mistral": _ROTARY | {"sliding_window": None},
    "gemma3_text": _ROTARY
    | {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_neo": {"intermediate_size": 48, "attention_types": [[["global", "local"], 1]], "window_size": 256},
    "bloom": {},
}
FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "gpt2", "opt", "gpt_neox", "gpt_neo"]


def tiny_model(family, *, attention="sdpa", seed=0, **overrides):
    """A random model of a `model_type`, evaluating, whose texts do not end by themselves."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SMALL | _EXTRA[family] | overrides))
    if family in ("gpt_neo", "bloom") and attention == "sdpa":
        attention = "eager"  # they have no other
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 makes attention nearly uniform, and mistakes invisible
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    model.generation_config.eos_token_id = None
    return model
