"""A grid on its families: its cells, in what order they are made, which of them are finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, zip_longest
from typing import Any

from alignmerge.engine.configuration import build
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.progress import silent
from alignmerge.engine.store import NotMade
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import Cell, CellResult, measure, prepare, read
from eval.grid.gates import Verdict, verdicts
from eval.grid.grid import MATCHED, Grid, spell
from eval.grid.workers import Failure, Job, Workers
from eval.scorers.interface import Scorer

Gates = Mapping[tuple[str, int], Sequence[Verdict]]
"""Family and seed -> every gate with what was measured."""
STAGES = {"dev": "settings on dev", "test": "rows on test"}
"""Split -> what measuring its cells is called where progress is shown."""
Chosen = Mapping[str, Mapping[str, Merger]]
"""Family -> row -> the method with the setting that is reported."""


@dataclass(frozen=True)
class Experiment:
    """A grid on its families."""

    grid: Grid
    zoos: Sequence[Zoo]
    """One for each family and seed, seeds outermost: neighbours do not wait for each other."""
    methods: Mapping[str, Mapping[str, Any]]
    """The files of conf/method."""
    scorers: Sequence[Scorer]

    @property
    def first_seed(self) -> Sequence[Zoo]:
        """One zoo for each family: settings are selected on it."""
        return [zoo for zoo in self.zoos if zoo.seed == self.zoos[0].seed]

    @property
    def own_zoos(self) -> Sequence[Zoo]:
        """The zoos with models of their own: what is not made here is the same for all seeds."""
        return [zoo for zoo in self.zoos if zoo.trained() or zoo.seed == self.zoos[0].seed]

    def merger(self, name: str, setting: Mapping[str, Any], control: str = "") -> Merger:
        """Build the method of a row of the grid with a setting, for the row itself or for a control of it.

        Raises:
            BadRequest: naming the row, if the method or a field is wrong.
        """
        row, where = self.grid.rows[name], f"grid.rows.{control or name}"
        if row.method not in self.methods:
            raise BadRequest.of(f"{where}.method", row.method, ", ".join(sorted(self.methods)))
        merger: Merger = build({**self.methods[row.method], **row.fixed, **setting}, where, Merger)
        return merger

    def candidates(self, name: str) -> list[Merger]:
        """Return every method that a row may report: one a setting, or those of the rows that decide for it.

        Those of a control stand in the places of those that they are controls of.
        """
        return [self.merger(source, setting, name) for source, setting in self._sources(name)]

    def _sources(self, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the row and the setting, changed for a control, that each candidate of a row is made of."""
        row = self.grid.rows[name]
        if row.like:
            return [(source, {**setting, **row.fixed}) for source, setting in self._sources(row.like)]
        if row.best_of:
            return list(chain.from_iterable(map(self._sources, row.best_of)))
        return [(name, setting) for setting in row.settings or ({},)]

    def check(self) -> None:
        """Build every method with every setting; raises BadRequest with all faults at once."""
        makers = {}
        for name in self.grid.rows:
            for number, (source, setting) in enumerate(self._sources(name)):
                makers[f"{name} {number}"] = partial(self.merger, source, setting, name)
        BadRequest.gathered(makers)

    def dev_cells(self) -> list[Cell]:
        """Return the cells that settings are selected on; neighbours differ in method."""
        cells = []
        for settings in zip_longest(*(row.tried for row in self.grid.rows.values())):
            for name, setting in zip(self.grid.rows, settings, strict=True):
                if setting is not None:
                    merger = self.merger(name, setting)
                    for zoo in self.first_seed:
                        cells.append(Cell(zoo, name, spell(setting), "dev", self._dev_scorers, merger=merger))
        return cells

    def identity_cells(self, split: str, scorers: Sequence[Scorer]) -> list[Cell]:
        """Return the rows that stand in every table: the family's models, unmerged."""
        cells = []
        for zoo in self.own_zoos:
            for key in zoo.family.references():
                row = key.replace("experts.", "expert:")
                cells.append(Cell(zoo, row, "", split, scorers, model=key))
        return cells

    def gate_cells(self) -> list[Cell]:
        """Return the dev cells that the gates look at."""
        cells: list[Cell] = []
        if self.grid.gates:
            cells += self.identity_cells("dev", self._dev_scorers)
        wanted = {row for gate in self.grid.gates.values() for row in (gate.row, gate.minus)}
        for name, row in self.grid.rows.items():
            if name in wanted and row.method and not row.settings:
                merger = self.merger(name, {})
                for zoo in self.own_zoos:
                    cells.append(Cell(zoo, name, "", "dev", self._dev_scorers, merger=merger))
        return cells

    def choice_cells(self) -> list[Cell]:
        """Return what selection looks at: every setting, and the experts that utility is relative to."""
        tried = self.dev_cells()
        models = self.identity_cells("dev", self._dev_scorers) if tried else []
        first = self.first_seed
        return [*(cell for cell in models if cell.expert and cell.zoo in first), *tried]

    def dev_split(self) -> list[Cell]:
        """Return every cell of the dev split: what gates and selection look at, each once."""
        cells = {cell.label: cell for cell in [*self.gate_cells(), *self.choice_cells()]}
        return list(cells.values())

    def test_cells(self, chosen: Chosen) -> list[Cell]:
        """Return the merges that are reported; what knows no chance is measured once for all seeds."""
        own = self.own_zoos
        cells = []
        for zoo in self.zoos:
            for row, merger in chosen[zoo.family.name].items():
                if merger.inputs.seed or zoo in own:
                    cells.append(Cell(zoo, row, "", "test", self.scorers, merger=merger))
        return cells

    def trajectory_cells(self) -> list[Cell]:
        """Return the ways from the base to its fine-tunes: the checkpoints that their trainings kept."""
        scorers = list(self.grid.trajectory_scorers.values())
        cells = []
        for zoo in self.own_zoos:
            kept = chain.from_iterable(map(zoo.kept, zoo.trained()))
            for key in ("base", *kept):
                cells.append(Cell(zoo, key, "", "test", scorers, model=key))
        return cells if scorers else []

    def reported(self, chosen: Chosen) -> list[Cell]:
        """Return the rows, as measured on the test split."""
        return [*self.identity_cells("test", self.scorers), *self.test_cells(chosen)]

    def provisional(self) -> Chosen:
        """Return a choice before anything is measured: of each tuned row the first setting."""
        mergers: dict[str, Merger] = {}
        for name in self.grid.rows:
            mergers |= self.untuned(name) or {name: self.candidates(name)[0]}
        for name, row in self.grid.rows.items():
            if row.matched:
                mergers[name + MATCHED] = mergers[name]
        return {zoo.family.name: mergers for zoo in self.first_seed}

    def untuned(self, name: str) -> dict[str, Merger]:
        """Return the methods of a row that is not tuned; nothing for one that is, or that follows another."""
        row = self.grid.rows[name]
        if row.settings or row.derived:
            return {point.row: self.merger(name, {point.field: point.value}) for point in row.points(name)}
        return {name: self.merger(name, {})}

    def make_models(self, workers: Workers) -> list[Failure]:
        """Make what is missing of the families' models, one stage after the other."""
        for name, models in self.missing_models():
            jobs: list[Job] = []
            for zoo, key in models:
                jobs.append((f"model: {zoo.family.name}, seed {zoo.seed}: {key}", prepare, (zoo, key)))
            failures = workers.run(jobs, name)
            if failures:
                return failures
        return []

    def model_stages(self) -> Iterator[tuple[str, list[tuple[Zoo, str]]]]:
        """Yield the name of each stage of making models, and its models; what all seeds share stands
        there once.
        """
        for stage in zip_longest(*(zoo.stages() for zoo in self.zoos), fillvalue=()):
            models: dict[Any, tuple[Zoo, str]] = {}
            for zoo, keys in zip(self.zoos, stage, strict=True):
                for key in keys:
                    models.setdefault((zoo.family.name, key, _seed_of(zoo, key)), (zoo, key))
            roles = dict.fromkeys(key.partition(".")[0] for _, key in models.values())
            yield f"models ({', '.join(roles)})", list(models.values())

    def missing_models(self) -> Iterator[tuple[str, list[tuple[Zoo, str]]]]:
        """Yield the same of the models that are not made yet."""
        for name, models in self.model_stages():
            yield name, [(zoo, key) for zoo, key in models if not _is_made(zoo, key)]

    def make(self, workers: Workers, cells: Sequence[Cell]) -> list[Failure]:
        """Measure the cells of a split that are not in the store yet."""
        missing = self.missing(cells)
        stage = STAGES[cells[0].split] if cells else "cells"
        return workers.run([(cell.label, measure, (cell,)) for cell in missing], stage)

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that the store lacks; of those that come to the same work, the first."""
        todo: dict[Any, Cell] = {}
        for cell in cells:
            todo.setdefault(cell.work, cell)
        for result in self.read(list(todo.values())):
            del todo[result.cell.work]
        return list(todo.values())

    def read(self, cells: Sequence[Cell]) -> list[CellResult]:
        """Return the finished ones among the cells."""
        results: list[CellResult] = []
        try:
            opened = self.opened
        except NotMade:
            return results
        for cell in cells:
            with suppress(NotMade):
                results.append(read(*opened[cell.family, cell.seed], cell))
        return results

    def gate_verdicts(self) -> Gates:
        """Hold the gates against what the store holds."""
        if not self.grid.gates:
            return {}
        results, found = self.read(self.gate_cells()), {}
        for zoo in self.own_zoos:
            mine = [one for one in results if one.cell.zoo == zoo]
            found[zoo.family.name, zoo.seed] = verdicts(self.grid.gates, mine)
        return found

    @cached_property
    def opened(self) -> dict[tuple[str, int], tuple[Zoo, Models]]:
        """Family and seed -> a frozen zoo and its models; raises NotMade until all are made."""
        opened = {}
        for zoo in self.zoos:
            frozen = zoo.frozen()
            opened[zoo.family.name, zoo.seed] = (frozen, frozen.models())
        return opened

    @property
    def _dev_scorers(self) -> list[Scorer]:
        return list(self.grid.dev_scorers.values())


def _seed_of(zoo: Zoo, key: str) -> int:
    """Return the seed that a model is one of, 0 for one of all seeds; a base brings each seed's lessons
    with it.
    """
    recipe = zoo.family.recipe_of(key)
    shared = key != "base" and not getattr(recipe, "seeded", recipe is not None)
    return 0 if shared else zoo.seed


def _is_made(zoo: Zoo, key: str) -> bool:
    try:
        prepare(zoo.frozen(), key, silent)
    except NotMade:
        return False
    return True
