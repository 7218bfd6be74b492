"""The measurement harness: wrong candidates are refused, clocks are apart, the JSON says what was measured where."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("undersong_benchmark_harness", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(harness):
    threads = torch.get_num_threads()
    yield harness.Benchmark("toy", device="cpu", rounds=20, threads=1)
    torch.set_num_threads(threads)


def test_a_wrong_candidate_is_an_error_and_is_never_timed(harness, bench):
    x = torch.tensor([1.0, 2.0, 4.0])
    calls = []
    with pytest.raises(
        harness.CheckFailed, match=r"case: bad: output 0 is off by 2\.500e-01 of its scale, allowed 1\.0e-06"
    ):
        bench.add("case", {"bad": lambda: calls.append(1) or x + 1}, reference=x, tolerance=1e-6)
    assert len(calls) == 1
    assert "case" not in [case["case"] for case in bench.cases]


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "off by nan"),
        (torch.tensor([1.0]), r"shape \(1,\), the reference \(2,\)"),
        ((torch.ones(2), torch.ones(2)), "gave 2 tensors, the reference has 1"),
    ],
)
def test_check_refuses(harness, got, message):
    with pytest.raises(harness.CheckFailed, match=message):
        harness.check("it", got, torch.ones(2), 1e-3)


def test_check_accepts_nested_states_and_equal_infinities(harness):
    got = (torch.ones(2), (torch.tensor([-float("inf"), 2.0]), None))
    assert harness.check("it", got, (torch.ones(2), [torch.tensor([-float("inf"), 2.0])]), 0.0) == 0.0


def test_ratio_floor_and_peak_memory(bench):
    x = torch.ones(100, 1000)
    rows = bench.add(
        "sum",
        {"fast": lambda: x + x, "slow": lambda: (time.sleep(5e-3), x * 2)[1]},
        reference=lambda: 2 * x.double(),
        tolerance={"fast": 0.0, "slow": 0.0},
        bytes=2 * x.nbytes,
        baseline="slow",
        shape=[100, 1000],
    )
    assert rows["slow"]["speedup"] == 1.0
    assert rows["fast"]["speedup"] > 2
    assert rows["slow"]["ms"] >= 5
    assert rows["fast"]["peak_bytes"] == x.nbytes
    assert 0 < rows["slow"]["floor_share"] < rows["fast"]["floor_share"]


def test_unchecked_peers_say_why(bench):
    rows = bench.add(
        "peer", {"peer": lambda: 0}, reference=torch.ones(1), tolerance=0, unchecked={"peer": "another task"}
    )
    assert rows["peer"]["unchecked"] == "another task"
    assert "error" not in rows["peer"]


def test_changing_lengths_see_what_a_new_length_costs(harness, bench):
    seen = set()

    def compiles_per_length(x):
        if len(x) not in seen:
            seen.add(len(x))
            time.sleep(0.01)
        return x * 2

    rows = bench.changing(
        "double",
        {"recompiles": compiles_per_length, "steady": lambda x: x * 2},
        [5, 6, 7],
        inputs=lambda n: (torch.ones(n),),
        reference=lambda x: 2 * x.double(),
    )
    assert rows["recompiles"]["new_ms"] >= 10 > rows["recompiles"]["again_ms"]
    assert rows["steady"]["new_ms"] < 10
    with pytest.raises(harness.CheckFailed, match="wrong"):
        bench.changing(
            "d", {"wrong": lambda x: x}, [1, 2], inputs=lambda n: (torch.ones(n),), reference=lambda x: 2 * x
        )


def test_first_call_runs_in_a_fresh_process(bench):
    setup = "import time; pause = [0.05]"
    rows = bench.first_call("pause", {"lazy": (setup, "time.sleep(pause.pop() if pause else 0)")}, processes=1)
    assert rows["lazy"]["first_ms"] >= 50 > rows["lazy"]["second_ms"]
    with pytest.raises(RuntimeError, match="the fresh process failed:(?s:.)*NameError"):
        bench.first_call("broken", {"broken": ("", "undefined")}, processes=1)


def test_json_and_table_name_the_machine(bench, tmp_path, capsys):
    bench.add("id", {"it": lambda: torch.ones(3)}, reference=torch.ones(3), tolerance=0)
    saved = json.loads(bench.save(tmp_path / "results" / "toy.json").read_text())
    assert {
        "benchmark",
        "date",
        "git_commit",
        "git_dirty",
        "command",
        "hardware",
        "versions",
        "threads",
    } <= saved.keys()
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["threads"] == torch.get_num_threads()
    assert saved["yardsticks"]["copy_bytes_per_s"] > 0
    assert saved["cases"][-1]["candidates"]["it"]["ms"] > 0
    assert str(Path.home()) not in saved["command"]
    assert "steady: id" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["toy.json"]


def test_too_few_rounds_are_refused(harness):
    with pytest.raises(ValueError, match=r"rounds \(5\) must be at least 20"):
        harness.Benchmark("toy", rounds=5)


def test_changing_needs_a_second_length(bench):
    with pytest.raises(ValueError, match=r"lengths \(\[3\]\) must have at least 2 entries"):
        bench.changing("d", {"it": torch.sum}, [3], inputs=lambda n: (torch.ones(n),))


@pytest.mark.gpu
def test_cuda_events_and_memory(harness):
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests need a CUDA device; deselect them with -m 'not gpu'")
    gpu = harness.Benchmark("toy", device="cuda", rounds=20)
    x = torch.ones(1 << 26, device="cuda")
    rows = gpu.add("copy", {"clone": x.clone}, reference=x, tolerance=0, bytes=2 * x.nbytes)
    assert rows["clone"]["peak_bytes"] == x.nbytes
    assert 0.3 < rows["clone"]["floor_share"] < 1.2
