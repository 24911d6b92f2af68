"""Where a user wants a result (``out=``): claimed by one process, filled beside it, renamed when it is
whole.

With locks, a second process that names a claimed destination is refused before it works. Without them
(some shared file systems) both work, each under a name of its own, and the second to finish is refused:
nothing is overwritten or mixed. What a killed process left beside the destination is removed by the
next one that claims it.
"""

import glob
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from alignmerge.engine.faults import BadRequest, NoRoom, disk_full, nearest_above, spelled_size, writing

ALLOWED = "a path that does not exist yet"
TOKEN = 4
"""Bytes of the part of a staging name that is drawn: two processes never share one."""


def free_path(path: Path, where: str, *, outside: Path) -> Path:
    """Return a path that can be claimed.

    Raises BadRequest, naming ``where``, if something is there (a dangling link too), if it lies in
    ``outside`` (the store), or if no folder can be there.
    """
    if os.path.lexists(path):
        raise BadRequest.of(where, f"{path} exists", ALLOWED)
    if path.resolve().is_relative_to(outside.resolve()):
        raise BadRequest.of(where, f"{path} lies in the store", f"a path outside {outside}")
    above = nearest_above(path)
    if not above.is_dir():
        raise BadRequest.of(where, f"{above} is not a folder", ALLOWED)
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadRequest.of(where, f"{above} cannot be written", "a place that this user may write to")
    return path


def check_room(path: Path, where: str, needed: int) -> None:
    """Raise BadRequest if the disk of ``path`` has not ``needed`` bytes free."""
    free = shutil.disk_usage(nearest_above(path)).free
    if free < needed:
        given = f"{path} needs {spelled_size(needed)}, {spelled_size(free)} are free on its disk"
        raise BadRequest.of(where, given, "a path on a disk with room")


@contextmanager
def claimed(path: Path, where: str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``path``; what is put there under ``path.name`` gets the final name at
    the end.

    That may be a file or a folder; it is flushed to the disk first. Raises BadRequest if another
    process holds the destination or was first, NoRoom if its disk is full. On any error nothing is
    left. ``replace``: put it in the place of a folder that may be there, after whoever else does the
    same.
    """
    with writing(where, path):
        made = _make_parents(path)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        holder = path.with_name(f".{path.name}.holder")
    try:
        with _held(lock, holder, path, where, wait=replace), _staging(path, where) as staging:
            yield staging
            _flush(staging)
            if replace and path.is_dir():
                path.rename(staging / "replaced")
            _publish(staging / path.name, path, where)
    finally:
        _prune(made)


@contextmanager
def _held(lock: FileLock, holder: Path, path: Path, where: str, *, wait: bool) -> Iterator[None]:
    try:
        with writing(where, path):
            lock.acquire(blocking=wait)
    except Timeout:
        who = "another process"
        if holder.is_file():
            who = holder.read_text()
        given = f"{path} is being written by {who}"
        raise BadRequest.of(where, given, "another path, or this one when that is done") from None
    try:
        with writing(where, path):
            holder.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}"
            )
        yield
    finally:
        holder.unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)  # filelock tells a lock whose file is gone from a held one
        lock.release()


@contextmanager
def _staging(path: Path, where: str) -> Iterator[Path]:
    for left in path.parent.glob(f".{glob.escape(path.name)}-{'?' * 2 * TOKEN}.staging"):
        shutil.rmtree(left, ignore_errors=True)
    staging = path.with_name(f".{path.name}-{secrets.token_hex(TOKEN)}.staging")
    with writing(where, path):
        staging.mkdir()
    try:
        yield staging
    except (BadRequest, NoRoom):
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        written = sum(one.stat().st_size for one in staging.rglob("*") if one.is_file())
        raise NoRoom.at(path, f"more than {spelled_size(written)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(made: Path, path: Path, where: str) -> None:
    """Rename without writing over anything: a folder cannot replace one with files, a link cannot
    replace a file.
    """
    taken = BadRequest.of(where, f"{path} exists: another process was first", ALLOWED)
    if os.path.lexists(path):
        raise taken
    try:
        if made.is_dir():
            made.rename(path)
        else:
            os.link(made, path)
    except FileExistsError:
        raise taken from None
    except OSError:
        if made.is_dir() or os.path.lexists(path):
            raise taken from None
        made.rename(path)  # a file system without hard links


def _flush(folder: Path) -> None:
    """Ask the disk to have every file before its final name: afterwards nobody checks a user's folder."""
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as open_file:
            os.fsync(open_file.fileno())


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above ``path`` and return those that were missing, the deepest first."""
    missing = [one for one in path.absolute().parents if not one.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _prune(made: list[Path]) -> None:
    """Remove folders that were made for nothing: those that are still empty."""
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return
