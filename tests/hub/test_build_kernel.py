"""A kernel source becomes the folder that `kernels` loads: deterministic, whole or absent, checked first."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch

from undersong.hub.build_kernel import KernelSource, build_kernel, kernel_sources

_spec = importlib.util.spec_from_file_location("undersong_toy_kernel", Path(__file__).with_name("toy_kernel.py"))
toy_kernel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy_kernel)
write_toy = toy_kernel.write_toy


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_and_metadata(tmp_path):
    built = build_kernel(write_toy(tmp_path / "source"), tmp_path / "out", backends=("cuda", "cpu"))
    files = tree(built)
    names = ["__init__.py", "layers.py", "metadata.json", "scale.py", "table.json", "toy_scale/__init__.py"]
    variants = [f"build/torch-{backend}/{name}" for backend in ("cpu", "cuda") for name in names]
    assert sorted(files) == [".undersong-build.json", "README.md", *variants]
    metadata = json.loads(files["build/torch-cuda/metadata.json"])
    digest = metadata.pop("digest")
    assert metadata == {
        "name": "toy-scale",
        "id": "_toy_scale_cuda_" + KernelSource.read(tmp_path / "source").digest[:7],
        "version": 3,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    assert metadata["id"].isidentifier()
    assert digest["algorithm"] == "sha256"
    assert digest["files"] == {
        name: base64.b64encode(hashlib.sha256(files[f"build/torch-cuda/{name}"]).digest()).decode()
        for name in names
        if name != "metadata.json"
    }


def test_equal_sources_give_equal_bytes_and_a_changed_source_a_new_id(tmp_path):
    source = write_toy(tmp_path / "source")
    first = tree(build_kernel(source, tmp_path / "a"))
    assert tree(build_kernel(write_toy(tmp_path / "copy"), tmp_path / "b")) == first
    before = KernelSource.read(source)
    write_toy(source, scale=lambda text: text + "\n# changed\n")
    assert KernelSource.read(source).digest != before.digest
    again = tree(build_kernel(source, tmp_path / "a"))
    assert again["build/torch-cuda/scale.py"].endswith(b"# changed\n")
    assert again["build/torch-cuda/metadata.json"] != first["build/torch-cuda/metadata.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "copy", "source"]


@pytest.mark.parametrize("where", ["", "build", "build/torch-cpu"])
def test_kernels_loads_it_and_it_computes(tmp_path, monkeypatch, where):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # one id per case: the id is the key in sys.modules
    source = write_toy(tmp_path / "source", scale=lambda text: text + f"\n# {where}\n")
    built = build_kernel(source, tmp_path / "out", backends=("cpu",))
    kernel = kernels.get_local_kernel(built / where)
    x = torch.randn(100, requires_grad=True)
    y = kernel.scale(x, 3.0)
    y.sum().backward()
    assert torch.equal(y, 3 * x)
    assert torch.equal(x.grad, torch.full_like(x, 3))
    layer = kernels.LocalLayerRepository(built / where, layer_name="ToyScale").load()
    assert torch.equal(layer()(x), 2 * x)


def test_compatibility_folder_imports_under_the_kernels_name(tmp_path):
    built = build_kernel(write_toy(tmp_path / "source"), tmp_path / "out", backends=("cpu",))
    code = "import sys, toy_scale; print(toy_scale.__all__, toy_scale.layers.__name__.split('.')[0] in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=built / "build/torch-cpu", capture_output=True, text=True)
    assert run.stdout.strip() == "['layers', 'scale'] True", run.stderr


def test_earlier_builds_are_replaced_edited_ones_are_not(tmp_path):
    source, out = write_toy(tmp_path / "source"), tmp_path / "out"
    build_kernel(source, out)
    (out / "build/torch-cuda/__pycache__").mkdir()
    (out / "build/torch-cuda/__pycache__/scale.pyc").write_bytes(b"left by an import")
    build_kernel(source, out, backends=("rocm",))
    assert [p.name for p in (out / "build").iterdir()] == ["torch-rocm"]
    (out / "build/torch-rocm/scale.py").write_text("# edited\n")
    before = tree(out)
    with pytest.raises(
        FileExistsError, match=r"holds build/torch-rocm/scale\.py, which no build wrote; choose another"
    ):
        build_kernel(source, out)
    assert tree(out) == before


def test_foreign_outputs_are_refused(tmp_path):
    source = write_toy(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"must be new, empty or an earlier build: it holds thesis\.txt"):
        build_kernel(source, tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"output \(.*thesis\.txt\) must be a folder to create, it is a file"):
        build_kernel(source, tmp_path / "mine" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    build_kernel(source, tmp_path / "empty")


def test_backends_must_be_the_sources_own(tmp_path):
    source = write_toy(tmp_path / "source")
    with pytest.raises(ValueError, match=r"backends \(xpu\) must be out of cpu, cuda, rocm; add what is missing"):
        build_kernel(source, tmp_path / "out", backends=("xpu",))
    with pytest.raises(ValueError, match=r"backends \(none\) must be out of"):
        build_kernel(source, tmp_path / "out", backends=())
    assert not (tmp_path / "out").exists()


RULES = {
    "numpy": (
        "scale",
        "import numpy",
        r"scale\.py line \d+ imports numpy; a kernel may import only the standard library",
    ),
    "undersong": ("scale", "from undersong import ops", r"imports undersong; a kernel may import only"),
    "own name": (
        "layers",
        "from toy_scale import scale",
        r"imports toy_scale; .* its own modules by relative imports",
    ),
    "parent": (
        "scale",
        "from .. import x",
        r"scale\.py line \d+ must not import from outside the kernel's own folder",
    ),
    "missing": ("scale", "from .missing import x", r"imports \.missing, which is not in the kernel's folder"),
    "syntax": ("scale", "def (:", r"scale\.py line \d+ must be python 3\.9 syntax"),
    "init": (
        "layers",
        "class B(nn.Module):\n    def __init__(self): pass",
        r"layer B must have nothing but .* it has __init__",
    ),
    "member": ("layers", "class B(nn.Module):\n    size = 3", r"layer B must have nothing but .* it has size"),
}


@pytest.mark.parametrize("rule", RULES)
def test_code_rules(tmp_path, rule):
    where, code, message = RULES[rule]
    source = write_toy(tmp_path / "source", **{where: lambda text: text + "\n" + code + "\n"})
    with pytest.raises(ValueError, match=message):
        build_kernel(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("removed", "message"),
    [("from . import layers", "must contain `from . import layers`"), ("__all__", "must define __all__")],
)
def test_init_rules(tmp_path, removed, message):
    source = write_toy(
        tmp_path / "source", init=lambda text: text.replace(removed, "names" if "all" in removed else "")
    )
    with pytest.raises(ValueError, match=message):
        KernelSource.read(source)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"toy-scale"', '"Toy_Scale"', r"general\.name \('Toy_Scale'\) in .* must be lower-case letters"),
        ("version = 3", "version = 0", r"general\.version \(0\) in .* must be a whole number from 1 on"),
        ('license = "Apache-2.0"', "", r"general\.license \(None\) in .* must be an SPDX name"),
        ('["cuda", "rocm"]', '["gpu"]', r"general\.backends \(\['gpu'\]\) in .* must be a list out of cpu, cuda"),
        ("[torch-noarch]", "[torch]", r"must have a section \[torch-noarch\]"),
        ("[general]", "[general", "must be valid TOML"),
    ],
)
def test_build_toml_rules(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        KernelSource.read(write_toy(tmp_path / "source", build=lambda text: text.replace(old, new)))


def test_unknown_source(tmp_path):
    with pytest.raises(ValueError, match=r"source \(no-such\) must be a folder with a build\.toml or the name of"):
        build_kernel("no-such", tmp_path / "out")


def test_layers_are_read_with_their_flags(tmp_path):
    assert KernelSource.read(write_toy(tmp_path / "source")).layers == {
        "ToyScale": {"has_backward": True, "can_torch_compile": False}
    }


@pytest.mark.parametrize("name", kernel_sources())
def test_every_kernel_of_the_package_builds_and_loads(tmp_path, name):
    source = KernelSource.read(name)
    built = build_kernel(name, tmp_path / "out", backends=("cpu", *source.backends))
    code = f"import kernels; k = kernels.get_local_kernel(__import__('pathlib').Path({str(built)!r}), backend='cpu');"
    code += (
        f"print(sorted(set({list(source.layers)}) - set(dir(getattr(k, 'layers', None)))),"
        " [n for n in k.__all__ if not hasattr(k, n)])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "[] []", run.stderr
