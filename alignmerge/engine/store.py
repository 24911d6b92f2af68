"""The content-addressed store: recipe -> key -> artifact. Resume, cache and provenance are this one idea."""

import fcntl
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import provenance

Make = Callable[[Path], Mapping[str, Any] | None]
"""Fills a folder and returns facts about it, if there are any."""
MANIFEST = "manifest.json"
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


class Store:
    """A folder of artifacts, each under ``<stage>/<key>``; a folder with its final name is complete."""

    def __init__(self, root: Path, *, frozen: bool = False) -> None:
        self.root, self.frozen = root, frozen

    def key(self, stage: str, recipe: Mapping[str, Any]) -> str:
        """Return the key of a recipe: 24 hex digits of the sha256 of its canonical JSON."""
        text = json.dumps({"format": FORMAT, "stage": stage, "recipe": recipe}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def path(self, stage: str, recipe: Mapping[str, Any]) -> Path:
        """Return where the artifact of a recipe lies, or will lie."""
        return self.root / stage / self.key(stage, recipe)

    def find(self, stage: str, recipe: Mapping[str, Any]) -> Artifact | None:
        """Return the finished artifact of a recipe, or None."""
        path = self.path(stage, recipe)
        try:
            return Artifact(path.name, path, json.loads((path / MANIFEST).read_text()))
        except FileNotFoundError:
            return None

    def obtain(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Return the artifact of a recipe; unless it exists, ``make`` makes it (a frozen store raises NotMade).

        Two processes that ask for the same artifact make it once: the second waits for the first.
        """
        if found := self.find(stage, recipe):
            return found
        path = self.path(stage, recipe)
        if self.frozen:
            raise NotMade(f"{stage}/{path.name}")
        with FileLock(self._lock_file(f"{stage}-{path.name}")):
            return self.find(stage, recipe) or self._made(stage, recipe, make)

    def _made(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Make an artifact in a fresh folder and give that its final name; the caller holds its lock."""
        path = self.path(stage, recipe)
        folder = self.root / ".staging" / f"{stage}-{path.name}"
        shutil.rmtree(folder, ignore_errors=True)
        self._sweep()
        folder.mkdir(parents=True)
        try:
            started = time.monotonic()
            facts = {**(make(folder) or {}), "seconds": round(time.monotonic() - started, 2)}
            manifest = {"stage": stage, "key": path.name, "recipe": recipe, "facts": facts}
            manifest["provenance"] = provenance()
            write_json(folder / MANIFEST, manifest)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(path)
        except BadRequest:
            raise  # the request is wrong: nothing is written, not even a record of failure
        except Exception as error:
            self.failed(stage, recipe, error)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.forget_failure(stage, recipe)
        return Artifact(path.name, path, manifest)

    @contextmanager
    def held(self, stage: str, recipe: Mapping[str, Any]) -> Iterator[None]:
        """Keep an artifact from being dropped for a while, whichever process wants to; many may hold it at once."""
        with self._lock_file(f"held-{stage}-{self.key(stage, recipe)}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def drop(self, stage: str, recipe: Mapping[str, Any]) -> bool:
        """Delete an artifact unless somebody holds it; say whether it is gone."""
        path = self.path(stage, recipe)
        with self._lock_file(f"held-{stage}-{path.name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if path.exists():
                gone = self.root / ".staging" / f"{stage}-{path.name}-dropped"
                gone.parent.mkdir(exist_ok=True)
                shutil.rmtree(gone, ignore_errors=True)  # what a kill left of an earlier drop
                path.rename(gone)  # first out of sight: a kill in the midst leaves no half of an artifact
                shutil.rmtree(gone, ignore_errors=True)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _sweep(self) -> None:
        """Remove what killed processes left half-made: their locks are free, wherever they ran."""
        staging = self.root / ".staging"
        for folder in staging.iterdir() if staging.is_dir() else ():
            try:
                with FileLock(self._lock_file(folder.name), blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:
                continue


def write_json(path: Path, value: Any) -> None:
    """Write sorted, readable JSON; refuses NaN, which JSON does not have."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
