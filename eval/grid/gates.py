"""Gates: what must hold of an experiment's models, on the dev split, for their merges to be of interest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest
from eval.columns import BOOTSTRAP
from eval.grid.cells import CellResult
from eval.stats.intervals import interval
from eval.stats.resampling import Floats, clusters_of, resample


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound on the mean of a column of one row (``experts``: of all), or on its difference to another row."""

    row: str
    column: str
    minus: str | None = None
    """Row whose mean is subtracted."""
    at_least: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        if not self.at_least <= self.at_most or (math.isinf(self.at_least) and math.isinf(self.at_most)):
            given = f"at_least {self.at_least}, at_most {self.at_most}"
            raise BadRequest.of("grid.gates", given, "a bound, with at_least not above at_most")


EXPERTS = "experts"
"""The row of a gate that looks at the mean of all experts, prompt by prompt."""


class Verdict(NamedTuple):
    """One gate with what was measured."""

    name: str
    measured: float
    low: float
    """Ends of the 95 % interval over prompts; NaN where the column is one number without replicates."""
    high: float
    bound: str
    counted: str
    """Of a rate: the prompts that count and how many may, in words."""
    met: bool
    """False where the whole interval (or the number itself, where there is none) is out of bounds."""


def verdicts(gates: Mapping[str, Gate], results: Sequence[CellResult]) -> list[Verdict]:
    """Hold each gate against the measured rows; a row that was not measured misses its gate."""
    frames = {one.cell.row: one.frame for one in results}
    frames[EXPERTS] = _mean_of([frame for row, frame in frames.items() if row.startswith("expert:")])
    found = []
    for name, gate in gates.items():
        samples = _column(frames.get(gate.row, _NOTHING), gate.column)
        if gate.minus is not None:
            samples = samples - _column(frames.get(gate.minus, _NOTHING), gate.column)  # paired by prompt
        found.append(_judged(name, gate, samples))
    return found


_NOTHING = pd.DataFrame({"column": [], "id": [], "value": []}, dtype=object)


def _mean_of(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of several rows, sample by sample; unscored where one of them is."""
    if not frames:
        return _NOTHING
    together = pd.concat(frames, ignore_index=True).groupby(["column", "id"], sort=False)["value"]
    mean = together.agg(lambda values: values.mean(skipna=False))
    return mean.reset_index()


def _column(frame: pd.DataFrame, column: str) -> pd.Series[float]:
    """Return the values of a column by id, bootstrap replicates among them."""
    of_column = frame[frame["column"] == column]
    return of_column.set_index("id")["value"].astype(float)


def _judged(name: str, gate: Gate, samples: pd.Series[float]) -> Verdict:
    drawn = samples.index.astype(str).str.startswith(BOOTSTRAP)
    scored = samples[~drawn].dropna()
    values: Floats = np.asarray(scored, dtype=np.float64)[None, None]
    replicates: Floats = np.asarray(samples[drawn], dtype=np.float64)[None, None]
    if not scored.size:
        return Verdict(name, math.nan, math.nan, math.nan, _spell(gate), "", met=False)
    found = resample(
        values, replicates, np.array([1]), clusters_of(map(str, scored.index)), column=gate.column, family=""
    )
    binary = bool(np.isin(values, (-1.0, 0.0, 1.0)).all())
    least = 0.0 if gate.minus is None else -1.0
    (low,), (high,) = interval(found, found.varies, binary=binary, least=least)
    (measured,) = found.mean
    lowest, highest = np.nan_to_num([low, high], nan=measured)  # no interval: the number itself decides
    met = bool(highest >= gate.at_least and lowest <= gate.at_most)
    counted = ""
    if binary and gate.minus is None:
        counted = _counted(gate, int(values.sum()), values.size)
    return Verdict(name, float(measured), float(low), float(high), _spell(gate), counted, met)


def _counted(gate: Gate, count: int, prompts: int) -> str:
    """Say a rate in prompts: ``3 of 48, at most 2 allowed``."""
    said = f"{count} of {prompts}"
    if math.isfinite(gate.at_least):
        said += f", at least {math.ceil(gate.at_least * prompts)} wanted"
    if math.isfinite(gate.at_most):
        said += f", at most {math.floor(gate.at_most * prompts)} allowed"
    return said


def missed(found: Mapping[tuple[str, int], Sequence[Verdict]]) -> list[str]:
    """Return a line for each gate that was not met, from family and seed -> verdicts."""
    lines = []
    for (family, seed), verdicts_of in found.items():
        for one in verdicts_of:
            if not one.met:
                ends = f" [{one.low:.3f}, {one.high:.3f}]" if math.isfinite(one.low) else ""
                counted = f" ({one.counted})" if one.counted else ""
                measured = f"measured {one.measured:.3f}{ends}{counted}"
                lines.append(f"{family}, seed {seed}: {one.name}: {one.bound}; {measured}")
    return lines


def marks(found: Mapping[tuple[str, int], Sequence[Verdict]]) -> dict[str, str]:
    """Return family -> what its tables say of missed gates; families that met all are left out."""
    seeds: dict[str, list[str]] = {}
    for (family, seed), verdicts_of in found.items():
        if missed({(family, seed): verdicts_of}):
            seeds.setdefault(family, []).append(str(seed))
    return {family: f"gates missed: seed {', '.join(numbers)}" for family, numbers in seeds.items()}


def _spell(gate: Gate) -> str:
    what = f"{gate.column} of {gate.row}"
    if gate.minus is not None:
        what += f" minus {gate.minus}"
    bounds = []
    for words, bound in (("at least", gate.at_least), ("at most", gate.at_most)):
        if math.isfinite(bound):
            bounds.append(f"{words} {bound:g}")
    return f"{what}: {', '.join(bounds)}"
