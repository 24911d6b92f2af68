"""What a grid is: rows, the settings that are tried for each, and how its models are measured and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from alignmerge.engine.faults import BadRequest, Fault
from eval.grid.gates import Gate
from eval.scorers.interface import Scorer

MATCHED = "/matched"
"""Suffix of the row whose setting comes nearest to the matched refusal rate on the dev split."""
AT = "@"
"""Between a swept row and its setting, in the name of the row that reports it: ``alignmerge@lambda_align=0.3``."""


class Point(NamedTuple):
    """One setting of a swept row: a row of its own on the test split."""

    row: str
    """Name in the tables."""
    sweep: str
    """The swept row of the grid."""
    field: str
    value: float | None
    """What the field is set to; None is the method's null."""


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
    swept: bool = False
    """Whether every setting is reported, as a row of its own, and none is tried on the dev split or selected."""

    @property
    def tried(self) -> Sequence[Mapping[str, Any]]:
        """The settings of which the dev split selects one."""
        return () if self.swept else self.settings

    def points(self, name: str) -> list[Point]:
        """Return what a swept row reports under its name; nothing for other rows."""
        values = [(key, value) for setting in self.settings for key, value in setting.items()]
        return [
            Point(f"{name}{AT}{key}={_short(value)}", name, key, value) for key, value in values if self.swept
        ]

    def faults(self, where: str) -> list[Fault]:
        """Return what is wrong with a sweep."""
        if not self.swept:
            return []
        found = (
            [Fault(f"{where}.matched", "true", "false: nothing is selected of a swept row")]
            if self.matched
            else []
        )
        keys = [", ".join(setting) for setting in self.settings]
        if not keys or len(set(keys)) > 1 or any(len(setting) != 1 for setting in self.settings):
            given = "; ".join(dict.fromkeys(keys)) or "no settings"
            return [
                *found,
                Fault(f"{where}.settings", given, "one field, the same in every setting of a swept row"),
            ]
        values = [value for setting in self.settings for value in setting.values()]
        wrong = [value for value in values if not _sweepable(value)]
        found += [Fault(f"{where}.settings", repr(value), "a number or null in a swept row") for value in wrong]
        names = [_short(value) for value in values if value not in wrong]
        if len(set(names)) < len(names):
            found.append(Fault(f"{where}.settings", ", ".join(names), "each value once"))
        return found


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Families x seeds x rows: settings on dev, then one setting each on test."""

    name: str
    title: str
    rows: Mapping[str, Row]
    dev_scorers: Mapping[str, Scorer]
    families: Sequence[str] = ()
    """Files of conf/family, without their ending; none: the family that the command line chooses."""
    seeds: int = 1
    """How many seeds: ``seed``, ``seed + 1``, ... Each makes models of its own where the family's are made here."""
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """What must hold of the models (and of rows without settings) on the dev split before anything is merged."""
    trajectory_scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """How the checkpoints that an anchor's training kept are measured (test split)."""
    against: Sequence[str] = ()
    """Rows that every other row is compared with."""
    matched_refusal: float = 0.6
    """Dev refusal rate at which ``matched`` rows are compared."""

    def __post_init__(self) -> None:
        faults = [
            Fault("grid.against", name, f"a row: {', '.join(self.row_names())}")
            for name in self.against
            if name not in self.row_names()
        ]
        faults += [fault for name, row in self.rows.items() for fault in row.faults(f"grid.rows.{name}")]
        counts = {len(row.tried) for row in self.rows.values() if row.tried}
        if len(counts) > 1:
            given = f"{sorted(counts)} settings"
            faults.append(Fault("grid.rows", given, "the same number of settings for every row that is tuned"))
        if self.seeds < 1:
            faults.append(Fault("grid.seeds", str(self.seeds), "a whole number of at least 1"))
        if len(set(self.families)) < len(self.families):
            faults.append(Fault("grid.families", ", ".join(self.families), "each family once"))
        if not 0 <= self.matched_refusal <= 1:
            faults.append(Fault("grid.matched_refusal", str(self.matched_refusal), "a number in [0, 1]"))
        if faults:
            raise BadRequest(faults)

    def row_names(self) -> list[str]:
        """Return every method row that the tables may hold."""
        named = [name for own, row in self.rows.items() for name in [p.row for p in row.points(own)] or [own]]
        matched = [name + MATCHED for name, row in self.rows.items() if row.matched]
        return [*named, *matched]

    def points(self) -> list[Point]:
        """Return what all swept rows report, in order."""
        return [point for name, row in self.rows.items() for point in row.points(name)]


def spell(setting: Mapping[str, Any]) -> str:
    """Write a setting as a label."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def _short(value: Any) -> str:
    """Write a swept value as short as it can be read back."""
    return "null" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _sweepable(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and not math.isnan(value))
