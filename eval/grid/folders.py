"""Where results lie: those of runs, which git ignores, and the committed ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignmerge.engine.configuration import choices
from alignmerge.engine.destination import claimed
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.store import MANIFEST, write_json

REFERENCE = "reference"
"""The folder of the committed results, within that of all results."""
COMMITTED = ROOT / "results" / REFERENCE
"""The committed results of this project."""


def folder_of_run(results: Path, name: str) -> Path:
    """Return the folder that a run writes, and may replace.

    Raises:
        BadRequest: if it would lie outside ``results`` or among the committed results, or if it exists
        and
            holds something else than results.
    """
    if name in ("", REFERENCE) or "/" in name or name.startswith("."):
        raise BadRequest.of("grid.name", repr(name), f"a plain folder name, not {REFERENCE}")
    folder = results / name
    if COMMITTED in folder.resolve().parents:
        raise BadRequest.of("results", str(results), "a folder outside the committed results")
    if folder.exists() and not _replaceable(folder):
        raise BadRequest.of("results", f"{folder} exists and holds no results", "a folder of results, or none")
    return folder


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    return (folder / "summary.csv").is_file() or not any(folder.iterdir())


def committed(results: Path, name: str) -> Path | None:
    """Return the committed results of an experiment: those beside a run's own, else the project's."""
    for folder in (results / REFERENCE / name, COMMITTED / name):
        if (folder / MANIFEST).is_file() and (folder / "summary.csv").is_file():
            return folder
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a results folder.

    Raises:
        BadRequest: if it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or "families" not in manifest:
        raise BadRequest.of(str(path), "cannot be read", "the manifest of an experiment that has been run")
    return manifest


def recorded_of(manifest: Mapping[str, Any], family: str, seed: int) -> dict[str, Any]:
    """Return what a manifest says of a family with a seed; nothing where it does not name them."""
    found: dict[str, Any] = manifest["families"].get(family, {}).get(f"seed {seed}", {})
    return found


def replace_folder(
    source: Path,
    folder: Path,
    manifest: Mapping[str, Any],
    without: Callable[[str, list[str]], list[str]] | None = None,
) -> None:
    """Put a copy of ``source`` with this manifest in the place of ``folder``.

    ``without`` says which names of a folder are left out, as for ``shutil.copytree``.
    Neither a kill nor another process that does the same leaves half of a folder under that name.
    """
    with claimed(folder, "results", replace=True) as staging:
        shutil.copytree(source, staging / folder.name, ignore=without)
        write_json(staging / folder.name / MANIFEST, manifest)


def word_of(name: str) -> str:
    """Return the word that chooses an experiment on the command line: ``ablation/tiny`` for
    ``ablation-tiny``.
    """
    for word in choices(ROOT / "conf" / "experiment"):
        if word.replace("/", "-") == name:
            return word
    return name
