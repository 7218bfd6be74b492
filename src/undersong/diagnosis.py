"""`undersong.doctor()`: what this machine has, which path each op takes on it and why, and what to do about it."""

import importlib.metadata
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["DoctorReport", "doctor"]

PACKAGES = ("undersong", "torch", "transformers", "kernels", "triton", "huggingface-hub", "peft")
VARIABLES = (
    "UNDERSONG_CACHE",
    "UNDERSONG_KERNELS",
    "TRITON_INTERPRET",
    "LOCAL_KERNELS",
    "DISABLE_KERNEL_MAPPING",
    "USE_HUB_KERNELS",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
PAIR_FOR_USE_KERNELS = "pip install 'transformers==5.22.*' 'kernels==0.17.2'"


@dataclass
class DoctorReport:
    """Sections of plain values, for `print` and for `as_dict()`.

    Attributes:
        versions: package -> version or None.
        kernels_pair: verdict on the installed transformers and kernels, and which ways to use kernels work with them.
        devices: cpu, threads and GPUs.
        ops: per op what `backend="auto"` takes here, the reason, the kernel's self-check, its cold start in seconds.
        layers: per kernel layer where its kernel comes from and what `undersong.kernelize` would answer here.
        model_types: per architecture the class that `AutoConfig` gives and whether it is ours.
        cache: folder and bytes per kind.
        environment: the variables that change any of this, if set.
        advice: what to do, one line each; empty when all is well.
    """

    versions: dict = field(default_factory=dict)
    kernels_pair: dict = field(default_factory=dict)
    devices: dict = field(default_factory=dict)
    ops: list = field(default_factory=list)
    layers: list = field(default_factory=list)
    model_types: list = field(default_factory=list)
    cache: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    advice: list = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        from io import StringIO

        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        terminal = Console()
        width = min(max(terminal.width, 60), 140) if terminal.is_terminal else 140
        console = Console(file=StringIO(), width=width, color_system=None)

        def show(title, columns, rows):
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            for index, column in enumerate(columns):
                table.add_column(column, no_wrap=index == 0)
            for row in rows:
                table.add_row(*(escape("-" if cell is None else str(cell)) for cell in row))
            if table.row_count:
                console.print(table)

        show("Versions", ("package", "installed"), self.versions.items())
        show("transformers with kernels", ("way", "verdict"), self.kernels_pair.items())
        gpus = [
            (f"gpu {i}", f"{g['name']}, {g['memory_gib']} GiB, {g['capability']}") for i, g in enumerate(self._gpus())
        ]
        show("Devices", ("what", "found"), [*((k, v) for k, v in self.devices.items() if k != "gpus"), *gpus])
        keys = ("op", "auto", "reason", "self_check", "cold_start_s")
        show("Ops", ("op", 'backend="auto"', "why", "kernel self-check", "cold start, s"), _rows(self.ops, keys))
        show("Kernel layers", ("layer", "kernel", "here"), _rows(self.layers, ("layer", "kernel", "here")))
        show(
            "Model types",
            ("model_type", "AutoConfig gives", "ours"),
            _rows(self.model_types, ("model_type", "class", "ours")),
        )
        sizes = [(kind, f"{size / 2**20:,.1f} MiB") for kind, size in self.cache.get("bytes", {}).items()]
        show(f"Cache in {self.cache.get('folder')}", ("kind", "size"), sizes)
        show("Environment", ("variable", "value"), self.environment.items())
        for line in self.advice or ["Nothing to do."]:
            console.print(f"* {escape(line)}")
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _gpus(self):
        return self.devices.get("gpus", [])


def doctor() -> DoctorReport:
    """Examines this machine. Imports torch and transformers; on a GPU it runs kernel self-checks not run before.

    >>> report = doctor()
    >>> sorted(report.as_dict())
    ['advice', 'cache', 'devices', 'environment', 'kernels_pair', 'layers', 'model_types', 'ops', 'versions']
    """
    report = DoctorReport()
    for section in (_versions, _kernels_pair, _devices, _ops, _layers, _model_types, _cache, _environment):
        try:
            section(report)
        except Exception as error:
            # a broken installation is what a doctor is for: the other sections must still appear
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            report.advice.append(f"{section.__name__.strip('_')} could not be examined: {reason}")
    return report


def _versions(report):
    from . import __version__ as undersong_version

    report.versions["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            report.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report.versions[package] = None
    report.versions["undersong"] = undersong_version  # also where it runs from a checkout that is not installed


def _kernels_pair(report):
    verdict, use_kernels, own, remedy = judge_pair(report.versions["transformers"], report.versions["kernels"])
    if use_kernels is None:  # versions that nobody tried: transformers itself knows what it accepts
        from transformers.utils.import_utils import is_kernels_available

        use_kernels = is_kernels_available()
    report.kernels_pair |= {
        "together": verdict,
        "use_kernels=True": _works(use_kernels),
        "undersong.kernelize": _works(own),
    }
    if remedy:
        report.advice.append(remedy)


def judge_pair(transformers: str | None, kernels: str | None) -> tuple[str, bool | None, bool, str | None]:
    """Verdict, does `use_kernels=True` work (None: unknown), does `undersong.kernelize` work, remedy.

    >>> judge_pair("5.22.2", "0.17.2")
    ('tested pair', True, True, None)
    >>> judge_pair("5.23.0", "0.17.2")[1:3]
    (False, True)
    """
    if transformers is None or _release(transformers) < (5, 22):
        remedy = f"undersong needs transformers 5.22 or newer, found {transformers}: {PAIR_FOR_USE_KERNELS}"
        return "transformers is missing or too old", False, False, remedy
    if kernels is None:
        return (
            "kernels is not installed",
            False,
            False,
            "no GPU kernels without the package: pip install 'kernels==0.17.2'",
        )
    series, kernels_release = _release(transformers)[:2], _release(kernels)
    if kernels_release < (0, 17):
        return "kernels is too old", False, False, f"undersong needs kernels 0.17 or newer: {PAIR_FOR_USE_KERNELS}"
    if series == (5, 22) and kernels_release == (0, 17, 2):
        return "tested pair", True, True, None
    if series == (5, 23) and kernels_release[:2] == (0, 17):
        remedy = f"transformers 5.23 refuses kernels 0.17: call undersong.kernelize(model), or {PAIR_FOR_USE_KERNELS}"
        return "tested pair, but without use_kernels=True", False, True, remedy
    return "untested pair", None, True, f"if kernels make trouble, the tested pair is: {PAIR_FOR_USE_KERNELS}"


def _devices(report):
    import torch

    report.devices |= {"cpu": _cpu_name(), "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    report.devices["gpus"] = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        kind = "gfx" if torch.version.hip else "sm_"
        facts = {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30),
            "capability": f"{kind}{gpu.major}{gpu.minor}",
        }
        report.devices["gpus"].append(facts)
    if torch.cuda.is_available() and report.versions.get("triton") is None:
        report.advice.append("there is a GPU but no triton, so every op runs plain torch: pip install triton")


def _ops(report):
    import torch

    from . import ops
    from .hub.kernelize import one_line

    on_gpu = torch.cuda.is_available()
    for row in ops.status():
        if row["backend"] == "triton":
            usable = on_gpu and row["available"] and not _interpreting()
            reason = one_line(row["reason"] if on_gpu else "no GPU; triton: " + row["reason"])
            checked = {key: row.get(key) for key in ("self_check", "cold_start_s")}
            report.ops.append({"op": row["op"], "auto": "triton" if usable else "torch", "reason": reason, **checked})
            if row.get("self_check") == "failed":
                report.advice.append(f"{row['op']}: the kernel failed its self-check and is off, torch runs: {reason}")
    if on_gpu and _interpreting():
        report.advice.append("TRITON_INTERPRET is set, so kernels are off: unset it (the interpreter is for tests)")


def _layers(report):
    import torch

    from .hub.kernelize import layer_status

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layer, (kernel, obstacle) in layer_status(device).items():
        report.layers.append({"layer": layer, "kernel": kernel, "here": obstacle or f"ready for {device}"})


def _model_types(report):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .registry import ARCHITECTURES

    for model_type, row in ARCHITECTURES.items():
        installed, ours = CONFIG_MAPPING[model_type], row.config_class()
        is_ours = row.stock_owned or installed is ours
        name = f"{installed.__module__}.{installed.__name__}"
        report.model_types.append({"model_type": model_type, "class": name, "ours": installed is ours})
        if not is_ours:
            report.advice.append(
                f"{model_type} belongs to {name}: import undersong before that package, or use its classes"
            )


def _cache(report):
    from .data import cache_dir

    folder = cache_dir()
    report.cache["folder"] = _short(folder)
    kinds = sorted(folder.iterdir()) if folder.is_dir() else []
    report.cache["bytes"] = {k.name: sum(f.stat().st_size for f in [k, *k.rglob("*")] if f.is_file()) for k in kinds}


def _environment(report):
    report.environment |= {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _rows(dicts, keys):
    return [[d.get(key) for key in keys] for d in dicts]


def _works(flag):
    return "works" if flag else "does not work"


def _interpreting():
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


def _cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
