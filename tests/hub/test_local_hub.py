import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from undersong.hub.local_hub import HubError, LocalHub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "upload"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 400)
    return folder


FOLDER_FILES = ["config.json", "empty.txt", "sub/deep/weights.bin"]


def commits_posted(hub):
    return [request for request in hub.requests if request.method == "POST" and "/commit/" in request.path]


@pytest.mark.parametrize("kind", ["model", "dataset", "space", "kernel"])
def test_folder_round_trip(hub, api, folder, tmp_path, kind):
    api.create_repo("org/name", repo_type=kind, **({"space_sdk": "static"} if kind == "space" else {}))
    api.upload_folder(folder_path=folder, repo_id="org/name", repo_type=kind)

    assert hub.repos(kind + "s") == ["org/name"]
    assert sorted(api.list_repo_files("org/name", repo_type=kind)) == FOLDER_FILES
    assert list(hub.files(kind + "s", "org/name")) == FOLDER_FILES
    local = api.snapshot_download("org/name", repo_type=kind, local_dir=tmp_path / "down")
    for path in FOLDER_FILES:
        assert (tmp_path / "down" / path).read_bytes() == (folder / path).read_bytes(), local


def test_second_upload_sends_nothing(hub, api, folder):
    api.create_repo("org/name")
    first = api.upload_folder(folder_path=folder, repo_id="org/name")
    assert len(commits_posted(hub)) == 1

    second = api.upload_folder(folder_path=folder, repo_id="org/name")
    assert len(commits_posted(hub)) == 1
    assert second.oid == first.oid


def test_revisions_are_branches_tags_and_commits(hub, api, tmp_path):
    api.create_repo("org/name")
    one = api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id="org/name")
    api.create_tag("org/name", tag="v1.0")
    api.create_branch("org/name", branch="feature/x")
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="org/name")
    api.upload_file(path_or_fileobj=b"three", path_in_repo="a.txt", repo_id="org/name", revision="feature/x")

    def read(revision):
        path = hf_hub_download("org/name", "a.txt", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path)
        with open(path, "rb") as file:
            return file.read()

    expected = {None: b"two", one.oid: b"one", one.oid[:7]: b"one", "v1.0": b"one", "feature/x": b"three"}
    assert {revision: read(revision) for revision in expected} == expected
    assert hub.files("models", "org/name", one.oid) == {"a.txt": b"one"}
    snapshot = snapshot_download("org/name", revision=one.oid, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert snapshot.endswith(one.oid)

    refs = api.list_repo_refs("org/name")
    assert {branch.name for branch in refs.branches} == {"main", "feature/x"}
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1.0": one.oid}
    assert api.model_info("org/name", revision="v1.0").sha == one.oid


def test_history_follows_the_branch(hub, api):
    api.create_repo("org/name")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="org/name", commit_message="first")
    api.create_branch("org/name", branch="side")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="org/name", commit_message="second")
    assert [c.title for c in api.list_repo_commits("org/name")] == ["second", "first", "initial commit"]
    assert [c.title for c in hub.commits("models", "org/name", "side")] == ["first", "initial commit"]

    api.delete_branch("org/name", branch="side")
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_commits("org/name", revision="side")
    with pytest.raises(HfHubHTTPError, match="main branch"):
        api.delete_branch("org/name", branch="main")


def test_a_branch_or_tag_that_exists_is_a_conflict(api):
    api.create_repo("org/name")
    for create in (
        lambda **kw: api.create_branch("org/name", branch="b", **kw),
        lambda **kw: api.create_tag("org/name", tag="t", **kw),
    ):
        create()
        create(exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            create()
    api.delete_tag("org/name", tag="t")
    assert api.list_repo_refs("org/name").tags == []


def test_an_existing_repo_is_a_conflict_and_delete_removes_it(hub, api):
    url = api.create_repo("org/name")
    assert url == f"{hub.endpoint}/org/name"
    assert api.create_repo("org/name", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/name")

    api.create_repo("org/name", repo_type="dataset")  # kinds do not share names
    api.delete_repo("org/name")
    assert not api.repo_exists("org/name")
    assert api.repo_exists("org/name", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/name")
    api.delete_repo("org/name", missing_ok=True)


def test_a_repo_without_namespace_belongs_to_the_user(hub, api):
    api.create_repo("name")
    assert hub.repos("models") == ["me/name"]
    assert api.whoami()["name"] == "me"


def test_errors_are_those_of_the_hub(hub, api, tmp_path):
    api.create_repo("org/name")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name")

    def download(repo_id, filename, **options):
        return hf_hub_download(repo_id, filename, endpoint=hub.endpoint, cache_dir=tmp_path, **options)

    with pytest.raises(EntryNotFoundError) as missing_file:
        download("org/name", "b", token=hub.token)
    assert missing_file.value.response.headers["X-Repo-Commit"] == hub.commits("models", "org/name")[0].oid
    for token in (hub.token, False):
        for repo_id in ("org/other", "name-without-organisation"):
            with pytest.raises(RepositoryNotFoundError):
                download(repo_id, "a", token=token)
    with pytest.raises(RevisionNotFoundError):
        download("org/name", "a", revision="nope", token=hub.token)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name", revision="nope")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("b", repo_id="org/name")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/name", "no/folder"))
    with pytest.raises(HfHubHTTPError, match="LocalHub does not serve GET /api/daily_papers"):
        list(api.list_daily_papers())
    assert not api.file_exists("org/name", "b")
    assert api.file_exists("org/name", "a")
    assert not api.revision_exists("org/name", "nope")


def test_pull_requests_are_refused(api):
    api.create_repo("org/name")
    with pytest.raises(BadRequestError, match="no pull requests"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name", create_pr=True)


def test_private_repos_need_the_token(hub, api, tmp_path):
    api.create_repo("org/secret", private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/secret")
    anonymous = HfApi(endpoint=hub.endpoint, token=False)

    for call in (anonymous.model_info, anonymous.list_repo_files, anonymous.list_repo_refs):
        with pytest.raises(RepositoryNotFoundError) as error:
            call("org/secret")
        assert error.value.response.status_code == 401
    assert [model.id for model in anonymous.list_models()] == []
    assert api.model_info("org/secret").private
    assert api.hf_hub_download("org/secret", "a", local_dir=tmp_path)

    api.update_repo_settings("org/secret", private=False)
    assert anonymous.list_repo_files("org/secret") == ["a"]


def test_writing_needs_the_token(hub):
    hub.create("models", "org/name")
    for token, message in ((False, "Invalid username or password"), ("hf_wrong", "Invalid credentials")):
        stranger = HfApi(endpoint=hub.endpoint, token=token)
        for write in (
            lambda api: api.create_repo("org/mine"),
            lambda api: api.delete_repo("org/name"),
            lambda api: api.create_tag("org/name", tag="t"),
        ):
            with pytest.raises(HfHubHTTPError, match=message) as error:
                write(stranger)
            assert error.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match="401"):
            stranger.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name")
    assert hub.files("models", "org/name") == {}


def test_tree_and_paths_info(hub, api, folder):
    api.create_repo("org/name")
    api.upload_folder(folder_path=folder, repo_id="org/name")
    weights = api.get_paths_info("org/name", ["sub/deep/weights.bin", "nothing"])
    assert [(entry.path, entry.size) for entry in weights] == [("sub/deep/weights.bin", 102400)]
    assert api.get_paths_info("org/name", "sub")[0].path == "sub"

    assert [entry.path for entry in api.list_repo_tree("org/name")] == ["config.json", "empty.txt", "sub"]
    assert [entry.path for entry in api.list_repo_tree("org/name", "sub")] == ["sub/deep"]
    everything = [entry.path for entry in api.list_repo_tree("org/name", recursive=True)]
    assert everything == ["config.json", "empty.txt", "sub", "sub/deep", "sub/deep/weights.bin"]
    siblings = api.model_info("org/name", files_metadata=True).siblings
    assert {sibling.rfilename: sibling.size for sibling in siblings} == {
        "config.json": 2,
        "empty.txt": 0,
        FOLDER_FILES[2]: 102400,
    }


def test_commit_operations(hub, api, folder):
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    api.create_repo("org/name")
    api.upload_folder(folder_path=folder, repo_id="org/name")
    api.create_commit(
        "org/name",
        [
            CommitOperationCopy("config.json", "copy.json"),
            CommitOperationDelete("sub/"),
            CommitOperationDelete("empty.txt"),
            CommitOperationAdd("täst/ü ö.txt", b"new"),
        ],
        commit_message="several",
        commit_description="things at once",
    )
    assert hub.files("models", "org/name") == {"config.json": b"{}", "copy.json": b"{}", "täst/ü ö.txt": b"new"}
    assert hub.commits("models", "org/name")[0].message == "things at once"
    assert api.hf_hub_download("org/name", "täst/ü ö.txt", local_dir=folder)


def test_a_stale_parent_is_refused(hub, api):
    from huggingface_hub import CommitOperationAdd

    api.create_repo("org/name")
    old = hub.commits("models", "org/name")[0].oid
    api.create_commit("org/name", [CommitOperationAdd("a", b"1")], commit_message="x", parent_commit=old)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/name", [CommitOperationAdd("a", b"2")], commit_message="x", parent_commit=old)
    assert hub.files("models", "org/name") == {"a": b"1"}


def test_concurrent_uploads_lose_nothing(hub, api):
    api.create_repo("org/name")

    def upload(index):
        return api.upload_file(path_or_fileobj=b"%d" % index, path_in_repo=f"{index}.txt", repo_id="org/name").oid

    with ThreadPoolExecutor(8) as pool:
        oids = list(pool.map(upload, range(24)))
    assert len(set(oids)) == 24
    assert hub.files("models", "org/name") == {f"{i}.txt": b"%d" % i for i in range(24)}
    assert len(hub.commits("models", "org/name")) == 25


@pytest.mark.parametrize("path", ["../up", "/root", "a/../../b", "a//b", "", ".git/config"])
def test_paths_stay_inside_the_repository(hub, path):
    hub.create("models", "org/name")
    with pytest.raises(HubError, match="must be relative and stay inside the repository"):
        hub.commit("models", "org/name", {path: b""})
    line = json.dumps({"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}})
    url = f"{hub.endpoint}/api/models/org/name/commit/main"
    response = get_session().post(url, content=line, headers={"Authorization": f"Bearer {hub.token}"})
    assert response.status_code == 400
    assert hub.files("models", "org/name") == {}


@pytest.mark.parametrize(
    "body",
    [
        b"not json\n",
        b'{"key": "file"}\n',
        b"[1]\n",
        b'{"key": "file", "value": {"path": "a", "content": "?", "encoding": "base64"}}\n',
        b'{"key": "teleport", "value": {}}\n',
    ],
)
def test_malformed_commits_are_bad_requests(hub, body):
    hub.create("models", "org/name")
    url = f"{hub.endpoint}/api/models/org/name/commit/main"
    response = get_session().post(url, content=body, headers={"Authorization": f"Bearer {hub.token}"})
    assert response.status_code == 400
    assert hub.files("models", "org/name") == {}


def test_chunked_bodies(hub):
    hub.create("models", "org/name")
    url = f"{hub.endpoint}/api/models/org/name/commit/main"
    line = json.dumps({"key": "file", "value": {"path": "a", "content": "aGk=", "encoding": "base64"}}).encode()
    response = get_session().post(
        url, content=iter([line[:10], line[10:]]), headers={"Authorization": f"Bearer {hub.token}"}
    )
    assert response.status_code == 200
    assert hub.files("models", "org/name") == {"a": b"hi"}


@pytest.mark.parametrize(
    ("wanted", "status", "content", "content_range"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_ranges(hub, wanted, status, content, content_range):
    hub.create("models", "org/name")
    hub.commit("models", "org/name", {"a": b"0123456789"})
    response = get_session().get(f"{hub.endpoint}/org/name/resolve/main/a", headers={"Range": wanted})
    assert (response.status_code, response.content) == (status, content)
    assert response.headers.get("Content-Range") == content_range


def test_head_equals_get_without_body(hub):
    hub.create("models", "org/name")
    commit = hub.commit("models", "org/name", {"a": b"0123456789"})
    url = f"{hub.endpoint}/org/name/resolve/main/a"
    head, get = get_session().head(url), get_session().get(url)
    for name in ("ETag", "X-Repo-Commit", "Content-Length", "Content-Type"):
        assert head.headers[name] == get.headers[name]
    assert (head.headers["X-Repo-Commit"], head.headers["Content-Length"], head.content) == (commit.oid, "10", b"")


def test_faults_hit_matching_requests_only_and_change_nothing(hub, api):
    api.create_repo("org/name")
    hub.fail_next(2, status=500, match="/commit/")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name")
    assert api.list_repo_files("org/name") == []
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="org/name")
    assert [request.status for request in commits_posted(hub)] == [500, 500, 200]


def test_a_directory_keeps_repositories(online, tmp_path):
    with LocalHub(tmp_path) as hub:
        hub.create("models", "org/name", private=True)
        first = hub.commit("models", "org/name", {"a": b"1", "b/c": b"2"})
        hub.commit("models", "org/name", {"a": b"3"}, title="later")
        HfApi(endpoint=hub.endpoint, token=hub.token).create_tag("org/name", tag="t", revision=first.oid)
    again = LocalHub(tmp_path)
    assert again.files("models", "org/name") == {"a": b"3", "b/c": b"2"}
    assert again.files("models", "org/name", "t") == {"a": b"1", "b/c": b"2"}
    assert [commit.title for commit in again.commits("models", "org/name")] == [
        "later",
        "Upload files",
        "initial commit",
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_not_running_is_named():
    hub = LocalHub()
    with pytest.raises(RuntimeError, match="LocalHub is not running; use it as `with LocalHub"):
        hub.env()
    with pytest.raises(HubError, match="must be namespace/name"):
        hub.create("models", "nonamespace")
    with pytest.raises(LookupError, match="Repository not found"):
        hub.files("models", "org/none")


def test_cards_are_validated_and_searchable(hub, api):
    api.create_repo("org/Aaren-digits")
    card = ModelCard("---\nlicense: mit\ntags: [aaren]\npipeline_tag: text-generation\n---\n# Hello\n")
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="org/Aaren-digits")
    hub.create("models", "other/thing")

    info = api.model_info("org/Aaren-digits")
    assert (info.pipeline_tag, info.card_data.license) == ("text-generation", "mit")
    assert "aaren" in info.tags
    assert [m.id for m in api.list_models(author="org")] == ["org/Aaren-digits"]
    assert [m.id for m in api.list_models(search="THING")] == ["other/thing"]
    assert [m.id for m in api.list_models(filter="aaren")] == ["org/Aaren-digits"]

    for bad in ("---\na: [1\n---\n", "---\n- a\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(path_or_fileobj=bad.encode(), path_in_repo="README.md", repo_id="org/Aaren-digits")
    assert hub.files("models", "org/Aaren-digits")["README.md"] == str(card).encode()


def test_env_hides_the_real_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/somewhere")
    env = hub.env(home=tmp_path)
    assert (env["HF_ENDPOINT"], env["HF_TOKEN"], env["HF_HOME"]) == (hub.endpoint, hub.token, str(tmp_path))
    assert "HF_HUB_OFFLINE" not in env
    assert "TRANSFORMERS_CACHE" not in env
    assert "127.0.0.1" in env["NO_PROXY"].split(",")
