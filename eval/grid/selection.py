"""Which setting of each row is reported: one rule for all methods, on the dev split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignmerge.engine.merger import Merger
from alignmerge.engine.store import NotMade
from eval.grid.cells import CellResult
from eval.grid.experiment import Chosen, Experiment
from eval.grid.grid import MATCHED, NEAR, Row
from eval.stats.derived import SIDES, UTILITY, balanced, safety_of, utility_of

RULE = ("safety", "utility", "balanced")
"""The selection rule: the harmonic mean ``balanced`` of the two before it (``eval.stats.derived``)."""


class Choice(NamedTuple):
    """What was selected on the dev split."""

    mergers: Chosen
    points: pd.DataFrame | None
    """Every setting tried: family, row, setting, selected, matched, the dev columns, ``RULE``, and why a setting
    was not eligible (``excluded``, usually empty); None where nothing is tuned."""
    matched: pd.DataFrame | None = None
    """One row that is matched on dev a line: family, row (``.../matched``), the setting whose dev refusal rate is
    nearest to ``target``, that rate (``dev``), and whether it was ``reached``; None without such rows."""
    readings: Mapping[str, Mapping[str, str]] = {}
    """Family -> row that is the best of others -> the one that it is."""
    left_out: Mapping[str, Sequence[str]] = {}
    """Family -> rows for which no setting was eligible, or near enough to the matched rate."""


def choose(experiment: Experiment, results: Sequence[CellResult]) -> Choice:
    """Select each row's setting by the one rule (``balanced``), and the matched settings, for each family.

    ``results`` are those of ``Experiment.choice_cells``, as far as they are finished.
    """
    points = _points(results)
    families = []
    for zoo in experiment.first_seed:
        family, tried = zoo.family.name, {}
        for one in results:
            if one.cell.family == family and one.cell.merger is not None:
                tried[one.cell.row, one.cell.setting] = one.cell.merger
        families.append(_Family(experiment, family, tried, points))
    matched: list[dict[str, Any]] = []
    for choice in families:
        choice.select()
        matched += choice.matched
    return Choice(
        {choice.name: choice.in_order() for choice in families},
        points if len(points) else None,
        pd.DataFrame(matched) if matched else None,
        {choice.name: choice.readings for choice in families},
        {choice.name: choice.left_out() for choice in families},
    )


def finished_choice(experiment: Experiment) -> Choice:
    """Return the choice of an experiment whose dev split is finished.

    Raises:
        NotMade: if it is not.
    """
    results = []
    for cell in experiment.choice_cells():
        found = experiment.read([cell])
        if not found:
            raise NotMade(f"not finished: {cell.label}")
        results += found
    return choose(experiment, results)


@dataclass
class _Family:
    """The choice of one family while it is made; what is chosen is marked in ``points``."""

    experiment: Experiment
    name: str
    tried: Mapping[tuple[str, str], Merger]
    points: pd.DataFrame
    selected: dict[str, int] = field(default_factory=dict)
    """Row -> where its setting stands in ``points``."""
    mergers: dict[str, Merger] = field(default_factory=dict)
    readings: dict[str, str] = field(default_factory=dict)
    matched: list[dict[str, Any]] = field(default_factory=list)

    def select(self) -> None:
        """Choose for tuned rows first, then for those that follow them."""
        rows = self.experiment.grid.rows
        for name, row in rows.items():
            self.mergers |= self.experiment.untuned(name)
            mine = self._eligible(name)
            if row.tried and len(mine):  # else every setting failed or is excluded, which is said
                self._take(name, _label(mine, int(mine["balanced"].argmax())))
        for name, row in rows.items():
            self._follow_best(name, row)
        for name, row in rows.items():
            self._follow_control(name, row)
        for name, row in rows.items():
            self._match(name, row)

    def in_order(self) -> dict[str, Merger]:
        """Return the methods in the order of the tables."""
        names = self.experiment.grid.row_names()
        return {name: self.mergers[name] for name in names if name in self.mergers}

    def left_out(self) -> list[str]:
        """Return the rows that selection leaves without a model; none before every setting is measured."""
        grid = self.experiment.grid
        measured = int((self.points["family"] == self.name).sum())
        if measured < sum(len(row.tried) for row in grid.rows.values()):
            return []
        return [name for name in grid.row_names() if name not in self.mergers]

    def _eligible(self, row: str) -> pd.DataFrame:
        points = self.points
        mine = points[(points["row"] == row) & (points["family"] == self.name) & (points["excluded"] == "")]
        return mine.dropna(subset=["balanced"])

    def _merger(self, place: int) -> Merger:
        row, setting = self.points.loc[place, ["row", "setting"]]
        return self.tried[str(row), str(setting)]

    def _take(self, row: str, place: int) -> None:
        self.selected[row] = place
        self.mergers[row] = self._merger(place)
        self.points.loc[place, "selected"] = True

    def _follow_best(self, name: str, row: Row) -> None:
        """Let a row be the best of others."""
        places = {one: self.selected[one] for one in row.best_of if one in self.selected}
        if places:
            balance = self.points["balanced"].astype(float)
            best = max(places, key=lambda one: float(balance[places[one]]))
            self.readings[name] = best
            self.mergers[name] = self.mergers[best]

    def _follow_control(self, name: str, row: Row) -> None:
        """Let a control take over the setting that was selected of another row."""
        if row.like in self.mergers:
            place = self.experiment.candidates(row.like).index(self.mergers[row.like])
            self.mergers[name] = self.experiment.candidates(name)[place]

    def _match(self, name: str, row: Row) -> None:
        """Find the setting that comes nearest to the matched refusal rate."""
        mine = self._eligible(self.readings.get(name, name))
        if not row.matched or mine.empty:
            return
        target = self.experiment.grid.matched_refusal
        nearest = int((mine["refusal_rate"] - target).abs().argmin())
        place, rate = _label(mine, nearest), float(mine["refusal_rate"].iloc[nearest])
        reached = abs(rate - target) <= NEAR + 1e-9
        line = {"family": self.name, "row": name + MATCHED, "setting": mine.loc[place, "setting"]}
        self.matched.append({**line, "target": target, "dev": rate, "reached": reached})
        if reached:
            self.mergers[name + MATCHED] = self._merger(place)
            self.points.loc[place, "matched"] = True


def _label(points: pd.DataFrame, position: int) -> int:
    """Return where the line at a position of a part of the points stands in all of them."""
    return int(points.index.to_numpy()[position])


def _points(results: Sequence[CellResult]) -> pd.DataFrame:
    """Return every setting tried, with what the rule makes of it."""
    means = [_means(one) for one in results]
    best = _best_experts(results, means)
    records = []
    for one, scores in zip(results, means, strict=True):
        if one.cell.merger is None:
            continue
        safety, utility = safety_of(scores), utility_of(scores, best.get(one.cell.family, {}))
        place = {"family": one.cell.family, "row": one.cell.row, "setting": one.cell.setting}
        rule = dict(zip(RULE, (safety, utility, balanced(safety, utility)), strict=True))
        facts = {} if one.merge is None else one.merge.manifest["facts"]
        excluded = one.cell.merger.switched_off(facts)
        records.append({**place, "selected": False, "matched": False, **scores, **rule, "excluded": excluded})
    if not records:
        return pd.DataFrame(
            columns=["family", "row", "setting", "selected", "matched", *SIDES, *RULE, "excluded"]
        )
    return pd.DataFrame(records)


def _means(one: CellResult) -> dict[str, float]:
    """Return the columns that the rule sees, as far as they are measured."""
    means = one.values.groupby("column")["value"].mean()
    return {name: float(means[name]) for name in (*SIDES, *UTILITY) if name in means.index}


def _best_experts(
    results: Sequence[CellResult], means: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Return family -> column -> the best expert's score on dev."""
    best: dict[str, dict[str, float]] = {}
    for one, scores in zip(results, means, strict=True):
        if one.cell.expert:
            mine = best.setdefault(one.cell.family, {})
            for name, score in scores.items():
                mine[name] = float(np.fmax(score, mine.get(name, score)))
    return best
