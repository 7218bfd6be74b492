"""RMoE: what tests/common does not ask of every model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from undersong import RMoEConfig, RMoEForCausalLM
from undersong.modeling.rmoe.modeling_rmoe import router_losses

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return RMoEForCausalLM(RMoEConfig(**{**SIZES, "router_hidden_size": 6, **changes})).to(dtype).eval()


def test_a_linear_router_is_mixtral():
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(MixtralConfig(**SIZES)).double().eval()
    theirs.set_experts_implementation("eager")  # the default knows no float64
    ours = build(router_type="linear")
    ours.load_state_dict(theirs.state_dict())
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS, "output_router_logits": True}
    got, want = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(got.logits[mask.bool()], want.logits[mask.bool()], rtol=0, atol=1e-6)
    for name in ("loss", "aux_loss"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_router_logits_follow_the_equations(kind):
    """One state a token, from layer to layer through torch's own cell."""
    model = build(router_type=kind)
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    logits = model(IDS, output_router_logits=True).router_logits
    state = torch.zeros(IDS.numel(), 6, dtype=torch.float64)
    for (gate, x), got in zip(seen, logits, strict=True):
        state = model.model.rnn_router(F.linear(x, gate.input_proj.weight), state)
        torch.testing.assert_close(got, F.linear(state, gate.score.weight), rtol=0, atol=1e-12)


def test_the_state_reaches_the_last_layer_and_gradients_flow_back_unless_detached():
    for detach in (False, True):
        model = build(detach_router_state=detach, num_experts_per_tok=4)  # with every expert chosen nothing jumps
        first = model.model.layers[0].mlp.gate.input_proj.weight
        for layer in model.model.layers:  # the residual stream is cut: only the state is left
            layer.mlp.experts.down_proj.data.zero_()
        last = model(IDS, output_router_logits=True).router_logits[-1]
        (gradient,) = torch.autograd.grad(last.square().sum(), first, allow_unused=True)
        assert (gradient is None or not gradient.any()) == detach
        with torch.no_grad():
            first.add_(0.5)
            moved = model(IDS, output_router_logits=True).router_logits[-1]
        assert (moved - last).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_our_choice_of_experts_equals_transformers_implementations(implementation, tokens):
    """One and two tokens go pair by pair, more of them expert by expert."""
    ours, theirs = build(torch.float32), build(torch.float32)
    theirs.set_experts_implementation(implementation)
    ids = IDS[:1, :tokens]
    got, want = ours(ids, labels=ids.clone()), theirs(ids, labels=ids.clone())
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    if tokens > 1:
        got.loss.backward()
        want.loss.backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_unknown_experts_implementation_is_refused():
    with pytest.raises(ValueError, match='experts_implementation="magic"'):
        build().set_experts_implementation("magic")


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_balancing_loss_is_transformers_own_and_counts_with_labels(per_layer):
    model = build(router_aux_loss_per_layer=per_layer, router_aux_loss_coef=0.3, router_z_loss_coef=0.01)
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    logits = outputs.router_logits
    if per_layer:
        want = sum(load_balancing_loss_func((layer,), 4, 2) for layer in logits) / 3
    else:
        want = load_balancing_loss_func(logits, 4, 2)
    torch.testing.assert_close(outputs.aux_loss, want)
    z = torch.stack(logits).logsumexp(-1).square().mean()
    cross_entropy = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss.float(), (cross_entropy + 0.3 * want + 0.01 * z).float())
    assert torch.equal(model(IDS, labels=IDS).loss, outputs.loss), "whether router logits are returned or not"
    assert model(IDS, labels=IDS).router_logits is None
    assert model(IDS).aux_loss is None


def test_padding_does_not_touch_the_router_losses():
    model = build(router_z_loss_coef=0.1)
    padded = torch.cat([torch.full((2, 4), 7), IDS], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True)
    want = model(IDS, output_router_logits=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    (a, b), (c, d) = (
        router_losses(got.router_logits, model.config, mask),
        router_losses(want.router_logits, model.config),
    )
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(b, d)


def test_an_accumulated_batch_counts_router_losses_once():
    model = build(router_aux_loss_coef=0.5)
    items = 2 * (IDS.shape[1] - 1)
    parts = [model(ids[None], labels=ids[None], num_items_in_batch=items).loss for ids in IDS]
    cross = sum(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]) for ids in IDS) / 2
    aux = sum(model(ids[None], output_router_logits=True).aux_loss for ids in IDS) / 2
    torch.testing.assert_close(sum(parts).float(), (cross + 0.5 * aux).float())


def test_routing_is_in_float32_in_a_half_precision_model(tmp_path):
    build(torch.float32).save_pretrained(tmp_path)
    model = RMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    gate = model.model.layers[0].mlp.gate
    assert {p.dtype for p in [*gate.parameters(), *model.model.rnn_router.parameters()]} == {torch.float32}
    outputs = model(IDS, output_router_logits=True)
    assert outputs.router_logits[0].dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16


def test_the_cell_is_saved_once(tmp_path):
    from safetensors import safe_open

    model = build(torch.float32)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "rnn_router" in name]  # noqa: SIM118 - no mapping
    assert sorted(names) == [f"model.rnn_router.{part}" for part in ("bias_hh", "bias_ih", "weight_hh", "weight_ih")]


def test_dense_layers_first_and_a_shared_expert():
    model = build(moe_layer_start=1, moe_intermediate_size=5, shared_expert_intermediate_size=7, share_weight=0.25)
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    assert len(outputs.router_logits) == 2
    assert model.model.layers[1].mlp.experts.down_proj.shape == (4, 16, 5)
    block, x = model.model.layers[2].mlp, torch.randn(1, 3, 16, dtype=torch.float64)
    state = torch.randn(3, 6, dtype=torch.float64)
    cell = tuple(getattr(model.model.rnn_router, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    got, _ = block(x, state, cell)
    shared, block.shared_expert = block.shared_expert, None
    torch.testing.assert_close(got, 0.5 * block(x, state, cell)[0] + 0.25 * shared(x))


def test_checkpointing_gives_the_same_gradients_with_two_forwards_before_one_backward():
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (model(IDS, labels=IDS).loss + 2 * model(IDS.flip(1), labels=IDS).loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_reentrant_checkpointing_is_refused():
    """The balancing loss would have no gradient."""
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant \(True\) loses gradients .*\{'use_reentrant': False\}"):
        model(IDS)


def test_autocast_trains_and_a_half_model_generates():
    model = build(torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(IDS, labels=IDS, output_router_logits=True)
    outputs.loss.backward()
    assert outputs.router_logits[0].dtype == torch.float32
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "gate" in name or "router" in name)
    half = model.to(torch.bfloat16).eval()
    assert half.generate(IDS[:1, :1], max_new_tokens=3, min_new_tokens=3).shape == (1, 4)


@pytest.mark.slow
def test_a_decoding_step_compiles_whole():
    model = build(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS[:, :1]).logits, model(IDS[:, :1]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) must lie between 1 and num_local_experts \(4\)"),
        ({"router_hidden_size": 0}, r"router_hidden_size \(0\) must be at least 1"),
        ({"moe_layer_start": 3}, r"moe_layer_start \(3\) must lie between 0 and num_hidden_layers - 1 \(2\)"),
        ({"router_type": "lstm"}, "router_type"),
        ({"hidden_size": 18}, r"hidden_size \(18\) must be divisible by num_attention_heads \(4\)"),
    ],
)
def test_errors(change, message):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises((ValueError, StrictDataclassError), match=message):
        RMoEConfig(**{**SIZES, **change})
