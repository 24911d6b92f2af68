"""Progress with time left, also of other processes: bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich import progress as bars
from rich.console import Console

OUT = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 180)
"""Where results are printed; in a file or a pipe a table may be wider than a terminal's 80 columns."""
STOP = None
LINES_PER_TASK = 4
Reporter = Callable[[int, int], None]
"""Is told how many steps of how many are over; picklable."""
_LINE: list[Any] = []
"""The queue of the board that this process reports to, last; none: nobody listens."""


def connect(queue: Any) -> None:
    """Make the reporters of this process send to ``queue``."""
    _LINE.append(queue)


class Board:
    """Shows what is under way; a context manager of the main process."""

    def __init__(self) -> None:
        self.queue: Any = multiprocessing.get_context("spawn").Queue()
        """What worker processes are connected to."""
        show = self._bars if sys.stderr.isatty() else self._lines
        self._thread = threading.Thread(target=show, daemon=True)

    def __enter__(self) -> Board:
        connect(self.queue)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        _LINE.remove(self.queue)
        self.queue.put(STOP)
        self._thread.join(timeout=5)
        self.queue.cancel_join_thread()  # a killed worker may hold the queue: do not wait for progress

    def reporter(self, label: str) -> Reporter:
        """Return what reports one piece of work to the board of the process that it runs in."""
        return partial(_report, label)

    def _bars(self) -> None:
        columns = (
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
        )  # fmt: skip
        with bars.Progress(*columns, console=Console(stderr=True)) as progress:
            tasks: dict[str, Any] = {}
            for label, done, total in iter(self.queue.get, STOP):
                if label not in tasks:
                    tasks[label] = progress.add_task(label, total=total)
                progress.update(tasks[label], completed=done, total=total)
                if done >= total:
                    progress.remove_task(tasks.pop(label))
                    progress.console.print(f"[green]done[/green] {label}", highlight=False)

    def _lines(self) -> None:
        started: dict[str, float] = {}
        shown: dict[str, int] = {}
        for label, done, total in iter(self.queue.get, STOP):
            began = started.setdefault(label, time.monotonic())
            step = LINES_PER_TASK * done // max(1, total)
            if step <= shown.get(label, 0) and done < total:
                continue
            shown[label] = step
            spent = time.monotonic() - began
            left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            print(f"{label}: {done}/{total} ({spent:.0f} s{left})", file=sys.stderr, flush=True)
            if done >= total:
                started.pop(label, None)
                shown.pop(label, None)


def end_with_parent() -> None:
    """Make this process end when the one that started it is killed, instead of waiting for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def silent(done: int, total: int) -> None:
    """Report to nobody."""


def _report(label: str, done: int, total: int) -> None:
    if _LINE:
        _LINE[-1].put((label, done, total))
