"""Which declared columns are shown, where and in what order; ``columns.csv`` says so in results."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from eval.columns import GROUPS, Column, Direction

Columns = Mapping[str, Column]  # by the name that samples and ``summary.csv`` give them
ARROWS: Mapping[Direction, str] = {"up": "↑", "down": "↓", "info": ""}
_FIELDS = ["label", "group", "direction", "decimals", "main"]


def in_order(columns: Columns) -> dict[str, Column]:
    """Return the columns by group, each in the order of its table; those without a table come last."""
    declared = [column.group for column in columns.values() if column.group]
    groups = [*dict.fromkeys([*GROUPS, *declared]), ""]
    names = sorted(columns, key=lambda name: (groups.index(columns[name].group), columns[name].rank))
    return {name: columns[name] for name in names}


def chosen(columns: Columns, names: Iterable[str]) -> dict[str, Column]:
    """Return those columns that are named, in their own order."""
    wanted = set(names)
    return {name: column for name, column in columns.items() if name in wanted}


def grouped(columns: Columns) -> dict[str, dict[str, Column]]:
    """Return group -> its columns, without those that have no table."""
    groups: dict[str, dict[str, Column]] = {}
    for name, column in columns.items():
        if column.group:
            groups.setdefault(column.group, {})[name] = column
    return groups


def main_columns(columns: Columns) -> dict[str, Column]:
    """Return the columns of the main table, in its order."""
    names = sorted(columns, key=lambda name: columns[name].main)
    return {name: columns[name] for name in names if columns[name].main}


def heading(column: Column) -> str:
    """Return the label with an arrow that points to the better direction."""
    return f"{column.label} {ARROWS[column.direction]}".strip()


def write_columns(columns: Columns, path: Path) -> None:
    """Write ``columns.csv``: what the columns of ``summary.csv`` are, in the order of the tables."""
    fields = pd.DataFrame(map(asdict, columns.values()), index=pd.Index(columns, name="name"))[_FIELDS]
    fields.astype({"decimals": "Int64"}).to_csv(path, lineterminator="\n")


def read_frame(path: Path) -> pd.DataFrame:
    """Return a CSV file of a results folder: an empty cell is NaN, and no word is."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_columns(folder: Path) -> dict[str, Column]:
    """Return the columns of a results folder, in the order of its tables."""
    columns = {}
    with (folder / "columns.csv").open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            decimals = int(line["decimals"]) if line["decimals"] else None
            fields: dict[str, Any] = line | {"main": int(line["main"]), "decimals": decimals}
            name = fields.pop("name")
            columns[name] = Column(**fields)
    return columns
