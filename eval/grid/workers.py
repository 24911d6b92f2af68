"""Worker processes for the work of a grid: started when first needed, with progress, none the worse for
a failure.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple

from alignmerge.engine.forecast import Forecast
from alignmerge.engine.interruption import deaf_to_interrupts
from alignmerge.engine.progress import Board, connect, end_with_parent


class Failure(NamedTuple):
    """A task that did not finish."""

    label: str
    error: BaseException


Job = tuple[str, Callable[..., None], tuple[Any, ...]]
"""Label, function of (*arguments, reporter), arguments."""


class Workers:
    """A context manager of the main process; its processes stay up from one stage of a grid to the
    next.
    """

    def __init__(self, count: int, forecast: Forecast | None = None) -> None:
        self.count = count
        self.forecast = forecast or Forecast((), count, recorded=False, after=0.0, now=time.monotonic())
        self._open = ExitStack()
        self._started: tuple[Board, ProcessPoolExecutor] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started is not None and kind is not None and issubclass(kind, KeyboardInterrupt):
            self._kill()
        self._stop()

    def run(self, tasks: Sequence[Job], stage: str = "tasks") -> list[Failure]:
        """Run tasks and return those that failed; the others go on, unless a process was killed.

        ``stage``: what they are called where progress is shown.
        """
        failures: list[Failure] = []
        self.forecast.begin(stage, len(tasks))
        if not tasks:
            return failures
        futures: dict[Future[None], str] = {}
        with deaf_to_interrupts():
            board, pool = self._start()
            for label, function, arguments in tasks:
                futures[pool.submit(work, function, *arguments, board.reporter(label))] = label
        for future in as_completed(futures):
            self.forecast.finish(futures[future], time.monotonic())
            error = future.exception()
            if error is not None:
                failures.append(Failure(futures[future], error))
        if any(isinstance(failure.error, BrokenProcessPool) for failure in failures):
            self._stop()
        return failures

    def _start(self) -> tuple[Board, ProcessPoolExecutor]:
        if self._started is None:
            board = self._open.enter_context(Board(self.forecast))
            pool = ProcessPoolExecutor(
                self.count, mp_context=get_context("spawn"), initializer=start_worker, initargs=(board.queue,)
            )
            self._started = board, self._open.enter_context(pool)
        return self._started

    def _kill(self) -> None:
        """End all work at once: what a worker was making is made again by the next run."""
        assert self._started is not None
        board, pool = self._started
        board.interrupted = True
        workers = list(pool._processes.values())  # the pool itself would first let every queued task finish
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def _stop(self) -> None:
        self._started = None
        self._open.close()


def work(function: Callable[..., None], *arguments: Any) -> None:
    """Do one task in a worker and give the memory that it freed back to the system."""
    try:
        function(*arguments)
    finally:
        give_memory_back()


def give_memory_back() -> None:
    """Return freed memory to the system.

    The C allocator would keep it in holes between what is still in use: 4 of a worker's 8 GB after some
    thirty merges.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries do not
    if trim is not None:
        trim(0)


def start_worker(progress: Any) -> None:
    """Prepare a worker process: no hub, no tokenizer threads, a line to the board, no life after its
    parent's.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    connect(progress)
    end_with_parent()
