"""A grid: which rows, which settings are tried on the dev split, which one is reported on the test split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignmerge.engine.configuration import TARGET, build, choices
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.store import NotMade
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import Cell, CellResult, measure, prepare, read
from eval.grid.gates import Verdict, verdicts
from eval.grid.grid import MATCHED, Grid, Row, spell
from eval.grid.workers import Failure, Workers
from eval.scorers.interface import Scorer

if TYPE_CHECKING:
    import pandas as pd

DEV_COLUMNS = ("refusal_rate", "over_refusal_rate", "instruction_following", "reasoning")
Gates = Mapping[tuple[str, int], Sequence[Verdict]]
"""Family and seed -> every gate with what was measured."""


class Choice(NamedTuple):
    """What was selected on the dev split."""

    mergers: Mapping[str, Mapping[str, Merger]]
    """Family -> row -> the method with its selected setting."""
    points: pd.DataFrame | None
    """Every setting tried: family, row, setting, selected, matched, the dev columns; None where nothing is tuned."""


@dataclass(frozen=True)
class Experiment:
    """A grid on its families."""

    grid: Grid
    zoos: Sequence[Zoo]
    """One for each family and seed, seeds outermost: neighbours share nothing that they would wait for."""
    methods: Mapping[str, Mapping[str, Any]]
    """The files of conf/method."""
    scorers: Sequence[Scorer]

    @property
    def first_seed(self) -> Sequence[Zoo]:
        """One zoo for each family: settings are selected on it, and what knows no chance is measured on it alone."""
        return [zoo for zoo in self.zoos if zoo.seed == self.zoos[0].seed]

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
        tried = max((len(row.tried) for row in self.grid.rows.values()), default=0)
        return [
            Cell(
                zoo, name, spell(setting), "dev", scorers, merger=self.merger(row, setting, f"grid.rows.{name}")
            )
            for i in range(tried)
            for name, row in self.grid.rows.items()
            for setting in row.tried[i : i + 1]
            for zoo in self.first_seed
        ]

    def identity_cells(self, split: str, scorers: Sequence[Scorer]) -> list[Cell]:
        """Return the rows that stand in every table: the family's models, unmerged."""
        return [
            Cell(zoo, key.replace("experts.", "expert:"), "", split, scorers, model=key)
            for zoo in self.zoos
            if self._own(zoo)
            for key in zoo.family.references()
        ]

    def gate_cells(self) -> list[Cell]:
        """Return the dev cells that the gates look at."""
        if not self.grid.gates:
            return []
        scorers = list(self.grid.dev_scorers.values())
        wanted = {name for gate in self.grid.gates.values() for name in (gate.row, gate.minus)}
        fixed = [
            Cell(zoo, name, "", "dev", scorers, merger=self.merger(row, {}, f"grid.rows.{name}"))
            for name, row in self.grid.rows.items()
            if name in wanted and not row.settings
            for zoo in self.zoos
            if self._own(zoo)
        ]
        return [*self.identity_cells("dev", scorers), *fixed]

    def gate_verdicts(self) -> Gates:
        """Hold the gates against what the store holds."""
        if not self.grid.gates:
            return {}
        measured = self.read(self.gate_cells())
        return {
            (zoo.family.name, zoo.seed): verdicts(
                self.grid.gates, [one for one in measured if one.cell.zoo == zoo]
            )
            for zoo in self.zoos
            if self._own(zoo)
        }

    def test_cells(self, choice: Choice) -> list[Cell]:
        """Return the merges that are reported; what knows no chance is measured once for all seeds."""
        return [
            Cell(zoo, row, "", "test", self.scorers, merger=merger)
            for zoo in self.zoos
            for row, merger in choice.mergers[zoo.family.name].items()
            if merger.stochastic or self._own(zoo)
        ]

    def trajectory_cells(self) -> list[Cell]:
        """Return the way from base to anchor: the checkpoints that the anchors' trainings kept."""
        scorers = list(self.grid.trajectory_scorers.values())
        return [
            Cell(zoo, key, "", "test", scorers, model=key)
            for zoo in self.zoos
            if scorers and self._own(zoo)
            for key in ("base", *zoo.kept("anchor"))
        ]

    def reported(self, choice: Choice) -> list[Cell]:
        """Return the rows, as measured on the test split."""
        return [*self.identity_cells("test", self.scorers), *self.test_cells(choice)]

    def make_models(self, workers: Workers) -> list[Failure]:
        """Make what is missing of the families' models, one stage after the other."""
        failures: list[Failure] = []
        stages = [zoo.stages() for zoo in self.zoos]
        for keys in zip_longest(*stages, fillvalue=()):
            tasks = [
                (f"model: {zoo.family.name}, seed {zoo.seed}: {key}", prepare, (zoo, key))
                for zoo, mine in zip(self.zoos, keys, strict=True)
                for key in mine
                if not self._made(zoo, key)
            ]
            failures += workers.run(tasks)
            if failures:
                break
        return failures

    def make(self, workers: Workers, cells: Sequence[Cell]) -> list[Failure]:
        """Measure the cells that are not in the store yet; rows that came to the same method are one piece of work."""
        missing = {
            (cell.family, cell.seed, cell.split, cell.model, repr(cell.merger), repr(cell.scorers)): cell
            for cell in reversed(cells)
            if not self.read([cell])
        }
        return workers.run([(cell.label, measure, (cell,)) for cell in reversed(missing.values())])

    def choose(self, measured: Sequence[CellResult]) -> Choice:
        """Select each row's setting by the one rule (``balanced``), and the matched settings, for each family."""
        points = _points(measured)
        mergers = {zoo.family.name: self._chosen(zoo.family.name, measured, points) for zoo in self.first_seed}
        return Choice(mergers, points if len(points) else None)

    def provisional(self) -> Choice:
        """Return a choice before anything is measured: each tuned row's first setting stands for the selected one."""
        mergers: dict[str, Merger] = {}
        for name, row in self.grid.rows.items():
            mergers |= self._unselected(name, row) or {
                name: self.merger(row, row.tried[0], f"grid.rows.{name}")
            }
        mergers |= {name + MATCHED: mergers[name] for name, row in self.grid.rows.items() if row.matched}
        return Choice({zoo.family.name: mergers for zoo in self.first_seed}, None)

    def _unselected(self, name: str, row: Row) -> dict[str, Merger]:
        """Return the methods of a row that is swept or has no settings; nothing for a row that is tuned."""
        where = f"grid.rows.{name}"
        if row.swept:
            return {
                point.row: self.merger(row, {point.field: point.value}, where) for point in row.points(name)
            }
        return {} if row.settings else {name: self.merger(row, {}, where)}

    def _chosen(self, family: str, measured: Sequence[CellResult], points: pd.DataFrame) -> dict[str, Merger]:
        """Return the methods of one family; marks the chosen settings in ``points``."""
        mergers: dict[str, Merger] = {}
        by_cell = {(m.cell.row, m.cell.setting): m.cell.merger for m in measured if m.cell.family == family}
        for name, row in self.grid.rows.items():
            mergers |= self._unselected(name, row)
            if not row.tried:
                continue
            mine = points[(points["row"] == name) & (points["family"] == family)]
            if mine.empty:
                continue  # every setting of the row failed, which has been said
            best = int(mine.index[int(mine["balanced"].argmax())])
            mergers[name] = _known(by_cell[name, str(mine.loc[best, "setting"])])
            points.loc[best, "selected"] = True
            if row.matched:
                distance = (mine["refusal_rate"] - self.grid.matched_refusal).abs()
                near = int(mine.index[int(distance.argmin())])
                mergers[name + MATCHED] = _known(by_cell[name, str(mine.loc[near, "setting"])])
                points.loc[near, "matched"] = True
        return mergers

    def read(self, cells: Sequence[Cell]) -> list[CellResult]:
        """Return the finished ones among the cells."""
        measured = []
        for cell in cells:
            try:
                measured.append(read(*self.opened[cell.family, cell.seed], cell))
            except NotMade:
                continue
        return measured

    @cached_property
    def opened(self) -> dict[tuple[str, int], tuple[Zoo, Models]]:
        """Family and seed -> a zoo that makes nothing, and its models; raises NotMade until all are made."""
        frozen = {(zoo.family.name, zoo.seed): zoo.frozen() for zoo in self.zoos}
        return {key: (zoo, zoo.models()) for key, zoo in frozen.items()}

    def _own(self, zoo: Zoo) -> bool:
        """Whether a seed has models of its own: those that are not made here are the same for all seeds."""
        return bool(zoo.trained()) or zoo.seed == self.zoos[0].seed

    def _made(self, zoo: Zoo, key: str) -> bool:
        frozen = zoo.frozen()
        try:
            frozen.source(key)
            if key == "base" and zoo.trained():
                frozen.examples_digest()
        except NotMade:
            return False
        return True


def balanced(point: Mapping[str, float]) -> float:
    """The selection rule, equal for every method: refusals less over-refusals, plus the mean of the two utilities."""
    utility = (point["instruction_following"] + point["reasoning"]) / 2
    return point["refusal_rate"] - point["over_refusal_rate"] + utility


def method_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every file of conf/method."""
    import yaml

    return {name: yaml.safe_load(path.read_text()) for name, path in choices(folder).items()}


def facts_of(merger: Merger) -> dict[str, Any]:
    """Return a method's class and fields for manifests."""
    from dataclasses import asdict

    fields = {key: str(value) if value == float("inf") else value for key, value in asdict(merger).items()}
    return {TARGET: f"{type(merger).__module__}.{type(merger).__qualname__}", **json.loads(json.dumps(fields))}


def _points(measured: Sequence[CellResult]) -> pd.DataFrame:
    import pandas as pd

    records = []
    for one in measured:
        means = one.frame.groupby("column")["value"].mean()
        record = {column: float(means[column]) for column in DEV_COLUMNS}
        head = {
            "family": one.cell.family,
            "row": one.cell.row,
            "setting": one.cell.setting,
            "selected": False,
            "matched": False,
        }
        records.append({**head, **record, "balanced": balanced(record)})
    return pd.DataFrame(
        records, columns=["family", "row", "setting", "selected", "matched", *DEV_COLUMNS, "balanced"]
    )


def _known(merger: Merger | None) -> Merger:
    assert merger is not None
    return merger
