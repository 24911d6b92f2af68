"""Provenance: which code, which versions, which machine made an artifact. No paths, tokens or user names."""

import hashlib
import platform
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

COMPUTING = (
    "torch", "transformers", "tokenizers", "jinja2", "lm-eval", "datasets", "safetensors", "scikit-learn", "scipy",
    "numpy", "gguf", "peft",
)  # fmt: skip
"""Packages that numbers depend on: their versions are part of keys."""
REPORTING = ("hydra-core", "pandas", "matplotlib", "statsmodels")
"""Packages that manifests name beside these."""
ROOT = Path(__file__).resolve().parents[2]


@cache
def versions(packages: Sequence[str] = COMPUTING) -> dict[str, str]:
    """Return the versions of the packages that numbers depend on, without the build suffix."""
    return {name: metadata.version(name).split("+")[0] for name in packages}


def all_versions() -> dict[str, str]:
    """Return the versions that a manifest names: of packages that compute and of those that report."""
    return versions((*COMPUTING, *REPORTING))


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
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    machine = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    return {"made": made, "versions": all_versions(), "git": git_state(), **machine}


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
