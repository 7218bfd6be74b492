"""Publishing: one commit, checked first, never over an existing repository by accident."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from undersong import registry
from undersong.hub import build_kernel, export, publish

from .toy_kernel import write_toy

CARD = (
    "---\nlicense: apache-2.0\n---\n# A model\n\n`M.from_pretrained(\"model\")` and `from_pretrained('model', x=1)`\n"
)


@pytest.fixture
def place(hub):
    return {"endpoint": hub.endpoint, "token": hub.token}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "nested").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "aaren", "separator": "/", "tokens": ["</s>", "~"]}')
    (folder / "nested" / "data.txt").write_text("data")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden.bin").write_bytes(b"hidden")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    return folder


FILES = ("README.md", "config.json", "model.safetensors", "nested/data.txt")


def test_a_new_repository_gets_everything_in_one_commit(hub, api, place, folder):
    done = publish(folder, "me/model", **place)
    assert done.uploaded == FILES
    assert done.deleted == ()
    assert done.url == f"{hub.endpoint}/me/model"
    assert done.commit == api.model_info("me/model").sha
    assert tuple(sorted(hub.files("models", "me/model"))) == FILES
    assert sum("/commit/" in request.path for request in hub.requests) == 1


def test_the_card_names_the_repository(hub, place, folder):
    publish(folder, "me/other", **place)
    card = hub.files("models", "me/other")["README.md"].decode()
    assert "`M.from_pretrained(\"me/other\")` and `from_pretrained('me/other', x=1)`" in card
    assert (folder / "README.md").read_text() == CARD


def test_an_existing_repository_needs_update(hub, api, place, folder):
    api.create_repo("me/model")
    before = len(hub.requests)
    with pytest.raises(FileExistsError, match=r"me/model exists already on http://127.*update=True \(--update\)"):
        publish(folder, "me/model", **place)
    assert {request.method for request in hub.requests[before:]} <= {"GET", "HEAD"}
    assert publish(folder, "me/model", update=True, **place).uploaded == FILES


def test_an_update_uploads_only_what_changed(hub, api, place, folder):
    first = publish(folder, "me/model", **place)
    api.upload_file(path_or_fileobj=b"by hand", path_in_repo="picture.png", repo_id="me/model")
    (folder / "nested" / "data.txt").write_text("new")
    second = publish(folder, "me/model", update=True, **place)
    assert second.uploaded == ("nested/data.txt",)
    assert second.commit != first.commit
    assert set(hub.files("models", "me/model")) == {*FILES, "picture.png"}
    assert hub.files("models", "me/model")["nested/data.txt"] == b"new"
    before = len(hub.requests)
    third = publish(folder, "me/model", update=True, **place)
    assert (third.uploaded, third.commit) == ((), second.commit)
    assert {request.method for request in hub.requests[before:]} <= {"GET", "HEAD"}


def test_a_dry_run_writes_nothing(hub, api, place, folder):
    done = publish(folder, "me/model", dry_run=True, **place)
    assert (done.uploaded, done.commit, done.dry_run) == (FILES, None, True)
    assert not api.repo_exists("me/model")
    publish(folder, "me/model", **place)
    (folder / "config.json").write_text("{}")
    assert publish(folder, "me/model", update=True, dry_run=True, **place).uploaded == ("config.json",)
    assert hub.files("models", "me/model")["config.json"] != b"{}"


def test_private_and_revision(hub, api, place, folder):
    publish(folder, "me/secret", private=True, **place)
    assert api.model_info("me/secret").private
    with pytest.raises(ValueError, match=r"private \(False\) differs from me/secret, which is private"):
        publish(folder, "me/secret", update=True, private=False, **place)
    (folder / "config.json").write_text("{}")
    done = publish(folder, "me/secret", update=True, revision="next", **place)
    assert done.uploaded == ("config.json",)
    assert api.model_info("me/secret", revision="next").sha == done.commit
    assert api.model_info("me/secret").sha != done.commit
    same = publish(folder, "me/secret", update=True, revision="next", **place)
    assert (same.uploaded, same.commit) == ((), done.commit)
    (folder / "config.json").write_text('{"model_type": "aaren", "separator": "/", "tokens": ["</s>", "~"]}')
    assert publish(folder, "me/secret", update=True, revision="as-main", **place).uploaded == ()
    assert api.model_info("me/secret", revision="as-main").sha == api.model_info("me/secret").sha
    assert publish(folder, "me/new", revision="main", **place).uploaded == FILES


def test_a_model_is_exported_and_stale_files_go(hub, api, place, tmp_path):
    row = registry.ARCHITECTURES["aaren"]
    model = row.model_class("AutoModelForCausalLM")(row.config_class()(**row.tiny))
    done = publish(model, "me/aaren", **place)
    files = hub.files("models", "me/aaren")
    assert set(done.uploaded) == set(files)
    assert b'from_pretrained("me/aaren"' in files["README.md"]
    assert publish(model, "me/aaren", update=True, **place).uploaded == ()
    api.upload_file(path_or_fileobj=b"by hand", path_in_repo="picture.png", repo_id="me/aaren")
    # as if the next version needed one file less
    folder = export(model, tmp_path / "aaren")
    (folder / "sequences.py").unlink()
    manifest = json.loads((folder / "undersong_export.json").read_text())
    del manifest["files"]["sequences.py"]
    (folder / "undersong_export.json").write_text(json.dumps(manifest))
    done = publish(folder, "me/aaren", update=True, **place)
    assert done.deleted == ("sequences.py",)
    assert "sequences.py" not in hub.files("models", "me/aaren")
    assert "picture.png" in hub.files("models", "me/aaren")


def test_a_kernel_goes_to_its_version_branch(hub, api, place, tmp_path):
    folder = build_kernel(write_toy(tmp_path / "source"), tmp_path / "toy-scale", backends=("cpu",))
    done = publish(folder, "me/toy-scale", **place)
    assert done.url == f"{hub.endpoint}/kernels/me/toy-scale"
    assert "build/torch-cpu/metadata.json" in done.uploaded
    assert api.repo_exists("me/toy-scale", repo_type="kernel")
    assert not api.repo_exists("me/toy-scale")
    assert api.kernel_info("me/toy-scale", revision="v3").sha == done.commit
    assert publish(folder, "me/toy-scale", update=True, **place).uploaded == ()


BAD = {
    "pickle": (lambda f: (f / "nested" / "pytorch_model.bin").touch(), r"nested/pytorch_model.bin\) is a pickle"),
    "pt": (lambda f: (f / "optimizer.PT").touch(), r"optimizer.PT\) is a pickle, which runs code"),
    "no license": (lambda f: (f / "README.md").write_text("---\ntags: [x]\n---\n"), "names no license"),
    "no metadata": (lambda f: (f / "README.md").write_text("# Hello"), "README.md has no metadata"),
    "bad yaml": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "README.md has invalid metadata"),
    "bad index": (
        lambda f: (f / "README.md").write_text("---\nlicense: mit\nmodel-index: [{}]\n---\n"),
        "README.md has invalid metadata",
    ),
    "path": (
        lambda f: (f / "config.json").write_text('{"a": [{"source": "/home/me/model"}]}'),
        r"config.json holds an absolute path \(a.source: /home/me/model\)",
    ),
    "windows path": (
        lambda f: (f / "tokenizer_config.json").write_text('{"name_or_path": "C:\\\\models"}'),
        "tokenizer_config.json holds an absolute path",
    ),
    "link": (lambda f: (f / "notes").symlink_to("/etc/hostname"), r"notes\) is a link to /etc/hostname, outside"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_before_anything_is_sent(hub, place, folder, case):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        publish(folder, "me/model", **place)
    assert not hub.requests


def test_a_missing_folder_or_card_is_named(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\) does not exist; export a model there first"):
        publish(tmp_path / "absent", "me/model", **place)
    with pytest.raises(FileNotFoundError, match=r"has no model card \(README.md\)"):
        publish(tmp_path, "me/model", **place)


def test_a_failed_upload_says_how_to_go_on(hub, place, folder):
    hub.fail_next(20, status=403, match="/commit/")
    with pytest.raises(HfHubHTTPError) as error:
        publish(folder, "me/model", **place)
    assert error.value.__notes__ == ["me/model was created but is empty; publish again with update=True (--update)."]


def test_a_commit_in_between_is_not_overwritten(api, place, folder, monkeypatch):
    publish(folder, "me/model", **place)
    (folder / "config.json").write_text("{}")
    create_commit = HfApi.create_commit

    def late(self, *arguments, **keywords):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id="me/model")
        return create_commit(self, *arguments, **keywords)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(HfHubHTTPError, match="412"):
        publish(folder, "me/model", update=True, **place)
