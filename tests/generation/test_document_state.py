"""A question that branches from the state gives what the whole prompt gives; the state is paid for once and reused."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from undersong import FastMambaForCausalLM
from undersong.generation.document_state import answer, branch, twice_state

from .test_repeat_tokens import tiny_aaren, tiny_mamba2
from .tiny_llama import tiny_llama

DOC, SEPARATOR, PREFIX = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [9], [1, 30]
QUESTIONS = [[40, 41], [42, 43, 44], [45, 46], [47]]
FULL = [*PREFIX, *DOC, *SEPARATOR, *DOC]


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.2)).eval()
    model.generation_config.eos_token_id = None
    return model


def tiny_qwen3():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return Qwen3ForCausalLM(config).eval()


def tiny_fast_mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=1.0)
    model = FastMambaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


MODELS = {
    "fast_mamba": tiny_fast_mamba,
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": tiny_qwen3,
    "aaren": tiny_aaren,
    "mamba2": tiny_mamba2,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def state(model):
    return twice_state(model, DOC, separator_ids=SEPARATOR, prefix_ids=PREFIX)


@torch.no_grad()
def test_branches_give_the_logits_of_the_whole_prompt(model, state):
    name = "cache_params" if type(model).__name__ == "Mamba2ForCausalLM" else "past_key_values"
    questions = torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])
    want = model(torch.cat([torch.tensor([FULL] * 3), questions], 1)).logits[:, -3:]
    for cache in (branch(state, 3), branch(state, 3)):  # twice: the first branch left the state as it was
        got = model(questions, **{name: cache}).logits
        assert (got - want).abs().max() <= 1e-4
    assert want.std() > 0.01  # the bound above means something
    without = model(questions).logits
    assert (without - want).abs().max() > 1e-3  # and so does the document


def test_answers_are_those_of_the_whole_prompts(model, state):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = [model.generate(torch.tensor([FULL + question]), **options)[0, -5:].tolist() for question in QUESTIONS]
    for _ in range(2):
        assert [tokens.tolist() for tokens in answer(model, state, QUESTIONS, **options)] == want


def test_documents_come_as_tensors_too_and_once_or_more_often():
    model = tiny_llama()
    for times in (1, 2, 3):
        cache = twice_state(model, torch.tensor([DOC]), times=times, separator_ids=SEPARATOR)
        assert cache.get_seq_length() == times * len(DOC) + times - 1


def test_a_state_is_not_shared_with_its_branches():
    model = tiny_aaren()
    state = twice_state(model, DOC)
    before = copy.deepcopy(state.layers[0].states)
    model(torch.tensor([[5, 6]] * 2), past_key_values=branch(state, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.layers[0].states.items())


@torch.no_grad()
def test_stock_mamba_1_is_refused_because_it_forgets():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=1.0)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(
        ValueError,
        match="MambaForCausalLM drops its state .* use FastMambaForCausalLM or a Mamba-2 model, or ReadTwice",
    ):
        twice_state(model, DOC)
    # What the refusal is about. Should this fail one day, stock Mamba continues its state and the refusal can go.
    ids = torch.tensor([FULL])
    whole = model(ids).logits[:, -4:]
    cache = model(ids[:, :-4], use_cache=True).cache_params
    assert (model(ids[:, -4:], cache_params=copy.deepcopy(cache)).logits - whole).abs().max() > 1e-2
    steps = [model(token, cache_params=cache).logits for token in ids[:, -4:].split(1, 1)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4


def test_refusals():
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=r"span \(0, 0\) must satisfy 0 <= start < end <= 0"):
        twice_state(model, [])
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        twice_state(model, DOC, times=0)
    with pytest.raises(
        ValueError, match=r"document 7 times \(70 tokens\) .* max_position_embeddings \(64\) of GPT2LM"
    ):
        twice_state(model, DOC, times=7)
    with pytest.raises(ValueError, match=r"questions\[1\] must hold a token"):
        answer(model, twice_state(model, DOC), [[5], []], max_new_tokens=1)
