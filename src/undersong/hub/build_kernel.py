"""Builds a kernel source folder into the layout that the `kernels` library loads, locally or from the Hub.

A source is `build.toml` + `torch-ext/<python_name>/{__init__,layers,...}.py` + `CARD.md`. Our kernels are pure
Triton, so a build is a copy: per backend `build/torch-<backend>/` with the modules, a `metadata.json` whose digest
covers every file, and a folder `<python_name>/` through which the package is importable by its own name.
"""

import ast
import hashlib
import json
import re
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

__all__ = ["KernelSource", "build_kernel", "kernel_sources"]

BACKENDS = ("cpu", "cuda", "mps", "npu", "rocm", "xpu")
LAYER_FLAGS = ("has_backward", "can_torch_compile")
_ALLOWED_PACKAGES = sys.stdlib_module_names | {"torch", "triton"}
_KERNELS_FOLDER = Path(__file__).resolve().parents[1] / "kernels"
# A build keeps the hash of everything it wrote, so that it replaces its own work only, and never an edited file.
_RECORD = ".undersong-build.json"

_COMPATIBILITY = '''"""Makes `import {name}` work with this variant's folder on sys.path."""

import importlib.util
import sys
from pathlib import Path

_module = sys.modules.get("{id}")
if _module is None:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parent.parent / "__init__.py")
    _module = sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
globals().update({{k: v for k, v in vars(_module).items() if not k.startswith("__") or k == "__all__"}})
'''


@dataclass(frozen=True)
class KernelSource:
    """A checked kernel source.

    Attributes:
        folder: where it lies.
        name, version, license, backends: as in build.toml; version 1 lives in the branch `v1` of its Hub repo.
        repo_id: that repo, or None.
        files: the modules, path -> bytes.
        layers: layer class -> its flags `has_backward` and `can_torch_compile`.
    """

    folder: Path
    name: str
    version: int
    license: str
    repo_id: str | None
    backends: tuple[str, ...]
    files: dict[str, bytes]
    layers: dict[str, dict[str, bool]]

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of build.toml and the modules: equal digests build equal kernels."""
        total = hashlib.sha256((self.folder / "build.toml").read_bytes())
        for path, content in sorted(self.files.items()):
            total.update(b"\0" + path.encode() + b"\0" + hashlib.sha256(content).digest())
        return total.hexdigest()

    @classmethod
    def read(cls, source: Path | str) -> "KernelSource":
        """Reads and checks a source folder, or the one of that name in `undersong/kernels`.

        Raises:
            ValueError: no such source, a wrong build.toml, or code that breaks the rules for kernels.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _KERNELS_FOLDER / str(source).replace("-", "_")
        if not (folder / "build.toml").is_file():
            known = ", ".join(kernel_sources()) or "none"
            raise ValueError(
                f"source ({source}) must be a folder with a build.toml or the name of a kernel of undersong ({known})."
            )
        general, extensions = _read_build_toml(folder / "build.toml")
        root = folder / "torch-ext" / general["name"].replace("-", "_")
        if not (root / "__init__.py").is_file():
            raise ValueError(f"source ({folder}) must contain {root.relative_to(folder).as_posix()}/__init__.py.")
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix.lstrip(".") in extensions and "__pycache__" not in path.parts
        }
        trees = {path: _parse(path, content) for path, content in files.items() if path.endswith(".py")}
        for path, tree in trees.items():
            _check_imports(path, tree, files)
        _check_init(trees["__init__.py"], has_layers="layers.py" in trees)
        layers = _read_layers(trees["layers.py"]) if "layers.py" in trees else {}
        hub = general.get("hub", {})
        return cls(folder, general["name"], general["version"], general["license"], hub.get("repo-id"),
                   tuple(general["backends"]), files, layers)  # fmt: skip


def kernel_sources() -> dict[str, Path]:
    """The kernel sources that come with undersong: folder name -> folder."""
    return {path.parent.name: path.parent for path in sorted(_KERNELS_FOLDER.glob("*/build.toml"))}


def build_kernel(source: Path | str, output: Path | str, backends: tuple[str, ...] = ("cuda",)) -> Path:
    """Builds a kernel into `output/build/torch-<backend>/`, beside its card as `output/README.md`.

    Equal sources give equal bytes. The folder appears whole or not at all; an earlier build of ours is replaced.

    Args:
        source: a source folder, or the name of a kernel that comes with undersong.
        output: the folder to create; `kernels.get_local_kernel` and `kernels.LocalLayerRepository` load it.
        backends: out of those that build.toml names; also "cpu", which runs under `TRITON_INTERPRET=1`, for tests.

    Returns:
        `output` as a path.

    Raises:
        ValueError: the source breaks a rule for kernels, or a backend is not one of its own.
        FileExistsError: `output` holds something that this function did not write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     built = build_kernel("cumulative_softmax_average", folder, backends=("cuda", "cpu"))
    ...     sorted(path.name for path in (built / "build").iterdir())
    ['torch-cpu', 'torch-cuda']
    """
    kernel = KernelSource.read(source)
    output = Path(output).absolute()
    backends = (backends,) if isinstance(backends, str) else tuple(backends)
    allowed = {"cpu", *kernel.backends}
    if not backends or not set(backends) <= allowed:
        raise ValueError(
            f"backends ({', '.join(backends) or 'none'}) must be out of {', '.join(sorted(allowed))};"
            f" add what is missing to backends in {kernel.name}'s build.toml."
        )
    _refuse_foreign(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        new = Path(scratch) / "new"
        for backend in backends:
            _write_variant(kernel, new / "build" / f"torch-{backend}", backend)
        if (card := kernel.folder / "CARD.md").is_file():
            shutil.copyfile(card, new / "README.md")
        (new / _RECORD).write_text(json.dumps(_hashes(new), indent=1) + "\n")
        want = _hashes(new)
        if _hashes(output) == want:
            return output
        if output.exists():
            output.rename(Path(scratch) / "old")
        try:
            new.rename(output)
        except OSError:  # another process was faster
            if _hashes(output) != want:
                raise
    return output


def _write_variant(kernel: KernelSource, folder: Path, backend: str) -> None:
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for path, content in kernel.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    # unique per content, because it is the key in sys.modules
    identity = f"_{kernel.python_name}_{backend}_{kernel.digest[:7]}"
    compatibility = folder / kernel.python_name / "__init__.py"
    compatibility.parent.mkdir()
    compatibility.write_text(_COMPATIBILITY.format(name=kernel.python_name, id=identity))
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, folder)
    metadata = {
        "name": kernel.name,
        "id": identity,
        "version": kernel.version,
        "license": kernel.license,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
    }
    content = json.dumps(metadata, indent=2) + "\n"
    Metadata.from_bytes(content.encode())  # the library's own parser is the judge
    (folder / "metadata.json").write_text(content)


def _hashes(folder: Path) -> dict[str, str]:
    """Hash of every file below; bytecode that an import left behind does not count."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _refuse_foreign(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"output ({output}) must be a folder to create, it is a file; choose another path.")
    record = output / _RECORD
    written = json.loads(record.read_text()) if record.is_file() else {}
    for path, value in _hashes(output).items():
        if path != _RECORD and written.get(path) != value:
            raise FileExistsError(
                f"output ({output}) must be new, empty or an earlier build: it holds {path}, which no build wrote;"
                " choose another folder or remove that file."
            )


def _read_build_toml(path: Path) -> tuple[dict, set[str]]:
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be valid TOML: {error}.") from None
    general = table.get("general", {})

    def demand(key, good, rule):
        if not good(general.get(key)):
            raise ValueError(f"general.{key} ({general.get(key)!r}) in {path} must be {rule}.")

    demand("name", lambda v: isinstance(v, str) and re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", v),
           "lower-case letters, digits and hyphens, such as \"my-kernel\"")  # fmt: skip
    demand("version", lambda v: type(v) is int and v >= 1, "a whole number from 1 on")
    demand("license", lambda v: isinstance(v, str) and v, "an SPDX name, such as \"Apache-2.0\"")  # fmt: skip
    demand("backends", lambda v: isinstance(v, list) and v and set(v) <= set(BACKENDS),
           f"a list out of {', '.join(BACKENDS)}")  # fmt: skip
    if "torch-noarch" not in table:
        raise ValueError(f"{path} must have a section [torch-noarch] because only pure Triton kernels are built here.")
    return general, set(table["torch-noarch"].get("pyext", ["py"]))


def _parse(path: str, content: bytes) -> ast.Module:
    try:
        return ast.parse(content, feature_version=(3, 9))
    except SyntaxError as error:
        raise ValueError(f"{path} line {error.lineno} must be python 3.9 syntax: {error.msg}.") from None


def _check_imports(path: str, tree: ast.Module, files: dict[str, bytes]) -> None:
    here = PurePosixPath(path).parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(here.parts) + 1:
                raise ValueError(f"{path} line {node.lineno} must not import from outside the kernel's own folder.")
            base = PurePosixPath(*here.parts[: len(here.parts) + 1 - node.level])
            if node.module and not _is_module(base.joinpath(*node.module.split(".")), files):
                raise ValueError(
                    f"{path} line {node.lineno} imports .{node.module}, which is not in the kernel's folder."
                )
            continue
        else:
            continue
        for name in names:
            if name.partition(".")[0] not in _ALLOWED_PACKAGES:
                raise ValueError(
                    f"{path} line {node.lineno} imports {name}; a kernel may import only the standard library, torch,"
                    " triton and its own modules by relative imports."
                )


def _is_module(path: PurePosixPath, files: dict[str, bytes]) -> bool:
    return f"{path}.py" in files or f"{path}/__init__.py" in files


def _check_init(tree: ast.Module, has_layers: bool) -> None:
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is None
        for alias in node.names
    }
    if has_layers and "layers" not in imported:
        raise ValueError(
            "__init__.py must contain `from . import layers` because `kernels` looks the layers up there."
        )
    targets = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    if "__all__" not in targets:
        raise ValueError("__init__.py must define __all__ because it is the kernel's versioned interface.")


def _read_layers(tree: ast.Module) -> dict[str, dict[str, bool]]:
    """Layer class -> flags. A layer has nothing but `forward`, annotations and flags: only forward is taken over."""
    layers = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not any(
            ast.unparse(b).split(".")[-1] == "Module" for b in node.bases
        ):
            continue
        flags = {"has_backward": True, "can_torch_compile": False}
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "forward":
                continue
            if isinstance(item, ast.AnnAssign) and item.value is None:
                continue
            if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                continue
            if isinstance(item, ast.AnnAssign | ast.Assign):
                target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0]
                name = ast.unparse(target)
                if name in LAYER_FLAGS and isinstance(item.value, ast.Constant) and isinstance(item.value.value, bool):
                    flags[name] = item.value.value
                    continue
            else:
                name = getattr(item, "name", type(item).__name__)
            raise ValueError(
                f"layers.py line {item.lineno}: layer {node.name} must have nothing but forward, annotations and the"
                f" flags {', '.join(LAYER_FLAGS)}, it has {name}; `kernels` takes over forward alone."
            )
        layers[node.name] = flags
    return layers
