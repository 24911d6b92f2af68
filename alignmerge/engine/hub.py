"""Models on the Hugging Face Hub: at the first fetch, ``hub:org/name@revision`` is locked to a commit.

The lock file (conf/hub.lock.yaml, to be committed) maps ``org/name@revision`` to a commit; later runs
fetch that commit, wherever the branch has moved. Folders lie in the Hub client's own cache.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock

from alignmerge.engine.faults import BadRequest, Fault, NoRoom, disk_full, writing
from alignmerge.engine.folder import CONFIG, GENERATION, INDEX, TOKENIZER
from alignmerge.engine.interruption import deaf_to_interrupts
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.progress import end_with_parent

LOCK = ROOT / "conf" / "hub.lock.yaml"
HEADER = """\
# The commit that each Hub reference stood for when it was first fetched. Commit this file: every run fetches these.
# To take up a branch that has moved, delete its line.
"""
REFERENCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}", re.ASCII)
WEIGHTS = "model*.safetensors"
FILES = (CONFIG, INDEX, WEIGHTS, GENERATION, *TOKENIZER)
"""All that is ever fetched: no pickles, no code, no second copy of the weights in another format."""
NEVER = ("*/*.safetensors", "*/*/*")
"""Weights in subfolders; the client's ``*`` matches slashes too."""
ONLINE = "ALIGNMERGE_HUB"
"""The environment variable that switches the Hub on."""


class Reference(NamedTuple):
    """A parsed ``hub:`` reference."""

    name: str
    """``org/name``."""
    revision: str
    """A branch, a tag or a commit."""

    @property
    def key(self) -> str:
        """What the lock file files it under."""
        return f"{self.name}@{self.revision}"


def parse(reference: str, where: str) -> Reference:
    """Parse ``hub:org/name@revision``."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise BadRequest.of(where, f"not a Hub reference: {reference}", "hub:org/name@revision")
    return Reference(**match.groupdict())


def commit_of(reference: Reference, where: str) -> str | None:
    """Return the commit that a reference names or is locked to, or None before the first fetch.

    Raises BadRequest if the lock file cannot be used, or contradicts a commit that the reference names.
    """
    locked = _read_lock(where).get(reference.key)
    if COMMIT.fullmatch(reference.revision) is None:
        return locked
    if locked not in (None, reference.revision):
        given = f"{reference.key} is locked to another commit, {locked}"
        raise BadRequest.of(f"{where}: {LOCK}", given, f"{reference.revision}, or no line for it")
    return reference.revision


def local_folder(reference: Reference, where: str) -> Path | None:
    """Return the complete snapshot in the Hub client's cache, or None; the network is not asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = commit_of(reference, where) or reference.revision
    try:
        return _snapshot(reference.name, revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def snapshot_in(folder: Path, where: str) -> Path:
    """Return the snapshot in a repository of the Hub client's cache (``models--org--name``), any other
    path as it is.

    That is the one that ``refs/main`` names, or else the only one. Raises BadRequest, naming ``where``,
    if there are several or none.
    """
    if not (folder / "snapshots").is_dir() or (folder / CONFIG).exists():
        return folder
    found = {path.name: path for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()}
    main = folder / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if commit not in found and len(found) == 1:
        (commit,) = found
    if commit in found:
        return found[commit]
    given = f"a repository of the Hub's cache with {len(found)} snapshots, none of which is refs/main"
    allowed = " or ".join(map(str, found.values())) or "one with a snapshot: download it again"
    raise BadRequest.of(f"{where}: {folder}", given, allowed)


def fetch(reference: Reference, where: str, locks: Path) -> Path:
    """Return the folder of a reference, downloading it if it is not in the cache, and lock its commit.

    ``locks`` is a folder for lock files: of two processes, the second waits for the first. Raises
    BadRequest, naming ``where``, with what to do: no network, no access, no such revision, ...
    """
    if commit_of(reference, where) is not None and (found := local_folder(reference, where)):
        return found
    with writing("store", locks):
        locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "hub"):
        commit = commit_of(reference, where)
        print(f"fetching hub:{reference.key}", file=sys.stderr)
        with _network() as pool:
            with deaf_to_interrupts():
                fetched = pool.submit(_download, reference, commit, where)
            folder = fetched.result()
        if not any(folder.glob(WEIGHTS)):
            given = f"hub:{reference.key} has no safetensors weights"
            raise BadRequest.of(where, given, f"a repository with {WEIGHTS} (pickles are never fetched)")
        if commit is None:
            _write_lock({**_read_lock(where), reference.key: folder.name}, where)
    return folder


def refusals(references: Mapping[str, Reference]) -> list[Fault]:
    """Ask the Hub for the config of each reference (key -> reference) and return what it refuses.

    Nothing is locked. A gated model is found out before another one has been downloaded for an hour.
    """
    asked = {}
    for where, reference in references.items():
        asked[where] = partial(_download, reference, commit_of(reference, where), where, FILES[:1])
    with _network() as pool:
        with deaf_to_interrupts():
            answered = pool.submit(BadRequest.gathered, asked)
        try:
            answered.result()
        except BadRequest as error:
            return list(error.faults)
    return []


def _network() -> ProcessPoolExecutor:
    """Return a process of its own: this one, like every worker, may be told to stay off the network."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_go_online)


def _go_online() -> None:
    if os.environ.get(ONLINE) is not None:
        os.environ["HF_HUB_OFFLINE"] = "0"
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    end_with_parent()


def _snapshot(name: str, revision: str, files: Sequence[str] = FILES, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": list(NEVER)}
    return Path(snapshot_download(name, revision=revision, local_files_only=local_files_only, **wanted))


def _cache() -> Path:
    """Return the folder that the Hub's client keeps its downloads in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _download(reference: Reference, commit: str | None, where: str, files: Sequence[str] = FILES) -> Path:
    try:
        return _snapshot(reference.name, commit or reference.revision, files, local_files_only=False)
    except Exception as error:  # the client raises many kinds, all others of which mean: not to be had
        if disk_full(error):
            raise NoRoom.at(_cache(), "more") from None
        given, allowed = _reason(error, reference, commit)
        raise BadRequest.of(where, f"cannot fetch hub:{reference.key}: {given}", allowed) from None


def _reason(error: Exception, reference: Reference, commit: str | None) -> tuple[str, str]:
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{reference.name}"
    revision = commit or reference.revision
    copy = f"`hf download {reference.name} --revision {revision}` where there is a network, or local:folder"
    login = "a token of an account that has access" if get_token() else "`hf auth login`, or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        allowed = f"an account that accepted the terms at {page}, and {login}; or local:folder"
        return "the repository is gated", allowed
    if isinstance(error, errors.RevisionNotFoundError):
        unlocked = f", or no line in conf/{LOCK.name}" if revision != reference.revision else ""
        return f"no revision {revision}", f"a branch, tag or commit of {page}{unlocked}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one", f"a name that {page} shows; for a private one {login}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache and the Hub is switched off", f"{ONLINE}=1, {copy}"
        return "it is not in the cache and the Hub cannot be reached", f"a network, {copy}"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0], f"what {page} lets you download; or local:folder"


def _read_lock(where: str) -> dict[str, str]:
    allowed = "lines of org/name@revision: commit, with 40 hex digits (delete a line to resolve it anew)"
    try:
        content = yaml.safe_load(LOCK.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        raise BadRequest.of(f"{where}: {LOCK}", "cannot be read as YAML", allowed) from None
    if not isinstance(content, dict):
        raise BadRequest.of(f"{where}: {LOCK}", "not a mapping", allowed)
    for key, commit in content.items():
        if not isinstance(commit, str) or COMMIT.fullmatch(commit) is None:
            given = f"{key} is locked to {commit!r}, which is no commit"
            raise BadRequest.of(f"{where}: {LOCK}", given, allowed)
    return content


def _write_lock(commits: Mapping[str, str], where: str) -> None:
    text = HEADER + "".join(f'{key}: "{commit}"\n' for key, commit in sorted(commits.items()))
    staged = LOCK.with_name(f".{LOCK.name}.new")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(LOCK)
    except OSError as error:
        if disk_full(error):
            raise NoRoom.at(LOCK, "more") from None
        given, allowed = error.strerror, "a file that records the commit of each Hub reference"
        raise BadRequest.of(f"{where}: {LOCK}", f"cannot be written ({given})", allowed) from None
