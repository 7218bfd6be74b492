"""A small Mamba or Mamba-2 of transformers and ours with the same weights, for tests."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from undersong import FastMamba2ForCausalLM, FastMambaForCausalLM

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}
KINDS = {
    "mamba": (MambaConfig, MambaForCausalLM, FastMambaForCausalLM, {"time_step_rank": 3}),
    "mamba2": (
        Mamba2Config,
        Mamba2ForCausalLM,
        FastMamba2ForCausalLM,
        {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
}


def make_config(kind, **overrides):
    return KINDS[kind][0](**{**SIZES, **SPECIAL, **KINDS[kind][3], **overrides})


def pair(kind, dtype=torch.float32, **overrides):
    """transformers' causal language model and ours, with the same weights, large enough that all of them matter."""
    torch.manual_seed(0)
    stock = KINDS[kind][1](make_config(kind, **overrides))
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            if key.endswith(("in_proj.bias", "out_proj.bias", "conv1d.bias")):
                parameter.normal_()  # they start at zero, where a leak through them would not show
    ours = KINDS[kind][2](stock.config)
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


def ids_of(batch, length, seed=0):
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
