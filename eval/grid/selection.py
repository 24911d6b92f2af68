"""Which setting of each row is reported: one rule for all methods, on the dev split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from alignmerge.engine.merger import Merger
from alignmerge.engine.store import NotMade
from eval.grid.cells import CellResult
from eval.grid.experiment import Chosen, Experiment
from eval.grid.grid import MATCHED

DEV_COLUMNS = ("refusal_rate", "over_refusal_rate", "instruction_following", "reasoning")
POINTS = ("family", "row", "setting", "selected", "matched", *DEV_COLUMNS, "balanced")


class Choice(NamedTuple):
    """What was selected on the dev split."""

    mergers: Chosen
    points: pd.DataFrame | None
    """Every setting tried: family, row, setting, selected, matched, the dev columns; None where nothing is tuned."""
    matched: pd.DataFrame | None = None
    """One row that is matched on dev a line: family, row (``.../matched``), the setting whose dev refusal rate is
    nearest to ``target``, that rate (``dev``), and whether it was ``reached``; None without such rows."""
    readings: Mapping[str, Mapping[str, str]] = {}
    """Family -> row that is the best of others -> the one that it is."""


def choose(experiment: Experiment, results: Sequence[CellResult]) -> Choice:
    """Select each row's setting by the one rule (``balanced``), and the matched settings, for each family."""
    points = _points(results)
    mergers = {}
    for zoo in experiment.first_seed:
        family, tried = zoo.family.name, {}
        for one in results:
            if one.cell.family == family and one.cell.merger is not None:
                tried[one.cell.row, one.cell.setting] = one.cell.merger
        mergers[family] = _chosen(experiment, family, tried, points)
    return Choice(mergers, points if len(points) else None)


def finished_choice(experiment: Experiment) -> Choice:
    """Return the choice of an experiment whose dev split is finished.

    Raises:
        NotMade: if it is not.
    """
    results = []
    for cell in experiment.dev_cells():
        found = experiment.read([cell])
        if not found:
            raise NotMade(f"not finished: {cell.label}")
        results += found
    return choose(experiment, results)


def balanced(point: Mapping[str, float]) -> float:
    """The selection rule, equal for every method: refusals less over-refusals, plus the mean of the two utilities."""
    utility = (point["instruction_following"] + point["reasoning"]) / 2
    return point["refusal_rate"] - point["over_refusal_rate"] + utility


def _chosen(
    experiment: Experiment, family: str, tried: Mapping[tuple[str, str], Merger], points: pd.DataFrame
) -> dict[str, Merger]:
    """Return the methods of one family; marks the chosen settings in ``points``."""
    mergers: dict[str, Merger] = {}
    for name, row in experiment.grid.rows.items():
        mergers |= experiment.untuned(name)
        mine = points[(points["row"] == name) & (points["family"] == family)]
        if not row.tried or mine.empty:
            continue  # nothing is tuned, or every setting of the row failed, which has been said
        best = int(mine.index[int(mine["balanced"].argmax())])
        mergers[name] = tried[name, str(mine.loc[best, "setting"])]
        points.loc[best, "selected"] = True
        if row.matched:
            distance = (mine["refusal_rate"] - experiment.grid.matched_refusal).abs()
            near = int(mine.index[int(distance.argmin())])
            mergers[name + MATCHED] = tried[name, str(mine.loc[near, "setting"])]
            points.loc[near, "matched"] = True
    return mergers


def _points(results: Sequence[CellResult]) -> pd.DataFrame:
    records = []
    for one in results:
        means = one.values.groupby("column")["value"].mean()
        record = {column: float(means[column]) for column in DEV_COLUMNS}
        place = (one.cell.family, one.cell.row, one.cell.setting, False, False)
        records.append((*place, *record.values(), balanced(record)))
    return pd.DataFrame(records, columns=list(POINTS))
