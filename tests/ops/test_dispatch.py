"""Which backend runs, what is said about it, and what happens when a kernel cannot be trusted."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from undersong.ops import _dispatch, available_backends, cumulative_softmax_average, explain, status

NAME = "cumulative_softmax_average"
S, V = torch.randn(1, 5, 2), torch.randn(1, 5, 2, 3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No verdict or record of another test, and a cache folder of its own."""
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path))
    monkeypatch.setattr(_dispatch, "_VERDICTS", {})
    monkeypatch.setattr(_dispatch, "_RECORDS", {NAME: _dispatch.Record()})
    monkeypatch.setattr(_dispatch, "_KERNELS", {})


@pytest.fixture
def pretend_gpu(monkeypatch):
    """CPU tensors go the way of CUDA tensors: the kernel runs in the interpreter, the self-check included."""

    class Gpu:
        type, index = "cuda", 0

    choose, check = _dispatch._choose, _dispatch._check_kernel

    class Tensor:
        device, dtype = Gpu(), torch.float32

    monkeypatch.setattr(_dispatch, "_interpreted", lambda: False)
    monkeypatch.setattr(_dispatch, "_choose", lambda op, backend, args: choose(op, backend, (Tensor(), *args[1:])))
    refuses = dataclasses.replace(_dispatch._OPS[NAME], kernel_refuses=lambda *args: None)
    monkeypatch.setitem(_dispatch._OPS, NAME, refuses)
    monkeypatch.setattr(sys.modules["undersong.ops.cumulative_softmax_average"], "OP", refuses)
    monkeypatch.setattr(_dispatch.torch.cuda, "get_device_name", lambda device=None: "pretended GPU")
    monkeypatch.setattr(_dispatch, "_check_kernel", lambda op, device, dtype: check(op, "cpu", dtype))


def test_explain_tells_what_ran_why_and_how_often():
    assert "not called yet" in str(explain())
    cumulative_softmax_average(S, V)
    cumulative_softmax_average(S, V, backend="reference")
    cumulative_softmax_average(S, V)
    record = explain()[NAME]
    assert (record.backend, record.reason) == ("torch", "auto: the inputs are on cpu")
    assert record.counts == {"torch": 2, "reference": 1}
    assert str(explain()) == f"{NAME}: torch (auto: the inputs are on cpu); so far reference 1x, torch 2x"


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    assert available_backends(NAME) == ["reference", "torch", "triton"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert available_backends(NAME) == ["reference", "torch"]
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1"):
        cumulative_softmax_average(S, V, backend="triton")


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed; pip install triton"):
        cumulative_softmax_average(S, V, backend="triton")


def test_triton_refuses_float64():
    with pytest.raises(RuntimeError, match="float64 inputs are computed in float64"):
        cumulative_softmax_average(S.double(), V.double(), backend="triton")


def test_an_op_without_its_kernel_folder_says_so_and_runs_on_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(_dispatch, "_kernel_folder", lambda name: tmp_path / name)
    cumulative_softmax_average(S, V)
    with pytest.raises(RuntimeError, match="no kernel source beside the op"):
        cumulative_softmax_average(S, V, backend="triton")
    assert next(row for row in status() if row["backend"] == "triton")["available"] is False


def test_a_kernel_source_that_does_not_load_is_reported(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text("import triton.no_such_module\n")
    monkeypatch.setattr(_dispatch, "_kernel_folder", lambda name: tmp_path)
    with pytest.raises(RuntimeError, match="kernel source does not load here"):
        cumulative_softmax_average(S, V, backend="triton")


def test_a_passed_self_check_is_remembered_on_disk(pretend_gpu, monkeypatch):
    cumulative_softmax_average(S, V)
    assert explain()[NAME].backend == "triton"
    (verdict,) = json.loads(_dispatch._verdict_file().read_text()).values()
    assert verdict["ok"]
    assert verdict["seconds"] > 0
    _dispatch._VERDICTS.clear()
    monkeypatch.setattr(_dispatch, "_check_kernel", lambda *args: pytest.fail("checked twice"))
    cumulative_softmax_average(S, V)


def test_a_failed_self_check_warns_once_and_falls_back(pretend_gpu, monkeypatch):
    cumulative_softmax_average(S, V)  # loads the kernel
    _dispatch._VERDICTS.clear()
    _dispatch._verdict_file().write_text("not json")  # unreadable: check again
    package, right = _dispatch._KERNELS[NAME], getattr(_dispatch._KERNELS[NAME], NAME)

    def wrong(*args):
        o, state = right(*args)
        return o * 1.01, state

    monkeypatch.setattr(package, NAME, wrong)
    with pytest.warns(
        RuntimeWarning, match="is off on this machine, the slower torch path runs instead: the self-check failed"
    ):
        got = cumulative_softmax_average(S, V)
    assert torch.equal(got, cumulative_softmax_average(S, V, backend="torch"))
    cumulative_softmax_average(S, V)  # no second warning (warnings are errors here)
    assert "self-check failed" in explain()[NAME].reason
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run .*the self-check failed'):
        cumulative_softmax_average(S, V, backend="triton")


def test_a_self_check_that_raises_and_an_unwritable_cache_do_not_break_auto(pretend_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path / "file" / "below"))
    broken = dataclasses.replace(_dispatch._OPS[NAME], example=lambda device, dtype: 1 / 0)
    monkeypatch.setitem(_dispatch._OPS, NAME, broken)
    with pytest.warns(RuntimeWarning, match="the self-check raised ZeroDivisionError"):
        cumulative_softmax_average(S, V)


def test_the_same_source_loads_under_two_names_without_a_clash():
    code = """
import importlib.util, sys, torch
from undersong.ops._dispatch import _kernel_folder
folder = _kernel_folder("cumulative_softmax_average")
for name in ("first_name", "second_name", "first_name"):
    where = dict(submodule_search_locations=[str(folder)])
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", **where)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    for child in [m for m in sys.modules if m.startswith(name + ".")]:
        del sys.modules[child]
    spec.loader.exec_module(module)
    o, _ = module.cumulative_softmax_average(torch.zeros(1, 3, 1), torch.ones(1, 3, 1, 4))
    assert o.eq(1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ops_import_neither_triton_nor_transformers():
    code = "import sys, undersong.ops; print([m for m in ('triton', 'transformers', 'kernels') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
