"""`undersong.kernelize`: our layers get the kernel, every other one says why not, and outputs prove which ran."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import undersong
import undersong.hub.build_kernel
from undersong._compat import use_kernel_forward_from_hub
from undersong.hub.kernelize import KernelUse, kernel_config, kernel_report, kernelize, register_kernels

_spec = importlib.util.spec_from_file_location("undersong_toy_kernel", Path(__file__).with_name("toy_kernel.py"))
toy_kernel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy_kernel)

# undersong.hub.build_kernel is the function; the module of that name is only here
build_module = sys.modules["undersong.hub.build_kernel"]
kernelize_module = sys.modules["undersong.hub.kernelize"]


@use_kernel_forward_from_hub("ToyScale")
class Scale(nn.Module):
    def forward(self, x, factor=2.0):
        return x * factor + 1  # off by one on purpose: it shows that torch ran, not the kernel


@use_kernel_forward_from_hub("SomebodysNorm")
class Norm(nn.Module):
    def forward(self, x):
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = nn.Linear(4, 4, bias=False)
        self.scales = nn.ModuleList([Scale(), Scale()])
        self.norm = Norm()

    def forward(self, x):
        x = self.input(x)
        for scale in self.scales:
            x = scale(x)
        return self.norm(x)


class ToyConfig(PreTrainedConfig):
    model_type = "undersong-toy"


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.input = nn.Linear(4, 4, bias=False)
        self.scales = nn.ModuleList([Scale(), Scale()])
        self.norm = Norm()
        self.post_init()

    forward = Model.forward


X = torch.ones(2, 4)
PATHS = ["scales.0", "scales.1", "norm"]


def ran(model):
    """Which implementation produced the outputs: the kernel gives 4h, torch 4h + 3."""
    x = X.to(model.input.weight.device)
    offset = (model(x) - 4 * model.input(x)).detach().round(decimals=4).unique().tolist()
    return {0.0: "kernel", 3.0: "torch"}[offset[0]] if len(offset) == 1 else offset


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Ships a toy kernel in place of the package's own, with an empty cache folder."""

    def ship(**changes):
        # a mark of its own in every test: equal content has an equal id, which `kernels` loads once per process
        changes.setdefault("init", lambda text: text + f"\n# {tmp_path}\n")
        toy_kernel.write_toy(tmp_path / "kernels" / "toy_scale", **changes)
        kernelize_module._layers.cache_clear()
        kernelize_module._built.cache_clear()

    monkeypatch.setattr(build_module, "_KERNELS_FOLDER", tmp_path / "kernels")
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("UNDERSONG_KERNELS", raising=False)
    ship()
    yield ship
    kernelize_module._layers.cache_clear()
    kernelize_module._built.cache_clear()


def test_our_layers_run_the_kernel_and_the_report_says_which(ship, tmp_path):
    model = Model().eval()
    assert ran(model) == "torch"
    report = kernelize(model)
    assert ran(model) == "kernel"
    assert list(report) == PATHS
    assert report.accelerated == PATHS[:2]
    folder = next((tmp_path / "cache" / "kernels").iterdir())
    assert report["scales.1"] == KernelUse(
        "ToyScale", f"toy-scale v3 (torch-cpu, {folder}), layer ToyScale", "kernel taken from this package"
    )
    assert report["norm"] == KernelUse("SomebodysNorm", None, "not a layer of undersong, left as it is")
    assert str(report).splitlines()[0] == "2 of 3 kernel layers run a kernel (device cpu, mode inference)"
    assert "  norm [SomebodysNorm]: torch - not a layer of undersong, left as it is" in str(report)
    assert report.as_dict()["norm"]["kernel"] is None
    assert kernel_report(model).accelerated == PATHS[:2]
    assert kernel_report(Model())["scales.0"].reason == "not kernelized; call undersong.kernelize(model)"


def test_it_stays_with_this_model_and_survives_train_eval_copy_and_a_second_call(ship):
    model, other = Model(), Model()
    kernelize(model)
    assert ran(other) == "torch"
    assert ran(model.eval()) == ran(model.train()) == "kernel"
    clone = copy.deepcopy(model)
    assert ran(clone) == "kernel"
    assert clone.scales[0].forward.__self__ is clone.scales[0]
    assert kernelize(model) == kernelize(model)
    assert ran(model) == "kernel"
    kernels.kernelize(other, mode=kernels.Mode.INFERENCE, device="cpu")
    assert ran(other) == "torch", "kernelize must not register anything for the process"


def test_gradients_flow_through_the_kernel(ship):
    model = Model().train()
    assert kernelize(model).mode == "training"
    model(X).sum().backward()
    assert torch.allclose(model.input.weight.grad, torch.full((4, 4), 8.0))


def test_without_the_interpreter_a_cpu_has_no_kernel_and_torch_comes_back(ship, monkeypatch):
    model = Model()
    kernelize(model)
    monkeypatch.delenv("TRITON_INTERPRET")
    report = kernelize(model)
    assert report["scales.0"].reason == (
        "no kernel for device cpu, only for cuda, rocm; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    )
    assert report.accelerated == []
    assert ran(model) == "torch"
    assert kernelize(model, device="cuda")["norm"].reason == "not a layer of undersong, left as it is"
    assert kernelize(model, device="xpu")["scales.0"].reason == "no kernel for device xpu, only for cuda, rocm"


@pytest.mark.parametrize("ability", ["has_backward", "can_torch_compile"])
def test_modes_follow_the_layers_abilities(ship, ability):
    ship(layers=lambda text: text.replace("has_backward: bool = True", "has_backward = False"))
    model = Model()
    assert kernelize(model, "inference").accelerated == PATHS[:2]
    mode, reason = {
        "has_backward": ("training", "mode training: the kernel has no backward"),
        "can_torch_compile": (
            kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE,
            "mode torch_compile: the kernel cannot be traced by torch.compile",
        ),
    }[ability]
    assert kernelize(model, mode)["scales.0"] == KernelUse("ToyScale", None, reason)
    assert ran(model) == "torch"


@pytest.mark.parametrize("mode", ["fast", "inference|training", "torch_compile", ""])
def test_wrong_modes(mode):
    with pytest.raises(ValueError, match=r"mode \(.*\) must be inference or training, alone or with \|torch_compile"):
        kernelize(Model(), mode)


def test_a_kernel_that_does_not_load_falls_back_loudly(ship):
    ship(scale=lambda text: text + "\nraise OSError('no driver')\n")
    model = Model()
    with pytest.warns(
        RuntimeWarning, match="ToyScale keeps its torch forward, loading the kernel failed: OSError: no driver"
    ):
        report = kernelize(model)
    assert report["scales.1"].reason == "loading the kernel failed: OSError: no driver"
    assert ran(model) == "torch"


def test_long_reasons_become_one_short_line(ship):
    ship(scale=lambda text: text + "\nraise OSError('at 45:\\n' + 'code\\n' * 300 + 'the point')\n")
    with pytest.warns(RuntimeWarning, match="the point"):
        reason = kernelize(Model())["scales.0"].reason
    assert reason.startswith("loading the kernel failed: OSError: at 45: code code")
    assert reason.endswith("the point")
    assert len(reason) < 300
    assert "\n" not in reason


def test_a_kernel_with_another_signature_is_refused(ship):
    ship(layers=lambda text: text.replace("x, factor=2.0", "x"))
    with pytest.warns(RuntimeWarning, match="different number of arguments"):
        assert kernelize(Model()).accelerated == []


def test_an_edited_cache_is_not_run(ship, tmp_path):
    kernelize(Model())
    next((tmp_path / "cache").rglob("torch-cpu/scale.py")).write_text("print('not ours')\n")
    kernelize_module._built.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"holds build/torch-cpu/scale\.py, which no build wrote"):
        assert kernelize(Model()).accelerated == []


def test_without_the_kernels_package_the_report_says_so(ship, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "kernels" else find(name, *a))
    report = kernelize(Model())
    assert report["scales.0"] == KernelUse(
        "ToyScale", None, "the package kernels is not installed; pip install kernels"
    )
    assert list(report) == PATHS


def test_functions_are_listed_with_the_module_that_uses_them(ship):
    @use_kernel_forward_from_hub("ToyScale")
    def scale(x, factor=2.0):
        return x * factor + 1

    class Uses(nn.Module):
        def forward(self, x):
            return scale(x)

    uses = kernels.use_kernelized_func(scale)(Uses)
    model, other = nn.Sequential(uses(), uses()), uses()
    report = kernelize(model)
    assert report.accelerated == ["0.ToyScale", "1.ToyScale"]
    assert {use.reason for use in report.values()} == {
        "kernel taken from this package, by every model of the process that calls it"
    }
    assert torch.equal(model(X), 4 * X)
    assert torch.equal(other(X), 2 * X), "a function is one object for all models"
    kernelize(model, device="xpu")
    assert torch.equal(other(X), 2 * X + 1)


def test_hub_choice_is_checked(ship, monkeypatch):
    monkeypatch.setenv("UNDERSONG_KERNELS", "moon")
    with pytest.raises(ValueError, match=r"UNDERSONG_KERNELS \(moon\) must be local or hub"):
        kernelize(Model())


@pytest.fixture
def process_mapping():
    """What is registered for the process ends with the test."""
    from kernels.layer.globals import _KERNEL_MAPPING
    from transformers.integrations import hub_kernels

    token = _KERNEL_MAPPING.set({})
    yield
    _KERNEL_MAPPING.reset(token)
    hub_kernels._KERNEL_MAPPING_CACHE = None


def test_register_kernels_outlasts_the_defaults_of_transformers(ship, process_mapping):
    hub_kernels = pytest.importorskip("transformers.integrations.hub_kernels")
    if not hasattr(hub_kernels, "get_kernel_mapping_transformers"):
        pytest.skip("this transformers refuses the installed kernels")
    ours = register_kernels()
    assert ours == ["ToyScale"]
    defaults = hub_kernels.get_kernel_mapping_transformers()
    assert "ToyScale" in defaults
    assert "RMSNorm" in defaults


def needs_accepted_kernels(load):
    """transformers 5.23 refuses kernels 0.17: there the claim is a clear refusal, and our own kernelize instead."""
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        with pytest.raises(ValueError, match="Kernels are not available"):
            load()
    return is_kernels_available()


@pytest.mark.parametrize("way", [kernel_config, register_kernels])
def test_use_kernels_of_transformers_runs_our_kernel(ship, process_mapping, tmp_path, way):
    ToyModel(ToyConfig()).save_pretrained(tmp_path / "model")
    options = {"use_kernels": True}
    if way is kernel_config:
        options["kernel_config"] = kernel_config()
    else:
        assert register_kernels() == ["ToyScale"]
    if not needs_accepted_kernels(lambda: ToyModel.from_pretrained(tmp_path / "model", use_kernels=True)):
        return
    model = ToyModel.from_pretrained(tmp_path / "model", **options)
    assert model.use_kernels
    assert ran(model) == "kernel"
    report = kernel_report(model)
    assert list(report) == PATHS
    assert report.accelerated == PATHS[:2]
    assert report["scales.0"].reason == "kernelized"
    assert ran(model.train()) == ran(model.eval()) == "kernel"
    assert ran(ToyModel.from_pretrained(tmp_path / "model")) == "torch"
    other = ToyModel.from_pretrained(tmp_path / "model", use_kernels=True)
    assert ran(other) == ("torch" if way is kernel_config else "kernel")


def test_float64_models_keep_torch_and_its_precision(ship):
    report = kernelize(Model().double())
    assert report["scales.0"].reason == "the kernels compute in float32 and the model is in float64"


def test_a_kernel_that_failed_its_self_check_is_not_taken(ship, monkeypatch):
    from undersong.ops import _dispatch

    rows = {
        name: _dispatch.Op(name, None, None, kernel) for name, kernel in [("double", "other"), ("half", "toy_scale")]
    }
    monkeypatch.setattr(_dispatch, "_OPS", rows)
    monkeypatch.setattr(_dispatch, "_kernel_problem", lambda name, device: None)
    monkeypatch.setattr(_dispatch, "_self_check", lambda name, device, dtype: (name == "double", "off by 3", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernelize(Model(), device="cuda")["scales.0"].reason == (
        "the kernel failed its self-check on this machine: half: off by 3"
    )
    assert register_kernels() == []


@pytest.fixture
def aaren(tmp_path, monkeypatch):
    """A tiny AarenForCausalLM, the package's own kernels, and Triton's interpreter."""
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    config = undersong.AarenConfig(**undersong.registry.ARCHITECTURES["aaren"].tiny)
    return undersong.AarenForCausalLM(config).eval()


AAREN_PATHS = ["model.layers.0.self_attn.average", "model.layers.1.self_attn.average"]
IDS = torch.arange(24).view(2, 12)


def torch_calls():
    return sum(undersong.ops.explain()["cumulative_softmax_average"].counts.values())


def test_aaren_runs_the_packages_kernel(aaren):
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    want = aaren(**inputs)
    want.loss.backward()
    gradients = {name: p.grad.clone() for name, p in aaren.named_parameters()}
    aaren.zero_grad()
    report = kernelize(aaren)
    assert report.accelerated == AAREN_PATHS
    # the activations carry names of kernels that others publish
    assert {use.reason for path, use in report.items() if path not in AAREN_PATHS} <= {
        "not a layer of undersong, left as it is"
    }
    before = torch_calls()
    got = aaren(**inputs)
    got.loss.backward()
    assert torch_calls() == before, "the op ran, not the kernel"
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    for name, parameter in aaren.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_aaren_generates_the_same_tokens_with_the_kernel(aaren):
    want = aaren.generate(IDS, max_new_tokens=5, do_sample=False)
    kernelize(aaren)
    before = torch_calls()
    assert torch.equal(aaren.generate(IDS, max_new_tokens=5, do_sample=False), want)
    assert torch_calls() == before


@pytest.mark.parametrize("way", [kernel_config, register_kernels])
def test_aaren_with_use_kernels(aaren, process_mapping, tmp_path, way):
    from transformers import AutoModelForCausalLM

    aaren.save_pretrained(tmp_path / "aaren")
    options = {"use_kernels": True}
    if way is kernel_config:
        options["kernel_config"] = kernel_config()
    else:
        register_kernels()
    if not needs_accepted_kernels(lambda: type(aaren).from_pretrained(tmp_path / "aaren", use_kernels=True)):
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "aaren", **options)
    report = kernel_report(model)
    assert report.accelerated == AAREN_PATHS
    assert "cumulative-softmax-average v1 (torch-cpu" in report[AAREN_PATHS[0]].kernel
    before = torch_calls()
    torch.testing.assert_close(model(IDS).logits, aaren(IDS).logits, rtol=1e-4, atol=1e-5)
    assert torch_calls() == before + len(AAREN_PATHS), "only the model without kernels may call the op"


HUB_CODE = """
import json, torch, undersong, warnings
row = undersong.registry.ARCHITECTURES["aaren"]
model = undersong.AarenForCausalLM(undersong.AarenConfig(**row.tiny)).eval()
ids = torch.arange(24).view(2, 12)
want = model(ids).logits
with warnings.catch_warnings(record=True) as caught:
    refused = undersong.kernelize(model)
taken = undersong.kernelize(model, trust_remote_code=True)
path = taken.accelerated[0]
print(json.dumps([len(caught), refused[path].reason, taken[path].kernel, taken[path].reason,
                  (model(ids).logits - want).abs().max().item()]))
"""


def test_from_the_hub_on_request_and_with_the_librarys_trust_check(hub, api, tmp_path):
    source = build_module.KernelSource.read("cumulative_softmax_average")
    built = build_module.build_kernel(source.folder, tmp_path / "out", backends=("cpu",))
    api.create_repo(source.repo_id, repo_type="kernel")
    api.create_branch(source.repo_id, branch=f"v{source.version}", repo_type="kernel")
    files = {p.relative_to(built).as_posix(): p.read_bytes() for p in built.rglob("*") if p.is_file()}
    commit = hub.commit("kernels", source.repo_id, files, branch=f"v{source.version}")
    environment = hub.env() | {"UNDERSONG_KERNELS": "hub", "TRITON_INTERPRET": "1", "UNDERSONG_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", HUB_CODE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    warned, refused, kernel, reason, difference = json.loads(run.stdout.splitlines()[-1])
    assert warned == 1
    assert refused.startswith("loading the kernel failed: ValueError")
    assert "not from a trusted publisher" in refused
    assert f"(torch-cpu, {source.repo_id}@{commit.oid[:7]}), layer CumulativeSoftmaxAverage" in kernel
    assert reason == "kernel taken from the Hub"
    assert difference < 1e-5
    assert not (tmp_path / "kernels").exists(), "nothing is built where the Hub was asked for"


@pytest.mark.gpu
@pytest.mark.parametrize("way", [kernel_config, register_kernels, kernelize])
def test_on_a_gpu(ship, process_mapping, tmp_path, monkeypatch, way):
    monkeypatch.delenv("TRITON_INTERPRET")
    ToyModel(ToyConfig()).save_pretrained(tmp_path / "model")
    options = {"device_map": "cuda"}
    if way is not kernelize:
        options["use_kernels"] = True
    if way is kernel_config:
        options["kernel_config"] = kernel_config()
    elif way is register_kernels:
        register_kernels()
    model = ToyModel.from_pretrained(tmp_path / "model", **options)
    if way is kernelize:
        kernelize(model)
    assert kernel_report(model)["scales.0"].kernel.startswith("toy-scale v3 (torch-cuda, ")
    assert ran(model) == ran(model.train()) == "kernel"
    model.cpu()
    assert kernelize(model).accelerated == []
    assert ran(model) == "torch"


@pytest.mark.gpu
def test_aaren_on_a_gpu(aaren, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    want = aaren(IDS).logits
    report = kernelize(aaren.cuda())
    assert report.accelerated == AAREN_PATHS, str(report)
    before = torch_calls()
    torch.testing.assert_close(aaren(IDS.cuda()).logits.cpu(), want, rtol=1e-2, atol=1e-3)
    assert torch_calls() == before


def test_public_names():
    assert undersong.kernelize is kernelize
