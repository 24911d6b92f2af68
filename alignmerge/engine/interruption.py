"""Ctrl-C: it unwinds the run, and what has not ended within a moment is ended all the same."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

CODE = 130
GRACE_SECONDS = 1.0
SAID = "interrupted: what is finished is kept, and the same command goes on with the rest"
_once = threading.Lock()


def end_at_once() -> None:
    """Let Ctrl-C end this process where it is: for as long as modules are imported and nothing is open."""
    signal.signal(signal.SIGINT, _end)


def unwind_first() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and end the process after ``GRACE_SECONDS``, where
    ``end_at_once`` stood.

    Python itself hears of a signal only when the call that it is in returns: a factorisation may take
    minutes. The system writes each signal's number into a pipe at once, where a thread waits for it.
    """
    if signal.getsignal(signal.SIGINT) is not _end:
        return  # this is somebody else's program
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _unwind)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def tell() -> int:
    """Say once that the run was interrupted and return its exit code."""
    if _once.acquire(blocking=False):
        print(SAID, file=sys.stderr, flush=True)
    return CODE


def leave() -> NoReturn:
    """End an interrupted process with what others registered for its end, but without taking its
    modules apart.

    That alone takes seconds on a busy machine.
    """
    atexit._run_exitfuncs()
    os._exit(CODE)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let processes that start meanwhile ignore Ctrl-C from their first moment: they inherit what is
    ignored.

    A terminal sends it to the whole group; the first process then ends the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: object) -> None:
    os._exit(tell())


def _unwind(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would break off the clearing up
    raise KeyboardInterrupt


def _watch(reading: int) -> None:
    while signal.SIGINT not in os.read(reading, 1):
        pass
    time.sleep(GRACE_SECONDS)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(tell())
