"""FastMamba and FastMamba2: equal to transformers where that is right; states, precision, training and adapters."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorWithFlattening, DynamicCache, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput

from undersong import (
    FastMamba2ForSequenceClassification,
    FastMambaForCausalLM,
    FastMambaForSequenceClassification,
    FastMambaForTokenClassification,
    FastMambaModel,
)

from .mamba_pairs import KINDS, ids_of, make_config, pair

kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")]


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(ids, **inputs).logits


def difference(got, want):
    return (got - want).abs().max().item()


# --- equality with transformers where transformers is right


@kinds
@pytest.mark.parametrize("use_bias", [False, True])
def test_equals_transformers(kind, use_bias):
    stock, ours = pair(kind, use_bias=use_bias)
    ids = ids_of(2, 21)
    with torch.no_grad():
        want, got = (model(ids, labels=ids, output_hidden_states=True) for model in (stock, ours))
    assert want.logits.abs().max() > 0.5
    assert difference(got.logits, want.logits) < 1e-5
    assert abs(got.loss - want.loss) < 1e-5
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert all(difference(a, b) < 1e-5 for a, b in zip(got.hidden_states, want.hidden_states, strict=True))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert ours.generate(ids, **options).tolist() == stock.generate(ids, **options).tolist()


def test_several_groups_of_mamba2_norm_each_by_itself(record_property):
    """rms(y silu(z)) over intermediate_size / n_groups channels (the authors' code; transformers from 5.23 on)."""
    stock, ours = pair("mamba2", n_groups=2)
    norm = ours.backbone.layers[0].mixer.norm
    y, z = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    gated = (y * torch.nn.functional.silu(z)).view(3, 5, 2, 16)
    want = gated / (gated.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 33.0))
        assert difference(norm(y.float(), z.float()), want.view(3, 5, 32) * torch.arange(1.0, 33.0)) < 1e-4
        norm.weight.fill_(1.0)
    error = difference(logits_of(ours, ids_of(2, 21)), logits_of(stock, ids_of(2, 21)))
    record_property("stock", error)
    if hasattr(stock.backbone.layers[0].mixer.norm, "group_size"):
        assert error < 1e-5


@kinds
def test_gradients_equal_transformers(kind):
    stock, ours = pair(kind, use_bias=True)
    ids = ids_of(2, 9)
    for model in (stock, ours):
        model.train()(ids, labels=ids).loss.backward()
    for (key, want), got in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert got.grad is not None, key
        assert difference(got.grad, want.grad) < 1e-5 * max(1.0, want.grad.abs().max()), key


@kinds
def test_other_shapes_of_the_configuration_equal_transformers(kind):
    odd = {"conv_kernel": 3, "hidden_act": "gelu", "use_conv_bias": False, "residual_in_fp32": False}
    stock, ours = pair(kind, **odd, **({"time_step_limit": (0.01, 0.05)} if kind == "mamba2" else {}))
    assert difference(logits_of(ours, ids_of(2, 9)), logits_of(stock, ids_of(2, 9))) < 1e-5


@kinds
def test_answers_like_transformers_do(kind):
    """The names, types and orders that code written for transformers' Mamba relies on."""
    stock, ours = pair(kind)
    ids = ids_of(2, 6)
    outputs = ours(ids[:, :5], use_cache=True)
    assert outputs.past_key_values is outputs.cache_params is outputs["cache_params"]
    if kind == "mamba":
        assert isinstance(outputs, MambaCausalLMOutput)
    assert [type(part) for part in ours(ids, use_cache=False, return_dict=False)] == [torch.Tensor]
    assert ours(ids, labels=ids, return_dict=False)[0].ndim == 0
    following = ours(ids[:, 5:], cache_params=outputs.cache_params, use_cache=True)
    assert difference(following.logits, logits_of(stock, ids)[:, 5:]) < 1e-5
    assert difference(logits_of(ours, ids, logits_to_keep=2), logits_of(ours, ids)[:, -2:]) < 1e-6
    assert ours.train()(ids).cache_params is None


# --- splits, padding, states


@kinds
@pytest.mark.slow
def test_fifty_random_splits_of_a_thousand_tokens(kind):
    single, double = pair(kind)[1], pair(kind, torch.float64)[1]
    ids, generator = ids_of(1, 1000), torch.Generator().manual_seed(1)
    want = logits_of(single, ids, use_cache=False)
    tokens = double.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, 1000:]
    for _ in range(50):
        count = int(torch.randint(1, 40, (1,), generator=generator))
        cuts = (torch.randperm(999, generator=generator)[:count] + 1).sort().values.tolist()
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, 1000], strict=True)]
        caches = DynamicCache(), DynamicCache()
        parts = []
        for chunk in ids.split(lengths, 1):
            parts.append(logits_of(single, chunk, past_key_values=caches[0], use_cache=True))
            logits = logits_of(double, chunk, past_key_values=caches[1], use_cache=True)
        assert difference(torch.cat(parts, 1), want) < 1e-4, lengths
        got = [logits[:, -1:].argmax(-1)]
        while len(got) < 8:
            got.append(logits_of(double, got[-1], past_key_values=caches[1], use_cache=True)[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(got, 1), tokens), lengths


@kinds
@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
def test_ragged_batches_equal_one_by_one_and_go_on_so(kind, side):
    _, model = pair(kind, torch.float64, use_bias=True)
    ids, mask = ids_of(4, 14), torch.zeros(4, 10, dtype=torch.long)
    for row, length in enumerate((10, 7, 3, 1)):
        where = {"left": slice(10 - length, 10), "right": slice(0, length), "both": slice(1, 1 + length)}
        if side == "middle":
            mask[row, torch.randperm(10, generator=torch.Generator().manual_seed(row))[:length]] = 1
        else:
            mask[row, where[side]] = 1
    with torch.no_grad():
        outputs = model(ids[:, :10], attention_mask=mask, use_cache=True)
        steps = [model(ids[:, t : t + 1], past_key_values=outputs.past_key_values).logits for t in range(10, 14)]
        for row in range(4):
            valid = mask[row].bool()
            alone = model(torch.cat([ids[row, :10][valid], ids[row, 10:]])[None]).logits[0]
            assert difference(outputs.logits[row, valid], alone[:-4]) < 1e-9
            assert difference(torch.cat(steps, 1)[row], alone[-4:]) < 1e-9


@kinds
def test_a_step_honours_its_mask(kind):
    _, model = pair(kind)
    ids = ids_of(2, 6)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    model(ids[:, 4:5], attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), past_key_values=cache)
    got = logits_of(model, ids[:, 5:], past_key_values=cache)
    assert difference(got[0], logits_of(model, torch.cat([ids[:1, :4], ids[:1, 5:]], 1))[0, -1:]) < 1e-5
    assert difference(got[1], logits_of(model, ids)[1, -1:]) < 1e-5


@kinds
def test_states_have_the_documented_shapes(kind):
    _, model = pair(kind)
    states = model(ids_of(3, 2), use_cache=True).past_key_values.layers[1].states
    channels = 32 if kind == "mamba" else 32 + 2 * 8
    assert states["conv"].shape == (3, channels, 4)
    assert not states["conv"][:, :, :2].any()  # nothing before the start
    assert states["ssm"].shape == ((3, 32, 8) if kind == "mamba" else (3, 4, 8, 8))
    for state in states.values():  # a window into the prompt's activations would keep those alive
        assert state.untyped_storage().nbytes() == state.nbytes


@kinds
def test_decoding_writes_into_the_states_and_training_does_not(kind):
    _, model = pair(kind)
    ids = ids_of(2, 6)

    def addresses():
        return [state.data_ptr() for layer in cache.layers for state in layer.states.values()]

    with torch.inference_mode():
        cache = model(ids[:, :3], use_cache=True).past_key_values
    with torch.no_grad():
        model(ids[:, 3:4], past_key_values=cache)  # what inference mode made is not to be written
        before = addresses()
        got = model(ids[:, 4:5], past_key_values=cache).logits
    assert addresses() == before  # so that a CUDA graph of a step can be replayed
    assert difference(got, logits_of(model, ids[:, :5])[:, -1:]) < 1e-5
    kept = copy.deepcopy(cache)
    model(ids[:, 5:], past_key_values=cache)
    assert addresses() != before
    for state, old in zip(cache.layers[0].states.values(), kept.layers[0].states.values(), strict=True):
        assert not torch.equal(state, old)


@kinds
def test_a_compiled_step_is_one_graph_and_is_not_compiled_again(kind):
    _, model = pair(kind)
    ids = ids_of(2, 16)
    want = logits_of(model, ids)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        for t in range(8, 16):
            got = step(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            assert difference(got, want[:, t : t + 1]) < 1e-5
    assert counter.frame_count <= 2  # the second time the number of seen tokens is found to vary


@kinds
def test_kernels_can_take_every_op_and_nothing_else(kind):
    from undersong import kernel_report

    _, model = pair(kind)
    recurrence = "SelectiveScan" if kind == "mamba" else "SSD"
    want = ["CausalConv1d", "CausalConv1dUpdate", "SelectiveStateUpdate", recurrence]
    layers = [use.layer for use in kernel_report(model).values()]
    layers = [layer for layer in layers if layer != "SiLU"]  # transformers' activation; its ops are gone
    assert sorted(layers) == sorted(2 * want)


# --- loading, saving, precision


@kinds
def test_half_precision_keeps_what_must_not_be_rounded(kind, tmp_path):
    stock, ours = pair(kind)
    ours.save_pretrained(tmp_path)
    half, info = type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    exact = {"mamba": ("A_log", "mixer.D", "dt_proj.bias"), "mamba2": ("A_log", "mixer.D", "dt_bias")}[kind]
    for key, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if key.endswith(exact) else torch.bfloat16), key
    ids = ids_of(2, 12)
    want = logits_of(stock, ids)
    error = (logits_of(half, ids) - want).norm() / want.norm()
    assert error < 0.02, error
    half.save_pretrained(tmp_path / "half")
    again = type(stock).from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, half.get_parameter(key).to(torch.bfloat16)), key
    assert half.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape == (2, 15)


@kinds
def test_autocast_trains(kind):
    _, model = pair(kind)
    ids = ids_of(2, 12)
    want = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.train()(ids, labels=ids)
    outputs.loss.backward()
    assert (outputs.logits - want).norm() < 0.03 * want.norm()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_configurations_with_the_old_keys_load_and_so_does_the_authors_name_of_the_token_table(tmp_path):
    """`state-spaces/mamba-*-hf` carry the authors' configuration keys beside transformers'."""
    from safetensors.torch import save_file

    stock, ours = pair("mamba")
    legacy = {"d_model": 16, "n_layer": 2, "d_inner": 32, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    config = MambaConfig(**{**ours.config.to_dict(), **legacy, "pad_vocab_size_multiple": 8})
    config.save_pretrained(tmp_path)
    tensors = {key.replace("embeddings", "embedding"): value for key, value in ours.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = FastMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert difference(logits_of(loaded.eval(), ids_of(2, 7)), logits_of(stock, ids_of(2, 7))) < 1e-5
    backbone = FastMambaModel.from_pretrained(tmp_path)
    assert torch.equal(backbone.embeddings.weight, ours.backbone.embeddings.weight)
    loaded.save_pretrained(tmp_path / "saved")  # under transformers' name, whatever the loaded file called it
    again, info = MambaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(again.backbone.embeddings.weight, ours.backbone.embeddings.weight)


def test_a_class_of_a_user_keeps_its_name_in_saved_folders(tmp_path):
    class Mine(FastMambaForCausalLM):
        pass

    model = Mine(make_config("mamba"))
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["Mine"]
    assert type(model) is Mine


# --- generation, training


@kinds
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_generate_takes_a_cache_by_either_name(kind, name):
    _, model = pair(kind)
    ids, cache = ids_of(2, 9), DynamicCache()
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model(ids[:, :6], use_cache=True, **{name: cache})
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **{name: cache})
    assert got.tolist() == want.tolist()
    assert cache.get_seq_length() == 9 + 5 - 1


@kinds
def test_two_different_caches_are_refused(kind):
    _, model = pair(kind)
    with pytest.raises(ValueError, match="past_key_values and cache_params are two names of one argument"):
        model(ids_of(1, 3), past_key_values=DynamicCache(), cache_params=DynamicCache())
    with pytest.raises(ValueError, match=r"cache_implementation \('dynamic'\) builds a cache, but past_key_values"):
        model.generate(ids_of(1, 3), past_key_values=DynamicCache(), cache_implementation="dynamic", max_new_tokens=1)


@kinds
def test_no_input_or_two_are_refused(kind):
    _, model = pair(kind)
    for inputs in ({}, {"input_ids": ids_of(1, 3), "inputs_embeds": torch.zeros(1, 3, 16)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)


@kinds
def test_flattened_batches_of_the_stock_collator_train_like_separate_rows(kind):
    _, model = pair(kind, torch.float64)
    rows = [ids_of(1, length, seed=length)[0].tolist() for length in (3, 7, 2, 5)]
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": row, "labels": row} for row in rows])
    assert batch["input_ids"].shape == (1, 17)
    items = sum(len(row) - 1 for row in rows)
    model.train()(**batch, num_items_in_batch=items).loss.backward()
    got = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        ids = torch.tensor([row])
        model(ids, labels=ids, num_items_in_batch=items).loss.backward()
    for key, parameter in model.named_parameters():  # transformers' loss is float32
        assert difference(got[key], parameter.grad) < 1e-6 * max(1.0, parameter.grad.abs().max()), key


# --- adapters


def lora(model, target, **options):
    """An adapter in every layer. PEFT refuses `out_proj` of a Mamba model, since fused kernels bypass it; through the
    list of layers, which has no model type, it is possible, and here it is effective."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=[target], init_lora_weights=False, r=2, **options)
    inject_adapter_in_model(config, model.backbone.layers)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return model


PROJECTIONS = [("mamba", name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
PROJECTIONS += [("mamba2", name) for name in ("in_proj", "out_proj")]


@pytest.mark.parametrize(("kind", "target"), PROJECTIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_on_every_projection_are_effective_and_merge(kind, target, use_dora):
    model = pair(kind, torch.float64)[1]
    ids = ids_of(2, 8)
    plain = logits_of(model, ids)
    lora(model, target, use_dora=use_dora).double()
    outputs = model(ids, labels=ids)
    assert difference(outputs.logits, plain) > 1e-3
    outputs.loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, key
    cache = model(ids[:, :7], use_cache=True).past_key_values
    step = logits_of(model, ids[:, 7:], past_key_values=cache)
    assert difference(step, outputs.logits[:, -1:]) < 1e-9  # training, prefill and decoding use the same weights
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert difference(logits_of(model, ids), outputs.logits) < 1e-9


def test_an_adapter_on_the_time_step_works_beside_its_float32_bias(tmp_path):
    pair("mamba")[1].save_pretrained(tmp_path)
    model = FastMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    plain = logits_of(model, ids_of(2, 8))
    assert lora(model, "dt_proj").backbone.layers[0].mixer.dt_proj.bias.dtype == torch.float32
    adapted = logits_of(model, ids_of(2, 8))
    assert adapted.isfinite().all()
    assert difference(adapted, plain) > 1e-2


# --- heads that transformers lacks


@pytest.mark.parametrize("by", ["mask", "pad id"])
def test_sequence_classification_reads_the_last_token_that_is_not_padding(by):
    torch.manual_seed(0)
    model = FastMambaForSequenceClassification(make_config("mamba", num_labels=3)).eval()
    ids = ids_of(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6])
    if by == "pad id":
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1] * 6])
    padded = torch.where(mask.bool(), ids, 0)
    with torch.no_grad():
        got = model(padded, **({"attention_mask": mask} if by == "mask" else {})).logits
        for row in range(3):
            assert difference(got[row], model(ids[row : row + 1, mask[row].bool()]).logits[0]) < 1e-5


def test_sequence_classification_without_a_padding_token_refuses_batches():
    model = FastMamba2ForSequenceClassification(make_config("mamba2", pad_token_id=None, num_labels=3))
    with pytest.raises(ValueError, match=r"the batch has 2 rows but pad_token_id is None"):
        model(ids_of(2, 4))
    assert model(ids_of(1, 4)).logits.shape == (1, 3)
    assert model(ids_of(2, 4), attention_mask=torch.ones(2, 4)).logits.shape == (2, 3)


def test_token_classification_labels_every_token_of_a_packed_row():
    torch.manual_seed(0)
    model = FastMambaForTokenClassification(make_config("mamba", num_labels=3)).eval()
    ids = ids_of(1, 9)
    with torch.no_grad():
        got = model(ids, seq_idx=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])).logits
        want = torch.cat([model(part).logits for part in ids.split([4, 5], 1)], 1)
    assert got.shape == (1, 9, 3)
    assert difference(got, want) < 1e-5
