import importlib.metadata
import io
import tarfile

import pytest

from . import fetch as module

VERSION = importlib.metadata.version("transformers")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path))
    return tmp_path / "transformers-tests"


@pytest.fixture
def sdist(monkeypatch):
    """Stands in for pip: an sdist with one common test and a real module where a stub would go."""
    calls = []

    def download(version, folder):
        calls.append(version)
        path = folder / f"transformers-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name in ("setup.py", "tests/test_modeling_common.py", "tests/generation/test_utils.py", "tests/a.bin"):
                member = tarfile.TarInfo(f"transformers-{version}/{name}")
                member.size = 5
                archive.addfile(member, io.BytesIO(b"x = 1"))
        return path

    monkeypatch.setattr(module, "_download", download)
    monkeypatch.setattr(module, "SHA256", {})
    return calls


def test_unpacks_the_installed_version_once(cache, sdist):
    package = module.fetch() / "hf_tests"
    assert module.fetch() == package.parent
    assert sdist == [VERSION]
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"__init__.py", "test_modeling_common.py", "exporters/__init__.py", "exporters/test_export.py"} <= files
    assert not {"setup.py", "a.bin"} & files
    assert (package / "generation/test_utils.py").read_text() == "x = 1", "a real file must win over our stub"


def test_an_unknown_sdist_is_refused_and_nothing_kept(cache, sdist, monkeypatch):
    monkeypatch.setattr(module, "SHA256", {VERSION: "0" * 64})
    with pytest.raises(module.FetchError, match=f"transformers-{VERSION}.tar.gz has sha256 .*, expected {'0' * 64}"):
        module.fetch()
    assert list(cache.iterdir()) == []


def test_no_network_says_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        module.FetchError, match=r"(?s)could not be downloaded .* run `python -m tests.hf_common.fetch` once"
    ):
        module.fetch()
    assert list(cache.iterdir()) == []
