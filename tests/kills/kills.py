"""Kill a run again and again at random points, run it again, and hold what it made against an undisturbed run.

    OMP_NUM_THREADS=1 python -m tests.kills.kills --kills 50

Each kill is aimed at a stage: it comes a random moment after the run has begun to make something of it. One half of
the kills hit the whole process group, the other half only the first process, whose workers then have to end as well.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import run
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.store import read_manifest
from eval.grid import modes  # noqa: F401  (runs are forks of this process)

STEPS = [f"family.recipes.{name}.steps=4" for name in ("anchor", "arithmetic", "format")]
WORDS = ["family=smoke", "corpus=toy", "scorer=[judge]", "workers=1", *STEPS]
"""One cell of random models: everything that a run does, in seconds."""
STAGES = {
    "training": ("models-", "lessons-"),
    "merging": ("merges-", "weights-", "bases-", "fisher-", "gradient-", "gram-", "nll-"),
    "scoring": ("replies-", "scores-"),
    "reporting": ("reports-", ".cell-"),
}
"""What is killed -> how the folders begin that are filled meanwhile."""
SPANS = {"training": 2.0, "merging": 0.3, "scoring": 1.0, "reporting": 0.8}
"""Within so many seconds of a stage's first folder the kill comes."""
GIVEN = {"assets", "calibration"}
"""Stages that are lent to every store: packages, and what is computed from them alone."""
DROPPED = {"weights", "failed", "reports"}
"""What no finished store has to hold, and reports: their keys hold the seconds of merges; their files are compared."""
PASSING = {"git", "cpu", "seconds"}
SAME = {True: "the same digests", False: "other digests"}
SECONDS = 600
"""For a run: far more than it needs."""
Contents = dict[str, str]


@dataclass
class Count:
    """What became of the kills of one stage."""

    tried: int = 0
    half_made: int = 0
    """How many left something unfinished in the store's staging folder."""
    lost: int = 0
    """How many took, or changed, what had its final name before, or left half of something under one."""
    healed: int = 0
    """How many were followed by runs that ended with the digests of the undisturbed one."""


class Process:
    """A run: a fork of this process, which has imported all that runs do; that takes most of a short run's time."""

    def __init__(self, identity: int) -> None:
        self.pid = identity
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int:
        """Return the exit code; raises TimeoutError if it does not end in time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"a run has not ended within {seconds} s")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def send(self, number: int, *, group: bool = True) -> None:
        """Send a signal to the run's process group or to its first process alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> None:
        """Kill what still runs of the group."""
        self.send(signal.SIGKILL)
        self.wait(SECONDS)


class Place(NamedTuple):
    """Where a run works."""

    folder: Path

    @property
    def store(self) -> Path:
        """Its artifacts."""
        return self.folder / "store"

    def staged(self) -> set[Path]:
        """Return what is being made, or was when something was killed."""
        found: set[Path] = set()
        for folder in (self.store / ".staging", self.folder / "results"):
            with contextlib.suppress(FileNotFoundError):
                found.update(folder.iterdir())
        return found

    def start(self, words: Sequence[str] = WORDS) -> Process:
        """Start the run in a process group of its own."""
        said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        identity = os.fork()
        if identity == 0:
            self._run(words, said)
        os.close(said)
        return Process(identity)

    def _run(self, words: Sequence[str], said: int) -> NoReturn:
        """Be the run: what a shell and Python do before ``main`` is called."""
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            os.dup2(said, sys.stdout.fileno())
            os.dup2(said, sys.stderr.fileno())
            os.environ["ALIGNMERGE_STORE"] = str(self.store)
            sys.argv = ["run.py", *words]
            code = run.main()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def contents(self) -> Contents:
        """Return what stands for everything under a final name; raises Damaged for half of an artifact."""
        found = {}
        for artifact in sorted(self.store.glob("[!.]*/*")):
            if artifact.parent.name not in {*GIVEN, *DROPPED}:
                found[str(artifact.relative_to(self.store))] = _digest(
                    artifact, read_manifest(artifact)["facts"]
                )
        for results in sorted((self.folder / "results").glob("[!.]*")):
            manifest = json.loads((results / "manifest.json").read_text())
            found[f"results/{results.name}"] = _digest(results, manifest)
        return found


def new_place(folder: Path, lender: Path) -> Place:
    """Return a place with an empty store, but for the packages of another one."""
    for stage in GIVEN:
        for have in (lender / stage).glob("*/manifest.json"):
            (folder / "store" / stage).mkdir(parents=True, exist_ok=True)
            (folder / "store" / stage / have.parent.name).symlink_to(have.parent.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    return Place(folder)


def undisturbed(place: Place) -> Contents:
    """Run to the end and return what was made; raises RuntimeError if the run does not end well."""
    process = place.start()
    try:
        code = process.wait(SECONDS)
    finally:
        process.end()
    if code:
        raise RuntimeError(f"exit {code}: {(place.folder / 'said.txt').read_text()}")
    return place.contents()


def killed(place: Place, stage: str, after: float, *, group: bool) -> bool:
    """Start a run and kill it ``after`` seconds into a stage; say whether it came so far."""
    before, process = place.staged(), place.start()
    try:
        while not any(path.name.startswith(STAGES[stage]) for path in place.staged() - before):
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        time.sleep(after)
        if process.poll() is not None:
            return False
        process.send(signal.SIGKILL, group=group)
        process.wait(SECONDS)
        _wait_for_workers(process)
    finally:
        process.end()
    return True


def lineage(
    folder: Path, lender: Path, wanted: Contents, aims: Sequence[str], chance: random.Random
) -> Iterator[tuple[str, Count]]:
    """Kill one store's run once for each aim, let it finish, and yield what became of each kill."""
    place = new_place(folder, lender)
    counts = []
    for number, stage in enumerate(aims):
        before = place.contents()
        if killed(place, stage, chance.uniform(0, SPANS[stage]), group=number % 2 == 0):
            half = bool(list((place.store / ".staging").glob("*")))
            counts.append((stage, Count(1, int(half), int(_lost(place, before, wanted)))))
    healed = undisturbed(place)
    again = {key: healed.get(key) for key in wanted}
    left = list((place.store / ".staging").iterdir())
    for stage, count in counts:
        count.healed = int(again == wanted and not left)
        yield stage, count


def together(place: Place) -> Contents:
    """Let two runs work on one store and one folder of results at the same time, and return what they made."""
    runs = [place.start(), place.start()]
    try:
        codes = [process.wait(SECONDS) for process in runs]
    finally:
        for process in runs:
            process.end()
    if any(codes):
        raise RuntimeError(f"exit {codes}: {(place.folder / 'said.txt').read_text()}")
    return place.contents()


def kill(kills: int, seed: int, folder: Path, lender: Path, wanted: Contents) -> dict[str, Count]:
    """Kill runs so many times, in as many stores as it takes, and count by stage."""
    chance = random.Random(seed)
    counts = {stage: Count() for stage in STAGES}
    number = 0
    while (missing := kills - sum(count.tried for count in counts.values())) > 0:
        aims = aims_of(counts, min(missing, chance.randint(5, 9)), chance)
        for stage, count in lineage(folder / str(number), lender, wanted, aims, chance):
            _add(counts[stage], count)
        number += 1
        print(report(counts), file=sys.stderr, flush=True)
    return counts


def aims_of(counts: dict[str, Count], size: int, chance: random.Random) -> list[str]:
    """Draw what is killed in one store, in the order of a run: the stages that were tried least come first."""
    rarest = sorted(STAGES, key=lambda stage: (counts[stage].tried, chance.random()))
    drawn = [rarest[number % len(rarest)] for number in range(size)]
    return sorted(drawn, key=list(STAGES).index)


def report(counts: dict[str, Count]) -> str:
    """Return the table: a line for each stage and one for all."""
    whole = Count()
    lines = [f"{'killed in':12}{'tried':>7}{'half-made':>11}{'lost':>6}{'healed':>8}"]
    for count in counts.values():
        _add(whole, count)
    for stage, count in {**counts, "all": whole}.items():
        lines.append(f"{stage:12}{count.tried:7}{count.half_made:11}{count.lost:6}{count.healed:8}")
    return "\n".join(lines)


def _add(to: Count, count: Count) -> None:
    to.tried += count.tried
    to.half_made += count.half_made
    to.lost += count.lost
    to.healed += count.healed


def _lost(place: Place, before: Contents, wanted: Contents) -> bool:
    """Say whether a kill cost anything finished, or left something unfinished or wrong under a final name."""
    after = place.contents()  # raises Damaged for a half
    wrong = [key for key, digest in after.items() if key in wanted and digest != wanted[key]]
    return bool(wrong) or not before.keys() <= after.keys()


def _digest(folder: Path, facts: dict[str, Any]) -> str:
    """Return the sha256 of the files of a folder and of what its manifest says of them."""
    digest = hashlib.sha256(json.dumps(_lasting(facts), sort_keys=True).encode())
    for file in sorted(filter(Path.is_file, folder.rglob("*"))):
        if file.name != "manifest.json":
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def _lasting(value: Any) -> Any:
    """Return what a manifest says without what passes: times, the commit, the CPU."""
    if not isinstance(value, dict):
        return value
    return {key: _lasting(one) for key, one in value.items() if key not in PASSING}


def alive(group: int) -> list[str]:
    """Return the processes of a group that still run (what nobody has reaped does not)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, of, *_ = stat.read_text().rpartition(") ")[2].split()
            if of == str(group) and state != "Z":
                found.append(stat.parent.name)
    return found


def _wait_for_workers(process: Process) -> None:
    deadline = time.monotonic() + 60
    while alive(process.pid):
        if time.monotonic() > deadline:
            raise RuntimeError("workers outlive the run")
        time.sleep(0.02)


def main() -> int:
    """Print the table; 1 if a kill cost anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lender", type=Path, default=Path(os.environ.get("ALIGNMERGE_STORE", ROOT / "store")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as made:
        folder, lender = Path(made), arguments.lender
        wanted = undisturbed(new_place(folder / "undisturbed", lender))
        same = together(new_place(folder / "together", lender)) == wanted
        counts = kill(arguments.kills, arguments.seed, folder, lender, wanted)
    print(report(counts))
    print(f"two runs at once: {SAME[same]} as of one")
    harmed = any(count.lost or count.healed < count.tried for count in counts.values())
    return int(harmed or not same)


if __name__ == "__main__":
    sys.exit(main())
