"""Gates: what must hold of an experiment's models, on the dev split, for their merges to be of interest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alignmerge.engine.faults import BadRequest
from eval.grid.cells import CellResult


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound on the mean of a column of one row, or on its difference to another row."""

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


class Verdict(NamedTuple):
    """One gate with what was measured."""

    name: str
    measured: float
    bound: str
    met: bool


def verdicts(gates: Mapping[str, Gate], measured: Sequence[CellResult]) -> list[Verdict]:
    """Hold each gate against the measured rows; a row that was not measured fails its gate."""
    means = {one.cell.row: one.frame.groupby("column")["value"].mean().to_dict() for one in measured}
    found = []
    for name, gate in gates.items():
        value = float(means.get(gate.row, {}).get(gate.column, math.nan))
        if gate.minus is not None:
            value -= float(means.get(gate.minus, {}).get(gate.column, math.nan))
        found.append(Verdict(name, value, _spell(gate), gate.at_least <= value <= gate.at_most))
    return found


def missed(found: Mapping[tuple[str, int], Sequence[Verdict]]) -> list[str]:
    """Return a line for each gate that was not met, from family and seed -> verdicts."""
    lines = []
    for (family, seed), verdicts_of in found.items():
        for one in verdicts_of:
            if not one.met:
                lines.append(f"{family}, seed {seed}: {one.name}: {one.bound}; measured {one.measured:.3f}")
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
