"""What is wrong with a request or an input, in one plain line each."""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import (
    EACCES,
    EDQUOT,
    EEXIST,
    EFBIG,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENOENT,
    ENOSPC,
    ENOTDIR,
    EPERM,
    EROFS,
)
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

T = TypeVar("T")

NAMED = 3
"""How many faults of one kind are spelled out before the rest is counted."""
FULL = (ENOSPC, EDQUOT, EFBIG)
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "os error 28")
"""What libraries say that write without Python's own files."""
PACKAGE_OF = {"sklearn": "scikit-learn", "yaml": "PyYAML", "hydra_plugins": "hydra-submitit-launcher"}
"""Top-level module -> the package that brings it, where the names differ."""
UNWRITABLE = (EACCES, EPERM, EROFS, ENOENT, ENOTDIR, EEXIST, EISDIR, ELOOP, ENAMETOOLONG)


class Fault(NamedTuple):
    """One thing that is wrong: which key or file, what was given, what is allowed."""

    where: str
    given: str
    allowed: str

    def __str__(self) -> str:
        words = f"{self.where}: {self.given}; allowed: {self.allowed}".split()
        return "".join(map(_printable, " ".join(words)))


class BadRequest(Exception):
    """The request or an input is wrong, with every fault found; ``run.py`` prints them and exits with
    2.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))

    @classmethod
    def of(cls, where: str, given: str, allowed: str) -> Self:
        """Build the common case of a single fault."""
        return cls([Fault(where, given, allowed)])

    @classmethod
    def gathered(cls, makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Return what every maker makes under the same names; raises with the faults of all, each once."""
        made: dict[str, T] = {}
        faults: list[Fault] = []
        for name, make in makers.items():
            try:
                made[name] = make()
            except BadRequest as error:
                faults += error.faults
        refuse(dict.fromkeys(faults))
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Fault, ...]]]:
        """Cross process borders with the faults intact."""
        return type(self), (self.faults,)


class NoRoom(Exception):
    """A disk is full; the message says where, what was needed and what is free."""

    @classmethod
    def at(cls, path: Path, needed: str) -> Self:
        """Describe the disk that ``path`` lies on; ``needed`` says how much, e.g. ``2.5 GB``."""
        free = spelled_size(shutil.disk_usage(nearest_above(path / "any")).free)
        return cls(f"no room on the disk: {path}: {needed} needed, {free} free; make room and run this again")


def disk_full(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came from, means that a disk (or a quota) is full."""
    if error is None or isinstance(error, NoRoom):
        return error is not None
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    said = str(error)
    return any(words in said for words in FULL_WORDS) or disk_full(error.__cause__ or error.__context__)


@contextmanager
def writing(where: str, path: Path) -> Iterator[None]:
    """Turn what keeps ``path`` from being written into one line: BadRequest naming ``where``, or
    NoRoom.
    """
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise NoRoom.at(path, "more") from error
        if error.errno not in UNWRITABLE:
            raise
        given = f"{error.filename or path} cannot be written ({error.strerror})"
        raise BadRequest.of(where, given, "a place that this user may write to") from None


def nearest_above(path: Path) -> Path:
    """Return the nearest folder above ``path`` that is there, or what stands where it should be."""
    return next(one for one in path.absolute().parents if os.path.lexists(one))


def missing_package(error: ModuleNotFoundError) -> BadRequest:
    """Say which package an import lacks, with the line that installs it."""
    module = str(error.name).partition(".")[0]
    name = PACKAGE_OF.get(module, module)
    stated = [one.partition(";")[0].strip() for one in metadata.requires("alignmerge") or ()]
    named = [one for one in stated if re.match(rf"{re.escape(name)}(?![\w.-])", one, re.IGNORECASE)]
    return BadRequest.of(f"package {name}", "is not installed", f"pip install '{[*named, name][0]}'")


def spelled_size(count: float) -> str:
    """Spell a number of bytes with three digits: ``2.51 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def refuse(faults: Collection[Fault]) -> None:
    """Raise ``BadRequest`` with the faults, if there are any."""
    if faults:
        raise BadRequest(faults)


def too_small(numbers: Mapping[str, int], where: str, least: int) -> list[Fault]:
    """Return a fault for each number below ``least``; ``where`` is what stands before its key."""
    faults = []
    for key, number in numbers.items():
        if number < least:
            faults.append(Fault(f"{where}{key}", str(number), f"a whole number of at least {least}"))
    return faults


def first_few(faults: Sequence[Fault]) -> list[Fault]:
    """Spell out the first faults of one kind and count the others."""
    shown, rest = [*faults[:NAMED]], faults[NAMED:]
    if rest:
        shown.append(rest[0]._replace(given=f"and {len(rest)} more like it"))
    return shown


def _printable(character: str) -> str:
    """Escape a character that does not print: a file may put it into a name to steer the terminal."""
    return character if character.isprintable() else repr(character)[1:-1]
