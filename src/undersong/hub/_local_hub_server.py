"""The HTTP side of `LocalHub`: routes and wire formats. What a repository is lives in `local_hub`."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .local_hub import KINDS, Commit, HubError, LocalHub, Repo, Request, blob_id


def _front_matter(readme: bytes) -> dict[str, Any]:
    """The YAML block at the top of a card. Raises ValueError when there is one and it is not a mapping."""
    import yaml  # huggingface_hub brings it; only cards need it

    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", readme.decode("utf-8", "replace"), re.DOTALL)
    if block is None:
        return {}
    try:
        metadata = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(metadata, dict | None):
        raise ValueError(f"metadata must be a mapping, got {type(metadata).__name__}")
    return metadata or {}


class HubServer(ThreadingHTTPServer):
    """One thread per connection; `server_close` also ends the connections that clients keep alive."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LocalHub) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, hub))

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests; anything else is a defect and shows its traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):  # kept alive by clients' connection pools
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def _route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a handler method; `{repo}` stands for kind and id, `{prefix}` for the same in non-API URLs."""
    name = r"(?P<repo_id>[^/]+/[^/]+?)"
    pattern = pattern.replace("{repo}", rf"/api/(?P<kind>{'|'.join(KINDS)})/{name}")
    pattern = pattern.replace("{prefix}", rf"/(?:(?P<kind>{'|'.join(KINDS)})/)?{name}")

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Translates HTTP to `LocalHub` calls: one method per endpoint, groups of its pattern as keyword arguments."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one packet

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        """Silent: `LocalHub.requests` is the log."""

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _reply(self, payload: Any = None, *, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        if body is None:
            body = json.dumps(payload).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        # before the client can act on the answer, so that a test never sees the list lag behind
        self.hub.requests.append(Request(self.command, self.url.path, status, len(self.body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        self.url, self.body = urlsplit(self.path), self._read_body()
        self.query = parse_qs(self.url.query)
        self.commit_oid: str | None = None
        try:
            self._dispatch()
        except HubError as error:
            # reading an entry that a commit lacks still names the commit: clients cache the absence under it
            headers = {"X-Repo-Commit": self.commit_oid} if self.commit_oid else {}
            payload = {"error": error.message}
            self._reply(
                payload, status=error.status, X_Error_Code=error.code, X_Error_Message=error.message, **headers
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._reply({"error": f"malformed request: {error!r}"}, status=400)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _dispatch(self) -> None:
        with self.hub._lock:
            for fault in self.hub._faults:
                if fault[1] in self.url.path:
                    self.hub._faults.remove(fault)
                    raise HubError(fault[0], "InjectedFault", "LocalHub.fail_next")
        given = self.headers.get("Authorization")
        self.authorised = given == f"Bearer {self.hub.token}"
        if given is not None and not self.authorised:
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, function in _ROUTES:
            if route_method == method and (match := pattern.fullmatch(self.url.path)):
                return function(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
        if re.match(rf"/api/({'|'.join(KINDS)})/|/.+/resolve/", self.url.path):  # e.g. an id without namespace
            raise HubError(404 if self.authorised else 401, "RepoNotFound", "Repository not found")
        raise HubError(404, "NotFound", f"LocalHub does not serve {self.command} {self.url.path}")

    def _repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.hub._repo(kind, repo_id, visible=self.authorised)
        if write:
            self._need_token()
        return repo

    def _need_token(self) -> None:
        if not self.authorised:
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def _form(self) -> dict[str, Any]:
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(self.body or b"{}")
        return parse_qs(self.body.decode())

    @_route("GET", "/api/whoami-v2")
    def _whoami(self) -> None:
        self._need_token()
        access = {"accessToken": {"displayName": "local", "role": "write"}, "type": "access_token"}
        self._reply({"type": "user", "id": self.hub.user, "name": self.hub.user, "orgs": [], "auth": access})

    @_route("GET", "/api/organizations/(?P<name>[^/]+)/overview")
    def _organization(self, name: str) -> None:
        self._reply({"name": name, "fullname": name, "trustedKernelPublisher": name in self.hub.trusted_publishers})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> None:
        errors = []
        try:
            _front_matter(self._form()["content"].encode())
        except ValueError as error:
            errors = [{"message": str(error)}]
        self._reply({"errors": errors, "warnings": []}, status=400 if errors else 200)

    @_route("GET", f"/api/(?P<kind>{'|'.join(KINDS)})")
    def _list(self, kind: str) -> None:
        author, search = (self.query.get(key, [""])[0] for key in ("author", "search"))
        tags = set(self.query.get("filter", []))
        repos = [repo for (k, _), repo in sorted(self.hub._repos.items()) if k == kind]
        infos = [self._info_of(repo, "main") for repo in repos if self.authorised or not repo.private]
        found = [i for i in infos if author in ("", i["author"]) and search.lower() in i["id"].lower()]
        self._reply([i for i in found if tags <= set(i["tags"])][: int(self.query.get("limit", ["1000"])[0])])

    @_route("POST", "/api/repos/create")
    def _create(self) -> None:
        self._need_token()
        form = self._form()
        kind, repo_id = form.get("type", "model") + "s", f"{form.get('organization') or self.hub.user}/{form['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        try:
            self.hub.create(kind, repo_id, private=bool(form.get("private")) or form.get("visibility") == "private")
        except HubError as error:
            if error.status != 409:
                raise
            self._reply({"error": error.message, "url": url}, status=409, X_Error_Message=error.message)
        else:
            self._reply({"url": url, "name": repo_id, "id": repo_id})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self) -> None:
        self._need_token()
        form = self._form()
        kind, repo_id = form.get("type", "model") + "s", f"{form.get('organization') or self.hub.user}/{form['name']}"
        with self.hub._lock:
            self._repo(kind, repo_id, write=True)
            del self.hub._repos[kind, repo_id]
            self.hub._save()
        self._reply({})

    @_route("PUT", "{repo}/settings")
    def _settings(self, kind: str, repo_id: str) -> None:
        form, repo = self._form(), self._repo(kind, repo_id, write=True)
        repo.private = form.get("visibility", "private" if form.get("private", repo.private) else "") == "private"
        self.hub._save()
        self._reply({"private": repo.private})

    @_route("GET", "{repo}/auth-check(?P<write>/write)?")
    def _auth_check(self, kind: str, repo_id: str, write: str | None) -> None:
        self._repo(kind, repo_id, write=write is not None)
        self._reply({})

    def _info_of(self, repo: Repo, revision: str) -> dict[str, Any]:
        commit = repo.commit_at(revision)
        try:
            card = _front_matter(self.hub._blobs.get(commit.files.get("README.md", ""), b""))
        except ValueError:
            card = {}
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for entry in siblings:
                blob = commit.files[entry["rfilename"]]
                entry |= {"blobId": blob, "size": len(self.hub._blobs[blob])}
        tags = card.get("tags") or []
        return {
            "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid,
            "lastModified": commit.date, "private": repo.private, "gated": False, "disabled": False,
            "downloads": 0, "likes": 0, "tags": [tags] if isinstance(tags, str) else tags, "siblings": siblings,
            "cardData": card or None, "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"), "sdk": card.get("sdk"),
        }  # fmt: skip

    @_route("GET", "{repo}(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, kind: str, repo_id: str, revision: str | None) -> None:
        self._reply(self._info_of(self._repo(kind, repo_id), revision or "main"))

    @_route("GET", "{repo}/commits/(?P<revision>[^/]+)")
    def _commits(self, kind: str, repo_id: str, revision: str) -> None:
        self._repo(kind, repo_id)
        authors = [{"user": self.hub.user}]
        self._reply(
            [
                {"id": c.oid, "authors": authors, "date": c.date, "title": c.title, "message": c.message}
                for c in self.hub.commits(kind, repo_id, revision)
            ]
        )

    @_route("GET", "{repo}/refs")
    def _refs(self, kind: str, repo_id: str) -> None:
        repo = self._repo(kind, repo_id)

        def listing(refs: dict[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        branches, tags = listing(repo.branches, "heads"), listing(repo.tags, "tags")
        self._reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @_route("POST", "{repo}/(?P<table>branch|tag)/(?P<name>[^/]+)")
    def _add_ref(self, kind: str, repo_id: str, table: str, name: str) -> None:
        form = self._form()
        # a branch is named in the URL and its start in the body, a tag the other way round
        ref, start = (name, form.get("startingPoint", "main")) if table == "branch" else (form["tag"], name)
        with self.hub._lock:
            repo = self._repo(kind, repo_id, write=True)
            refs = repo.branches if table == "branch" else repo.tags
            if ref in refs:
                raise HubError(409, "Conflict", f"Reference already exists: {ref}")
            refs[ref] = repo.commit_at(start).oid
            self.hub._save()
        self._reply({})

    @_route("DELETE", "{repo}/(?P<table>branch|tag)/(?P<name>[^/]+)")
    def _delete_ref(self, kind: str, repo_id: str, table: str, name: str) -> None:
        with self.hub._lock:
            repo = self._repo(kind, repo_id, write=True)
            refs = repo.branches if table == "branch" else repo.tags
            if name not in refs:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
            if table == "branch" and name == "main":
                raise HubError(403, "Forbidden", "Cannot delete the main branch")
            del refs[name]
            self.hub._save()
        self._reply({})

    def _entry(self, commit: Commit, path: str) -> dict[str, Any] | None:
        """A file or folder as /tree and /paths-info describe it, None when the commit has neither."""
        if path in commit.files:
            blob = commit.files[path]
            return {"type": "file", "path": path, "oid": blob, "size": len(self.hub._blobs[blob])}
        inside = sorted((p, blob) for p, blob in commit.files.items() if p.startswith(path + "/"))
        return (
            {"type": "directory", "path": path, "oid": blob_id(repr(inside).encode()), "size": 0} if inside else None
        )

    @_route("GET", "{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def _tree(self, kind: str, repo_id: str, revision: str, path: str | None) -> None:
        commit = self._repo(kind, repo_id).commit_at(revision)
        prefix = f"{path.rstrip('/')}/" if path else ""
        inside = [p.removeprefix(prefix) for p in commit.files if p.startswith(prefix)]
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        depth = None if self.query.get("recursive", ["false"])[0].lower() in ("true", "1") else 1
        found = {
            "/".join(parts[:level])
            for parts in (p.split("/") for p in inside)
            for level in range(1, (depth or len(parts)) + 1)
        }
        self._reply([self._entry(commit, prefix + p) for p in sorted(found)])

    @_route("POST", "{repo}/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        commit = self._repo(kind, repo_id).commit_at(revision)
        entries = (self._entry(commit, path) for path in self._form().get("paths", []))
        self._reply([entry for entry in entries if entry])

    @_route("GET", "{prefix}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        commit = self._repo(kind or "models", repo_id).commit_at(revision)
        self.commit_oid = commit.oid
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        blob = commit.files[path]
        content = self.hub._blobs[blob]
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{blob}"', "Accept_Ranges": "bytes"}
        headers["Content_Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._reply(body=content, **headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start > end:
            return self._reply(status=416, body=b"", Content_Range=f"bytes */{len(content)}", **headers)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._reply(status=206, body=content[start : end + 1], **headers)

    @_route("POST", "{repo}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, kind: str, repo_id: str, revision: str) -> None:
        commit = self._repo(kind, repo_id, write=True).commit_at(revision)
        files = []
        for path in (file["path"] for file in self._form()["files"]):
            lfs = kind == "datasets" and path.endswith(".parquet")
            oid = commit.files.get(path)  # clients skip a file whose id they compute to be the same
            if oid is not None and lfs:
                oid = hashlib.sha256(self.hub._blobs[oid]).hexdigest()
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._reply({"files": files})

    @_route("POST", r"{prefix}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, kind: str | None, repo_id: str) -> None:
        self._repo(kind or "models", repo_id, write=True)
        url = f"{self.hub.endpoint}/lfs/"
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if o["oid"] in self.hub._lfs else {"actions": {"upload": {"href": url + o["oid"]}}})
            for o in self._form()["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, oid: str) -> None:
        # no token here: like the signed URLs of the real Hub's storage
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", f"the content does not have sha256 {oid}")
        self.hub._lfs[oid] = self.body
        self._reply({})

    @_route("POST", "{repo}/commit/(?P<revision>[^/]+)")
    def _commit(self, kind: str, repo_id: str, revision: str) -> None:
        self._repo(kind, repo_id, write=True)
        if "create_pr" in self.query:
            raise HubError(400, "BadRequest", "LocalHub has no pull requests; commit to a branch")
        header: dict[str, str] = {}
        files: dict[str, bytes] = {}
        deleted: list[str] = []
        for item in (json.loads(line) for line in self.body.splitlines() if line.strip()):
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = value["content"]
                base64_coded = value.get("encoding") == "base64"
                files[value["path"]] = base64.b64decode(content, validate=True) if base64_coded else content.encode()
            elif key == "lfsFile":
                if value["oid"] not in self.hub._lfs:
                    raise HubError(400, "BadRequest", f"no LFS object {value['oid']} was uploaded")
                files[value["path"]] = self.hub._lfs[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
            else:
                raise HubError(400, "BadRequest", f"LocalHub does not know the commit operation {key!r}")
        commit = self.hub.commit(
            kind,
            repo_id,
            files,
            deleted=deleted,
            branch=revision,
            parent=header.get("parentCommit"),
            title=header.get("summary", ""),
            message=header.get("description", ""),
        )
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}/commit/{commit.oid}"
        self._reply({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})
