"""Which backend an op takes, why, and what it took.

An op is a table row: a `reference` (the definition), a `torch` function (fast everywhere) and perhaps a Triton kernel,
all with the same positional tensors. The kernel's source is a package of its own, `<package>/kernels/<name>/`, that
also goes to the Hub; it is loaded by file path, so exported models, which travel without that folder, run on torch.
A kernel is trusted only after a self-check on this very machine: forward and backward against `torch`, once for each
(GPU, torch, Triton, kernel source, dtype), remembered in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

BACKENDS = ("auto", "reference", "torch", "triton")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of each tensor's largest entry


@dataclasses.dataclass(frozen=True)
class Op:
    """One row: functions of the same positional arguments that return tensors in (nested) tuples.

    kernel: folder under `kernels/`, whose package exports a function of the op's name; None = there is no kernel.
    kernel_refuses: the arguments -> why the kernel cannot take them, or None.
    example: (device, dtype) -> small arguments for the self-check, leaves that need a gradient marked so.
    """

    name: str
    reference: Callable
    torch: Callable
    kernel: str | None = None
    kernel_refuses: Callable[..., str | None] = lambda *args: None
    example: Callable | None = None


@dataclasses.dataclass
class Record:
    """What an op did last: the backend, the reason, and how often each backend ran."""

    backend: str = "-"
    reason: str = "not called yet"
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Explanation(dict):
    """`{op: Record}`, printed as a small table."""

    def __str__(self):
        lines = []
        for name, record in self.items():
            counts = ", ".join(f"{backend} {n}x" for backend, n in sorted(record.counts.items()))
            lines.append(f"{name}: {record.backend} ({record.reason})" + (f"; so far {counts}" if counts else ""))
        return "\n".join(lines)


_OPS: dict[str, Op] = {}
_RECORDS: dict[str, Record] = {}
_KERNELS: dict[str, object] = {}  # kernel name -> package, or the text of why it does not load
_VERDICTS: dict[tuple, tuple[bool, str, float | None]] = {}  # (op, device, dtype) -> ok, reason, seconds of the check


def register(op: Op) -> Op:
    _OPS[op.name] = op
    _RECORDS.setdefault(op.name, Record())
    return op


def run(op: Op, backend: str, *args):
    """Call the backend that `backend` names or that "auto" picks, with `args[0]` telling device and dtype."""
    chosen, reason = _choose(op, backend, args)
    if not torch.compiler.is_compiling():  # bookkeeping would end up as guards of a compiled graph
        record = _RECORDS[op.name]
        record.backend, record.reason = chosen, reason
        record.counts[chosen] = record.counts.get(chosen, 0) + 1
    if chosen == "triton":
        return getattr(_KERNELS[op.kernel], op.name)(*args)
    return (op.reference if chosen == "reference" else op.torch)(*args)


def explain() -> Explanation:
    """Which backend each op ran last, why, and how often each ran: `{op: Record}`, printable.

    >>> {name: record.backend for name, record in explain().items()}
    {...}
    """
    return Explanation((name, dataclasses.replace(r, counts=dict(r.counts))) for name, r in _RECORDS.items())


def available_backends(name: str, device: str | torch.device = "cpu") -> list[str]:
    """The backends that may be named for tensors on `device`; on the CPU Triton counts when its interpreter is on."""
    usable = _kernel_problem(name, torch.device(device)) is None
    return ["reference", "torch", "triton"] if usable else ["reference", "torch"]


def status() -> list[dict]:
    """For each op and backend on this machine: available, reason, verdict of the self-check, cold-start seconds.

    On a GPU this runs the self-checks that have not run yet (seconds each). `undersong doctor` prints it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in _OPS.values():
        for backend in ("reference", "torch"):
            rows.append({"op": op.name, "backend": backend, "available": True, "reason": "always"})
        row = {"op": op.name, "backend": "triton", "available": True, "self_check": "not run", "cold_start_s": None}
        if (problem := _kernel_problem(op.name, device)) is not None:
            row |= {"available": False, "reason": problem}
        elif device.type == "cpu":
            row |= {"reason": "Triton's CPU interpreter (TRITON_INTERPRET=1), when named"}
        else:
            verdicts = {dtype: _self_check(op.name, device, dtype) for dtype in (torch.float32, torch.bfloat16)}
            row["available"] = all(ok for ok, _, _ in verdicts.values())
            row["self_check"] = "passed" if row["available"] else "failed"
            row["reason"] = "; ".join(f"{str(d).removeprefix('torch.')}: {why}" for d, (_, why, _) in verdicts.items())
            row["cold_start_s"] = max((t for _, _, t in verdicts.values() if t is not None), default=None)
        rows.append(row)
    return rows


def _choose(op: Op, backend: str, args) -> tuple[str, str]:
    if backend not in BACKENDS:
        raise ValueError(f"backend ({backend!r}) must be one of {', '.join(map(repr, BACKENDS))}; use 'auto'.")
    if backend in ("reference", "torch"):
        return backend, "asked for by name"
    tensor = args[0]
    if backend == "auto" and tensor.device.type != "cuda":
        return "torch", f"auto: the inputs are on {tensor.device.type}"
    problem = _kernel_problem(op.name, tensor.device) or op.kernel_refuses(*args)
    if problem is None and backend == "auto" and _interpreted():
        problem = "TRITON_INTERPRET is set, and the interpreter is only for tests; unset it"
    if problem is None and tensor.device.type == "cuda":
        ok, problem, _ = _self_check(op.name, tensor.device, _check_dtype(args))
        problem = None if ok else problem
    if problem is None:
        return "triton", "auto: a CUDA device and a checked kernel" if backend == "auto" else "asked for by name"
    if backend == "triton":
        raise RuntimeError(f'backend="triton" cannot run {op.name}: {problem}. Or use backend="auto".')
    return "torch", f"auto: {problem}"


def _check_dtype(args) -> torch.dtype:
    """The narrowest dtype among the inputs decides which code the kernel compiles to."""
    dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _kernel_problem(name: str, device: torch.device) -> str | None:
    """Why the op's kernel cannot be loaded for tensors on `device`, or None."""
    op = _OPS[name]
    if op.kernel is None:
        return "this op has no kernel"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it needs CUDA tensors, got {device.type}; move the inputs, or set TRITON_INTERPRET=1 before the start"
    if op.kernel not in _KERNELS:
        _KERNELS[op.kernel] = _load_kernel(op.kernel)
    package = _KERNELS[op.kernel]
    return package if isinstance(package, str) else None


def _kernel_folder(name: str) -> Path:
    return Path(__file__).resolve().parent.parent / "kernels" / name / "torch-ext" / name


def _load_kernel(name: str):
    """The kernel's package, loaded from its files under a name of its own; or the reason why there is none."""
    folder = _kernel_folder(name)
    if not (folder / "__init__.py").is_file():
        return "there is no kernel source beside the op (an exported model leaves it out); install undersong"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    module_name = f"_undersong_{name}_{_digest(folder)[:7]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = package
    try:
        spec.loader.exec_module(package)
    except Exception as error:  # a torch or Triton this source does not fit: report, "auto" goes on with torch
        sys.modules.pop(module_name, None)
        return f"the kernel source does not load here ({type(error).__name__}: {error}); upgrade torch and triton"
    return package


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _self_check(name: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str, float | None]:
    """Verdict on the op's kernel here: from this process, else from the user's cache, else by running it."""
    op = _OPS[name]
    slot = (name, device.type, device.index or 0, dtype)
    if slot in _VERDICTS:
        return _VERDICTS[slot]
    names = (op.name, torch.cuda.get_device_name(device), torch.__version__, _version("triton"))
    key = " | ".join((*names, _digest(_kernel_folder(op.kernel))[:16], str(dtype)))
    verdicts = _read_verdicts()
    if key in verdicts:
        verdict = bool(verdicts[key]["ok"]), str(verdicts[key]["reason"]), verdicts[key].get("seconds")
    else:
        verdict = _check_kernel(op, device, dtype)
        _write_verdict(key, dict(zip(("ok", "reason", "seconds"), verdict, strict=True)))
    _VERDICTS[slot] = verdict
    if not verdict[0]:
        warnings.warn(
            f"undersong: the Triton kernel of {op.name} is off on this machine, the slower torch path runs instead: "
            f"{verdict[1]}. Remove {_verdict_file()} to check again.",
            RuntimeWarning,
            stacklevel=5,
        )
    return verdict


# torch.compile calls these while tracing and keeps the answer, as it would a constant.
_kernel_problem._dynamo_marked_constant = True
_self_check._dynamo_marked_constant = True


def _check_kernel(op: Op, device: torch.device, dtype: torch.dtype) -> tuple[bool, str, float | None]:
    begin = time.perf_counter()
    try:
        with torch.enable_grad():
            got = _outputs_and_gradients(getattr(_KERNELS[op.kernel], op.name), op.example(device, dtype))
            seconds = time.perf_counter() - begin
            want = _outputs_and_gradients(op.torch, op.example(device, dtype))
    except Exception as error:
        return False, f"the self-check raised {type(error).__name__}: {error}", None
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        x, y = x.double(), y.double()
        same = (x == y) | (x.isnan() & y.isnan())  # infinities are equal, their difference is not 0
        error = torch.where(same, 0.0, (x - y).abs()).max() / y[y.isfinite()].abs().amax().clamp(min=1e-30)
        worst = max(worst, error.nan_to_num(torch.inf).item())
    verdict = "passed" if worst <= TOLERANCE[dtype] else "failed"
    return verdict == "passed", f"the self-check {verdict} (largest relative error {worst:.1e})", round(seconds, 3)


def _outputs_and_gradients(function, args) -> list[torch.Tensor]:
    outputs = _tensors(function(*args))
    leaves = [x for x in _tensors(args) if x.requires_grad]
    if not leaves:
        return outputs
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    carry = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    return outputs + list(torch.autograd.grad([x for x, _ in carry], leaves, [g for _, g in carry]))


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, tuple | list) else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _verdict_file() -> Path:
    home = os.environ.get("UNDERSONG_CACHE")
    if not home:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undersong"
    return Path(home) / "self_check.json"


def _read_verdicts() -> dict:
    try:
        verdicts = json.loads(_verdict_file().read_text())
        return {k: v for k, v in verdicts.items() if isinstance(v, dict) and {"ok", "reason"} <= v.keys()}
    except (OSError, ValueError, AttributeError):  # absent, unreadable or garbled: check again
        return {}


def _write_verdict(key: str, verdict: dict) -> None:
    file = _verdict_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=file.name, text=True)
        with os.fdopen(handle, "w") as stream:
            json.dump(_read_verdicts() | {key: verdict}, stream, indent=1)
        os.replace(part, file)
    except OSError:  # a read-only home costs one check in each process, no more
        pass
