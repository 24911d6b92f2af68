"""Progress with time left: bars on a terminal, plain lines otherwise, also for work in other processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.managers import SyncManager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STOP = None
LINES_PER_TASK = 4


class Reporter:
    """Sends (label, done, total) to the board; crosses process borders."""

    def __init__(self, queue: Any, label: str) -> None:
        self.queue, self.label = queue, label

    def __call__(self, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps are over."""
        self.queue.put((self.label, done, total))

    def about(self, label: str) -> Reporter:
        """Return a reporter for another piece of work on the same board."""
        return Reporter(self.queue, label)


class Board:
    """Shows what is under way; a context manager of the main process."""

    def __init__(self) -> None:
        self._manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        self._manager.start(end_with_parent)
        self._queue: Any = self._manager.Queue()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Board:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(STOP)
        self._thread.join(timeout=5)
        self._manager.shutdown()

    def reporter(self, label: str) -> Reporter:
        """Return a picklable reporter for one piece of work."""
        return Reporter(self._queue, label)

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
            while (item := self._queue.get()) is not STOP:
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
        while (item := self._queue.get()) is not STOP:
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
