"""A Hugging Face Hub on loopback, for tests and demonstrations that must not reach the network.

`LocalHub` speaks the part of the Hub's HTTP API that `huggingface_hub`, `transformers`, `kernels`, `evaluate` and
`datasets` use: models, datasets, spaces and kernels, with branches, tags, commits and private repositories.
It differs from the real Hub in three ways: a new repository is empty (no `.gitattributes`), there is one user, who may
write to every namespace, and every upload is a "regular" one (no Xet; LFS only for parquet files of datasets, which
`datasets.push_to_hub` insists on).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._local_hub_server import HubServer

KINDS = ("models", "datasets", "spaces", "kernels")


class HubError(LookupError):
    """A request that the hub refuses; `status` and `code` are what the real Hub answers in the same case."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Request:
    """One request the hub answered. `received` is the size of its body in bytes, `path` comes without the query."""

    method: str
    path: str
    status: int
    received: int


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository: `files` maps each path to the id of its content (git's blob sha1)."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: Mapping[str, str]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            # git's abbreviations; shorter than 7 digits is more likely a mistyped branch
            matches = [full for full in self.commits if len(revision) >= 7 and full.startswith(revision)]
            if len(matches) != 1:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            oid = matches[0]
        return self.commits[oid]

    def append(self, branch: str, files: dict[str, str], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        identity = json.dumps(
            [self.kind, self.id, parent, len(self.commits), title, message, date, sorted(files.items())]
        )
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, message, date, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _checked_path(path: str) -> str:
    if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, "BadRequest", f"path ({path!r}) must be relative and stay inside the repository")
    return path


class LocalHub:
    """A writable Hub server on 127.0.0.1, alive inside a `with` block.

    Args:
        directory: where repositories are kept; they are there again for a later `LocalHub` of the same directory.
            Without it they live in memory.
        token, user: the one account. Writing and private repositories need the token.

    Attributes:
        requests: every `Request` answered so far, in order of completion.
        trusted_publishers: organisations whose kernels load without `trust_remote_code`.

    `huggingface_hub` reads `HF_ENDPOINT` when it is imported, so pass `endpoint=hub.endpoint, token=hub.token` to
    `HfApi` and its functions in this process, and start other programs with `env=hub.env()`.

    >>> from urllib.request import urlopen
    >>> with LocalHub() as hub:
    ...     hub.create("models", "me/model")
    ...     commit = hub.commit("models", "me/model", {"config.json": b"{}"})
    ...     urlopen(f"{hub.endpoint}/me/model/resolve/{commit.oid}/config.json").read()
    b'{}'
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, token: str = "hf_local", user: str = "me"):
        self.token, self.user = token, user
        self.requests: list[Request] = []
        self.trusted_publishers: set[str] = set()
        self._directory = None if directory is None else Path(directory)
        self._repos: dict[tuple[str, str], Repo] = {}
        self._blobs: dict[str, bytes] = {}
        self._lfs: dict[str, bytes] = {}  # uploaded, waiting for the commit that names them
        self._faults: list[tuple[int, str]] = []
        self._lock = threading.RLock()
        self._server: HubServer | None = None
        if self._directory is not None:
            self._load(self._directory)

    def __enter__(self) -> LocalHub:
        from ._local_hub_server import HubServer  # here because the two modules know each other

        self._home = tempfile.mkdtemp(prefix="undersong-hf-home-")
        self._server = HubServer(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def endpoint(self) -> str:
        """The base URL, e.g. `http://127.0.0.1:40123`. Raises RuntimeError outside the `with` block."""
        if self._server is None:
            raise RuntimeError("LocalHub is not running; use it as `with LocalHub() as hub:`.")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self, *, home: str | os.PathLike[str] | None = None) -> dict[str, str]:
        """The environment for a subprocess that shall see this hub and no other; `home` replaces its HF_HOME."""
        ours = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HUGGING_FACE_", "KERNELS_CACHE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        no_proxy = ",".join(filter(None, [env.get("NO_PROXY") or env.get("no_proxy"), "127.0.0.1"]))
        return env | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": os.fspath(self._home if home is None else home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # without telemetry kernels 0.17 makes a User-Agent that ends in a blank, which huggingface_hub 2 will not
            # send; an origin behind it mends that
            "HF_HUB_USER_AGENT_ORIGIN": "undersong",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def fail_next(self, count: int = 1, *, status: int = 503, match: str = "") -> None:
        """Answers the next `count` requests whose path contains `match` with `status`, before they have any effect."""
        with self._lock:
            self._faults += [(status, match)] * count

    def repos(self, kind: str) -> list[str]:
        """Ids of all repositories of a kind ("models", "datasets", "spaces" or "kernels"), sorted."""
        return sorted(repo_id for repo_kind, repo_id in self._repos if repo_kind == kind)

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a branch, tag or commit holds, by path. Raises HubError (a LookupError) when there is no such thing."""
        files = self._repo(kind, repo_id).commit_at(revision).files
        return {path: self._blobs[blob] for path, blob in sorted(files.items())}

    def commits(self, kind: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first; it ends with the empty initial commit."""
        repo = self._repo(kind, repo_id)
        history = [repo.commit_at(revision)]
        while history[-1].parent is not None:
            history.append(repo.commits[history[-1].parent])
        return history

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> None:
        """Creates an empty repository. Raises HubError 409 when it exists."""
        if kind not in KINDS or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
            raise HubError(400, "BadRequest", f"repo_id ({repo_id!r}) must be namespace/name and its kind in {KINDS}")
        with self._lock:
            if (kind, repo_id) in self._repos:
                raise HubError(409, "Conflict", "You already created this repo")
            repo = self._repos[kind, repo_id] = Repo(kind, repo_id, private)
            repo.append("main", {}, "initial commit")
            self._save()

    def commit(
        self,
        kind: str,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        deleted: Iterable[str] = (),
        branch: str = "main",
        parent: str | None = None,
        title: str = "Upload files",
        message: str = "",
    ) -> Commit:
        """Adds `files` to a branch and removes the paths in `deleted` first (a folder's path ends in "/").

        Raises:
            HubError: no such repository, branch or deleted path; `parent` is not the branch's head; an unsafe path.
        """
        with self._lock:
            repo = self._repo(kind, repo_id)
            if branch not in repo.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            head = repo.commit_at(branch)
            if parent is not None and not head.oid.startswith(parent):
                raise HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
            paths = dict(head.files)
            for path in deleted:
                doomed = [p for p in paths if p == path or (path.endswith("/") and p.startswith(path))]
                if not doomed:
                    raise HubError(404, "EntryNotFound", f"Entry not found: {path}")
                for doomed_path in doomed:
                    del paths[doomed_path]
            contents = {_checked_path(path): content for path, content in files.items()}
            for path, content in contents.items():
                paths[path] = blob_id(content)
                self._blobs[paths[path]] = content
            commit = repo.append(branch, paths, title, message)
            self._save()
            return commit

    def _repo(self, kind: str, repo_id: str, *, visible: bool = True) -> Repo:
        repo = self._repos.get((kind, repo_id))
        if repo is None or (repo.private and not visible):
            # an anonymous client must not learn whether a private repository exists: the Hub answers 401 for both
            raise HubError(404 if visible else 401, "RepoNotFound", "Repository not found")
        return repo

    def _load(self, directory: Path) -> None:
        index = directory / "repos.json"
        for entry in json.loads(index.read_text("utf-8")) if index.exists() else []:
            commits = {commit["oid"]: Commit(**commit) for commit in entry.pop("commits")}
            repo = self._repos[entry["kind"], entry["id"]] = Repo(**entry, commits=commits)
            for commit in repo.commits.values():
                self._blobs |= {blob: (directory / "blobs" / blob).read_bytes() for blob in commit.files.values()}

    def _save(self) -> None:
        if self._directory is None:
            return
        blobs = self._directory / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        for blob, content in self._blobs.items():
            if not (blobs / blob).exists():
                _write_atomically(blobs / blob, content)
        entries = [
            asdict(repo) | {"commits": [asdict(c) for c in repo.commits.values()]} for repo in self._repos.values()
        ]
        _write_atomically(self._directory / "repos.json", json.dumps(entries).encode())


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
