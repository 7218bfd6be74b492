"""Gets transformers' own common model tests: they are in its source distribution on PyPI, not in the wheel.

`python -m tests.hf_common.fetch` downloads the sdist of the installed version once and unpacks its `tests/` as package
`hf_tests` in the user's cache. Three modules that the common tests import are not in the sdist; the stubs are ours.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from undersong.data.wheels import cache_dir

# Versions the suite was tried with. pip compares any version with the hash in the index; this pins ours beyond that.
SHA256 = {
    "5.22.2": "55f57e5cbd7c0b500b7a706daa0ecd76567b56ca139e6e02ef0bba0437e3a763",
}

STUBS = {
    "exporters/test_export.py": '''"""torch.export and ONNX export tests are not part of the sdist."""


class ExportTesterMixin:
    pass
''',
    "generation/test_utils.py": '''"""generate() has undersong's own tests (tests/common/test_generation.py)."""


class GenerationTesterMixin:
    pass
''',
    "utils/test_configuration_utils.py": '''"""Values other than the defaults for what all configurations share."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 7,
    "is_encoder_decoder": True,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
}
''',
}


class FetchError(RuntimeError):
    """The sdist could not be had; nothing was kept."""


def fetch() -> Path:
    """Folder to put on `sys.path` so that `import hf_tests.test_modeling_common` works.

    Raises:
        FetchError: no network on the first call, or an sdist other than the known one.
    """
    version = importlib.metadata.version("transformers")
    shelf = cache_dir() / "transformers-tests"
    stub_hash = hashlib.sha256(repr(STUBS).encode()).hexdigest()[:6]  # new stubs make a new folder
    for known in sorted(shelf.glob(f"{version}-*-{stub_hash}")):
        return known
    shelf.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=shelf) as temporary:
        sdist = _download(version, Path(temporary))
        sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
        if sha256 != SHA256.get(version, sha256):
            raise FetchError(f"{sdist.name} has sha256 {sha256}, expected {SHA256[version]}; nothing was kept.")
        package = Path(temporary) / "unpacked" / "hf_tests"
        _unpack(sdist, package)
        goal = shelf / f"{version}-{sha256[:12]}-{stub_hash}"
        try:
            package.parent.rename(goal)
        except OSError:
            if not goal.is_dir():  # else another process was faster
                raise
    return goal


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"transformers=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    sdists = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not sdists:
        raise FetchError(
            f"transformers=={version} could not be downloaded as a source distribution, which holds transformers' own"
            f" model tests; run `python -m tests.hf_common.fetch` once with a network.\n{done.stderr[-2000:]}"
        )
    return sdists[0]


def _unpack(sdist: Path, package: Path) -> None:
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        members = [m for m in archive.getmembers() if m.name.startswith(f"{root}/tests/") and m.name.endswith(".py")]
        if not members:
            raise FetchError(f"{sdist.name} holds no tests/*.py; this version of transformers ships none.")
        archive.extractall(package.parent, members, filter="data")
    shutil.move(package.parent / root / "tests", package)
    (package.parent / root).rmdir()
    for path, source in STUBS.items():
        stub = package / path
        if stub.exists():
            continue  # a version that ships the real one
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(source, encoding="utf-8")
    for folder in {package, *(path.parent for path in package.rglob("*.py"))}:
        (folder / "__init__.py").touch()


if __name__ == "__main__":
    print(fetch())
