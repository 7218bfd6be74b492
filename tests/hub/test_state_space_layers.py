"""Stock transformers' Mamba and Mamba-2 on our kernels: by `undersong.kernelize`, and by `use_kernels=True`.

Triton's interpreter stands in for the GPU. Stock's functions are one object for the process, so every test puts their
torch forward back.
"""

import importlib.util
import inspect

import pytest
import torch
from kernels.layer.globals import _KERNEL_MAPPING
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import undersong
from undersong.hub.build_kernel import KernelSource
from undersong.hub.kernelize import kernel_config, kernel_report, kernelize

pytestmark = [
    pytest.mark.usefixtures("one_thread", "torch_afterwards"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="runs Triton's interpreter"
    ),
]
SIZES = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "eos_token_id": None, "pad_token_id": 0}
MODELS = {
    "mamba": (MambaForCausalLM, MambaConfig(**SIZES, state_size=4)),
    "mamba2": (
        Mamba2ForCausalLM,
        Mamba2Config(**SIZES, num_heads=4, head_dim=4, n_groups=2, state_size=8, chunk_size=8),
    ),
}
FUNCTIONS = {
    "mamba": [
        "causal_conv1d_fn", "causal_conv1d_update", "mamba_inner_fn", "selective_scan_fn", "selective_state_update",
    ],
    "mamba2": [
        "causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined",
        "selective_state_update",
    ],
}  # fmt: skip
IDS = torch.tensor([[3, 5, 2, 8, 1, 1, 7, 4, 9, 9, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])


def stock_functions():
    return [
        value
        for module in (modeling_mamba, modeling_mamba2)
        for value in vars(module).values()
        if isinstance(value, torch.nn.Module)
    ]


@pytest.fixture
def torch_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    token = _KERNEL_MAPPING.set({})
    yield
    _KERNEL_MAPPING.reset(token)
    for function in stock_functions():
        vars(function).pop("forward", None)


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


def build(kind, **changes):
    cls, config = MODELS[kind]
    torch.manual_seed(0)
    model = cls(type(config).from_dict(config.to_dict() | changes))
    for name, parameter in model.named_parameters():  # a fresh convolution has no bias, and all decays are alike
        if "bias" in name or "A_log" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_equal_stocks_own(kind, training):
    model = build(kind).train(training)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    inputs = {"input_ids": IDS, "labels": IDS, "attention_mask": mask, "use_cache": False}
    want, want_gradients = loss_and_gradients(model, **inputs)
    report = kernelize(model)
    names = [f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in FUNCTIONS[kind]]
    assert sorted(report.accelerated) == names, str(report)
    assert kernel_report(model).accelerated == report.accelerated
    assert report[names[0]].reason == "kernel taken from this package, by every model of the process that calls it"
    got, gradients = loss_and_gradients(model, **inputs)
    valid = mask.bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        scale = want_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, want_gradients[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_generate_gives_stocks_tokens_and_scores(kind):
    model = build(kind).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(IDS, **options)
    kernelize(model)
    got = model.generate(IDS, **options)
    assert torch.equal(got.sequences, want.sequences)
    for x, y in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_steps_with_gradients_equal_stocks_own(kind):
    """A cached step outside no_grad() records gradients: the step's kernel has none, the scan over one token has."""
    model = build(kind).eval()

    def two_steps():
        cache = model(IDS[:, :6], use_cache=True).cache_params
        logits = [model(IDS[:, t : t + 1], cache_params=cache, use_cache=True).logits for t in (6, 7)]
        return torch.cat(logits, 1)

    want = two_steps()
    kernelize(model)
    torch.testing.assert_close(two_steps(), want, rtol=1e-5, atol=1e-5)


def test_use_kernels_of_transformers(kind, tmp_path):
    from transformers.utils.import_utils import is_kernels_available

    model = build(kind).eval()
    model.save_pretrained(tmp_path / kind)
    want = model(IDS).logits
    if not is_kernels_available():  # transformers 5.23 refuses kernels 0.17
        with pytest.raises(ValueError, match="Kernels are not available"):
            type(model).from_pretrained(tmp_path / kind, use_kernels=True)
        return
    fast = type(model).from_pretrained(tmp_path / kind, use_kernels=True, kernel_config=kernel_config())
    report = kernel_report(fast)
    assert len(report.accelerated) == 10, str(report)
    assert "state-space v1 (torch-cpu" in report[report.accelerated[0]].kernel
    torch.testing.assert_close(fast(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert len(kernel_report(fast.train()).accelerated) == 10


def test_the_mapping_is_undone(kind):
    model = build(kind)
    kernelize(model)
    report = kernelize(model.double())
    assert report.accelerated == []
    assert {use.reason for use in report.values() if use.layer.startswith("causal")} == {
        "the kernels compute in float32 and the model is in float64"
    }
    assert kernel_report(build(kind)).accelerated == []
    assert _KERNEL_MAPPING.get() == {}


def test_models_that_the_kernels_cannot_serve_keep_stocks_torch_path(kind):
    """The functions are shared: a model in float64 must not lose its precision because another one was kernelized."""
    precise = build(kind).double().eval()
    want = precise(IDS).logits
    tokens = precise.generate(IDS, max_new_tokens=3, do_sample=False)
    kernelize(build(kind))
    assert torch.equal(precise(IDS).logits, want)
    assert torch.equal(precise.generate(IDS, max_new_tokens=3, do_sample=False), tokens)


def test_projections_are_called_as_modules_in_training(kind):
    """So hooks, LoRA and quantised layers count: the fused functions, which take raw weights, are not taken."""
    model = build(kind).train()
    kernelize(model)
    called = []
    for name in ("in_proj", "out_proj"):
        layer = getattr(model.backbone.layers[0].mixer, name)
        layer.register_forward_hook(lambda *args, name=name: called.append(name))
    model(IDS, use_cache=False)
    assert called == ["in_proj", "out_proj"]


class TestFunctions:
    """The functions one by one, where stock's own models do not reach: packed rows, long steps, other activations."""

    @pytest.fixture(autouse=True)
    def kernelized(self, torch_afterwards):
        kernelize(build("mamba"))
        kernelize(build("mamba2"))

    def test_packed_convolution(self):
        x, weight, bias = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3)
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1, 2]], dtype=torch.int32)
        got = modeling_mamba2.causal_conv1d_fn(x, weight, bias, activation="silu", seq_idx=seq_idx)
        for row, cuts in enumerate([[0, 3, 9], [0, 7, 8, 9]]):
            for begin, end in zip(cuts, cuts[1:], strict=False):
                alone = modeling_mamba2.causal_conv1d_fn(x[row : row + 1, :, begin:end], weight, bias, "silu")
                torch.testing.assert_close(got[row : row + 1, :, begin:end], alone)
        offsets = torch.tensor([0, 3, 9], dtype=torch.int32)
        same = modeling_mamba2.causal_conv1d_fn(x[:1], weight, bias, activation="silu", cu_seqlens=offsets)
        torch.testing.assert_close(same, got[:1])
        with pytest.raises(ValueError, match=r"cu_seqlens \(3 offsets\) must come with batch 1 but batch is 2"):
            modeling_mamba2.causal_conv1d_fn(x, weight, bias, cu_seqlens=offsets)

    def test_packed_scans_and_their_last_states(self):
        seq_idx = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.int32)
        x, dt, A = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2), -torch.rand(2)
        B, C = torch.randn(2, 2, 5, 1, 8)
        options = {"chunk_size": 4, "dt_softplus": True, "return_final_states": True}
        y, state = modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, C, **options, seq_idx=seq_idx)
        for row, cut in enumerate((3, 2)):
            inputs = [t[row : row + 1, cut:] for t in (x, dt, B, C)]
            alone, last = modeling_mamba2.mamba2_chunk_scan(*inputs[:2], A, *inputs[2:], **options)
            torch.testing.assert_close(y[row : row + 1, cut:], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state[row : row + 1], last, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="initial_states must be None because seq_idx or cu_seqlens is given"):
            modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, C, **options, seq_idx=seq_idx, initial_states=state)

        u, delta, A = torch.randn(1, 3, 5), torch.randn(1, 3, 5), -torch.rand(3, 4)
        B, C = torch.randn(2, 1, 4, 5)
        y, last = modeling_mamba.mamba_selective_scan(u, delta, A, B, C, return_last_state=True, seq_idx=seq_idx[:1])
        tails = [t[..., 3:] for t in (u, delta, B, C)]
        alone, state = modeling_mamba.mamba_selective_scan(*tails[:2], A, *tails[2:], return_last_state=True)
        torch.testing.assert_close(y[..., 3:], alone)
        torch.testing.assert_close(last, state)

    def test_several_tokens_at_once_in_a_step(self):
        weight, bias, state = torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 4)
        x = torch.randn(2, 3, 6)
        windows = state.clone(), state.clone()
        got = modeling_mamba.causal_conv1d_update(x, windows[0], weight, bias, "silu")
        want = type(modeling_mamba.causal_conv1d_update).forward(None, x, windows[1], weight, bias, "silu")
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*windows)

    def test_an_activation_that_the_kernel_lacks_is_refused(self):
        with pytest.raises(ValueError, match=r"activation \('gelu'\) must be one of None, 'silu', 'swish'"):
            modeling_mamba.causal_conv1d_fn(torch.randn(1, 3, 5), torch.randn(3, 4), None, activation="gelu")


def test_without_our_kernels_stock_refuses_packed_rows():
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        modeling_mamba2.causal_conv1d_fn(x, weight, seq_idx=torch.zeros(1, 5, dtype=torch.int32))


def test_every_layer_of_ours_has_the_signature_of_its_module():
    """`kernels` compares the numbers and kinds of arguments when it exchanges a forward."""
    from undersong.modeling import state_space

    source = KernelSource.read("state_space")
    ours = [name for name in source.layers if name[0].isupper()]
    assert sorted(ours) == ["CausalConv1d", "CausalConv1dUpdate", "SSD", "SelectiveScan", "SelectiveStateUpdate"]
    assert all(flags == {"has_backward": True, "can_torch_compile": True} for flags in source.layers.values())
    model = torch.nn.ModuleDict({name: getattr(state_space, name)() for name in ours})
    assert sorted(kernelize(model).accelerated) == sorted(model)
    for name, module in model.items():
        got, want = (inspect.signature(f).parameters for f in (module.forward, type(module).forward.__get__(module)))
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()], name


@pytest.mark.parametrize("kind", list(MODELS))
def test_our_own_model_runs_the_layers(kind):
    """FastMamba's modules take the kernels one by one: no other model changes."""
    cls = {"mamba": undersong.FastMambaForCausalLM, "mamba2": undersong.FastMamba2ForCausalLM}[kind]
    torch.manual_seed(0)
    model = cls(MODELS[kind][1]).eval()
    want = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False)
    report = kernelize(model)
    assert len([path for path in report.accelerated if "convolution" in path or "recurrence" in path]) == 8
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), tokens)
