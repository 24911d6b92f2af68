"""Progress with time left, also of other processes: bars on a terminal, a line now and then otherwise."""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from rich import progress as bars
from rich.console import Console

from alignmerge.engine.forecast import Forecast, spelt

OUT = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 180)
"""Where results are printed; in a file or a pipe a table may be wider than a terminal's 80 columns."""
STOP = None
EVERY = 15.0
"""Seconds between two lines of progress, at least; the last one may follow sooner."""
TICK = 0.5
"""Seconds after which a board looks at the clock, where nobody reports anything."""
WHOLE = "whole run"
Reporter = Callable[[int, int], None]
"""Is told how many steps of how many are over; picklable."""
Event = tuple[str, int, int]
"""What a reporter was told, after its label."""
_LINE: list[Any] = []
"""The queue of the board that this process reports to, last; none: nobody listens."""


def connect(queue: Any) -> None:
    """Make the reporters of this process send to ``queue``."""
    _LINE.append(queue)


class Board:
    """Shows what is under way and, with a forecast, how far the whole is; a context manager of the main
    process.
    """

    def __init__(self, forecast: Forecast | None = None) -> None:
        self.queue: Any = multiprocessing.get_context("spawn").Queue()
        """What worker processes are connected to."""
        self.forecast = forecast
        self.interrupted = False
        """Set where the end of the work is told elsewhere: there is no last line then."""
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

    def _events(self) -> Iterator[Event | None]:
        """Yield what is reported until the board closes, and None where nothing is for a while."""
        while (
            not self.interrupted
        ):  # a killed worker may hold the queue, so that the end cannot come through it
            try:
                event = self.queue.get(timeout=TICK)
            except queue.Empty:
                yield None
                continue
            if event is STOP:
                return
            label, done, total = event
            if self.forecast is not None:
                self.forecast.report(label, done / max(1, total), time.monotonic())
            yield label, done, total

    def _bars(self) -> None:
        columns = (
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), bars.TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        # Results go to stdout, which may be a file: the bars must not take them along.
        with bars.Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
            tasks: dict[str, Any] = {}
            if self.forecast is not None:
                tasks[WHOLE] = progress.add_task(WHOLE, total=self.forecast.total, left="")
            for event in self._events():
                if event is not None:
                    _show_task(progress, tasks, event)
                self._show_whole(progress, tasks)
            self._show_whole(progress, tasks)

    def _show_whole(self, progress: bars.Progress, tasks: Mapping[str, Any]) -> None:
        if self.forecast is not None:
            left = self.forecast.left(time.monotonic())
            rest = "" if left is None else f"about {spelt(left)} left"
            progress.update(tasks[WHOLE], completed=self.forecast.done, total=self.forecast.total, left=rest)

    def _lines(self) -> None:
        said, due = "", time.monotonic()
        for event in self._events():
            if self.forecast is not None:
                said = self.forecast.line(time.monotonic())
            elif event is not None:
                said = "{}: {}/{}".format(*event)
            if said and time.monotonic() >= due:
                print(said, file=sys.stderr, flush=True)
                said, due = "", time.monotonic() + EVERY
        if self.forecast is not None:
            said = self.forecast.line(time.monotonic())
        if said and not self.interrupted:
            print(said, file=sys.stderr, flush=True)


def _show_task(progress: bars.Progress, tasks: dict[str, Any], event: Event) -> None:
    """Show one piece of work as a bar until it is over."""
    label, done, total = event
    if label not in tasks:
        tasks[label] = progress.add_task(label, total=total, left="")
    progress.update(tasks[label], completed=done, total=total)
    if done >= total:
        progress.remove_task(tasks.pop(label))


def end_with_parent() -> None:
    """Make this process end when the one that started it is killed, instead of waiting for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def say(line: str) -> None:
    """Print a line of a result as it is."""
    OUT.print(line, highlight=False, markup=False)


def silent(done: int, total: int) -> None:
    """Report to nobody."""


def _report(label: str, done: int, total: int) -> None:
    if _LINE:
        _LINE[-1].put((label, done, total))
