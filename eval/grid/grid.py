"""What a grid is: rows, the settings that are tried for each, how models are measured and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from alignmerge.engine.configuration import GROUP
from alignmerge.engine.faults import BadRequest, Fault
from eval.grid.gates import Gate
from eval.scorers.interface import Scorer

MATCHED = "/matched"
"""Suffix of the row whose setting comes nearest to the matched refusal rate on the dev split."""
NEAR = 0.05
"""How far from the matched refusal rate, on the dev split, a ``matched`` row may be."""
AT = "@"
"""Between a swept row and its setting where one is reported: ``alignmerge@lambda_align=0.3``."""


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

    method: str = ""
    """A file of conf/method, without its ending; empty for what other rows say (``best_of``, ``like``)."""
    best_of: Sequence[str] = ()
    """Rows of which this one is the better on the dev split: an alias, with no cells of its own. Together they
    have as many settings as any other row."""
    like: str = ""
    """The row whose selected setting this one takes over, with the fields of ``fixed`` changed: a control."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that differ from that file, or from that row."""
    settings: Sequence[Mapping[str, Any]] = ()
    """Fields to try on the dev split; none: the row has nothing to tune."""
    matched: bool = False
    """Whether the setting nearest to the grid's matched refusal rate is a row of its own as well."""
    swept: bool = False
    """Whether every setting is a row of its own, and none is tried on the dev split or selected."""

    @property
    def derived(self) -> bool:
        """Whether other rows decide what is reported."""
        return bool(self.best_of or self.like)

    @property
    def tried(self) -> Sequence[Mapping[str, Any]]:
        """The settings of which the dev split selects one."""
        return () if self.swept else self.settings

    def faults(self, where: str, rows: Mapping[str, Row]) -> list[Fault]:
        """Return what is wrong with a row that stands among ``rows``."""
        found = self.sweep_faults(where) if self.swept else []
        if [bool(self.method), bool(self.best_of), bool(self.like)].count(True) != 1:
            found.append(Fault(where, "not one of the three", "a method, or best_of, or like"))
        if self.derived and (self.settings or (self.matched and self.like)):
            found.append(Fault(where, "settings of its own", "none: another row's are taken over"))
        if self.best_of and self.fixed:
            found.append(Fault(f"{where}.fixed", ", ".join(self.fixed), "none beside best_of"))
        tuned = [name for name, row in rows.items() if row.tried]
        for name in self.best_of:
            if name not in tuned:
                found.append(Fault(f"{where}.best_of", name, f"a tuned row: {', '.join(tuned)}"))
        followed = [*tuned, *(name for name, row in rows.items() if row.best_of)]
        if self.like and self.like not in followed:
            found.append(Fault(f"{where}.like", self.like, f"a row with settings: {', '.join(followed)}"))
        return found

    def points(self, name: str) -> list[Point]:
        """Return what a swept row reports under its name; nothing for other rows."""
        points = []
        for setting in self.settings if self.swept else ():
            for key, value in setting.items():
                points.append(Point(f"{name}{AT}{key}={_short(value)}", name, key, value))
        return points

    def sweep_faults(self, where: str) -> list[Fault]:
        """Return what is wrong with a swept row."""
        found, names, settings = [], [], f"{where}.settings"
        if self.matched:
            found.append(Fault(f"{where}.matched", "true", "false: nothing is selected of a swept row"))
        keys = dict.fromkeys(map(", ".join, self.settings))
        if len(keys) != 1 or len(self.settings[0]) != 1:
            allowed = "one field, the same in every setting of a swept row"
            return [*found, Fault(settings, "; ".join(keys) or "no settings", allowed)]
        for setting in self.settings:
            (value,) = setting.values()
            if value is None or (type(value) in (int, float) and not math.isnan(value)):
                names.append(_short(value))
            else:
                found.append(Fault(settings, repr(value), "a number or null in a swept row"))
        if len(set(names)) < len(names):
            found.append(Fault(settings, ", ".join(names), "each value once"))
        return found


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Families x seeds x rows: settings on dev, then one setting each on test."""

    name: str
    title: str
    rows: Mapping[str, Row]
    dev_scorers: Mapping[str, Scorer] = field(metadata={GROUP: "scorer"})
    families: Sequence[str] = ()
    """Files of conf/family, without their ending; none: the family that the command line chooses."""
    seeds: int = 1
    """How many seeds: ``seed``, ``seed + 1``, ... Each has its own models where they are made here."""
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """What should hold of the models, and of rows without settings, on the dev split."""
    trajectory_scorers: Mapping[str, Scorer] = field(default_factory=dict, metadata={GROUP: "scorer"})
    """How the checkpoints that an anchor's training kept are measured (test split)."""
    against: Sequence[str] = ()
    """Rows that every other row is compared with."""
    matched_refusal: float = 0.6
    """Dev refusal rate at which ``matched`` rows are compared; a row that comes not within ``NEAR`` has no number."""

    def __post_init__(self) -> None:
        faults = []
        names = self.row_names()
        for name in self.against:
            if name not in names:
                faults.append(Fault("grid.against", name, f"a row: {', '.join(names)}"))
        for name, row in self.rows.items():
            faults += row.faults(f"grid.rows.{name}", self.rows)
        counts = self._tried()
        if len(counts) > 1:
            allowed = (
                "the same number of settings for every row that is tuned (a best_of has those of its rows)"
            )
            faults.append(Fault("grid.rows", f"{sorted(counts)} settings", allowed))
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
        named = []
        for name, row in self.rows.items():
            named += [point.row for point in row.points(name)] or [name]
        return named + [name + MATCHED for name, row in self.rows.items() if row.matched]

    def _tried(self) -> set[int]:
        """Return the numbers of settings that a row may be chosen from; the rows of a best_of share them."""
        shared = {name for row in self.rows.values() for name in row.best_of}
        counts = set()
        for name, row in self.rows.items():
            if row.best_of:
                readings = (self.rows[one] for one in row.best_of if one in self.rows)
                counts.add(sum(len(one.tried) for one in readings))
            elif name not in shared:
                counts.add(len(row.tried))
        return counts - {0}

    def points(self) -> list[Point]:
        """Return what all swept rows report, in order."""
        return list(chain.from_iterable(row.points(name) for name, row in self.rows.items()))


def spell(setting: Mapping[str, Any]) -> str:
    """Write a setting as a label."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def _short(value: Any) -> str:
    """Write a swept value as short as it can be read back."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
