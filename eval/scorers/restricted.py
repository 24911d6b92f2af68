"""Unpickling with an explicit list of what a file may name: third-party files are data, never code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler

from alignmerge.engine.faults import BadRequest


class Record:
    """Stands in for another library's class: it keeps the pickled attributes and has no behaviour."""


def _scalar(kind: np.dtype[Any], raw: bytes) -> np.generic:
    """Return the number that ``raw`` holds; ``frombuffer`` refuses objects."""
    number: np.generic = np.frombuffer(raw, kind, count=1)[0]
    return number


ARRAYS: Mapping[tuple[str, str], Any] = {
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): NumpyArrayWrapper,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "float64"): np.float64,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
"""What joblib stores arrays with; it reads an array of objects by the same ``find_class``."""


def _found(allowed: Mapping[tuple[str, str], Any], module: str, name: str) -> object:
    if (module, name) not in allowed:
        raise pickle.UnpicklingError(f"names {module}.{name}")
    return allowed[module, name]


def read_pickle(path: Path, allowed: Mapping[tuple[str, str], Any]) -> object:
    """Return the object in a pickle that names nothing but the keys (module, name) of ``allowed``.

    The values are what such a name becomes. Raises ``BadRequest`` naming the file if it names anything
    else or is no pickle.
    """

    class ListedPickle(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return _found(allowed, module, name)

    with path.open("rb") as file:
        return _loaded(path, ListedPickle(file).load)


def read_joblib(path: Path, allowed: Mapping[tuple[str, str], Any]) -> object:
    """Return the object in an uncompressed joblib file, with numeric arrays; see ``read_pickle``."""
    names = {**ARRAYS, **allowed}

    class ListedJoblib(NumpyUnpickler):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> object:
            return _found(names, module, name)

    with path.open("rb") as file:
        return _loaded(path, ListedJoblib(str(path), file, ensure_native_byte_order=True).load)


def _loaded(path: Path, load: Callable[[], object]) -> object:
    try:
        return load()
    except Exception as error:  # a damaged or hostile stream can end in any kind of error
        reason = str(error) or type(error).__name__
        allowed = "the file as published, with plain containers and numbers"
        raise BadRequest.of(path.name, f"not read: {reason}", allowed) from None
