"""Models on the Hugging Face Hub: ``hub:org/name@revision`` becomes a commit at the first fetch and is locked.

The lock file (conf/hub.lock.yaml, to be committed) maps ``org/name@revision`` to a commit; later runs fetch that
commit, wherever the branch has moved. Folders lie in the Hub client's own cache.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import yaml
from filelock import FileLock

from alignmerge.engine.faults import BadRequest, Fault
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
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
FILES = ("config.json", "model.safetensors.index.json", WEIGHTS, *TOKENIZER)
"""All that is ever fetched: no pickles, no code, no second copy of the weights in another format."""
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
    return Reference(match["name"], match["revision"])


def commit_of(reference: Reference, where: str) -> str | None:
    """Return the commit that a reference stands for: its own, or the locked one; None before the first fetch.

    Raises:
        BadRequest: if the lock file cannot be used, or contradicts a commit that the reference names.
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

    try:
        return _snapshot(
            reference.name, commit_of(reference, where) or reference.revision, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None


def fetch(reference: Reference, where: str, locks: Path) -> Path:
    """Return the folder of a reference, downloading it if it is not in the cache, and lock its commit.

    Args:
        locks: a folder for lock files: of two processes, the second waits for the first.

    Raises:
        BadRequest: naming ``where``, with what to do: no network, no access, no such revision, no safetensors, ...
    """
    if commit_of(reference, where) is not None and (found := local_folder(reference, where)) is not None:
        return found
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "hub"):
        commit = commit_of(reference, where)
        print(f"fetching hub:{reference.key}", file=sys.stderr)
        with _network() as pool:
            folder = pool.submit(_download, reference, commit, where).result()
        if not any(folder.glob(WEIGHTS)):
            given = f"hub:{reference.key} has no safetensors weights"
            raise BadRequest.of(where, given, f"a repository with {WEIGHTS} (pickles are never fetched)")
        if commit is None:
            _write_lock({**_read_lock(where), reference.key: folder.name}, where)
    return folder


def refusals(references: Mapping[str, Reference]) -> list[Fault]:
    """Ask the Hub for no more than the config of each reference (key -> reference) and return what it refuses.

    Nothing is locked. A gated model is found out before another one has been downloaded for an hour.
    """
    asked = [(where, reference, commit_of(reference, where)) for where, reference in references.items()]
    with _network() as pool:
        return pool.submit(_ask, asked).result()


def _network() -> ProcessPoolExecutor:
    """Return a process of its own: this one, like every worker, may have been told to stay off the network."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_go_online)


def _go_online() -> None:
    if os.environ.get(ONLINE) is not None:
        os.environ["HF_HUB_OFFLINE"] = "0"
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    end_with_parent()


def _snapshot(name: str, revision: str, files: Sequence[str] = FILES, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name,
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=list(files),
        ignore_patterns=["*/*"],
    )
    return Path(found)


def _ask(references: Sequence[tuple[str, Reference, str | None]]) -> list[Fault]:
    faults: list[Fault] = []
    for where, reference, commit in references:
        try:
            _download(reference, commit, where, FILES[:1])
        except BadRequest as error:
            faults += error.faults
    return faults


def _download(reference: Reference, commit: str | None, where: str, files: Sequence[str] = FILES) -> Path:
    try:
        return _snapshot(reference.name, commit or reference.revision, files, local_files_only=False)
    except Exception as error:  # the client raises many kinds, all of which mean: not to be had
        given, allowed = _reason(error, reference, commit)
        raise BadRequest.of(where, f"cannot fetch hub:{reference.key}: {given}", allowed) from None


def _reason(error: Exception, reference: Reference, commit: str | None) -> tuple[str, str]:
    """Return what is wrong and what to do about it."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{reference.name}"
    login = "`hf auth login`, or HF_TOKEN" if get_token() is None else "a token of an account that has access"
    copy = f"`hf download {reference.name} --revision {commit or reference.revision}` where there is a network"
    if isinstance(error, errors.GatedRepoError):
        return (
            "the repository is gated",
            f"an account that accepted the terms at {page}, and {login}; or local:folder",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        locked = f", or no line in conf/{LOCK.name}" if commit not in (None, reference.revision) else ""
        return f"no revision {commit or reference.revision}", f"a branch, tag or commit of {page}{locked}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one", f"a name that {page} shows; for a private one {login}"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "it is not in the cache and the Hub is switched off", f"{ONLINE}=1, {copy}, or local:folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache and the Hub cannot be reached", f"a network, {copy}, or local:folder"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return reason, f"what {page} lets you download; or local:folder"


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
            raise BadRequest.of(
                f"{where}: {LOCK}", f"{key} is locked to {commit!r}, which is no commit", allowed
            )
    return content


def _write_lock(commits: Mapping[str, str], where: str) -> None:
    text = HEADER + "".join(f'{key}: "{commit}"\n' for key, commit in sorted(commits.items()))
    staged = LOCK.with_name(f".{LOCK.name}.new")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(LOCK)
    except OSError as error:
        given = f"cannot be written ({error.strerror})"
        raise BadRequest.of(
            f"{where}: {LOCK}", given, "a file that records the commit of each Hub reference"
        ) from None
