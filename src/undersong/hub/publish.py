"""Publishing a folder to the Hub: checked first, one commit, never over somebody's work by accident."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .export import MANIFEST, export

_PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_IGNORED = ("__pycache__",)
# a slash-led value with a second part: "/home/me/model" and "C:\\models" are, the token "/" is not
_ABSOLUTE_PATH = re.compile(r"^(?:/|~/|[A-Za-z]:[\\/])[\w.-]+[\\/]|^[A-Za-z]:[\\/]\w")


@dataclass(frozen=True)
class Published:
    """What `publish` did: the repository's `url`, the sha of its head, and the paths `uploaded` and `deleted`.

    `commit` is None for a dry run on a repository that does not exist. Nothing uploaded and nothing deleted means
    that the repository already held exactly this.
    """

    url: str
    commit: str | None
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    dry_run: bool = False


def publish(
    folder_or_model,
    repo_id,
    *,
    update=False,
    private=None,
    token=None,
    endpoint=None,
    revision=None,
    dry_run=False,
    repo_type=None,
):
    """Creates a Hub repository and uploads a folder, or an exported model, in one commit.

    An update uploads changed files only, and removes those that an earlier export uploaded and this one no longer
    has; files that others added stay. In the card, `from_pretrained("<name of the folder>"` becomes the
    repository's id.

    Args:
        folder_or_model: a folder with a card (README.md), such as `export` and `build_kernel` write, or a model,
            which is exported first.
        repo_id: `"owner/name"`.
        update: allow a repository that exists already.
        private: visibility of a new repository; None is the account's default.
        token, endpoint: as in `huggingface_hub.HfApi`.
        revision: branch to commit to, created if missing; for a kernel `v<version>` unless named.
        dry_run: check everything and say what would be uploaded, but write nothing.
        repo_type: "model" or "kernel"; None recognises a built kernel by its layout.

    Returns:
        `Published(url, commit, uploaded, deleted)`.

    Raises:
        FileExistsError: the repository exists and `update` is False.
        FileNotFoundError: there is no such folder, or it has no card.
        ValueError: the card's metadata is invalid, a file is a pickle or a link that leaves the folder, a
            configuration holds an absolute path, or `private` differs from what an existing repository is.

    >>> import tempfile
    >>> publish(tempfile.mkdtemp(), "me/aaren-digits")
    Traceback (most recent call last):
    FileNotFoundError: folder (...) has no model card (README.md); undersong.hub.model_card makes one, ...
    """
    if not isinstance(folder_or_model, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = export(folder_or_model, Path(scratch) / repo_id.rpartition("/")[2])
            return publish(
                folder,
                repo_id,
                update=update,
                private=private,
                token=token,
                endpoint=endpoint,
                revision=revision,
                dry_run=dry_run,
                repo_type=repo_type,
            )
    folder = Path(folder_or_model)
    kernel_versions = {json.loads(path.read_text())["version"] for path in folder.glob("build/*/metadata.json")}
    repo_type = repo_type or ("kernel" if kernel_versions else "model")
    if repo_type == "kernel" and revision is None and kernel_versions:
        revision = f"v{max(kernel_versions)}"  # where `kernels.get_kernel(repo, version=...)` looks
    files = _checked_files(folder, repo_id, repo_type)

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="undersong")
    place = {"repo_id": repo_id, "repo_type": repo_type}
    exists = api.repo_exists(**place)
    if exists:
        _check_existing(api, place, update, private)
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    url = f"{api.endpoint}/{prefix}{repo_id}"
    head, remote, has_branch = _remote_files(api, place, revision) if exists else (None, {}, False)
    changed = [path for path, content in files.items() if not _same(content, remote.get(path))]
    stale = _stale(api, place, remote, files, head)
    if dry_run:
        return Published(url, head, tuple(changed), tuple(stale), dry_run)
    if not exists:
        api.create_repo(**place, private=private)
    if revision is not None and not has_branch:
        api.create_branch(**place, branch=revision, exist_ok=True)  # main may be the one asked for
    if not (changed or stale):
        return Published(url, head)
    operations = [CommitOperationAdd(path, _fileobj(files[path])) for path in changed]
    operations += [CommitOperationDelete(path) for path in stale]
    try:
        commit = api.create_commit(
            **place,
            operations=operations,
            commit_message=f"Upload {folder.name} with undersong",
            revision=revision,
            # somebody else's commit since we looked makes the Hub refuse ours
            parent_commit=head,
        )
    except Exception as error:
        if not exists:
            error.add_note(f"{repo_id} was created but is empty; publish again with update=True (--update).")
        raise
    return Published(url, commit.oid, tuple(changed), tuple(stale))


def _checked_files(folder, repo_id, repo_type):
    """Path in the repository -> content (bytes) or local path of everything that goes up."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder ({folder}) does not exist; export a model there first (undersong export).")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") or part in _IGNORED for part in name.split("/")):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"file ({name}) is a link to {path.readlink()}, outside the folder; copy it in.")
        if not path.is_file():
            continue
        if path.suffix.lower() in _PICKLES:
            raise ValueError(f"file ({name}) is a pickle, which runs code when loaded; save weights as safetensors.")
        if path.suffix == ".json" and "config" in path.name:
            _check_no_absolute_path(name, json.loads(path.read_text(encoding="utf-8")))
        files[name] = path
    if "README.md" not in files:
        raise FileNotFoundError(
            f"folder ({folder}) has no model card (README.md); undersong.hub.model_card makes one, export writes it."
        )
    files["README.md"] = _checked_card(folder, repo_id, repo_type).encode()
    return files


def _checked_card(folder, repo_id, repo_type):
    from huggingface_hub import ModelCard

    text = (folder / "README.md").read_text(encoding="utf-8")
    if text.lstrip().startswith("---"):
        try:
            metadata = ModelCard(text).data.to_dict()
        except Exception as error:  # yaml's and huggingface_hub's own errors, of many classes
            raise ValueError(f"README.md has invalid metadata: {' '.join(str(error).split())}") from error
        if "license" not in metadata:
            raise ValueError("README.md names no license in its metadata; add e.g. `license: apache-2.0`.")
    elif repo_type != "kernel":  # a kernel's license is in its metadata.json
        raise ValueError("README.md has no metadata; begin it with a YAML block between two lines of ---.")
    own_name = re.escape(folder.resolve().name)
    return re.sub(rf"""(from_pretrained\((['"])){own_name}\2""", lambda match: match[1] + repo_id + match[2], text)


def _check_no_absolute_path(name, value, key=""):
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_no_absolute_path(name, item, f"{key}.{inner}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _check_no_absolute_path(name, item, key)
    elif isinstance(value, str) and _ABSOLUTE_PATH.match(value):
        raise ValueError(f"{name} holds an absolute path ({key}: {value}), which means nothing elsewhere; remove it.")


def _check_existing(api, place, update, private):
    if not update:
        raise FileExistsError(
            f"repository {place['repo_id']} exists already on {api.endpoint}; pass update=True (--update) to upload"
            " changed files."
        )
    is_private = bool(getattr(api.repo_info(**place), "private", False))
    if private is not None and private != is_private:
        raise ValueError(
            f"private ({private}) differs from {place['repo_id']}, which is {'private' if is_private else 'public'};"
            " change its visibility in its settings."
        )


def _remote_files(api, place, revision):
    """Head, files by path, and whether the branch exists; one still to be made starts where main is."""
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    has_branch = True
    try:
        head = api.repo_info(**place, revision=revision).sha
    except RevisionNotFoundError:
        has_branch = False
        head = api.repo_info(**place).sha
    tree = api.list_repo_tree(**place, recursive=True, revision=head)
    return head, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}, has_branch


def _same(content, remote):
    """Whether the local content is what the Hub has: it knows LFS files by sha256, others by git's blob sha1."""
    if remote is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha256() if remote.lfs else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() == (remote.lfs.sha256 if remote.lfs else remote.blob_id)


def _stale(api, place, remote, files, head):
    """Files that an earlier export uploaded and that are not part of this one."""
    if MANIFEST not in remote or MANIFEST not in files:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        path = api.hf_hub_download(**place, filename=MANIFEST, revision=head, local_dir=scratch)
        written = json.loads(Path(path).read_text(encoding="utf-8"))["files"]
    return [name for name in written if name in remote and name not in files]


def _fileobj(content):
    return content if isinstance(content, bytes) else str(content)
