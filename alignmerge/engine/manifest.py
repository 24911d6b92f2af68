"""Provenance: which code, which versions, which machine made an artifact. No paths, tokens or user names."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "lm-eval",
    "datasets",
    "hydra-core",
    "safetensors",
    "scikit-learn",
    "numpy",
)
ROOT = Path(__file__).resolve().parents[2]


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on, without the build suffix."""
    return {name: metadata.version(name).split("+")[0] for name in PACKAGES}


@cache
def git_state() -> dict[str, Any]:
    """Return commit and dirty flag of this project, or nothing where it is not a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (subprocess.SubprocessError, FileNotFoundError):
        return {}


def provenance() -> dict[str, Any]:
    """Return what the manifest of an artifact says of its making."""
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"made": made, "versions": versions(), "git": git_state(), **machine}


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
