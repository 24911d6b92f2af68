"""Progress with time left: bars on a terminal, plain lines otherwise, also for work in other processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OUT = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 180)
"""Where results are printed; in a file or a pipe a table may be wider than a terminal's 80 columns."""
STOP = None
LINES_PER_TASK = 4


class Reporter:
    """Sends (label, done, total) to the board of this process, or of the one that started it."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps are over."""
        if _LINE:
            _LINE[-1].put((self.label, done, total))


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
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Board:
        connect(self.queue)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _LINE.remove(self.queue)
        self.queue.put(STOP)
        self._thread.join(timeout=5)
        self.queue.cancel_join_thread()  # a killed worker may hold the queue: progress is not worth waiting for

    def reporter(self, label: str) -> Reporter:
        """Return a picklable reporter for one piece of work."""
        return Reporter(label)

    def _show(self) -> None:
        if sys.stderr.isatty():
            self._bars()
        else:
            self._lines()

    def _bars(self) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as progress:
            tasks: dict[str, Any] = {}
            while (item := self.queue.get()) is not STOP:
                label, done, total = item
                if label not in tasks:
                    tasks[label] = progress.add_task(label, total=total)
                progress.update(tasks[label], completed=done, total=total)
                if done >= total:
                    progress.remove_task(tasks.pop(label))
                    progress.console.print(f"[green]done[/green] {label}", highlight=False)

    def _lines(self) -> None:
        started: dict[str, float] = {}
        shown: dict[str, int] = {}
        while (item := self.queue.get()) is not STOP:
            label, done, total = item
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
    """Make this process end when the one that started it is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def silent(done: int, total: int) -> None:
    """Report to nobody."""
