"""Whether the present code on this machine makes what a committed manifest names, artifact by artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich.table import Table

from alignmerge.engine.configuration import build
from alignmerge.engine.device import cpu_name, machine_class
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Merger
from alignmerge.engine.progress import OUT, say
from alignmerge.engine.store import NotMade
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import Cell
from eval.grid.experiment import Experiment
from eval.grid.folders import COMMITTED, committed, read_manifest, recorded_of, word_of
from eval.grid.record import of_models, of_rows
from eval.grid.workers import Failure, Workers
from eval.report.layout import read_frame
from eval.scorers.interface import Scorer

TOLERANCE = 0.05
"""Share by which a mean may differ that has no interval in the committed ``summary.csv``; others may
differ by half the width of theirs. It holds only where bits cannot be equal: another machine class, or
passes not in float32.
"""
ROUNDING = 1e-6
"""By so much any of these may differ: what is 0 but for rounding has no share to differ by."""
NAMED = 5
"""How many differences are spelled out before the rest is counted."""
SHOWN = 12
"""Digits of a digest that are shown."""
State = Literal["equal", "within tolerance", "different", "missing"]
STATES: tuple[State, ...] = ("equal", "within tolerance", "different", "missing")
KINDS = ("models", "merges", "scores")


class Outcome(NamedTuple):
    """What became of one artifact that the manifest names."""

    kind: str
    state: State
    note: str = ""
    """Which artifact it is and how it differs; empty where it does not."""


class Drift(NamedTuple):
    """A mean that is not the committed one, and by how much it may differ."""

    column: str
    here: float
    there: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether it is within tolerance."""
        return abs(self.here - self.there) <= self.allowed

    def __str__(self) -> str:
        return f"{self.column} {self.here:.4g}, in the reference {self.there:.4g} (may differ by {self.allowed:.2g})"


@dataclass(frozen=True)
class Verification:
    """A committed manifest and the part of its experiment that is made again."""

    experiment: Experiment
    """With the families and seeds that the manifest names too."""
    folder: Path
    """The committed results."""
    manifest: Mapping[str, Any]

    def make(self, workers: Workers) -> list[Failure]:
        """Make what is missing of the models, merges and scores, as a run does."""
        failures = self.experiment.make_models(workers)
        return failures or self.experiment.make(workers, self.cells)

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells that the manifest names, each method with the recorded fields."""
        cells = []
        for zoo in self.experiment.zoos:
            for row, recorded in recorded_of(self.manifest, zoo.family.name, zoo.seed)["rows"].items():
                cells.append(self._cell(zoo, row, recorded))
        return cells

    def outcomes(self) -> list[Outcome]:
        """Compare every named artifact with what the store holds."""
        try:
            opened, results = self.experiment.opened, self.experiment.read(self.cells)
        except NotMade:
            opened, results = {}, []
        found: list[Outcome] = []
        for zoo in self.experiment.zoos:
            place, there = (zoo.family.name, zoo.seed), recorded_of(self.manifest, zoo.family.name, zoo.seed)
            models = of_models(opened[place][1]) if place in opened else {}
            found += self._compared(zoo, there, {"models": models, "rows": of_rows(results, place)})
        return found

    def _cell(self, zoo: Zoo, row: str, recorded: Mapping[str, Any]) -> Cell:
        model, scorers = recorded.get("model"), self.experiment.scorers
        if model is not None and "@" in model:
            scorers = list(self.experiment.grid.trajectory_scorers.values())
        kept: list[Scorer] = [scorer for scorer in scorers if scorer.name in recorded["scores"]]
        merger = None if model is not None else self._merger(row, recorded["method"])
        return Cell(zoo, row, "", "test", kept, model=model, merger=merger)

    def _merger(self, row: str, recorded: Mapping[str, Any]) -> Merger:
        where = f"{self.folder.name}/manifest.json: {row}"
        name = recorded["name"]
        if name not in self.experiment.methods:
            raise BadRequest.of(where, name, ", ".join(sorted(self.experiment.methods)))
        node = dict(self.experiment.methods[name])
        for key in recorded.keys() - {"name"}:
            node[key] = _plain(recorded[key])
        merger: Merger = build(node, where, Merger)
        return merger

    def exact(self, zoo: Zoo) -> bool:
        """Whether bits must be equal: passes in float32, on the recorded class of machine."""
        return zoo.family.dtype == "float32" and self.manifest["machine"] == machine_class()

    def _compared(self, zoo: Zoo, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Outcome]:
        """Yield the outcomes of one family with one seed: models, then the merge and the scores of each
        row.
        """
        name = f"{zoo.family.name} seed {zoo.seed}"
        scores = {row: list(self._scores(zoo, row, there, here)) for row in there["rows"]}
        for alias, digest in there["models"].items():
            row = alias if alias in scores else f"expert:{alias}"
            found = here["models"].get(alias)
            yield self._weights(zoo, "models", f"{name} {alias}", digest, found, scores.get(row, []))
        for row, recorded in there["rows"].items():
            if "merge" in recorded:
                found = here["rows"].get(row, {}).get("facts", {}).get("digest")
                digest = recorded["facts"]["digest"]
                yield self._weights(zoo, "merges", f"{name} {row}", digest, found, scores[row])
            yield from scores[row]

    def _weights(
        self, zoo: Zoo, kind: str, name: str, there: str, here: str | None, scores: Sequence[Outcome]
    ) -> Outcome:
        """Compare weights; where bits need not be equal the scores of the row decide."""
        if here is None:
            return Outcome(kind, "missing", f"{name}: weights {there[:SHOWN]} were not made")
        if here == there:
            return Outcome(kind, "equal")
        if not self.exact(zoo) and scores and all(one.state in STATES[:2] for one in scores):
            return Outcome(kind, "within tolerance")
        return Outcome(kind, "different", f"{name}: weights {here[:SHOWN]} is not {there[:SHOWN]}")

    def _scores(
        self, zoo: Zoo, row: str, there: Mapping[str, Any], here: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        recorded, found = there["rows"][row], here["rows"].get(row)
        for scorer, digest in recorded["digests"].items():
            name = f"{zoo.family.name} seed {zoo.seed} {row} {scorer}"
            made = None if found is None else found["digests"].get(scorer)
            if made is None:
                yield Outcome("scores", "missing", f"{name}: samples {digest[:SHOWN]} were not made")
            elif made == digest:
                yield Outcome("scores", "equal")
            else:
                drifts = self._drifts(zoo.family.name, row, recorded["means"][scorer], found["means"][scorer])
                yield self._judged(zoo, f"{name}: samples {made[:SHOWN]} is not {digest[:SHOWN]}", drifts)

    def _judged(self, zoo: Zoo, note: str, drifts: Sequence[Drift]) -> Outcome:
        outside = [drift for drift in drifts if self.exact(zoo) or not drift.within]
        if not outside and not self.exact(zoo):
            return Outcome("scores", "within tolerance")
        return Outcome("scores", "different", "; ".join([note, *map(str, outside[:1])]))

    def _drifts(
        self, family: str, row: str, there: Mapping[str, float], here: Mapping[str, float]
    ) -> list[Drift]:
        """Return the means that differ; one that only one side has differs by more than any tolerance."""
        drifts = []
        for column in dict.fromkeys([*there, *here]):
            old, new = there.get(column, float("nan")), here.get(column, float("nan"))
            if old != new:
                drifts.append(Drift(column, new, old, self._allowed(family, row, column, old)))
        return drifts

    def _allowed(self, family: str, row: str, column: str, value: float) -> float:
        """Return by how much a mean may differ: half the width of its committed interval, else a share
        of it.
        """
        allowed = TOLERANCE * abs(value)
        for place in ((family, row.partition("@")[0], column), (family, row, column)):
            if place in self._widths:
                allowed = self._widths[place] / 2
        return max(allowed, ROUNDING)

    @cached_property
    def _widths(self) -> dict[Any, float]:
        """(family, row, column) -> the width of its committed interval, where it has one."""
        summary = read_frame(self.folder / "summary.csv")
        widths = (summary["ci_high"] - summary["ci_low"]).set_axis(
            pd.MultiIndex.from_frame(summary[["family", "row", "column"]])
        )
        return widths.dropna().to_dict()


def verification_of(experiment: Experiment, results: Path) -> Verification:
    """Find the committed results of an experiment.

    Raises:
        BadRequest: if there are none, or none that could be compared.
    """
    name = experiment.grid.name
    folder = committed(results, name)
    if folder is None:
        have = ", ".join(sorted(word_of(path.parent.name) for path in COMMITTED.glob("*/manifest.json")))
        raise BadRequest.of("experiment", f"{name} has no committed results", have or "none yet")
    manifest = read_manifest(folder)
    if "statistics" not in manifest:
        allowed = f"one that is made anew: mode=run, then mode=reference experiment={word_of(name)}"
        raise BadRequest.of(str(folder), "was made before digests of scores were recorded", allowed)
    zoos = [zoo for zoo in experiment.zoos if recorded_of(manifest, zoo.family.name, zoo.seed)]
    if not zoos:
        named = ", ".join(manifest["families"])
        raise BadRequest.of("grid.families", "none with a seed that the manifest names", named)
    return Verification(replace(experiment, zoos=zoos), folder, manifest)


def tell(verification: Verification, outcomes: Sequence[Outcome]) -> bool:
    """Print what became of the artifacts; return whether all are equal or within tolerance."""
    counts = {kind: dict.fromkeys(STATES, 0) for kind in KINDS}
    for one in outcomes:
        counts[one.kind][one.state] += 1
    table = Table("artifacts", *STATES, title=f"{verification.experiment.grid.name}: made again and compared")
    for kind in KINDS:
        table.add_row(kind, *map(str, counts[kind].values()))
    OUT.print(table)
    bad = [one for one in outcomes if one.state in STATES[2:]]
    for one in bad[:NAMED]:
        say(f"{one.state}: {one.note}")
    if len(bad) > NAMED:
        say(f"and {len(bad) - NAMED:,} more")
    say(_last_line(verification, outcomes, len(bad)))
    return not bad


def _last_line(verification: Verification, outcomes: Sequence[Outcome], bad: int) -> str:
    manifest, total = verification.manifest, len(outcomes)
    commit = str(manifest["git"].get("commit", "unknown"))[:7]
    made = f"{verification.folder}, made on {manifest['cpu']} (commit {commit}); here {cpu_name()}"
    near = len(outcomes) - bad - _count(outcomes, "equal")
    if bad:
        return f"not verified: {bad:,} of {total:,} artifacts are different or missing; {made}"
    if near:
        return (
            f"verified within tolerance: {total - near:,} of {total:,} artifacts equal, {near:,} near; {made}"
        )
    return f"verified: {total:,} of {total:,} artifacts equal {made}"


def _count(outcomes: Sequence[Outcome], state: State) -> int:
    return [one.state for one in outcomes].count(state)


def _plain(value: Any) -> Any:
    """Return a recorded field as it was: JSON has no infinity."""
    return float(value) if value in ("inf", "-inf") else value
