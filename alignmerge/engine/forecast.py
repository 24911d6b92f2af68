"""How much of a run is over and how long the rest takes, over all stages that are still to come."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

ENOUGH = 3
"""So many finished tasks of a stage tell how long the others take."""
PRIOR_SECONDS = 30.0
"""How much of a run has to be over for its own pace to weigh as much as recorded times."""
LEAST_SECONDS = 5.0
"""So much of a run has to be measured before it tells anything by itself."""
MINUTE, HOUR = 60, 3600


@dataclass
class Stage:
    """Tasks of one kind, done side by side before the next stage begins."""

    name: str
    total: int
    """How many tasks are to be done."""
    expected: float
    """Seconds of one task, as far as they can be told beforehand."""
    kind: str = ""
    """What its tasks do: work of one kind is late or early together."""
    done: int = 0
    seconds: float = 0.0
    """Sum over the tasks that are over."""


class Forecast:
    """Counts the tasks of a run and tells the time left; may be called by several threads.

    ``recorded``: whether the stages' expected seconds were measured by earlier runs. If not, the pace
    is this run's own. What one kind of work has shown tells half of another's (the square root of its
    pace): a busy machine slows both, but an expectation that was wrong for one says nothing about the
    other. ``after``: seconds of what follows the last task. All times are those of one clock, in
    seconds.
    """

    def __init__(
        self, stages: Iterable[Stage], workers: int, *, recorded: bool, after: float, now: float
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.workers, self.recorded, self.after, self.started = workers, recorded, after, now
        self._stage: Stage | None = None
        self._running: dict[str, tuple[float, float]] = {}
        self._over: set[str] = set()
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """How many tasks of the run are over."""
        return sum(stage.done for stage in self.stages.values())

    @property
    def total(self) -> int:
        """How many tasks the run has."""
        return sum(stage.total for stage in self.stages.values())

    def begin(self, name: str, total: int) -> None:
        """Begin a stage, of which it is now known how many tasks it has."""
        with self._lock:
            self._stage = self.stages.setdefault(name, Stage(name, 0, 1.0))
            self._stage.total = self._stage.done + total
            self._running.clear()
            self._over.clear()

    def report(self, label: str, share: float, now: float) -> None:
        """Note how much of a task is done; what comes late, after its end, is left out."""
        with self._lock:
            if label not in self._over:
                began, before = self._running.get(label, (now, 0.0))
                self._running[label] = began, max(before, min(1.0, share))

    def finish(self, label: str, now: float) -> None:
        """Note that a task is over, well or not."""
        with self._lock:
            assert self._stage is not None
            began, _ = self._running.pop(label, (now, 1.0))
            self._over.add(label)
            self._stage.done += 1
            self._stage.seconds += now - began

    def left(self, now: float) -> float | None:
        """Return the seconds that the rest of the run takes; None where nothing tells it yet."""
        with self._lock:
            measured = self._measured(now)
            whole = self._pace(measured.values())
            if whole is None:
                return None
            seconds = self.after * math.sqrt(whole)
            for stage in self.stages.values():
                pace = math.sqrt(whole)
                if stage.kind in measured:
                    pace = self._pace([measured[stage.kind]]) or pace
                seconds += self._rest_of(stage, pace)
            return seconds

    def _rest_of(self, stage: Stage, pace: float) -> float:
        """Return the seconds that the rest of a stage takes."""
        tasks = float(stage.total - stage.done)
        if stage is self._stage:
            tasks -= sum(share for _, share in self._running.values())
        each = stage.expected * pace
        if stage.done >= ENOUGH:
            each = stage.seconds / stage.done
        return tasks * each / max(1, min(self.workers, stage.total - stage.done))

    def line(self, now: float) -> str:
        """Say in one line how far the stage and the run are."""
        stage, left = self._stage, self.left(now)
        where = ""
        if stage is not None:
            where = f"{stage.name} {stage.done}/{stage.total}; "
        rest = "not known yet"
        if left is not None:
            rest = f"about {spelt(left)}"
        return f"{where}whole run {self.done}/{self.total}; {spelt(now - self.started)} gone, left: {rest}"

    def _measured(self, now: float) -> dict[str, tuple[float, float]]:
        """Return kind of work -> the seconds that this run has taken for some of it, and those
        expected.
        """
        found: dict[str, tuple[float, float]] = {}
        for stage in self.stages.values():
            taken, expected = stage.seconds, stage.expected * stage.done
            if stage is self._stage:
                for began, share in self._running.values():
                    if share > 0:
                        taken += now - began
                        expected += stage.expected * share
            before = found.get(stage.kind, (0.0, 0.0))
            if expected > 0:
                found[stage.kind] = before[0] + taken, before[1] + expected
        return found

    def _pace(self, measured: Iterable[tuple[float, float]]) -> float | None:
        """Return how many seconds are taken for an expected one; None where nothing tells it yet."""
        known = list(measured)
        taken = sum(one for one, _ in known)
        expected = sum(one for _, one in known)
        if self.recorded:
            return (PRIOR_SECONDS + taken) / (PRIOR_SECONDS + expected)
        if taken < LEAST_SECONDS:
            return None
        return taken / expected


def spelt(seconds: float) -> str:
    """Write a duration for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h"
