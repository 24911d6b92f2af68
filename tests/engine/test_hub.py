"""Hub references against a small stand-in for the Hub: what is fetched, what is locked, what is said if it fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import MakesModel

from alignmerge.engine import hub
from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest, NoRoom
from alignmerge.engine.folder import tokenizer_digest
from alignmerge.engine.language import load_model
from alignmerge.engine.store import NotMade, Store

WHERE = "family.base"
NAME = "acme/tiny"
REFERENCE = f"hub:{NAME}@main"
TEMPLATE = "additional_chat_templates/tool_use.jinja"
TOKEN = "hf_" + "s3cret" * 5


def commit(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


class StandIn(ThreadingHTTPServer):
    """The endpoints that ``snapshot_download`` asks: revision, tree, and the files by HEAD and GET."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, Path] = {}
        """Commit -> folder with the files of that commit."""
        self.refs: dict[str, str] = {}
        """Branch or tag -> commit."""
        self.gated = False
        self.asked: list[tuple[str, str, bool]] = []
        """(method, path, whether a token came along) of every request."""

    def add(self, number: int, folder: Path, *refs: str) -> str:
        self.commits[commit(number)] = folder
        self.refs |= dict.fromkeys(refs, commit(number))
        return commit(number)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self, part: str) -> list[str]:
        return [path for _, path, _ in self.asked if part in path]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append((self.command, path, "Authorization" in self.headers))
        if path.startswith(f"/api/models/{NAME}/"):
            self.api(path.removeprefix(f"/api/models/{NAME}/"))
        elif path.startswith(f"/{NAME}/resolve/"):
            self.file(*path.removeprefix(f"/{NAME}/resolve/").split("/", 1))
        else:
            self.refuse(401, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def api(self, path: str) -> None:
        kind, _, revision = path.partition("/")
        sha = self.server.refs.get(revision, revision)
        if sha not in self.server.commits:
            self.refuse(404, "RevisionNotFound")
        elif kind == "revision":
            self.answer(json.dumps({"id": NAME, "sha": sha, "siblings": []}).encode())
        else:
            folder = self.server.commits[sha]
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            rows: list[dict[str, Any]] = [
                {
                    "type": "file",
                    "path": str(file.relative_to(folder)),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self.answer(json.dumps(rows).encode())

    def file(self, sha: str, name: str) -> None:
        if self.server.gated:
            self.refuse(403, "GatedRepo")
            return
        content = (self.server.commits[sha] / name).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        self.answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def answer(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that a fresh Hub client with an empty cache talks to, and an empty lock file's place."""
    from huggingface_hub import constants

    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv(hub.ONLINE, "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(hub, "LOCK", tmp_path / "conf" / "hub.lock.yaml")
    hub.LOCK.parent.mkdir()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(Store(tmp_path / "store"), {})


def repository(model: Path, folder: Path) -> Path:
    """What a real repository holds beside what is wanted: pickles, code, a second copy in another format."""
    shutil.copytree(model, folder)
    for name in (
        "pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "original/params.json",
        "original/model.safetensors", "model/extra.safetensors", "model_copies/a/model.safetensors",
        "additional_chat_templates/run.py", "additional_chat_templates/a/b.jinja",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never to be fetched")
    for name in ("spiece.model", "vocab.txt", "chat_template.json", TEMPLATE):
        (folder / name).write_bytes(b"part of the tokenizer")
    return folder


def locked() -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load(hub.LOCK.read_text())
    return found


def refused(assets: Assets, reference: str = REFERENCE) -> str:
    with pytest.raises(BadRequest) as caught:
        assets.path(reference, WHERE)
    (fault,) = caught.value.faults
    assert fault.where.startswith(WHERE) and "\n" not in str(fault)
    return str(fault)


def test_model_is_fetched_once_and_its_commit_locked(
    server: StandIn, assets: Assets, tiny_model: MakesModel, tmp_path: Path
) -> None:
    hosted = repository(tiny_model("qwen2"), tmp_path / "one")
    sha = server.add(1, hosted, "main")
    folder = assets.path(REFERENCE, WHERE)
    wanted = {p.name for p in tiny_model("qwen2").iterdir()}
    wanted |= {"spiece.model", "vocab.txt", "chat_template.json", TEMPLATE}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == wanted
    assert all((folder / name).read_bytes() == (hosted / name).read_bytes() for name in wanted)
    assert not [path for path in server.paths("/resolve/") if path.split(f"{sha}/")[1] not in wanted]
    assert locked() == {f"{NAME}@main": sha}
    asked = len(server.asked)
    assert assets.path(REFERENCE, WHERE) == folder and len(server.asked) == asked  # not even asked again
    assert assets.identity(REFERENCE, WHERE) == {"hub": NAME, "commit": sha}
    opened = Checkpoint.open(folder, WHERE)
    assert opened.digest == Checkpoint.open(tiny_model("qwen2"), "x").digest
    assert tokenizer_digest(folder) == tokenizer_digest(hosted) != tokenizer_digest(tiny_model("qwen2"))
    load_model(folder)


def test_branch_that_moved_does_not_matter_on_another_machine(
    server: StandIn, assets: Assets, tiny_model: MakesModel, tmp_path: Path
) -> None:
    old, new = tiny_model("llama", 1), tiny_model("llama", 2)
    sha = server.add(1, old, "main")
    assets.path(REFERENCE, WHERE)
    server.add(2, new, "main")
    shutil.rmtree(tmp_path / "hf")  # another machine: the lock came with the repository, the cache did not
    server.asked.clear()
    folder = assets.path(REFERENCE, WHERE)
    assert (
        folder.name == sha
        and (folder / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    )
    assert not server.paths("/revision/") and not [p for p in server.paths(NAME) if commit(2) in p]
    assert locked() == {f"{NAME}@main": sha}
    hub.LOCK.write_text("")  # the line is deleted: the branch is taken up where it is now
    assert assets.path(REFERENCE, WHERE).name == commit(2) and locked() == {f"{NAME}@main": commit(2)}


def test_each_revision_has_its_own_line_and_a_commit_needs_none(
    server: StandIn, assets: Assets, tiny_model: MakesModel
) -> None:
    one, two = server.add(1, tiny_model("llama", 1), "v1"), server.add(2, tiny_model("llama", 2), "main")
    assert assets.path(f"hub:{NAME}@v1", WHERE).name == one
    assert assets.path(REFERENCE, WHERE).name == two
    assert locked() == {f"{NAME}@v1": one, f"{NAME}@main": two}
    assert hub.LOCK.read_text().startswith("# The commit")
    assert assets.path(f"hub:{NAME}@{one}", WHERE).name == one
    assert len(locked()) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{NAME}@main: main", "acme/tiny@main is locked to 'main', which is no commit"),
        (f"{NAME}@main: 1234567", "acme/tiny@main is locked to 1234567, which is no commit"),
        (f"other/model@main: {commit(1)[:39]}", "other/model@main is locked to"),
        ("- a list", "not a mapping"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_lock_file_that_cannot_be_used_is_one_fault_and_nothing_is_asked(
    text: str, said: str, server: StandIn, assets: Assets
) -> None:
    hub.LOCK.write_text(text)
    line = refused(assets)
    assert line.startswith(f"{WHERE}: {hub.LOCK}: ") and said in line and "org/name@revision: commit" in line
    assert not server.asked and hub.LOCK.read_text() == text


def test_reference_to_another_commit_than_the_locked_one_is_a_fault(server: StandIn, assets: Assets) -> None:
    hub.LOCK.write_text(f"{NAME}@{commit(1)}: {commit(2)}\n")
    line = refused(assets, f"hub:{NAME}@{commit(1)}")
    assert f"locked to another commit, {commit(2)}" in line and not server.asked


def test_locked_commit_that_the_hub_no_longer_has(
    server: StandIn, assets: Assets, tiny_model: MakesModel
) -> None:
    server.add(1, tiny_model("llama"), "main")
    hub.LOCK.write_text(f"{NAME}@main: {commit(9)}\n")
    line = refused(assets)
    assert f"no revision {commit(9)}" in line and line.endswith("or no line in conf/hub.lock.yaml")
    assert locked() == {f"{NAME}@main": commit(9)}


def test_gated_model_without_and_with_a_token_says_what_to_do_and_keeps_the_token_to_itself(
    server: StandIn, assets: Assets, tiny_model: MakesModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(1, tiny_model("llama"), "main")
    server.gated = True
    line = refused(assets)
    assert "cannot fetch hub:acme/tiny@main: the repository is gated" in line
    assert f"accepted the terms at {server.url}/{NAME}" in line and "`hf auth login`, or HF_TOKEN" in line
    assert not hub.LOCK.exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    line = refused(assets)
    assert "a token of an account that has access" in line and TOKEN not in line and not hub.LOCK.exists()
    server.gated = False
    assert assets.path(REFERENCE, WHERE).is_dir()
    assert any(with_token for _, _, with_token in server.asked)
    kept = [p for root in (hub.LOCK.parent, tmp_path / "store") for p in root.rglob("*") if p.is_file()]
    assert hub.LOCK in kept and not [p for p in kept if TOKEN.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hub:acme/other@main", "no such repository, or a private one; allowed: a name that"),
        (f"hub:{NAME}@nightly", "no revision nightly; allowed: a branch, tag or commit of"),
    ],
)
def test_names_that_the_hub_does_not_know(
    reference: str, said: str, server: StandIn, assets: Assets, tiny_model: MakesModel
) -> None:
    server.add(1, tiny_model("llama"), "main")
    assert said in refused(assets, reference) and not hub.LOCK.exists()


def test_repository_with_pickles_only(
    server: StandIn, assets: Assets, tiny_model: MakesModel, tmp_path: Path
) -> None:
    folder = repository(tiny_model("llama"), tmp_path / "pickles")
    (folder / "model.safetensors").unlink()
    server.add(1, folder, "main")
    line = refused(assets)
    assert "no safetensors weights" in line and "pickles are never fetched" in line
    assert not hub.LOCK.exists() and not [p for p in server.paths("/resolve/") if p.endswith(".bin")]


def test_hub_that_is_switched_off_or_out_of_reach(
    server: StandIn, assets: Assets, tiny_model: MakesModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(1, tiny_model("llama"), "main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as run.py and every worker set it
    monkeypatch.delenv(hub.ONLINE)
    line = refused(assets)
    assert (
        "not in the cache and the Hub is switched off; allowed: ALIGNMERGE_HUB=1, `hf download acme/tiny"
        in line
    )
    assert not server.asked
    monkeypatch.setenv(hub.ONLINE, "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = refused(assets)
    assert "the Hub cannot be reached; allowed: a network, `hf download acme/tiny --revision main`" in line
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    folder = assets.path(REFERENCE, WHERE)  # asked for explicitly: HF_HUB_OFFLINE of the parent does not hold
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv(hub.ONLINE)
    assert assets.path(REFERENCE, WHERE) == folder  # fetched once: no network is needed any more
    hub.LOCK.unlink()
    assert assets.path(REFERENCE, WHERE) == folder  # `hf download` beforehand is enough, and is locked
    assert locked() == {f"{NAME}@main": commit(1)}


def test_what_the_hub_refuses_is_found_out_at_once_and_without_weights(
    server: StandIn, assets: Assets, tiny_model: MakesModel
) -> None:
    sha = server.add(1, tiny_model("llama"), "main")
    asked = {key: hub.parse(REFERENCE, key) for key in ("family.base", "family.anchor")}
    assert hub.refusals(asked) == []
    assert set(server.paths("/resolve/")) == {f"/{NAME}/resolve/{sha}/config.json"} and not hub.LOCK.exists()
    with pytest.raises(NotMade):  # a config alone is no model
        Assets(Store(assets.store.root, frozen=True), {}).path(REFERENCE, WHERE)
    server.add(2, tiny_model("llama", 1), "main")
    server.gated = True
    faults = hub.refusals({**asked, "family.experts.x": hub.parse("hub:acme/other@main", "x")})
    assert [fault.where for fault in faults] == ["family.base", "family.anchor", "family.experts.x"]
    assert ["gated" in str(fault) for fault in faults] == [True, True, False]
    assert "no such repository" in faults[2].given


def test_frozen_store_looks_but_never_fetches(server: StandIn, assets: Assets, tiny_model: MakesModel) -> None:
    server.add(1, tiny_model("llama"), "main")
    frozen = Assets(Store(assets.store.root, frozen=True), {})
    with pytest.raises(NotMade):
        frozen.path(REFERENCE, WHERE)
    assert not server.asked and not hub.LOCK.exists() and not assets.store.root.exists()
    folder = assets.path(REFERENCE, WHERE)
    assert frozen.path(REFERENCE, WHERE) == folder


def test_download_that_was_cut_off_is_completed(
    server: StandIn, assets: Assets, tiny_model: MakesModel, tmp_path: Path
) -> None:
    server.add(1, tiny_model("llama"), "main")
    folder = assets.path(REFERENCE, WHERE)
    blob = (folder / "model.safetensors").resolve()
    blob.unlink()
    (folder / "model.safetensors").unlink()
    frozen = Assets(Store(assets.store.root, frozen=True), {})
    with pytest.raises(NotMade):
        frozen.path(REFERENCE, WHERE)
    assert assets.path(REFERENCE, WHERE) == folder and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "reference",
    ["hub:", "hub:name-alone@main", "hub:org/name", "hub:org/name@", "hub:a/b/c@main", "hub:a/b@x y"],
)
def test_malformed_references(reference: str, assets: Assets) -> None:
    assert refused(assets, reference) == (
        f"{WHERE}: not a Hub reference: {reference}; allowed: hub:org/name@revision"
    )


# --- the client's cache, given as a path ------------------------------------------------------------------


def cached(folder: Path, commits: int, main: str | None = None) -> Path:
    """A repository as the client lays it out: snapshots of links into blobs."""
    (folder / "snapshots").mkdir(parents=True)
    for number in range(1, commits + 1):
        (folder / "snapshots" / commit(number)).mkdir()
    (folder / "refs").mkdir()
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize(
    ("commits", "main", "found"), [(2, commit(2), 2), (1, None, 1), (1, commit(1) + "\n", 1), (1, commit(7), 1)]
)
def test_repository_of_the_cache_stands_for_its_snapshot(
    commits: int, main: str | None, found: int, assets: Assets, tmp_path: Path
) -> None:
    folder = cached(tmp_path / "models--acme--tiny", commits, main)
    assert assets.path(str(folder), WHERE) == folder / "snapshots" / commit(found)


@pytest.mark.parametrize(("commits", "main"), [(2, None), (2, commit(7)), (2, "../.."), (0, None)])
def test_repository_with_several_snapshots_or_none_is_one_line_that_lists_them(
    commits: int, main: str | None, assets: Assets, tmp_path: Path
) -> None:
    folder = cached(tmp_path / "models--acme--tiny", commits, main)
    line = refused(assets, str(folder))
    assert f"{commits} snapshots, none of which is refs/main" in line
    assert all(str(path) in line for path in (folder / "snapshots").iterdir())


def test_a_model_with_a_folder_of_snapshots_stands_for_itself(assets: Assets, tmp_path: Path) -> None:
    folder = cached(tmp_path / "model", 1)
    (folder / "config.json").write_text("{}")
    assert assets.path(str(folder), WHERE) == folder


@pytest.mark.parametrize("name", ["with spaces", "mod\u00e8le \u2460", "a=b", "a#b", "a,b {c: d}", "100% [x]"])
def test_paths_of_any_name_are_found(
    name: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).mkdir()
    assert assets.path(str(tmp_path / name), WHERE) == assets.path(f"local:~/{name}", WHERE) == tmp_path / name
    assert "no such file or folder: ~nobody-at-all/x" in refused(assets, "~nobody-at-all/x")


def test_a_full_disk_is_not_called_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: StandIn
) -> None:
    def full(*args: object, **options: object) -> Path:
        raise RuntimeError("Data processing error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "_snapshot", full)
    with pytest.raises(NoRoom, match=f"no room on the disk: {tmp_path}/hf/hub: more needed, .* free"):
        hub._download(hub.parse(REFERENCE, WHERE), None, WHERE)
