"""`undersong.doctor` tells what is installed, which path each op takes and why, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import undersong
from undersong import diagnosis, ops
from undersong.diagnosis import DoctorReport, doctor, judge_pair
from undersong.ops import _dispatch


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("transformers", "kernels", "verdict", "use_kernels", "own", "remedy"),
    [
        ("5.22.2", "0.17.2", "tested pair", True, True, None),
        (
            "5.23.0",
            "0.17.2",
            "tested pair, but without use_kernels=True",
            False,
            True,
            "undersong.kernelize(model), or pip",
        ),
        (
            "5.24.0.dev0",
            "0.18.2",
            "untested pair",
            None,
            True,
            "the tested pair is: pip install 'transformers==5.22.*'",
        ),
        ("5.22.2", None, "kernels is not installed", False, False, "pip install 'kernels==0.17.2'"),
        ("5.22.2", "0.12.0", "kernels is too old", False, False, "kernels 0.17 or newer"),
        ("4.57.1", "0.17.2", "transformers is missing or too old", False, False, "5.22 or newer, found 4.57.1"),
        (None, None, "transformers is missing or too old", False, False, "found None"),
    ],
)
def test_pairs(transformers, kernels, verdict, use_kernels, own, remedy):
    *got, advice = judge_pair(transformers, kernels)
    assert got == [verdict, use_kernels, own]
    assert (advice is None) if remedy is None else (remedy in advice)


def test_the_report_of_this_machine(cache, no_interpreter):
    (cache / "models" / "some").mkdir(parents=True)
    (cache / "models" / "some" / "weights").write_bytes(bytes(3 * 2**20))
    report = doctor()
    assert report.versions["torch"] == torch.__version__
    assert report.devices["torch_threads"] == torch.get_num_threads()
    assert len(report.devices["gpus"]) == torch.cuda.device_count()
    assert {row["op"] for row in report.ops} == {row["op"] for row in ops.status() if row["backend"] == "triton"}
    assert report.cache["bytes"] == {"models": 3 * 2**20}
    assert report.environment["UNDERSONG_CACHE"] == str(cache)
    assert {row["model_type"] for row in report.model_types} == set(undersong.registry.ARCHITECTURES)
    assert all(
        row["ours"]
        for row in report.model_types
        if not undersong.registry.ARCHITECTURES[row["model_type"]].stock_owned
    )
    assert "CumulativeSoftmaxAverage" in {row["layer"] for row in report.layers}
    text = str(report)
    for part in (torch.__version__, "cumulative_softmax_average", "aaren", "3.0 MiB", "UNDERSONG_CACHE"):
        assert part in text
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_without_a_gpu_every_op_takes_torch_and_says_why(cache, no_interpreter):
    report = doctor()
    assert {row["auto"] for row in report.ops} == {"torch"}
    reasons = {row["op"]: row["reason"] for row in report.ops}
    for op, reason in reasons.items():
        why = "this op has no kernel" if _dispatch._OPS[op].kernel is None else "it needs CUDA tensors"
        assert reason.startswith(f"no GPU; triton: {why}"), op
    assert reasons["selective_scan"].startswith("no GPU; triton: it needs CUDA tensors")
    assert all("no kernel for device cpu" in row["here"] for row in report.layers)


def test_a_failed_self_check_becomes_advice(cache, no_interpreter, monkeypatch):
    keys = ("op", "backend", "available", "reason", "self_check", "cold_start_s")
    values = [
        ("scan", "torch", True, "always", None, None),
        ("scan", "triton", False, "float32: off by 3", "failed", 1.5),
        ("sum", "triton", True, "passed", "passed", 2.0),
    ]
    rows = [dict(zip(keys, row, strict=True)) for row in values]
    monkeypatch.setattr(ops, "status", lambda: rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = DoctorReport()
    diagnosis._ops(report)
    assert [(row["op"], row["auto"], row["cold_start_s"]) for row in report.ops] == [
        ("scan", "torch", 1.5),
        ("sum", "triton", 2.0),
    ]
    assert report.advice == ["scan: the kernel failed its self-check and is off, torch runs: float32: off by 3"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    diagnosis._ops(report)
    assert report.ops[-1]["auto"] == "torch"
    assert report.advice[-1].startswith("TRITON_INTERPRET is set, so kernels are off: unset it")


def test_a_broken_part_does_not_hide_the_others(cache, monkeypatch):
    def broken():
        raise OSError("driver gone")

    monkeypatch.setattr(ops, "status", broken)
    report = doctor()
    assert "ops could not be examined: OSError: driver gone" in report.advice
    assert report.versions
    assert report.model_types
    assert "driver gone" in str(report)


def test_importing_it_is_light():
    code = "import sys, undersong.diagnosis; print({'torch', 'transformers', 'kernels', 'rich'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
