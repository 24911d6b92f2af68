"""The content-addressed store: recipe -> key -> artifact. Resume, cache and provenance are this one idea."""

from __future__ import annotations

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

MANIFEST = "manifest.json"
FORMAT = 1
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
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            return None
        return Artifact(path.name, path, manifest)

    def obtain(
        self, stage: str, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        """Return the artifact of a recipe; unless it exists, ``make`` fills its folder and returns facts.

        Two processes that ask for the same artifact make it once: the second waits for the first.

        Raises:
            NotMade: if the store is frozen and the artifact is not there.
        """
        found = self.find(stage, recipe)
        if found is not None:
            return found
        if self.frozen:
            raise NotMade(f"{stage}/{self.key(stage, recipe)}")
        path = self.path(stage, recipe)
        with self._lock(f"{stage}-{path.name}"):
            if self.find(stage, recipe) is None:
                with self._staging(stage, recipe) as folder:
                    started = time.monotonic()
                    facts = dict(make(folder))
                    facts["seconds"] = round(time.monotonic() - started, 2)
                    manifest = {"stage": stage, "key": path.name, "recipe": recipe, "facts": facts}
                    write_json(folder / MANIFEST, {**manifest, "provenance": provenance()})
                    path.parent.mkdir(parents=True, exist_ok=True)
                    folder.rename(path)
        made = self.find(stage, recipe)
        assert made is not None
        return made

    def failed(self, stage: str, recipe: Mapping[str, Any], error: BaseException) -> Path:
        """Leave the traceback of a failed artifact under ``failed/`` and return its path."""
        path = self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(traceback.format_exception(error))
        write_json(path, {"stage": stage, "recipe": recipe, "traceback": text})
        return path

    def forget_failure(self, stage: str, recipe: Mapping[str, Any]) -> None:
        """Drop the record of a failure that a later run has mended."""
        (self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json").unlink(missing_ok=True)

    def failure(self, stage: str, recipe: Mapping[str, Any]) -> Path | None:
        """Return the record of a failure, if there is one."""
        path = self.root / "failed" / f"{stage}-{self.key(stage, recipe)}.json"
        return path if path.is_file() else None

    def _lock(self, name: str) -> FileLock:
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / name)

    @contextmanager
    def _staging(self, stage: str, recipe: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a fresh folder; it is in use for as long as the caller holds the artifact's lock."""
        folder = self.root / ".staging" / f"{stage}-{self.key(stage, recipe)}"
        shutil.rmtree(folder, ignore_errors=True)
        self._sweep()
        folder.mkdir(parents=True)
        try:
            yield folder
        except BadRequest:
            raise  # the request is wrong: nothing is written, not even a record of failure
        except Exception as error:
            self.failed(stage, recipe, error)
            raise
        else:
            self.forget_failure(stage, recipe)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left half-made: their locks are free, wherever they ran."""
        staging = self.root / ".staging"
        for folder in staging.iterdir() if staging.is_dir() else ():
            try:
                with self._lock(folder.name).acquire(blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:
                continue


def write_json(path: Path, value: Any) -> None:
    """Write sorted, readable JSON; refuses NaN, which JSON does not have."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
