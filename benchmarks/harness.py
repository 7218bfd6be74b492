"""One harness for every number we publish: candidates interleaved in one process, checked first, three clocks apart.

    bench = Benchmark("cumulative_softmax_average", device="cuda")
    bench.add("forward B8 T8192", {"triton": ours, "sdpa": peer}, reference=ref64, tolerance=1e-2,
              unchecked={"sdpa": "another function of the same inputs"}, bytes=moved, flops=0, baseline="sdpa")
    bench.changing("forward", {"triton": op}, lengths, inputs=make)     # a new length in every call
    bench.first_call("forward", {"triton": (setup_code, call_code)})    # compile included, in a fresh process
    bench.save("benchmarks/results/cumulative_softmax_average.json")    # writes the JSON and prints a table

Steady times are medians over >= 20 rounds A B A B; on a GPU with CUDA events, the L2 cache flushed before every call
(as `triton.testing.do_bench` does); on a CPU with perf_counter, caches as they are, the thread count in the JSON.
Peak memory is what tensors held beyond the start of one call: `cuda.max_memory_allocated`, on a CPU the profiler's
record of the tensor allocator (scratch memory that libraries take elsewhere, e.g. oneDNN's, is not in it).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts CPU memory would chat on stderr

import torch  # noqa: E402

import undersong  # noqa: E402

MIN_ROUNDS = 20
_PLACES = (
    "--data",
    "--models",
    "--out",
    "--output",
    "--peer",
    "--recbole",
    "--retest",
    "--texts",
    "--write-checkpoints",
)  # where files go does not change a figure, and is nobody else's business
PACKAGES = ("torch", "triton", "transformers", "kernels")


class CheckFailed(RuntimeError):
    """A candidate's output differs from the reference, so it must not be timed."""


class Benchmark:
    """Collects cases; see the module's text. `threads` sets torch's CPU threads for the whole process."""

    def __init__(self, name: str, device: str | None = None, rounds: int = 30, threads: int | None = None):
        if rounds < MIN_ROUNDS:
            raise ValueError(f"rounds ({rounds}) must be at least {MIN_ROUNDS} because medians of fewer are noise.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name, self.rounds, self.cases = name, rounds, []
        if threads:
            torch.set_num_threads(threads)
        self.on_gpu = self.device.type == "cuda"
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=self.device) if self.on_gpu else None
        self.yardsticks = self._yardsticks()

    def add(self, case: str, candidates: dict[str, Callable], *, reference, tolerance: float | dict[str, float],
            bytes: float = 0, flops: float = 0, baseline: str | None = None, unchecked: dict[str, str] | None = None,
            **info) -> dict:  # fmt: skip
        """Check, then time callables without arguments. `reference`: tensors or a callable giving them; the error is
        max|got - want| / max|want| per tensor. `unchecked` names peers that compute something else, with the reason.
        `bytes`, `flops`: the least the task must move and compute. `baseline`: the peer that ratios refer to."""
        want = reference() if callable(reference) else reference
        rows = {name: {} for name in candidates}
        for name, call in candidates.items():
            if name in (unchecked or {}):
                rows[name]["unchecked"] = unchecked[name]
            else:
                limit = tolerance[name] if isinstance(tolerance, dict) else tolerance
                rows[name]["error"] = check(f"{case}: {name}", call(), want, limit)
        del want
        for name, call in candidates.items():
            rows[name]["peak_bytes"] = self._peak_bytes(call)
        samples = self._interleave(candidates, self.rounds)
        floor = max(bytes / self.yardsticks["copy_bytes_per_s"], flops / self.yardsticks["matmul_flops_per_s"])
        for name, row in rows.items():
            quartiles = statistics.quantiles(samples[name], n=4)
            row |= {"ms": quartiles[1] * 1e3, "quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3]}
            if floor:
                row["floor_share"] = floor / quartiles[1]
            if baseline:  # rounds are pairs: the median of ratios shrugs off a slow moment that hits both
                pairs = zip(samples[baseline], samples[name], strict=True)
                row["speedup"] = statistics.median(theirs / own for theirs, own in pairs)
        facts = {"floor_ms": floor * 1e3, "bytes": bytes, "flops": flops, "baseline": baseline}
        return self._record("steady", case, rows, info, **facts)

    def changing(self, case: str, candidates: dict[str, Callable], lengths: list[int], *, inputs: Callable,
                 reference: Callable | None = None, tolerance: float = 1e-5, **info) -> dict:  # fmt: skip
        """Time `candidate(*inputs(length))` over `lengths`, each new in its call, then once more when all were seen.

        `new_ms` close to `again_ms` means that changing lengths cost nothing; the first length only warms up."""
        if len(lengths) < 2:
            raise ValueError(f"lengths ({lengths}) must have at least 2 entries because the first one only warms up.")
        data = [inputs(length) for length in lengths]
        rows = {}
        for name, call in candidates.items():
            call(*data[0])
            new, again = ([self._clock(call, *x) for x in data[1:]] for _ in range(2))
            rows[name] = {"new_ms": statistics.median(new) * 1e3, "new_max_ms": max(new) * 1e3}
            rows[name] |= {"again_ms": statistics.median(again) * 1e3, "total_ratio": sum(new) / sum(again)}
            if reference:  # after the clock: a check before it would show the candidate its lengths
                errors = [check(f"{case}: {name}", call(*x), reference(*x), tolerance) for x in data]
                rows[name]["error"] = max(errors)
        return self._record("changing", case, rows, info, lengths=list(lengths))

    def first_call(self, case: str, candidates: dict[str, tuple[str, str]], *, processes: int = 3, **info) -> dict:
        """Time (setup, call) source texts in fresh processes with an empty Triton cache: setup, first, second call."""
        rows = {}
        for name, (setup, call) in candidates.items():
            runs = [_fresh_process(setup, call) for _ in range(processes)]
            rows[name] = {f"{k}_ms": statistics.median(r[k] for r in runs) * 1e3 for k in runs[0]}
        return self._record("first call", case, rows, info, processes=processes)

    def as_dict(self) -> dict:
        return run_record(self.name, self.device) | {"yardsticks": self.yardsticks, "cases": self.cases}

    def save(self, path: str | Path) -> Path:
        """Write the JSON (atomically) and print the table."""
        print(self.table())
        return write_json(path, self.as_dict())

    def table(self) -> str:
        lines = [f"{self.name} on {_hardware(self.device)['device']}, {torch.get_num_threads()} threads"]
        units = {"floor_share": "{:.0%} of floor", "speedup": "{:.2f}x", "peak_bytes": "peak {:,} B"}
        units["error"] = "err {:.1e}"
        for case in self.cases:
            versus = f" (x = vs {case['baseline']})" if case.get("baseline") else ""
            lines.append(f"{case['clock']}: {case['case']}{versus}")
            for name, row in case["candidates"].items():
                cells = [units.get(k, k.removesuffix("_ms") + " {:.4g}" + " ms" * k.endswith("ms")).format(v)
                         for k, v in row.items() if isinstance(v, int | float)]  # fmt: skip
                lines.append(f"  {name:<24}" + "  ".join(cells))
        return "\n".join(lines)

    def _record(self, clock: str, case: str, rows: dict, info: dict, **facts) -> dict:
        self.cases.append({"clock": clock, "case": case, **facts, "info": info, "candidates": rows})
        return rows

    def _interleave(self, candidates: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
        for call in list(candidates.values()) * 3:
            call()
        # Short CPU calls are repeated inside one sample until the clock's resolution does not matter.
        repeats = {n: 1 if self.on_gpu else max(1, int(2e-4 / self._clock(call))) for n, call in candidates.items()}
        samples = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, call in candidates.items():
                samples[name].append(self._sample(call, repeats[name]))
        if self.on_gpu:
            torch.cuda.synchronize()
            return {name: [start.elapsed_time(end) * 1e-3 for start, end in pairs] for name, pairs in samples.items()}
        return samples

    def _sample(self, call: Callable, repeats: int = 1):
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            return start, end
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    def _clock(self, call: Callable, *inputs) -> float:
        """Seconds of one call by the wall clock: it sees compilation, which CUDA events do not."""
        if self.on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call(*inputs)
        if self.on_gpu:
            torch.cuda.synchronize()
        return max(time.perf_counter() - begin, 1e-9)

    def _peak_bytes(self, call: Callable) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def _yardsticks(self) -> dict[str, float]:
        """What this machine does at best: copy (read + written bytes) and matmul (bf16 on a GPU, fp32 on a CPU)."""
        size, dtype = (8192, torch.bfloat16) if self.on_gpu else (1024, torch.float32)
        source = torch.ones(64 << 20, dtype=torch.float32, device=self.device)
        target, a, b = torch.empty_like(source), *torch.rand(2, size, size, device=self.device).to(dtype)
        calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        best = {name: min(times) for name, times in self._interleave(calls, MIN_ROUNDS).items()}
        copy, matmul = 2 * source.nbytes / best["copy"], 2 * size**3 / best["matmul"]
        name = str(dtype).removeprefix("torch.")
        return {"copy_bytes_per_s": copy, "matmul_flops_per_s": matmul, "matmul_dtype": name}


def run_record(name: str, device: torch.device | str) -> dict:
    """What every results file begins with: the benchmark, when, by which command, commit, hardware and versions."""
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"benchmark": name, "date": datetime.date.today().isoformat(), "command": _command(),
            "git_commit": _git("rev-parse", "HEAD") or None, "git_dirty": dirty,
            "hardware": _hardware(torch.device(device)), "versions": versions(),
            "threads": torch.get_num_threads()}  # fmt: skip


def write_json(path: str | Path, record: dict) -> Path:
    """Write `record` in one step: an interrupted run leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return part.replace(path)


def check(what: str, got, want, tolerance: float) -> float:
    """Largest max|got - want| / max|want| over (nested) tensors; raises `CheckFailed` above `tolerance` or on NaN."""
    got, want = _tensors(got), _tensors(want)
    if len(got) != len(want):
        raise CheckFailed(f"{what}: gave {len(got)} tensors, the reference has {len(want)}.")
    worst = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.shape != w.shape:
            raise CheckFailed(f"{what}: output {i} has shape {tuple(g.shape)}, the reference {tuple(w.shape)}.")
        if g.numel() == 0:
            continue
        w = w.detach().to(g.device, torch.float64)
        difference = torch.where(g == w, 0.0, (g.detach().double() - w).abs()).max()  # equal infinities are equal
        scale = w[w.isfinite()].abs().max().item() if w.isfinite().any() else 0.0
        error = difference.item() / (scale or 1.0)
        if not error <= tolerance:  # also catches NaN
            raise CheckFailed(f"{what}: output {i} is off by {error:.3e} of its scale, allowed {tolerance:.1e}.")
        worst = max(worst, error)
    return worst


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "undersong": undersong.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value or () for t in _tensors(item)]


def _fresh_process(setup: str, call: str) -> dict[str, float]:
    sync = "'torch' in sys.modules and (c := sys.modules['torch'].cuda).is_initialized() and c.synchronize()"
    steps = {"setup": setup, "first": call, "second": call}
    body = "import time, json, sys\n_t, _space = {}, {}\n"
    for name, code in steps.items():
        body += f"_b = time.perf_counter(); exec({code!r}, _space); {sync}; _t[{name!r}] = time.perf_counter() - _b\n"
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", body + "print(json.dumps(_t))"]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the fresh process failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def _command() -> str:
    script = Path(sys.argv[0])
    arguments, told_where = [], False
    for argument in sys.argv[1:]:
        if argument.startswith("--"):
            told_where = argument.partition("=")[0] in _PLACES
        if not told_where:
            arguments.append(shlex.quote(argument))
    return " ".join(["python", os.path.relpath(script) if script.exists() else script.name, *arguments])


def _hardware(device: torch.device) -> dict[str, str | int | None]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"device": name, "cpu": cpu, "cpu_count": os.cpu_count(), "platform": platform.system()}
