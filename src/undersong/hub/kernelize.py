"""Gives a model's layers our GPU kernels, and says for every layer which kernel runs or why none does.

A layer class is decorated with `use_kernel_forward_from_hub(name)`; the `kernels` library then exchanges its
`forward`. Our kernels come from the sources in this package, built once per content into the user's cache, or from
the Hub with `UNDERSONG_KERNELS=hub` in the environment.

What to know: a model stays kernelized until `kernelize` runs again, so run it again after moving the model to another
device, before `torch.compile`, and after `train()` / `eval()` if a kernel has no backward (the report of that mode
tells; all of ours have one). Running it again is safe, also where no kernel fits any more: the torch forward comes
back then. A module gets its kernel as an instance attribute, so one model never changes another. A decorated
*function*, as transformers' own Mamba models use them, is one object for the process: kernelizing one model changes it
for every model that calls it, and the report says so. Our kernels send what they cannot compute, tensors on a CPU for
instance, on to the function they replaced; kernelizing a model on the CPU gives every model the torch function back.
"""

import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .build_kernel import KernelSource, build_kernel, kernel_sources

__all__ = ["KernelReport", "KernelUse", "kernel_config", "kernel_report", "kernelize", "register_kernels"]

_MODES = ("inference", "training", "torch_compile")


@dataclass(frozen=True)
class KernelUse:
    """What one module runs: `kernel` names it (None: the torch forward), `reason` says why."""

    layer: str
    kernel: str | None
    reason: str


class KernelReport(dict):
    """`{module path: KernelUse}` for every module that carries a kernel layer name."""

    def __init__(self, uses=(), *, device="", mode=""):
        super().__init__(uses)
        self.device, self.mode = device, mode

    @property
    def accelerated(self) -> list[str]:
        """Paths of the modules that run a kernel."""
        return [path for path, use in self.items() if use.kernel]

    def as_dict(self) -> dict:
        return {path: {"layer": u.layer, "kernel": u.kernel, "reason": u.reason} for path, u in self.items()}

    def __str__(self):
        where = ", ".join(filter(None, (self.device and f"device {self.device}", self.mode and f"mode {self.mode}")))
        lines = [
            f"{len(self.accelerated)} of {len(self)} kernel layers run a kernel" + (f" ({where})" if where else "")
        ]
        for path, use in self.items():
            lines.append(f"  {path or '(the model)'} [{use.layer}]: {use.kernel or 'torch'} - {use.reason}")
        return "\n".join(lines)


def kernelize(model, mode: str | None = None, device: str | None = None, *, trust_remote_code=False) -> KernelReport:
    """Gives every layer of `model` that undersong has a kernel for that kernel; other layers are left as they are.

    Nothing is registered beyond this model, and nothing raises when a kernel is missing: the report tells. It also
    tells where a layer is a function that other models of this process share, and so run with its kernel from now on.

    Args:
        model: any `nn.Module`, changed in place.
        mode: "inference" or "training", each also with "|torch_compile" or as a `kernels.Mode`; by default as
            `model.training` says. A kernel without that ability is not used.
        device: device type the model runs on, "cuda", "rocm", "xpu", ...; by default that of its parameters. Kernels
            for "cpu" exist only under `TRITON_INTERPRET=1` (slow, for tests).
        trust_remote_code: with `UNDERSONG_KERNELS=hub`, load from publishers that Hugging Face does not list as
            trusted.

    Returns:
        `{module path: KernelUse}`; `print` it.

    Raises:
        ValueError: mode is none of the above.

    >>> import torch, undersong
    >>> print(undersong.kernelize(torch.nn.Linear(2, 2)))
    0 of 0 kernel layers run a kernel (device cpu, mode training)
    """
    mode = _mode_names(model, mode)
    device = _device_type(model, device)
    report = KernelReport(device=device, mode="|".join(mode))
    sources, failed, shared = _layers(), {}, {}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for path, module in _places(model):
        layer = module.kernel_layer_name
        if module in shared:  # a function that another module of the model uses too
            report[path] = shared[module]
            continue
        if layer not in sources:
            reason = "not a layer of undersong, left as it is"
        elif not (reason := failed.get(layer) or _obstacle(sources[layer], device, dtypes)):
            try:
                reason = _take_kernel(module, sources[layer], mode, device, trust_remote_code)
            except Exception as error:
                # a model that runs slowly beats one that does not run, if nobody can overlook it
                reason = failed[layer] = one_line(f"loading the kernel failed: {type(error).__name__}: {error}")
                warnings.warn(f"{layer} keeps its torch forward, {reason}", RuntimeWarning, stacklevel=2)
        kernel = _running(module)
        if kernel and layer in sources and not reason.startswith("kernel"):
            module.__dict__.pop("forward")
            kernel = None
        report[path] = KernelUse(layer, kernel, reason)
        if _is_function(module):
            if kernel and layer in sources:
                report[path] = KernelUse(layer, kernel, f"{reason}, by every model of the process that calls it")
            shared[module] = report[path]
    return report


def kernel_report(model) -> KernelReport:
    """What every layer of `model` runs now, whoever kernelized it (also `use_kernels=True`); changes nothing."""
    report, device = KernelReport(device=_device_type(model, None)), _device_type(model, None)
    sources = _layers()
    for path, module in _places(model):
        layer = module.kernel_layer_name
        kernel = _running(module)
        if kernel:
            reason = "kernelized"
        elif layer not in sources:
            reason = "not a layer of undersong"
        else:
            reason = _obstacle(sources[layer], device) or "not kernelized; call undersong.kernelize(model)"
        report[path] = KernelUse(layer, kernel, reason)
    return report


def one_line(text: str, limit: int = 280) -> str:
    """Compiler errors quote whole functions; their first and last words tell enough for a report."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def layer_status(device: str) -> dict[str, tuple[str, str | None]]:
    """Every layer that undersong has a kernel for -> its kernel, and what speaks against it on `device`, or None."""
    return {
        layer: (f"{source.name} v{source.version}", _obstacle(source, device)) for layer, source in _layers().items()
    }


def kernel_config(*, trust_remote_code=False):
    """A `transformers.KernelConfig`: `from_pretrained(..., use_kernels=True, kernel_config=kernel_config())`.

    Only that model gets our kernels, and transformers keeps them right through `train()` and `eval()`. Needs a
    transformers that accepts the installed `kernels`: 5.22 accepts 0.17.2, 5.23 does not (`kernelize` works there).
    """
    from transformers import KernelConfig

    class UndersongKernelConfig(KernelConfig):
        # A plain KernelConfig with local kernels fails inside from_pretrained (seen on 5.22.2), serves only the mode
        # in which a model was loaded, and refuses layers that the model lacks. Its mapping may hold repositories, as
        # `kernels` itself takes them: these serve every mode and are looked up by layer name.
        def sanitize_kernel_mapping(self, model):
            pass

        def create_compatible_mapping(self, model, compile=False):
            self.kernel_mapping = _mapping(trust_remote_code)

    return UndersongKernelConfig()


def register_kernels(*, trust_remote_code=False) -> list[str]:
    """Makes every `from_pretrained(..., use_kernels=True)` of this process use our kernels; see `kernel_config`.

    Returns:
        The layer names that now have a kernel; one whose self-check failed on this machine is left out.

    Raises:
        ImportError: `kernels` is not installed.
    """
    from kernels import register_kernel_mapping

    mapping = _mapping(trust_remote_code)
    register_kernel_mapping(mapping)
    if importlib.util.find_spec("transformers") is not None:
        from transformers.integrations import hub_kernels

        # transformers registers its defaults anew with every use_kernels=True, over ours for Mamba's functions
        if defaults := getattr(hub_kernels, "get_kernel_mapping_transformers", None):
            defaults().update(mapping)
    return list(mapping)


def _mapping(trust_remote_code) -> dict:
    return {
        layer: dict.fromkeys(_devices(source), _repository(source, layer, trust_remote_code))
        for layer, source in _layers().items()
        if _failed_check(source) is None
    }


@lru_cache(maxsize=1)
def _layers() -> dict[str, KernelSource]:
    """Layer name -> the kernel source of this package that holds it."""
    return {
        layer: source
        for f in kernel_sources().values()
        for source in [KernelSource.read(f)]
        for layer in source.layers
    }


def _places(model):
    for path, module in model.named_modules():
        if hasattr(type(module), "kernel_layer_name"):
            yield path, module
        for name, function in getattr(module, "_kernel_funcs", {}).items():
            yield f"{path}.{name}".lstrip("."), function


def _is_function(module) -> bool:
    """Whether the module is what `use_kernel_forward_from_hub` makes of a function."""
    return type(module).__module__.split(".")[0] == "kernels"


def _from_hub() -> bool:
    choice = os.environ.get("UNDERSONG_KERNELS", "local")
    if choice not in ("local", "hub"):
        raise ValueError(f"UNDERSONG_KERNELS ({choice}) must be local or hub.")
    return choice == "hub"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _devices(source: KernelSource) -> tuple[str, ...]:
    return (*source.backends, "cpu") if _interpreted() else source.backends


def _obstacle(source: KernelSource, device: str, dtypes=()) -> str | None:
    """Why no kernel can run here, or None."""
    if importlib.util.find_spec("kernels") is None:
        return "the package kernels is not installed; pip install kernels"
    from kernels.layer.globals import _DISABLE_KERNEL_MAPPING

    if _DISABLE_KERNEL_MAPPING:
        return "switched off by DISABLE_KERNEL_MAPPING in the environment"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import torch

    if torch.float64 in dtypes:
        return "the kernels compute in float32 and the model is in float64"
    if device in ("cuda", "rocm") and not torch.cuda.is_available():
        return f"torch sees no {device} device here"
    if device not in _devices(source):
        hint = "; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests" if device == "cpu" else ""
        return f"no kernel for device {device}, only for {', '.join(source.backends)}{hint}"
    if _from_hub() and not source.repo_id:
        return f"{source.name} names no Hub repo in its build.toml"
    return _failed_check(source, dtypes) if device == "cuda" else None


def _failed_check(source: KernelSource, dtypes=()) -> str | None:
    """What the self-check said, where an op has found its kernel of this source wrong on this GPU, for a model with
    parameters of these dtypes (the narrowest decides, as in the ops), or for any."""
    import torch

    from ..ops import _dispatch

    if not torch.cuda.is_available():
        return None
    for op in _dispatch._OPS.values():
        device = torch.device("cuda")
        if op.kernel != source.folder.name or _dispatch._kernel_problem(op.name, device):
            continue
        narrow = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)
        for dtype in (narrow,) if dtypes else (torch.float32, torch.bfloat16):
            passed, reason, _ = _dispatch._self_check(op.name, device, dtype)
            if not passed:
                return one_line(f"the kernel failed its self-check on this machine: {op.name}: {reason}")
    return None


@lru_cache
def _built(folder: Path) -> Path:
    from ..data import cache_dir

    source = KernelSource.read(folder)
    return build_kernel(
        folder, cache_dir() / "kernels" / f"{source.name}-{source.digest[:12]}", (*source.backends, "cpu")
    )


def _repository(source: KernelSource, layer: str, trust_remote_code):
    from kernels import LayerRepository, LocalLayerRepository

    if _from_hub():
        return LayerRepository(
            source.repo_id, layer_name=layer, version=source.version, trust_remote_code=trust_remote_code
        )
    return LocalLayerRepository(_built(source.folder), layer_name=layer)


def _take_kernel(module, source: KernelSource, mode: tuple[str, ...], device: str, trust_remote_code) -> str:
    import kernels

    layer = module.kernel_layer_name
    repository = _repository(source, layer, trust_remote_code)
    flag = kernels.Mode[mode[0].upper()]
    for name in mode[1:]:
        flag = flag | kernels.Mode[name.upper()]
    # a plain repository serves every mode; the library itself falls back where the layer's flags deny the mode
    with kernels.use_kernel_mapping({layer: {device: repository}}):
        kernels.kernelize(module, mode=flag, device=device)
    if _running(module):
        return "kernel taken " + ("from the Hub" if _from_hub() else "from this package")
    loaded = repository.load()
    if "training" in mode and not getattr(loaded, "has_backward", True):
        return "mode training: the kernel has no backward"
    if "torch_compile" in mode and not getattr(loaded, "can_torch_compile", False):
        return "mode torch_compile: the kernel cannot be traced by torch.compile"
    return "the layer's kernel_condition refused it"


def _running(module) -> str | None:
    """Name of the kernel whose forward the module has, found through the forward itself."""
    if importlib.util.find_spec("kernels") is None:
        return None
    from kernels import get_loaded_kernels

    forward = module.__dict__.get("_old_forward") or module.__dict__.get(
        "forward"
    )  # accelerate's hooks keep the old one
    function = getattr(forward, "__func__", None)
    if function is None or function is type(module).forward:
        return None
    for loaded in get_loaded_kernels():
        if function.__module__.split(".")[0] == loaded.metadata.id:
            variant = Path(loaded.module.__file__).parent
            where = f"{i.repo_id}@{i.revision[:7]}" if (i := loaded.repo_info) else variant.parents[1]
            name = f"{loaded.metadata.name} v{loaded.metadata.version}"
            return f"{name} ({variant.name}, {where}), layer {function.__qualname__.split('.')[0]}"
    return None


def _mode_names(model, mode) -> tuple[str, ...]:
    if mode is None:
        return ("training",) if model.training else ("inference",)
    names = mode.name if hasattr(mode, "name") else mode
    names = tuple(sorted((names or "").lower().split("|"), key=lambda n: n == "torch_compile"))
    if not set(names) <= set(_MODES) or len({"inference", "training"} & set(names)) != 1:
        raise ValueError(f"mode ({mode}) must be inference or training, alone or with |torch_compile.")
    return names


def _device_type(model, device) -> str:
    import torch

    if device is None:
        tensor = next(iter(model.parameters()), next(iter(model.buffers()), None))
        device = tensor.device.type if tensor is not None else "cpu"
    device = getattr(device, "type", device).split(":")[0]
    return "rocm" if device == "cuda" and torch.version.hip else device
