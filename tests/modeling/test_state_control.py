"""State control is what its equation says, in every way a model can read a text, and leaves no trace."""

import copy
import gc
import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaForCausalLM,
)

from undersong import FastMamba2ForCausalLM, FastMamba2ForSequenceClassification
from undersong.modeling import decode_graph as graphs
from undersong.modeling.decode_graph import decode_graph
from undersong.modeling.state_control import (
    StateControlConfig,
    apply_state_control,
    calibrate_thresholds,
    remove_state_control,
    state_control,
)
from undersong.modeling.state_file import load_state, save_state

from .mamba_pairs import ids_of, make_config, pair

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, HEADS, HUGE = 2, 4, 1e30
LIMITS = [[0.05, 0.2, 0.1, 0.4], [0.3, 0.02, 0.1, 0.2]]
CONTROLS = {
    "rescale": StateControlConfig("rescale", decay_mult=[0.3, 3.0], insert_mult=LIMITS, dt_mult=0.7),
    "normalize": StateControlConfig("normalize", threshold=LIMITS, threshold_multiplier=0.5, granularity=3),
    "window": StateControlConfig("window", window=8, granularity=4, decay_mult=0.1),
}
controls = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)


def build(dtype=torch.float32, **overrides):
    """Ours, with heads that hardly forget, so that what a control takes away would be felt."""
    _, model = pair("mamba2", dtype, initializer_range=0.6, **overrides)
    for name, parameter in model.named_parameters():
        if "A_log" in name:
            parameter.data -= 3
    return model


@pytest.fixture
def model():
    return build(torch.float64)


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def in_chunks(model, ids, *sizes, mask=None):
    """Logits and the cache of a text that is read in parts."""
    cache, logits = DynamicCache(), []
    stop = 0
    for part in ids.split(sizes, 1):
        stop += part.shape[1]
        inputs = {} if mask is None else {"attention_mask": mask[:, :stop]}
        logits.append(logits_of(model, part, past_key_values=cache, use_cache=True, **inputs))
    return torch.cat(logits, 1), cache


def close(got, want, atol):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def by_the_equation(mixer, hidden_states, control, index=0):
    """A mixer's output for one row, token by token from the definition in `StateControlConfig`."""

    def value(name, neutral):
        given = getattr(control, name)
        for _ in range(2):
            given = given[index] if isinstance(given, list) and len(given) == LAYERS else given
        return torch.tensor(neutral if given is None else given, dtype=torch.float64)

    z, xBC, dt = mixer.project(hidden_states)
    xBC, _ = mixer.convolve(xBC)
    x, B, C = mixer.heads_and_groups(xBC)
    delta = F.softplus(value("raw_dt_mult", 1.0) * dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    delta = value("dt_mult", 1.0) * delta
    A = value("decay_mult", 1.0) * mixer.decay + value("decay_offset", 0.0)
    B, C = (part.repeat_interleave(HEADS // part.shape[2], 2) for part in (B, C))
    B = B.clamp(max=value("insert_clip", torch.inf).item())
    writes = (value("insert_mult", 1.0) * delta)[..., None, None] * x[..., None] * B[..., None, :]
    decays = (delta * A).exp()[..., None, None]
    outputs, h = [], torch.zeros_like(writes[:, 0])
    for t in range(x.shape[1]):
        if control.mode == "window":  # what is left of the writes since the window began, one after the other
            begin = max(t // control.granularity * control.granularity - control.window, 0)
            h = sum(writes[:, s] * decays[:, s + 1 : t + 1].prod(1) for s in range(begin, t + 1))
        else:
            h = decays[:, t] * h + writes[:, t]
        outputs.append((h @ C[:, t, :, :, None])[..., 0] + mixer.D[:, None] * x[:, t])
        if control.mode == "normalize" and (t + 1) % control.granularity == 0:
            limit = control.threshold_multiplier * value("threshold", 1.0)
            h = h * (limit / h.norm(dim=(-2, -1))).clamp(max=1.0)[..., None, None]
    return mixer.out_proj(mixer.norm(torch.stack(outputs, 1).flatten(-2), z))


@pytest.mark.parametrize(
    "control",
    [
        StateControlConfig("rescale", decay_mult=2.0, decay_offset=-0.3, raw_dt_mult=0.8),
        StateControlConfig("rescale", insert_mult=0.5, insert_clip=[0.2, 0.1]),
        StateControlConfig("rescale", dt_mult=[0.5, 1.5], decay_mult=LIMITS, insert_mult=LIMITS),
        StateControlConfig("normalize", threshold=LIMITS, granularity=3, dt_mult=0.5, insert_mult=2.0),
        StateControlConfig("normalize", threshold=[0.1, 0.2], threshold_multiplier=0.5, granularity=1),
        StateControlConfig("window", window=8, granularity=4, raw_dt_mult=1.2, insert_clip=0.3),
        StateControlConfig("window", window=1, granularity=1, decay_mult=0.5),
    ],
    ids=lambda control: "-".join(control.to_dict()).replace("mode", control.mode),
)
def test_every_field_is_what_the_equation_says(model, control):
    hidden_states = torch.randn(1, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), state_control(model, control):
        for index, block in enumerate(model.backbone.layers):
            want = by_the_equation(block.mixer, hidden_states, control, index)
            close(block.mixer(hidden_states), want, 1e-12)


@pytest.mark.parametrize(
    "control",
    [
        StateControlConfig("rescale", decay_mult=1.0, decay_offset=0.0, dt_mult=1.0, raw_dt_mult=1, insert_mult=1),
        StateControlConfig("normalize", threshold=HUGE, granularity=4),
        StateControlConfig("window", window=32, granularity=4),
    ],
    ids=lambda control: control.mode,
)
def test_identity_settings_change_nothing(control):
    model, ids = build(), ids_of(2, 24)
    want, _ = in_chunks(model, ids, 20, 1, 1, 1, 1)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    with state_control(model, control):
        close(in_chunks(model, ids, 20, 1, 1, 1, 1)[0], want, 1e-6 * want.abs().max().item())
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


def test_rescaling_is_editing_the_weights(model):
    """decay_mult scales A = -exp(A_log), decay_offset moves it; raw_dt_mult scales the rows of in_proj for dt."""
    edited, mult = copy.deepcopy(model), torch.tensor(LIMITS, dtype=torch.float64)
    control = StateControlConfig("rescale", decay_mult=LIMITS, decay_offset=-0.1, raw_dt_mult=[0.5, 2.0])
    with torch.no_grad():
        for index, block in enumerate(edited.backbone.layers):
            block.mixer.A_log.copy_((mult[index] * block.mixer.A_log.exp() + 0.1).log())
            block.mixer.in_proj.weight[-HEADS:] *= control.raw_dt_mult[index]
    with state_control(model, control):
        close(logits_of(model, ids_of(2, 20)), logits_of(edited, ids_of(2, 20)), 1e-12)


@controls
def test_a_control_changes_what_it_should(model, control):
    plain = logits_of(model, ids_of(1, 24))
    with state_control(model, control):
        assert (logits_of(model, ids_of(1, 24)) - plain).abs().max() > 1e-3


@controls
def test_any_split_is_one_pass(model, control):
    ids = ids_of(2, 24)
    with state_control(model, control):
        want, cache = in_chunks(model, ids, 24)
        close(logits_of(model, ids, use_cache=False), want, 1e-12)
        for sizes in (
            [8, 8, 8],
            [5, 12, 7],
            [1, 1, 21, 1],
            [1] * 24,
        ):  # at boundaries, between, step by step
            got, other = in_chunks(model, ids, *sizes)
            close(got, want, 1e-12)
            for layers in zip(cache.layers, other.layers, strict=True):
                assert layers[0].states.keys() == layers[1].states.keys()
                for name, state in layers[0].states.items():
                    close(layers[1].states[name], state, 1e-12)


def test_norms_stay_below_the_limit_after_every_boundary():
    model, ids, control = build(), ids_of(2, 30), StateControlConfig("normalize", threshold=LIMITS, granularity=5)
    limit, cache = 2 * torch.tensor(LIMITS), DynamicCache()
    reached = 0
    with state_control(model, control), torch.no_grad():
        for begin, end in ((0, 5), (5, 6), (6, 10), (10, 30)):
            model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            if end % 5 == 0:
                norms = torch.stack([layer.read("ssm").norm(dim=(-2, -1)) for layer in cache.layers], 1)
                assert (norms <= limit * (1 + 1e-5)).all()
                reached += (norms > limit * (1 - 1e-5)).sum()
    assert reached > 0


@controls
def test_states_stay_float32_in_half_precision(control):
    model, ids = build(torch.bfloat16), ids_of(1, 20)
    with state_control(model, control):
        want, cache = in_chunks(model, ids, 15, 1, 1, 1, 1, 1)
        assert {state.dtype for layer in cache.layers for name, state in layer.states.items() if name != "conv"} == {
            torch.float32
        }
        rounding = 2.0**-8 * want.abs().max().item()
        assert (logits_of(model, ids) - want).abs().max() < 4 * rounding


@controls
def test_a_gradient_flows_after_inference_mode(control):
    """What a control keeps beside the weights must not belong to the mode it was first used in."""
    model, ids = build(), ids_of(1, 12)
    with torch.inference_mode():
        apply_state_control(model, control)
        model.generate(ids, max_new_tokens=3)
    model(ids, labels=ids).loss.backward()
    remove_state_control(model)
    assert model.backbone.layers[0].mixer.A_log.grad.abs().sum() > 0


@controls
def test_padding_counts_for_nothing(model, control):
    """Left, right and in the middle; a chunk of padding alone; rows of different lengths."""
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[1, 15:], mask[2, 5:9] = 0, 0, 0
    with state_control(model, control):
        for sizes in ([20], [6, 9, 5], [1] * 20):
            got, _ = in_chunks(model, ids, *sizes, mask=mask)
            for row in range(3):
                keep = mask[row].bool()
                close(got[row, keep], logits_of(model, ids[row : row + 1, keep])[0], 1e-12)


@controls
def test_packed_sequences_are_apart(model, control):
    ids, sizes = ids_of(1, 24), [9, 4, 11]
    position_ids = torch.cat([torch.arange(size) for size in sizes])[None]
    with state_control(model, control):
        want = torch.cat([logits_of(model, part) for part in ids.split(sizes, 1)], 1)
        close(logits_of(model, ids, position_ids=position_ids), want, 1e-12)


@controls
def test_generation_agrees_in_every_mode(control):
    model = build()
    ids, mask = ids_of(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    greedy = {"max_new_tokens": 9, "do_sample": False}
    beams = {"max_new_tokens": 9, "num_beams": 3, "attention_mask": mask}
    plain = model.generate(ids, attention_mask=mask, **greedy)
    with state_control(model, control):
        want = model.generate(ids, attention_mask=mask, **greedy)
        assert torch.equal(model.generate(ids, attention_mask=mask, **greedy), want)
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **greedy), want)
        assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **greedy), want)
        alone = [model.generate(row, **greedy)[0, -9:] for row in (ids[:1, 6:], ids[1:])]
        assert torch.equal(want[:, -9:], torch.stack(alone))
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
        torch.manual_seed(0)
        sample = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=True, num_return_sequences=2)
        torch.manual_seed(0)
        again = {"do_sample": True, "num_return_sequences": 2, "use_cache": False, "max_new_tokens": 9}
        assert torch.equal(model.generate(ids, attention_mask=mask, **again), sample)
    assert torch.equal(model.generate(ids, attention_mask=mask, **greedy), plain)
    assert not torch.equal(want, plain)


def test_only_the_chosen_layers_are_controlled(model):
    ids = ids_of(1, 20)
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states
        with state_control(model, StateControlConfig("window", window=4, granularity=4, layers=[1])):
            second = model(ids, output_hidden_states=True, use_cache=True)
        with state_control(model, StateControlConfig("window", window=4, granularity=4, layers=[0, 1])):
            both = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(second.hidden_states[0], plain[0])  # behind the first layer
    assert not torch.equal(second.hidden_states[1], plain[1])
    assert not torch.equal(both[0], plain[0])
    assert [sorted(layer.states) for layer in second.past_key_values.layers] == [
        ["conv", "ssm"],
        ["conv", "local", "local_decay", "ring", "ring_decay", "ssm"],
    ]


def snapshot(model):
    """Everything that tells a model from another one: classes, attributes, children, hooks, the generation config."""
    parts = [(name, type(part), part.training, dict(vars(part))) for name, part in model.named_modules()]
    generation = getattr(model, "generation_config", None)
    return parts, None if generation is None else dict(vars(generation))


def same(before, after):
    assert [part[:3] for part in before[0]] == [part[:3] for part in after[0]]
    for (name, *_, old), (*_, new) in zip(before[0], after[0], strict=True):
        assert old.keys() == new.keys(), name
        assert all(old[key] is new[key] for key in old), name
    assert before[1] == after[1]


def adapted():
    config = LoraConfig(target_modules=["in_proj"], init_lora_weights=False, r=2, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return get_peft_model(pair("mamba2")[0], config)


@controls
@pytest.mark.parametrize("kind", ["stock", "ours", "adapters", "backbone", "head"])
def test_removing_restores_everything(kind, control):
    model = {
        "stock": lambda: pair("mamba2")[0],
        "ours": lambda: pair("mamba2")[1],
        "adapters": adapted,
        "backbone": lambda: Mamba2Model(make_config("mamba2")),
        "head": lambda: FastMamba2ForSequenceClassification(make_config("mamba2")),
    }[kind]().eval()
    before = snapshot(model)
    with state_control(model, control):
        model(ids_of(1, 8))
    same(before, snapshot(model))
    with pytest.raises(IndexError), state_control(model, control):
        model(ids_of(1, 8) + 100)
    same(before, snapshot(model))
    model(ids_of(1, 8))


def test_a_stock_model_and_adapters_are_controlled_as_ours_are():
    stock, ours = pair("mamba2")
    want = None
    for model in (ours, stock):
        with state_control(model, CONTROLS["window"]):
            assert isinstance(model, FastMamba2ForCausalLM)
            got = logits_of(model, ids_of(2, 20))
        want = got if want is None else want
    close(got, want, 1e-6)
    assert type(stock) is Mamba2ForCausalLM

    model = adapted()
    with state_control(model, CONTROLS["window"]):
        tokens = model.generate(input_ids=ids_of(1, 20), max_new_tokens=6, do_sample=False, prefill_chunk_size=6)
    merged = model.merge_and_unload()
    with state_control(merged, CONTROLS["window"]):
        assert torch.equal(merged.generate(ids_of(1, 20), max_new_tokens=6, do_sample=False), tokens)


def test_a_head_reads_the_controlled_state():
    torch.manual_seed(0)
    model = FastMamba2ForSequenceClassification(make_config("mamba2", initializer_range=0.6)).eval()
    plain = logits_of(model, ids_of(2, 20))
    with state_control(model, StateControlConfig("window", window=4, granularity=4)):
        got = logits_of(model, ids_of(2, 20))
    assert (got - plain).abs().max() > 1e-4


def test_a_copy_of_a_controlled_model_is_a_controlled_model(model):
    apply_state_control(model, CONTROLS["window"])
    other = copy.deepcopy(model)
    remove_state_control(model)
    plain, ids = logits_of(model, ids_of(1, 20)), ids_of(1, 20)
    assert (logits_of(other, ids) - plain).abs().max() > 1e-3
    assert torch.equal(logits_of(remove_state_control(other), ids), plain)


def test_no_reference_to_the_model_is_kept():
    model = pair("mamba2")[0]
    with state_control(model, CONTROLS["normalize"]):
        pass
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@controls
def test_a_saved_model_carries_its_control(control, tmp_path):
    model = pair("mamba2")[0]
    with state_control(model, control):
        want = model.generate(ids_of(1, 20), max_new_tokens=8, do_sample=False)
        model.save_pretrained(tmp_path)
    again = Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert StateControlConfig.from_dict(again.generation_config.state_control) == control
    plain = again.generate(ids_of(1, 20), max_new_tokens=8, do_sample=False)  # it acts when it is asked to
    with state_control(again):
        assert torch.equal(again.generate(ids_of(1, 20), max_new_tokens=8, do_sample=False), want)
    assert again.generation_config.state_control == control.to_dict()
    assert torch.equal(again.generate(ids_of(1, 20), max_new_tokens=8, do_sample=False), plain)
    assert not hasattr(model.generation_config, "state_control")


def test_a_state_goes_to_a_file_and_on_under_the_control(model, tmp_path):
    ids = ids_of(2, 24)
    with state_control(model, CONTROLS["window"]):
        want, _ = in_chunks(model, ids, 24)
        _, cache = in_chunks(model, ids[:, :14], 14)
        save_state(cache, tmp_path / "state.safetensors", model=model)
        cache = load_state(tmp_path / "state.safetensors", model=model)
        close(logits_of(model, ids[:, 14:], past_key_values=cache), want[:, 14:], 1e-12)


def test_a_window_needs_a_cache_that_was_filled_under_it(model):
    ids = ids_of(1, 24)
    _, plain = in_chunks(model, ids, 24)
    with state_control(model, CONTROLS["window"]):
        _, cache = in_chunks(model, ids, 24)
        with pytest.raises(ValueError, match=r"past_key_values was filled without a window, .* last window \(8\) tok"):
            model(ids, past_key_values=plain)
    with (
        state_control(model, StateControlConfig("window", window=12, granularity=4)),
        pytest.raises(ValueError, match=r"filled with a window of 2 chunks, .* window \(12\) tokens; read the whole"),
    ):
        model(ids, past_key_values=cache)


@pytest.fixture
def rerun_instead_of_recording(monkeypatch):
    def capture(run, device):
        outputs = run()

        def replay():
            for name, value in run().items():
                if isinstance(value, torch.Tensor):
                    outputs[name].copy_(value)

        return replay, outputs

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "_require_device", lambda model: None)


@controls
def test_decode_graphs_take_controlled_steps(control, rerun_instead_of_recording):
    model, ids = build(), ids_of(2, 10)
    with state_control(model, control):
        want = model.generate(ids, max_new_tokens=12, do_sample=False)
        with decode_graph(model) as recorded:
            assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), want)
        assert (recorded.captured, recorded.replayed) == (1, 11)
    with (
        decode_graph(model),
        pytest.raises(RuntimeError, match="is inside a decode_graph block, whose recordings"),
    ):
        apply_state_control(model, control)


def test_calibration_measures_the_states_of_the_prompt(model):
    ids, mask = ids_of(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        caches = [model(row, use_cache=True).past_key_values for row in (ids[:1, 5:], ids[1:])]
    rows = [[layer.read("ssm").norm(dim=(-2, -1))[0] for layer in cache.layers] for cache in caches]
    control = calibrate_thresholds(model, ids, mask, multiplier=1.5)
    want = (torch.stack(rows[0]) + torch.stack(rows[1])) / 2
    close(torch.tensor(control.threshold, dtype=torch.float64), want, 1e-12)
    assert (control.mode, control.threshold_multiplier) == ("normalize", 1.5)
    stock = pair("mamba2")[0]
    before = snapshot(stock)
    assert len(calibrate_thresholds(stock, ids).threshold) == LAYERS
    same(before, snapshot(stock))


def test_calibration_needs_a_model_as_it_is(model):
    with (
        state_control(model, CONTROLS["window"]),
        pytest.raises(RuntimeError, match="has a state control already; call remove_state_control"),
    ):
        calibrate_thresholds(model, ids_of(1, 4))
    with pytest.raises(ValueError, match=r"threshold_multiplier \(-1\) must be a finite number above 0"):
        calibrate_thresholds(model, ids_of(1, 4), multiplier=-1)
    for block in model.backbone.layers:
        nn.init.zeros_(block.mixer.in_proj.weight)
        nn.init.zeros_(block.mixer.conv1d.bias)
    with pytest.raises(ValueError, match=r"input_ids \(\[1, 4\]\) leave heads of the model with a state of zeros"):
        calibrate_thresholds(model, ids_of(1, 4))


def test_what_cannot_be_controlled_is_named(model):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    for other, name in ((llama, "LlamaForCausalLM, model_type 'llama'"), (nn.Linear(2, 2), "Linear, model_type None")):
        with pytest.raises(ValueError, match=rf"model \({name}\) has no layers with a matrix state to control; thos"):
            apply_state_control(other, CONTROLS["window"])
    with pytest.raises(ValueError, match="MambaForCausalLM, model_type 'mamba'.* has no layers with a matrix state"):
        apply_state_control(MambaForCausalLM(make_config("mamba")), CONTROLS["window"])
    with pytest.raises(RuntimeError, match=r"model \(FastMamba2ForCausalLM\) has no state control to remove; apply_s"):
        remove_state_control(model)
    with pytest.raises(ValueError, match=r"config \(None\) means the one in model.generation_config.state_control"):
        apply_state_control(model)
    with (
        state_control(model, CONTROLS["window"]),
        pytest.raises(RuntimeError, match=r"FastMamba2ForCausalLM\) has a state control already; call remove_state_c"),
    ):
        apply_state_control(model, CONTROLS["rescale"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "window", "window": 128, "layers": [0, 2]}, "layers ([0, 2]) must lie in 0 to 1: the model has 2 "),
        ({"mode": "normalize", "threshold": [1.0]}, "threshold has 1 entries, but the model has 2 layers; give one p"),
        (
            {"mode": "normalize", "threshold": [[1.0] * 4, [1.0] * 3]},
            "threshold[1] has 3 entries, but the layer has 4 heads; give one per head",
        ),
        ({"mode": "rescale", "insert_clip": [1.0] * 3}, "insert_clip has 3 entries, but the model has 2 layers"),
    ],
)
def test_values_must_fit_the_model(fields, message):
    model = pair("mamba2")[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_state_control(model, fields)
    same(before, snapshot(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "forget"}, "mode ('forget') must be one of 'rescale', 'normalize', 'window'"),
        ({"mode": "rescale"}, "mode 'rescale' changes nothing here; give at least one of decay_mult, decay_offset"),
        ({"mode": "normalize"}, "threshold (None) must be given for mode 'normalize'; measure it with calibrate_thr"),
        ({"mode": "window"}, "window (None) must be given for mode 'window'; give a number of tokens"),
        ({"mode": "window", "window": 0}, "window (0) must be an integer of at least 1, in tokens"),
        ({"mode": "window", "window": 12.0}, "window (12.0) must be an integer of at least 1, in tokens"),
        ({"mode": "window", "window": 8, "granularity": 0}, "granularity (0) must be an integer of at least 1"),
        ({"mode": "window", "window": 8, "threshold": 1}, "threshold belongs to mode 'normalize' and mode is 'windo"),
        ({"mode": "rescale", "decay_mult": 2, "window": 8}, "window belongs to mode 'window' and mode is 'rescale'"),
        ({"mode": "normalize", "threshold": 0}, "threshold (0) must be a finite number above 0; calibrate_thresholds"),
        ({"mode": "normalize", "threshold": [[1, -2]]}, "threshold[0][1] (-2) must be a finite number above 0"),
        ({"mode": "normalize", "threshold": [1, float("nan")]}, "threshold[1] (nan) must be a finite number above 0"),
        ({"mode": "normalize", "threshold": True}, "threshold (True) must be a finite number above 0"),
        ({"mode": "normalize", "threshold": [[[1]]]}, "threshold[0][0] ([1]) must be a finite number above 0"),
        (
            {"mode": "normalize", "threshold": 1, "threshold_multiplier": 0},
            "threshold_multiplier (0) must be a finite number above 0; 2.0 lets a state grow to twice its threshold",
        ),
        ({"mode": "rescale", "decay_mult": 0}, "decay_mult (0) must be a finite number above 0; more than 1 forgets"),
        ({"mode": "rescale", "decay_offset": 0.5}, "decay_offset (0.5) must be a finite number at most 0; below 0 fo"),
        ({"mode": "rescale", "insert_mult": 0}, "insert_mult (0) must be a finite number above 0; less than 1 inser"),
        ({"mode": "rescale", "insert_clip": -1}, "insert_clip (-1) must be a finite number above 0; None leaves B"),
        ({"mode": "rescale", "insert_clip": [[1]]}, "insert_clip[0] ([1]) must be a finite number above 0"),
        ({"mode": "rescale", "dt_mult": "2"}, "dt_mult ('2') must be a finite number above 0; less than 1 takes"),
        ({"mode": "rescale", "raw_dt_mult": -1}, "raw_dt_mult (-1) must be a finite number above 0; use dt_mult"),
        ({"mode": "rescale", "dt_mult": 2, "layers": []}, "layers ([]) must be a list of different layer indices"),
        ({"mode": "rescale", "dt_mult": 2, "layers": [1, 1]}, "layers ([1, 1]) must be a list of different layer ind"),
        ({"mode": "rescale", "dt_mult": 2, "layers": [-1]}, "layers ([-1]) must be a list of different layer indices"),
        ({"mode": "window", "width": 8}, "unknown fields width; a state control has mode, decay_mult, decay_offset"),
        ({"window": 8}, "a state control must be an object with a mode and other mode, decay_mult"),
        ("window", "a state control must be an object with a mode and other mode, decay_mult"),
    ],
)
def test_mistakes_in_a_config_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StateControlConfig.from_dict(fields)


def test_a_window_is_rounded_up_to_whole_chunks():
    with pytest.warns(UserWarning, match=r"window \(300\) is not a multiple of granularity \(128\) and becomes 384;"):
        control = StateControlConfig("window", window=300)
    assert control.window == 384
    assert StateControlConfig.from_dict(control.to_dict()) == control


def test_a_config_is_json_and_owns_its_values():
    limits = [[1.0, 2.0], [3.0, 4.0]]
    control = StateControlConfig("normalize", threshold=limits, layers=(1,), decay_mult=torch.tensor([1.0, 2.0]))
    limits[0][0] = -1.0
    values = control.to_dict()
    assert values == {
        "mode": "normalize",
        "threshold": [[1.0, 2.0], [3.0, 4.0]],
        "layers": [1],
        "decay_mult": [1.0, 2.0],
    }
    values["threshold"][0][0] = -1.0
    assert control.threshold[0][0] == 1.0
