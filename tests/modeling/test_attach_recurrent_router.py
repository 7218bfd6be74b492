"""A recurrent router on models that exist already: nothing changes until it is trained, and it comes off again."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from undersong.hub.local_hub import LocalHub
from undersong.modeling.attach_recurrent_router import (
    attach_recurrent_router,
    detach_recurrent_router,
    load_recurrent_router,
    recurrent_router_modules,
    save_recurrent_router,
)
from undersong.modeling.recurrent_router_config import RecurrentRouterConfig

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Mixtral": {},
    "Olmoe": {},
    "Qwen3Moe": {"moe_intermediate_size": 8, "head_dim": 4, "norm_topk_prob": True},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def build(family, dtype=torch.float32, head="ForCausalLM", **changes):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config).to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default knows no float64
    return model


def trained(model, seed=1):
    """Weights as after a training of the router."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "rmoe_" in name:
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def run(model):
    return model(IDS, attention_mask=MASK, labels=IDS, output_router_logits=True)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_is_bit_identical_until_trained(family, dtype):
    base = build(family, dtype)
    model = attach_recurrent_router(copy.deepcopy(base), 6)
    assert type(model).__name__ == f"RMoE{family}ForCausalLM"
    assert isinstance(model, type(base))
    got, want = run(model), run(base)
    assert len(got.router_logits) == 3
    for name in ("logits", "loss", "aux_loss"):
        assert torch.equal(got[name], want[name]), name
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        assert torch.equal(a, b)
    options = {"attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6}
    for mode in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        assert torch.equal(model.generate(IDS, **options, **mode), base.generate(IDS, **options, **mode))
    assert not torch.equal(run(trained(model)).logits, want.logits)


@every_family
def test_scores_follow_the_equation(family):
    """s_i = W_i x_i + W2_i h_i, with torch's own cell from layer to layer."""
    model = trained(attach_recurrent_router(build(family, torch.float64), 6))
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].reshape(-1, 16))))
    logits = run(model).router_logits
    state = torch.zeros(IDS.numel(), 6, dtype=torch.float64)
    for (gate, x), got in zip(seen, logits, strict=True):
        state = model.model.rmoe_cell(gate.rmoe_input_proj(x), state)
        torch.testing.assert_close(got, x @ gate.weight.T + gate.rmoe_score(state), rtol=0, atol=1e-12)


@every_family
def test_cached_and_padded_generation_of_a_trained_router(family):
    model = trained(attach_recurrent_router(build(family, torch.float64), 6))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(IDS, attention_mask=MASK, **options)
    assert torch.equal(batch, model.generate(IDS, attention_mask=MASK, use_cache=False, **options))
    assert torch.equal(batch[:1, -6:], model.generate(IDS[:1, 3:], **options)[:, -6:])


@every_family
def test_checkpointing_gives_the_same_gradients_with_two_forwards_before_one_backward(family):
    gradients = []
    for checkpointing in (False, True):
        model = trained(attach_recurrent_router(build(family, torch.float64), 6)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        first, second = model(IDS, labels=IDS), model(IDS.flip(1), labels=IDS)
        (first.loss + 2 * second.loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.rmoe_cell.weight_hh"].abs().max() > 0
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_reentrant_checkpointing_is_refused():
    model = attach_recurrent_router(build("Olmoe"), 6).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant \(True\) .*\{'use_reentrant': False\}"):
        model(IDS)


@every_family
def test_detach_gives_the_model_back(family):
    base = build(family)
    want = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    frozen = base.model.embed_tokens.weight.requires_grad_(False)
    model = attach_recurrent_router(base, 6, freeze_base=True)
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"rmoe_cell", "rmoe_input_proj", "rmoe_score"}
    detach_recurrent_router(trained(model))
    assert [type(part) for part in model.modules()] == [type(part) for part in build(family).modules()]
    assert type(model.config) is type(build(family).config)
    assert "recurrent_router" not in model.config.to_dict()
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(run(model).logits, run(build(family)).logits)
    attach_recurrent_router(model, 6)  # and again


@every_family
def test_the_whole_model_saves_and_loads(family, tmp_path):
    """Also of a checkpoint whose experts are stored one by one, as the Hub's are."""
    build(family).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(attach_recurrent_router(model, 6, router_type="rnn"))
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["architectures"] == [f"RMoE{family}ForCausalLM"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(run(loaded).logits, run(model).logits, rtol=0, atol=1e-5)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert half.model.rmoe_cell.weight_ih.dtype == torch.float32
    assert torch.equal(half.model.rmoe_cell.weight_ih, model.model.rmoe_cell.weight_ih)


@every_family
def test_the_router_alone_saves_and_loads(family, tmp_path):
    model = trained(attach_recurrent_router(build(family), 6))
    folder = save_recurrent_router(model, tmp_path / "router")
    assert {path.name for path in folder.iterdir()} == {"recurrent_router.safetensors", "recurrent_router.json"}
    other = load_recurrent_router(build(family), folder, freeze_base=True)
    assert torch.equal(run(other).logits, run(model).logits)


def test_a_router_from_a_hub(tmp_path):
    """In a process of its own: huggingface_hub reads the server's address when it is imported."""
    base = build("Olmoe")
    base.save_pretrained(tmp_path / "base")
    folder = save_recurrent_router(trained(attach_recurrent_router(base, 6)), tmp_path / "router")
    code = f"""
        import torch, transformers, undersong
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        undersong.load_recurrent_router(model, "team/router", revision="main")
        logits = model(torch.tensor([[3, 4]]), output_router_logits=True).router_logits
        assert len(logits) == 3, "classes that were never built as such must be known too"
        print(sum(p.double().sum().item() for name, p in model.named_parameters() if "rmoe" in name))
    """
    with LocalHub() as hub:
        hub.create("models", "team/router")
        hub.commit("models", "team/router", {path.name: path.read_bytes() for path in folder.iterdir()})
        environment = {**os.environ, **hub.env(home=tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr[-3000:]
    want = sum(p.double().sum().item() for name, p in base.named_parameters() if "rmoe" in name)
    assert float(done.stdout) == pytest.approx(want, abs=1e-9)


def test_a_router_for_another_model_is_refused(tmp_path):
    folder = save_recurrent_router(attach_recurrent_router(build("Olmoe"), 6), tmp_path)
    with pytest.raises(ValueError, match="made for a model with num_routers = 3, but the model's is 2"):
        load_recurrent_router(build("Olmoe", num_hidden_layers=2), folder)
    with pytest.raises(ValueError, match="model_type = 'olmoe', but the model's is 'mixtral'"):
        load_recurrent_router(build("Mixtral"), folder)
    with pytest.raises(ValueError, match=r"has no recurrent_router.json; save_recurrent_router writes it"):
        load_recurrent_router(build("Olmoe"), tmp_path.parent)


def test_peft_trains_and_saves_it(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = attach_recurrent_router(build("Olmoe"), 6)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=recurrent_router_modules(model))
    wrapped = get_peft_model(model, config).train()
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in names if "modules_to_save" in name} == set(
        recurrent_router_modules(model)
    )
    wrapped(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if "modules_to_save" in name}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.normal_(std=0.5)
    wrapped.eval().save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(attach_recurrent_router(build("Olmoe"), 6), tmp_path).eval()
    assert torch.equal(run(other).logits, run(wrapped).logits)
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        detach_recurrent_router(wrapped)


def test_replace_does_without_the_routers_that_are_there():
    model = attach_recurrent_router(build("Qwen3Moe"), 6, mode="replace")
    before = run(model).logits
    for layer in model.model.layers:
        assert not layer.mlp.gate.weight.requires_grad
        layer.mlp.gate.weight.data.normal_()
    assert torch.equal(run(model).logits, before)
    detach_recurrent_router(model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_without_experts_are_passed_by_and_heads_keep_their_class():
    model = build("Qwen3Moe", head="ForSequenceClassification", mlp_only_layers=[1])
    want = model(IDS).logits
    attach_recurrent_router(model, 6)
    assert type(model).__name__ == "Qwen3MoeForSequenceClassification"
    assert torch.equal(model(IDS).logits, want)
    assert [layer.mlp.gate.rmoe_index for layer in (model.model.layers[0], model.model.layers[2])] == [0, 1]
    assert not torch.equal(trained(model)(IDS).logits, want)


def test_a_routers_own_call_says_what_is_missing():
    model = attach_recurrent_router(build("Mixtral"), 6)
    with pytest.raises(RuntimeError, match="called outside its model"):
        model.model.layers[0].mlp.gate(torch.ones(1, 16))


def test_errors():
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=2)
    )  # fmt: skip
    with pytest.raises(ValueError, match="LlamaForCausalLM.* has no layer with a router"):
        attach_recurrent_router(dense)
    with pytest.raises(ValueError, match="has no recurrent router; attach_recurrent_router gives it one"):
        save_recurrent_router(build("Mixtral"), "nowhere")
    model = attach_recurrent_router(build("Mixtral"), 6)
    with pytest.raises(ValueError, match="has a recurrent router; detach_recurrent_router it first"):
        attach_recurrent_router(model)
    with pytest.raises(ValueError, match=r"router_hidden_size \(0\)"):
        attach_recurrent_router(build("Mixtral"), 0)
    with pytest.raises(ValueError, match=r"mode \('add'\) must be one of 'residual', 'replace'"):
        RecurrentRouterConfig(mode="add")
    odd = build("Mixtral")
    odd.model.layers[0].mlp.gate.forward = lambda x: (x[:, :4], x[:, :2], torch.zeros(len(x), 2).long())
    with pytest.raises(ValueError, match="MixtralTopKRouter does not choose by softmax and top-k"):
        attach_recurrent_router(odd)


@every_family
def test_a_model_built_from_its_configuration_starts_as_the_base_does(family):
    config = attach_recurrent_router(build(family), 6).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == f"RMoE{family}ForCausalLM"
    assert type(model.model).__name__ == f"RMoE{family}Model"
    assert all(not layer.mlp.gate.rmoe_score.weight.any() for layer in model.model.layers)
    assert all(layer.mlp.gate.rmoe_input_proj.weight.std() > 0.1 for layer in model.model.layers)
    assert len(run(model).router_logits) == 3
