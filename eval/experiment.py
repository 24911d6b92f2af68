"""A grid: which rows, which settings are tried on the dev split, which one is reported on the test split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignmerge.engine.build import TARGET, build
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.store import NotMade
from alignmerge.zoo.build import Zoo
from eval.cells import Cell, Failure, Measured, measure, prepare, read, run_tasks
from eval.gates import Gate, Verdict, verdicts
from eval.scorer import Scorer

if TYPE_CHECKING:
    import pandas as pd

DEV_COLUMNS = ("refusal_rate", "over_refusal_rate", "instruction_following", "reasoning")
MATCHED = "/matched"
"""Suffix of the row whose setting comes nearest to the matched refusal rate on the dev split."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of a grid."""

    method: str
    """A file of conf/method, without its ending."""
    fixed: Mapping[str, Any]
    """Fields that differ from that file."""
    settings: Sequence[Mapping[str, Any]] = ()
    """Fields to try on the dev split; none: the row has nothing to tune."""
    matched: bool = False
    """Whether the setting nearest to the grid's matched refusal rate is reported as a row of its own."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows x settings on dev, then one setting each on test."""

    name: str
    title: str
    rows: Mapping[str, Row]
    dev_scorers: Mapping[str, Scorer]
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """What must hold of the models (and of rows without settings) on the dev split before anything is merged."""
    against: Sequence[str] = ()
    """Rows that every other row is compared with."""
    seeds: Sequence[int] = (0,)
    matched_refusal: float = 0.6
    """Dev refusal rate at which ``matched`` rows are compared."""

    def __post_init__(self) -> None:
        faults = [
            Fault("grid.against", name, f"a row: {', '.join(self.row_names())}")
            for name in self.against
            if name not in self.row_names()
        ]
        counts = {len(row.settings) for row in self.rows.values() if row.settings}
        if len(counts) > 1:
            given = f"{sorted(counts)} settings"
            faults.append(Fault("grid.rows", given, "the same number of settings for every row that is tuned"))
        if not 0 <= self.matched_refusal <= 1:
            faults.append(Fault("grid.matched_refusal", str(self.matched_refusal), "a number in [0, 1]"))
        if faults:
            raise BadRequest(faults)

    def row_names(self) -> list[str]:
        """Return every method row that the tables may hold."""
        matched = [name + MATCHED for name, row in self.rows.items() if row.matched]
        return [*self.rows, *matched]


class Choice(NamedTuple):
    """What was selected on the dev split."""

    mergers: Mapping[str, Merger]
    """Row -> the method with its selected setting."""
    points: pd.DataFrame | None
    """Every setting tried: row, setting, selected, matched, and the dev columns; None where nothing is tuned."""


@dataclass(frozen=True)
class Experiment:
    """A grid on one family."""

    grid: Grid
    zoo: Zoo
    methods: Mapping[str, Mapping[str, Any]]
    """The files of conf/method."""
    scorers: Sequence[Scorer]
    workers: int

    def merger(self, row: Row, setting: Mapping[str, Any], where: str) -> Merger:
        """Build the method of a row with a setting.

        Raises:
            BadRequest: naming the row, if the method or a field is wrong.
        """
        if row.method not in self.methods:
            raise BadRequest.of(f"{where}.method", row.method, ", ".join(sorted(self.methods)))
        merger: Merger = build({**self.methods[row.method], **row.fixed, **setting}, where)
        return merger

    def check(self) -> None:
        """Build every method with every setting; raises BadRequest with all faults at once."""
        faults: list[Fault] = []
        for name, row in self.grid.rows.items():
            for setting in row.settings or ({},):
                try:
                    self.merger(row, setting, f"grid.rows.{name}")
                except BadRequest as error:
                    faults += error.faults
        if faults:
            raise BadRequest(dict.fromkeys(faults))

    def dev_cells(self) -> list[Cell]:
        """Return the cells that settings are selected on; neighbours differ in method: they wait less on locks."""
        scorers = list(self.grid.dev_scorers.values())
        tried = max((len(row.settings) for row in self.grid.rows.values()), default=0)
        return [
            Cell(
                name,
                spell(row.settings[i]),
                "dev",
                scorers,
                merger=self.merger(row, row.settings[i], f"grid.rows.{name}"),
            )
            for i in range(tried)
            for name, row in self.grid.rows.items()
            if row.settings
        ]

    def identity_cells(self, split: str, scorers: Sequence[Scorer]) -> list[Cell]:
        """Return the rows that stand in every table: base, anchor and each expert, unmerged."""
        keys = {"base": "base", "anchor": "anchor"}
        keys |= {f"expert:{alias}": f"experts.{alias}" for alias in self.zoo.family.experts}
        return [Cell(row, "", split, scorers, model=key) for row, key in keys.items()]

    def gate_cells(self) -> list[Cell]:
        """Return the dev cells that the gates look at."""
        if not self.grid.gates:
            return []
        scorers = list(self.grid.dev_scorers.values())
        wanted = {name for gate in self.grid.gates.values() for name in (gate.row, gate.minus)}
        fixed = [
            Cell(name, "", "dev", scorers, merger=self.merger(row, {}, f"grid.rows.{name}"))
            for name, row in self.grid.rows.items()
            if name in wanted and not row.settings
        ]
        return [*self.identity_cells("dev", scorers), *fixed]

    def gate_verdicts(self) -> list[Verdict]:
        """Hold the gates against what the store holds."""
        return verdicts(self.grid.gates, self.read(self.gate_cells()))

    def test_cells(self, choice: Choice) -> list[Cell]:
        """Return the merges that are reported; a method without chance is measured once for all seeds."""
        return [
            Cell(row, "", "test", self.scorers, merger=merger, seed=seed)
            for row, merger in choice.mergers.items()
            for seed in (self.grid.seeds if merger.stochastic else self.grid.seeds[:1])
        ]

    def make_models(self) -> list[Failure]:
        """Make what is missing of the family's models: the base first, the others side by side."""
        failures: list[Failure] = []
        for keys in (["base"], self.zoo.trained()):
            tasks = [(f"model: {key}", prepare, (self.zoo, key)) for key in keys if not self._made(key)]
            failures += run_tasks(tasks, self.workers, self.zoo.family.threads)
            if failures:
                break
        return failures

    def make(self, cells: Sequence[Cell]) -> list[Failure]:
        """Measure the cells that are not in the store yet."""
        tasks = [(cell.label, measure, (self.zoo, cell)) for cell in cells if not self.read([cell])]
        return run_tasks(tasks, self.workers, self.zoo.family.threads)

    def choose(self, measured: Sequence[Measured]) -> Choice:
        """Select each row's setting by the one rule (``balanced``), and the matched settings."""
        fixed = {n: self.merger(r, {}, f"grid.rows.{n}") for n, r in self.grid.rows.items() if not r.settings}
        points = _points(measured)
        mergers: dict[str, Merger] = {}
        by_cell = {(m.cell.row, m.cell.setting): m.cell.merger for m in measured}
        for name, row in self.grid.rows.items():
            if name in fixed:
                mergers[name] = fixed[name]
                continue
            mine = points[points["row"] == name]
            if mine.empty:
                continue  # every setting of the row failed, which has been said
            best = str(mine["setting"].iloc[int(mine["balanced"].argmax())])
            mergers[name] = _known(by_cell[name, best])
            points.loc[(points["row"] == name) & (points["setting"] == best), "selected"] = True
            if row.matched:
                distance = (mine["refusal_rate"] - self.grid.matched_refusal).abs()
                near = str(mine["setting"].iloc[int(distance.argmin())])
                mergers[name + MATCHED] = _known(by_cell[name, near])
                points.loc[(points["row"] == name) & (points["setting"] == near), "matched"] = True
        return Choice(mergers, points if len(points) else None)

    def read(self, cells: Sequence[Cell]) -> list[Measured]:
        """Return the finished ones among the cells."""
        measured = []
        for cell in cells:
            try:
                measured.append(read(*self._opened, cell))
            except NotMade:
                continue
        return measured

    @cached_property
    def _opened(self) -> tuple[Zoo, Models]:
        frozen = self.zoo.frozen()
        return frozen, frozen.models()

    def _made(self, key: str) -> bool:
        frozen = self.zoo.frozen()
        try:
            frozen.source(key)
            if self.zoo.trained():
                frozen.examples_digest()
        except NotMade:
            return False
        return True


def balanced(point: Mapping[str, float]) -> float:
    """The selection rule, equal for every method: refusals less over-refusals, plus the mean of the two utilities."""
    utility = (point["instruction_following"] + point["reasoning"]) / 2
    return point["refusal_rate"] - point["over_refusal_rate"] + utility


def spell(setting: Mapping[str, Any]) -> str:
    """Write a setting as a label."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def method_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every file of conf/method."""
    import yaml

    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}


def facts_of(merger: Merger) -> dict[str, Any]:
    """Return a method's class and fields for manifests."""
    from dataclasses import asdict

    fields = {key: str(value) if value == float("inf") else value for key, value in asdict(merger).items()}
    return {TARGET: f"{type(merger).__module__}.{type(merger).__qualname__}", **json.loads(json.dumps(fields))}


def _points(measured: Sequence[Measured]) -> pd.DataFrame:
    import pandas as pd

    records = []
    for one in measured:
        means = one.frame.groupby("column")["value"].mean()
        record = {column: float(means[column]) for column in DEV_COLUMNS}
        head = {"row": one.cell.row, "setting": one.cell.setting, "selected": False, "matched": False}
        records.append({**head, **record, "balanced": balanced(record)})
    return pd.DataFrame(records, columns=["row", "setting", "selected", "matched", *DEV_COLUMNS, "balanced"])


def _known(merger: Merger | None) -> Merger:
    assert merger is not None
    return merger
