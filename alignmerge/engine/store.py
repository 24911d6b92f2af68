"""The content-addressed store: recipe -> key -> artifact. Resume, cache and provenance are this one
idea.
"""

import fcntl
import hashlib
import json
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTEMPTY
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from alignmerge.engine.faults import BadRequest, NoRoom, disk_full, spelled_size, writing
from alignmerge.engine.manifest import provenance

Make = Callable[[Path], Mapping[str, Any] | None]
"""Fills a folder and returns facts about it, if there are any."""
MANIFEST = "manifest.json"
HEALED = {True: "the next run makes it again", False: "it is made again"}
"""Whether the store is frozen -> what becomes of a damaged artifact."""
FORMAT = 3
"""Part of every key: raise it when the meaning of a stage changes."""


class Artifact(NamedTuple):
    """A finished folder with what its manifest says."""

    key: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The digest of the content, as recorded when it was made."""
        return str(self.manifest["facts"]["digest"])


class NotMade(LookupError):
    """A frozen store was asked for an artifact that nobody has made yet."""


class Damaged(ValueError):
    """An artifact is not what was made: how."""


class Store:
    """A folder of artifacts, each under ``<stage>/<key>``; a folder with its final name is complete.

    It is filled under a name of its own and then renamed, its manifest written last. Locks keep two
    processes from making it twice. Where a file system has no locks, both make it, one rename wins and
    the other is thrown away; a process may also lose what it was making to another one's sweep, and
    then says so. Nothing is partial. The manifest records the size of every file: what a power failure
    or a full disk cut off is found and made again.
    """

    def __init__(self, root: Path, *, frozen: bool = False) -> None:
        self.root, self.frozen = root, frozen
        self._named: set[Path] = set()
        """Damaged artifacts that have been named."""

    def key(self, stage: str, recipe: Mapping[str, Any]) -> str:
        """Return the key of a recipe: 24 hex digits of the sha256 of its canonical JSON."""
        text = json.dumps({"format": FORMAT, "stage": stage, "recipe": recipe}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def path(self, stage: str, recipe: Mapping[str, Any]) -> Path:
        """Return where the artifact of a recipe lies, or will lie."""
        return self.root / stage / self.key(stage, recipe)

    def find(self, stage: str, recipe: Mapping[str, Any]) -> Artifact | None:
        """Return the finished artifact of a recipe, or None; a damaged one is named on stderr and
        counts as missing.

        Raises BadRequest if the store cannot be read.
        """
        path = self.path(stage, recipe)
        try:
            return Artifact(path.name, path, read_manifest(path))
        except FileNotFoundError:
            return None
        except Damaged as error:
            self._name(path, error)
            return None
        except OSError as error:
            given = f"{error.filename or self.root} cannot be read ({error.strerror})"
            raise BadRequest.of("store", given, "a folder that this user may read") from None

    def obtain(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Return the artifact of a recipe; unless it exists, ``make`` makes it (a frozen store raises
        NotMade).

        Two processes that ask for the same artifact make it once: the second waits for the first.
        Raises BadRequest if the store cannot be written, NoRoom if its disk is full.
        """
        if found := self.find(stage, recipe):
            return found
        path = self.path(stage, recipe)
        if self.frozen:
            raise NotMade(f"{stage}/{path.name}")
        with self._locked(f"{stage}-{path.name}"):
            return self.find(stage, recipe) or self._made(stage, recipe, make)

    def _made(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Make an artifact in a fresh folder and give that its final name; the caller holds its lock."""
        path = self.path(stage, recipe)
        folder = self._aside(path)
        self._sweep(f"{stage}-{path.name}")
        with writing("store", self.root):
            folder.mkdir(parents=True)
        try:
            started = time.monotonic()
            facts = {**(make(folder) or {}), "seconds": round(time.monotonic() - started, 2)}
            manifest = {"stage": stage, "key": path.name, "recipe": recipe, "facts": facts}
            manifest |= {"provenance": provenance(), "files": file_sizes(folder)}
            write_json(folder / MANIFEST, manifest)
            self._publish(folder, path)
        except (BadRequest, NoRoom):
            raise  # nothing is written, not even a record of failure
        except Exception as error:
            if disk_full(error):
                written = sum(file_sizes(folder).values())
                raise NoRoom.at(self.root, f"more than {spelled_size(written)}") from error
            self.failed(stage, recipe, error)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.forget_failure(stage, recipe)
        return self.find(stage, recipe) or Artifact(path.name, path, manifest)

    def _publish(self, folder: Path, path: Path) -> None:
        """Give a finished folder its final name; a damaged artifact gives way, a whole one stays."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if _damage(path):
            self._remove(path)
        try:
            folder.rename(path)
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise  # otherwise another process, whose lock we could not see, was first

    def _name(self, path: Path, error: Damaged) -> None:
        """Say once that an artifact is damaged, and what becomes of it."""
        if path not in self._named:
            self._named.add(path)
            print(f"damaged: {path}: {error}; {HEALED[self.frozen]}", file=sys.stderr)

    def _aside(self, path: Path) -> Path:
        """Return a name, used once, for a folder that is not finished or no longer wanted."""
        return self.root / ".staging" / f"{path.parent.name}-{path.name}.{secrets.token_hex(4)}"

    def _remove(self, path: Path) -> None:
        """Delete an artifact: first out of sight, so that a kill in the midst leaves no half of one."""
        gone = self._aside(path)
        gone.parent.mkdir(parents=True, exist_ok=True)
        path.rename(gone)
        _delete(gone)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = FileLock(self._lock_file(name))
        with writing("store", self.root):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def held(self, stage: str, recipe: Mapping[str, Any]) -> Iterator[None]:
        """Keep an artifact from being dropped for a while, whichever process wants to; many may hold it
        at once.
        """
        with self._hold_file(stage, self.key(stage, recipe)) as file:
            with suppress(OSError):  # a file system without locks: then ``drop`` deletes nothing
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def drop(self, stage: str, recipe: Mapping[str, Any]) -> bool:
        """Delete an artifact unless somebody holds it, or may hold it; say whether it is gone."""
        path = self.path(stage, recipe)
        with self._hold_file(stage, path.name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            if path.exists():
                self._remove(path)
            return True

    def failed(self, stage: str, recipe: Mapping[str, Any], error: BaseException) -> Path:
        """Leave the traceback of a failed artifact under ``failed/`` and return its path."""
        path = self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = traceback.format_exception(error)
        write_json(path, {"stage": stage, "recipe": recipe, "traceback": "".join(lines)})
        return path

    def forget_failure(self, stage: str, recipe: Mapping[str, Any]) -> None:
        """Drop the record of a failure that a later run has mended."""
        (self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json").unlink(missing_ok=True)

    def failure(self, stage: str, recipe: Mapping[str, Any]) -> Path | None:
        """Return the record of a failure, if there is one."""
        path = self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json"
        return path if path.is_file() else None

    def _lock_file(self, name: str) -> Path:
        path = self.root / ".locks" / name
        with writing("store", self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _hold_file(self, stage: str, key: str) -> IO[str]:
        path = self._lock_file(f"held-{stage}-{key}")
        with writing("store", self.root):
            return path.open("w")

    def _sweep(self, mine: str) -> None:
        """Remove what killed processes left half-made: their locks are free, or, as that of ``mine``,
        held here.
        """
        staging = self.root / ".staging"
        for folder in staging.glob("*"):  # of which there are none in a new store
            name = folder.name.partition(".")[0]
            if name == mine:
                _discard(folder)
                continue
            with suppress(Timeout), FileLock(self._lock_file(name), blocking=False):
                _discard(folder)


def _discard(folder: Path) -> None:
    """Delete what nobody wants, out of sight first: a maker that lives after all fails instead of
    publishing a half.
    """
    gone = folder.with_name(f"{folder.name}.swept")
    with suppress(FileNotFoundError):
        folder.rename(gone)
        _delete(gone)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact whose files have their recorded sizes (nothing of them is
    read).

    Raises FileNotFoundError if there is no such folder, Damaged if it is not what was made.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise Damaged(f"{MANIFEST} is empty or cut off") from None
    except FileNotFoundError:
        if folder.exists():
            raise Damaged(f"no {MANIFEST}") from None
        raise
    if not isinstance(manifest, dict):
        raise Damaged(f"{MANIFEST} holds no facts")
    for part in ("facts", "recipe"):
        if not isinstance(manifest.get(part), dict):
            raise Damaged(f"{MANIFEST} holds no {part}")
    for name, size in manifest.get("files", {}).items():
        _check_size(folder, name, size)
    return manifest


def _check_size(folder: Path, name: str, size: int) -> None:
    try:
        found = (folder / name).stat().st_size
    except FileNotFoundError:
        if not folder.exists():
            raise  # it was dropped meanwhile
        raise Damaged(f"{name} is missing") from None
    if found != size:
        raise Damaged(f"{name} has {found} bytes, not {size}")


def _damage(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except Damaged:
        return True
    except FileNotFoundError:
        return False
    return False


def _delete(path: Path) -> None:
    """Delete a folder, or a link to one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file of a folder, by its path in it."""
    files = sorted(filter(Path.is_file, folder.rglob("*")))
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def write_json(path: Path, value: Any) -> None:
    """Write sorted, readable JSON, under another name first: a reader sees the whole of it or nothing.

    Refuses NaN, which JSON does not have.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    staged = path.with_name(f".{secrets.token_hex(4)}.json")
    try:
        staged.write_text(text)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
