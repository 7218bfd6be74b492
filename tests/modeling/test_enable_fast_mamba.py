"""enable_fast_mamba changes what a model runs and nothing of what it is."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaModel,
)

from undersong import FastMambaModel, enable_fast_mamba

from .mamba_pairs import SIZES, SPECIAL, ids_of, make_config, pair

pytestmark = pytest.mark.usefixtures("one_thread")


def falcon():
    return FalconMambaConfig(**SIZES, **SPECIAL, time_step_rank=3, use_bias=True)


def jamba(**overrides):
    sizes = {key: value for key, value in SIZES.items() if key != "state_size"} | {"num_hidden_layers": 4}
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 3, "mamba_proj_bias": True}
    attention = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 2, "expert_layer_period": 2, "intermediate_size": 24}
    return JambaConfig(**{**sizes, **SPECIAL, **mamba, **attention, **experts, **overrides})


CONFIGS = {
    "mamba": lambda: make_config("mamba", use_bias=True),
    "mamba2": lambda: make_config("mamba2", use_bias=True),
    "falcon_mamba": falcon,
    "jamba": jamba,
}
types = pytest.mark.parametrize("model_type", CONFIGS)


def build(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[model_type]()).eval()


@types
def test_outputs_stay_and_so_do_weights_and_optimizer(model_type):
    model = build(model_type)
    ids = ids_of(2, 11)
    with torch.no_grad():
        want = model(ids).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    before, optimizer = dict(model.named_parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    classes = [type(part) for part in model.modules()]
    assert enable_fast_mamba(model) is model
    assert [type(part) for part in model.modules()] != classes
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[key] is parameter for key, parameter in before.items())
    with torch.no_grad():
        assert (model(ids).logits - want).abs().max() < 1e-5
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert got.tolist() == tokens.tolist()
    model.train()(ids, labels=ids).loss.backward()
    weight = next(parameter for key, parameter in after.items() if "in_proj" in key)
    old = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, old)


@types
def test_chunks_and_left_padding_come_right(model_type):
    model = enable_fast_mamba(build(model_type))
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    alone = [
        torch.stack(model.generate(row, attention_mask=torch.ones_like(row), **options).logits, 1)
        for row in (ids[:1, 4:], ids[1:])
    ]
    for chunk in (None, 2, 5):  # 2: a chunk of padding alone
        got = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
        assert (torch.stack(got.logits, 1) - torch.cat(alone)).abs().max() < 1e-4, chunk
    beams = {"max_new_tokens": 6, "num_beams": 3, "attention_mask": mask}
    assert model.generate(ids, **beams).tolist() == model.generate(ids, use_cache=False, **beams).tolist()


@types
def test_packed_position_ids_separate_sequences(model_type):
    model = enable_fast_mamba(build(model_type))
    ids = ids_of(1, 12)
    position_ids = torch.cat([torch.arange(n) for n in (5, 3, 4)])[None]
    with torch.no_grad():
        want = torch.cat([model(part).logits for part in ids.split([5, 3, 4], 1)], 1)
        got = model(ids, position_ids=position_ids, use_cache=False).logits
    assert (got - want).abs().max() < 1e-5
    if model_type == "jamba":  # with a cache its attention layers would not separate the sequences
        with pytest.raises(ValueError, match="packed input .* needs use_cache=False"):
            model(ids, position_ids=position_ids)


def test_jamba_keeps_its_attention_and_experts():
    model = build("jamba")
    before = {type(part).__name__ for part in model.modules()}
    enable_fast_mamba(model)
    after = {type(part).__name__ for part in model.modules()}
    assert before - after == {"JambaMambaMixer", "JambaMambaDecoderLayer"}
    ids = ids_of(2, 7)
    outputs = model(ids, output_hidden_states=True, use_cache=True)
    assert len(outputs.hidden_states) == 5
    kinds = [type(layer).__name__ for layer in outputs.past_key_values.layers]
    assert kinds == ["RecurrentStateLayer", "DynamicLayer"] * 2
    assert [layer.get_seq_length() for layer in outputs.past_key_values.layers] == [7] * 4


@types
def test_a_second_call_changes_nothing(model_type):
    model = enable_fast_mamba(build(model_type))
    before = [(name, id(part), type(part)) for name, part in model.named_modules()]
    enable_fast_mamba(model)
    assert [(name, id(part), type(part)) for name, part in model.named_modules()] == before


def test_a_bare_backbone_and_one_inside_another_module():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = MambaModel(make_config("mamba"))

    model = enable_fast_mamba(Tagger())
    assert type(model.encoder) is FastMambaModel
    assert type(enable_fast_mamba(MambaModel(make_config("mamba")))) is FastMambaModel


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_with_adapters(kind):
    """Upgrading under PEFT equals adapting an upgraded model; generation goes through PEFT's wrapper."""
    stock, ours = pair(kind)
    config = LoraConfig(target_modules=["in_proj"], init_lora_weights=False, r=2, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    want = get_peft_model(ours, config)
    torch.manual_seed(1)
    got = enable_fast_mamba(get_peft_model(stock, config))
    ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        assert (got(ids, attention_mask=mask).logits[1] - want(ids, attention_mask=mask).logits[1]).abs().max() < 1e-6
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    tokens = [model.generate(input_ids=ids, prefill_chunk_size=2, **options).tolist() for model in (got, want)]
    assert tokens[0] == tokens[1] == want.generate(input_ids=ids, **options).tolist()


class ScaledLinear(nn.Module):
    """Like a quantised layer: integers and a scale, whose `weight` is no matrix to multiply with."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.abs().amax() / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@types
def test_quantised_projections_are_called_and_not_read(model_type):
    model = build(model_type)
    full = enable_fast_mamba(copy.deepcopy(model))
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                setattr(part, name, ScaledLinear(child))
    ids = ids_of(2, 9)
    with torch.no_grad():
        got = enable_fast_mamba(model)(ids).logits
        want = full(ids).logits
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


def test_a_model_with_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = build("mamba")
    for part in model.modules():
        add_hook_to_module(part, ModelHook())
    enable_fast_mamba(model)
    ids = ids_of(1, 8)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        want = torch.cat([model(part).logits for part in ids.split([3, 5], 1)], 1)
        assert (model(ids, position_ids=position_ids).logits - want).abs().max() < 1e-5


def test_saving_an_upgraded_model_is_saving_the_stock_model(tmp_path):
    import json

    model = enable_fast_mamba(build("mamba"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MambaForCausalLM"]


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_an_upgraded_models_class_loads_what_it_saved(model_type, tmp_path):
    model = enable_fast_mamba(build(model_type))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert [type(part) for part in again.modules()] == [type(part) for part in model.modules()]
    with torch.no_grad():
        assert (again(ids_of(1, 7)).logits - model(ids_of(1, 7)).logits).abs().max() < 1e-5


def test_unsupported_models_are_named():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(
        ValueError, match=r"model \(LlamaForCausalLM, model_type 'llama'\) has no layers that enable_f"
    ):
        enable_fast_mamba(llama)
    with pytest.raises(ValueError, match=r"model \(Linear, model_type None\).*mamba, mamba2, falcon_mamba and jamba"):
        enable_fast_mamba(nn.Linear(2, 2))


def test_no_reference_to_the_model_is_kept():
    import weakref

    model = enable_fast_mamba(build("mamba"))
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
