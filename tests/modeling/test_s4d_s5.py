"""S4D and S5 against what their papers say: dense simulations, directions, resolutions, irregular steps, heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import DynamicCache

from undersong.modeling.s4d.configuration_s4d import S4DConfig
from undersong.modeling.s4d.modeling_s4d import (
    S4DForCausalLM,
    S4DForSequenceClassification,
    S4DForTimeSeriesClassification,
    S4DModel,
)
from undersong.modeling.s5.configuration_s5 import S5Config
from undersong.modeling.s5.modeling_s5 import (
    S5ForCausalLM,
    S5ForSequenceClassification,
    S5ForTimeSeriesClassification,
    S5Model,
)
from undersong.ops.hippo import discretise, hippo_blocks, hippo_normal

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = {"s4d": S4DConfig, "s5": S5Config}
BACKBONES = {"s4d": S4DModel, "s5": S5Model}
SERIES = {"s4d": S4DForTimeSeriesClassification, "s5": S5ForTimeSeriesClassification}
LANGUAGE = {"s4d": S4DForCausalLM, "s5": S5ForCausalLM}
both = pytest.mark.parametrize("kind", ["s4d", "s5"])
CHANNELS = 6


def config(kind, **overrides):
    sizes = {"vocab_size": 17, "hidden_size": CHANNELS, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
    return CONFIGS[kind](**{**sizes, "initializer_range": 0.3, **overrides})


def build(cls, kind, **overrides):
    torch.manual_seed(0)
    return cls(config(kind, **overrides)).double().eval()


def mixer_of(kind, **overrides):
    return build(BACKBONES[kind], kind, num_hidden_layers=1, **overrides).layers[0].mixer


def series(batch=2, length=50, channels=CHANNELS):
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stepwise(model, **inputs):
    """Hidden states of one pass per token, through a cache."""
    cache, steps = DynamicCache(), []
    for t in range(next(iter(inputs.values())).shape[1]):
        now = {name: x[:, t : t + 1] for name, x in inputs.items()}
        steps.append(model(**now, past_key_values=cache, use_cache=True).last_hidden_state)
    return torch.cat(steps, 1)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_parallel_form_equals_steps(kind, dtype, tolerance, discretization):
    model = build(BACKBONES[kind], kind, discretization=discretization).to(dtype)
    ids = torch.randint(1, 17, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(stepwise(model, input_ids=ids), whole, rtol=0, atol=tolerance)


def test_s4d_is_a_system_of_its_own_in_every_channel():
    """x_k = exp(dt A) x_{k-1} + A^-1 (exp(dt A) - 1) u_k, y = 2 Re(C x) + D u, written out for every channel."""
    mixer, u = mixer_of("s4d"), series()
    A, dt, C = mixer.A, mixer.log_dt.exp(), torch.view_as_complex(mixer.C)
    for channel in range(CHANNELS):
        step = (dt[channel] * A[channel]).exp()
        x, want = torch.zeros(2, 4, dtype=torch.complex128), []
        for t in range(u.shape[1]):
            x = step * x + (step - 1) / A[channel] * u[:, t, channel, None]
            want.append(2 * (C[channel] * x).sum(-1).real + mixer.D[channel] * u[:, t, channel])
        torch.testing.assert_close(mixer(u)[..., channel], torch.stack(want, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_s5_with_a_shared_step_is_a_dense_real_system(num_blocks):
    """The matrix exponential of block-diagonal HiPPO-N, with real B and C in its own basis."""
    mixer, u, dt = mixer_of("s5", num_blocks=num_blocks), series(), 0.07
    generator = torch.Generator().manual_seed(2)
    B, C = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((8, CHANNELS), (CHANNELS, 8)))
    eigenvalues, V = hippo_blocks(8, num_blocks)
    with torch.no_grad():
        mixer.log_dt.fill_(math.log(dt))
        mixer.log_A_real.copy_((-eigenvalues.real).log())
        mixer.A_imag.copy_(eigenvalues.imag)
        mixer.B.copy_(torch.view_as_real(V.mH @ B.cdouble()))
        mixer.C.copy_(torch.view_as_real(C.cdouble() @ V))
    A = torch.block_diag(*[hippo_normal(8 // num_blocks)] * num_blocks)
    step = torch.linalg.matrix_exp(dt * A)
    enter = torch.linalg.solve(A, (step - torch.eye(8, dtype=torch.float64)) @ B)
    x, want = torch.zeros(2, 8, dtype=torch.float64), []
    for t in range(u.shape[1]):
        x = x @ step.T + u[:, t] @ enter.T
        want.append(x @ C.T + mixer.D * u[:, t])
    torch.testing.assert_close(mixer(u), torch.stack(want, 1), rtol=0, atol=1e-10)


@both
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_no_weights_make_it_unstable(kind, discretization):
    mixer = mixer_of(kind, discretization=discretization)
    with torch.no_grad():
        for parameter in (mixer.log_dt, mixer.log_A_real, mixer.A_imag):
            parameter.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    u = torch.zeros(1, 4000, CHANNELS, dtype=torch.float64)
    u[:, 0] = 1
    y = mixer(u)
    assert y.isfinite().all()
    dt = mixer.log_dt.exp()
    log_a, _ = discretise(mixer.A, dt.unsqueeze(1) if kind == "s4d" else dt, discretization)
    assert (log_a.exp().abs() < 1).all()


@both
def test_bidirectional_reads_both_ways(kind):
    mixer, u = mixer_of(kind, bidirectional=True), series()
    forward = mixer_of(kind)
    forward.load_state_dict({name: x for name, x in mixer.state_dict().items() if name != "C_reverse"})
    backward = mixer_of(kind)
    backward.load_state_dict(forward.state_dict() | {"C": mixer.C_reverse, "D": 0 * mixer.D})
    want = forward(u) + backward(u.flip(1)).flip(1)
    torch.testing.assert_close(mixer(u), want, rtol=0, atol=1e-10)
    symmetric = mixer_of(kind, bidirectional=True)
    symmetric.load_state_dict(mixer.state_dict() | {"C_reverse": mixer.C})
    torch.testing.assert_close(symmetric(u.flip(1)).flip(1), symmetric(u), rtol=0, atol=1e-10)


@both
def test_bidirectional_padding_and_packing_equal_rows_alone(kind):
    model = build(BACKBONES[kind], kind, bidirectional=True)
    ids = torch.randint(1, 17, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0], [1] * 12])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).last_hidden_state
        for row in range(2):
            alone = model(ids[row][mask[row].bool()][None]).last_hidden_state[0]
            torch.testing.assert_close(padded[row][mask[row].bool()], alone, rtol=0, atol=1e-10)
        packed = model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 12], dtype=torch.int32)).last_hidden_state
        parts = [model(part).last_hidden_state for part in ids[:1].split([5, 7], 1)]
        torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=0, atol=1e-10)


@both
def test_bidirectional_models_refuse_what_needs_causality(kind):
    with pytest.raises(ValueError, match=r"bidirectional \(True\) makes S.*ForCausalLM see the token it predicts"):
        LANGUAGE[kind](config(kind, bidirectional=True))
    model = build(BACKBONES[kind], kind, bidirectional=True)
    with pytest.raises(ValueError, match="past_key_values cannot be used by a bidirectional model"):
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=DynamicCache())
    assert model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values is None


class TestIrregularSteps:
    def model(self):
        return build(S5Model, "s5")

    def test_equal_steps_of_one_change_nothing(self):
        model, ids = self.model(), torch.randint(1, 17, (2, 40), generator=torch.Generator().manual_seed(0))
        got = model(ids, step_sizes=torch.ones(2, 40)).last_hidden_state
        torch.testing.assert_close(got, model(ids).last_hidden_state, rtol=0, atol=1e-12)

    def test_they_work_with_chunks_padding_and_packing(self):
        model, generator = self.model(), torch.Generator().manual_seed(0)
        ids, steps = torch.randint(1, 17, (2, 14), generator=generator), 2 * torch.rand(2, 14, generator=generator)
        with torch.no_grad():
            whole = model(ids, step_sizes=steps).last_hidden_state
            torch.testing.assert_close(stepwise(model, input_ids=ids, step_sizes=steps), whole, rtol=0, atol=1e-10)
            pad = torch.zeros(2, 3, dtype=torch.long)
            padded = model(
                torch.cat([pad, ids], 1),
                attention_mask=torch.cat([pad, torch.ones_like(ids)], 1),
                step_sizes=torch.cat([torch.full((2, 3), torch.nan), steps], 1),
            )
            torch.testing.assert_close(padded.last_hidden_state[:, 3:], whole, rtol=0, atol=1e-10)
            offsets = torch.tensor([0, 14, 28], dtype=torch.int32)
            packed = model(ids.view(1, -1), step_sizes=steps.view(1, -1), cu_seq_lens_q=offsets).last_hidden_state
            torch.testing.assert_close(packed.view(2, 14, -1), whole, rtol=0, atol=1e-10)

    def test_gradients_do_not_see_the_steps_of_padding(self):
        mixer, u = mixer_of("s5"), series(length=6)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]).bool()
        steps = torch.ones(2, 6).masked_fill(~mask, torch.nan)
        mixer(u.masked_fill(~mask[..., None], torch.nan), mask=mask, step_sizes=steps).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())

    def test_a_step_of_two_is_two_steps_of_a_constant_input(self):
        mixer = mixer_of("s5")
        u = series(length=20)
        held = mixer(u.repeat_interleave(2, 1))[:, 1::2]
        torch.testing.assert_close(mixer(u, step_sizes=torch.full((2, 20), 2.0)), held, rtol=0, atol=1e-10)

    def test_errors(self):
        ids = torch.ones(1, 5, dtype=torch.long)
        with pytest.raises(ValueError, match=r"step_sizes has shape \(1, 4\) but the input is .* = \[1, 5\]"):
            self.model()(ids, step_sizes=torch.ones(1, 4))
        with pytest.raises(ValueError, match="step_sizes were given, but S4D is a convolution"):
            build(S4DModel, "s4d")(ids, step_sizes=torch.ones(1, 5))


@both
def test_half_the_step_at_twice_the_rate_gives_the_same_signal(kind):
    mixer = mixer_of(kind)
    time = torch.arange(800, dtype=torch.float64)[None, :, None] / 400
    waves = torch.sin(2 * torch.pi * time * torch.arange(1, 1 + CHANNELS))  # a period takes 33 slow steps and more
    slow = mixer(waves[:, 1::2])
    with torch.no_grad():
        mixer.log_dt -= math.log(2.0)
    fast = mixer(waves)[:, 1::2]
    assert (fast - slow).norm() < 0.02 * slow.norm()
    held = mixer(waves[:, 1::2].repeat_interleave(2, 1))[:, 1::2]  # what zero-order hold takes the slow signal for
    torch.testing.assert_close(held, slow, rtol=0, atol=1e-10)


@both
def test_checkpoints_hold_no_complex_numbers_and_load_to_the_same_model(kind, tmp_path):
    model = build(LANGUAGE[kind], kind, bidirectional=False)
    assert not any(x.is_complex() for x in model.state_dict().values())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"model.layers.0.mixer.{name}" for name in ("log_dt", "log_A_real", "A_imag", "C", "D")} <= names
    ids = torch.randint(1, 17, (1, 9))
    loaded = LANGUAGE[kind].from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


@both
def test_dynamics_stay_float32_in_half_precision_and_states_too(kind, tmp_path):
    model = build(LANGUAGE[kind], kind).float()
    model.save_pretrained(tmp_path)
    half = LANGUAGE[kind].from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    mixer = half.model.layers[0].mixer
    assert {mixer.log_dt.dtype, mixer.log_A_real.dtype, mixer.A_imag.dtype} == {torch.float32}
    assert (mixer.C.dtype, half.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    ids = torch.randint(1, 17, (2, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = half(ids, use_cache=True), model(ids)
    assert got.logits.dtype == torch.bfloat16
    assert got.past_key_values.layers[0].read("state").dtype == torch.float32
    assert (got.logits.float() - want.logits).norm() < 0.05 * want.logits.norm()


@both
def test_the_state_is_real_pairs_of_a_fixed_size(kind):
    model = build(BACKBONES[kind], kind)
    cache = model(torch.ones(3, 20, dtype=torch.long), use_cache=True).past_key_values
    shape = (3, CHANNELS, 4, 2) if kind == "s4d" else (3, 4, 2)
    assert [layer.read("state").shape for layer in cache.layers] == [shape, shape]


@both
def test_initial_time_steps_and_eigenvalues_are_those_of_the_paper(kind):
    model = build(BACKBONES[kind], kind, hidden_size=64, state_size=64, dt_min=0.01, dt_max=0.02)
    mixer = model.layers[0].mixer
    assert (mixer.log_dt.exp() >= 0.01 * (1 - 1e-6)).all()
    assert (mixer.log_dt.exp() <= 0.02 * (1 + 1e-6)).all()
    torch.testing.assert_close(mixer.A.real, torch.full_like(mixer.A.real, -0.5), rtol=0, atol=1e-6)
    if kind == "s4d":
        want = torch.pi * torch.arange(32, dtype=torch.float64)
        torch.testing.assert_close(mixer.A.imag, want.expand(64, 32), rtol=1e-6, atol=0)
        assert torch.view_as_complex(mixer.C).abs().square().mean().item() == pytest.approx(1.0, rel=0.1)
    else:
        torch.testing.assert_close(mixer.A, hippo_blocks(64)[0], rtol=1e-5, atol=1e-5)
        # of real B with variance 1 / hidden_size, in a unitary basis
        assert torch.view_as_complex(mixer.B).abs().square().mean().item() == pytest.approx(1 / 64, rel=0.1)


@both
class TestTimeSeriesClassification:
    def model(self, kind, **overrides):
        return build(SERIES[kind], kind, input_size=3, num_labels=5, **overrides)

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_padding_does_not_matter_whatever_stands_there(self, kind, pooling, bidirectional):
        model, x = self.model(kind, pooling=pooling, bidirectional=bidirectional), series(1, 6, 3)
        model.requires_grad_(True)
        nothing = torch.full((1, 2, 3), torch.nan, dtype=torch.float64)
        padded, mask = torch.cat([nothing, x, nothing], 1), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]])
        got = model(padded, attention_mask=mask, labels=torch.tensor([1]))
        torch.testing.assert_close(got.logits, model(x).logits, rtol=0, atol=1e-12)
        got.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_missing_values_count_as_zero_and_missing_steps_as_padding(self, kind):
        model, x = self.model(kind), series(1, 5, 3)
        observed = torch.ones(1, 5, 3)
        observed[0, 1, 2] = 0
        observed[0, 3] = 0
        zeroed = x.clone()
        zeroed[0, 1, 2] = 0
        want = model(zeroed[:, [0, 1, 2, 4]]).logits
        torch.testing.assert_close(model(x, past_observed_mask=observed).logits, want, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_a_series_without_a_valid_step_gives_the_bias(self, kind, pooling):
        model = self.model(kind, pooling=pooling)
        logits = model(series(1, 4, 3), attention_mask=torch.zeros(1, 4)).logits
        assert torch.equal(logits[0], model.score.bias)

    def test_last_pooling_reads_the_last_step_and_mean_all_of_them(self, kind):
        model, x = self.model(kind, pooling="last"), series(2, 7, 3)
        hidden = model.model(inputs_embeds=model.value_projection(x)).last_hidden_state
        torch.testing.assert_close(model(x).logits, model.score(hidden[:, -1]), rtol=0, atol=1e-12)
        model.config.pooling = "mean"
        torch.testing.assert_close(model(x).logits, model.score(hidden.mean(1)), rtol=0, atol=1e-12)

    def test_labels_target_values_and_regression(self, kind):
        model, x = self.model(kind), series(2, 4, 3)
        labels = torch.tensor([1, 4])
        want = F.cross_entropy(model(x).logits, labels)
        torch.testing.assert_close(model(x, labels=labels).loss, want)
        torch.testing.assert_close(model(x, target_values=labels).loss, want)
        regression = build(SERIES[kind], kind, input_size=3, num_labels=1, problem_type="regression")
        target = torch.tensor([0.3, -1.0], dtype=torch.float64)
        got = regression(x, labels=target)
        torch.testing.assert_close(got.loss, F.mse_loss(got.logits.squeeze(1), target))

    def test_wrong_channels_are_named(self, kind):
        with pytest.raises(ValueError, match=r"past_values has shape \(2, 4, 1\).*input_size=3"):
            self.model(kind)(series(2, 4, 1))


@both
def test_sequence_classification_reads_the_last_token(kind):
    cls = {"s4d": S4DForSequenceClassification, "s5": S5ForSequenceClassification}[kind]
    model = build(cls, kind, num_labels=3)
    ids = torch.tensor([[3, 5, 7, 0, 0]])
    got = model(ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    torch.testing.assert_close(got, model(ids[:, :3]).logits, rtol=0, atol=1e-12)


def test_config_errors_name_field_value_and_fix():
    for cls in (S4DConfig, S5Config):
        with pytest.raises(Exception, match=r"state_size \(7\) must be a positive even number.*use 8"):
            cls(state_size=7)
        with pytest.raises(Exception, match=r"dt_min \(0.5\) must be positive and at most dt_max \(0.1\)"):
            cls(dt_min=0.5)
        with pytest.raises(Exception, match="discretization"):
            cls(discretization="euler")
        with pytest.raises(Exception, match="pooling"):
            cls(pooling="max")
    with pytest.raises(Exception, match=r"num_blocks \(3\) must divide state_size \(64\).*state_size=66"):
        S5Config(num_blocks=3)
    with pytest.raises(Exception, match="state_init"):
        S4DConfig(state_init="random")
