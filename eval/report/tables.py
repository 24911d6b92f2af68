"""The numbers of ``summary.csv`` as they are shown, and ``table.md`` and ``table.tex`` of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from eval.columns import Column, Direction
from eval.report.layout import Columns, chosen, grouped, heading
from eval.report.markup import escape_markdown, template
from eval.report.numbers import interval, number
from eval.report.supplement import NOTHING, Supplement
from eval.stats.derived import KAPPA
from eval.stats.estimates import ALL, is_method
from eval.stats.resampling import LEAST_SEEDS, LEVEL, RESAMPLES

NONE = "–"  # where a row has no value
_TEX_ARROWS: Mapping[Direction, str] = {"up": r"$\uparrow$", "down": r"$\downarrow$", "info": ""}


class Entry(NamedTuple):
    """One number as shown."""

    value: float
    mean: str
    interval: str
    best: bool  # whether no other method is better; never true for theta_IT, the anchor and the experts


_UNREACHED = Entry(math.nan, "not reached", "", best=False)


class Table(NamedTuple):
    """Some columns of one family."""

    caption: str
    columns: Columns
    rows: Mapping[str, Mapping[str, Entry | None]]  # row -> column -> entry

    @property
    def blocks(self) -> list[list[str]]:
        """The identity rows, then the methods; one of them where there are no others."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, is_method)]


class Section(NamedTuple):
    """What is shown of one family, or of the mean over all."""

    family: str
    heading: str
    rows: Sequence[str]
    tables: Sequence[Table]
    unscored: Sequence[str]
    remarks: Sequence[str]
    """Which row is another's alias, which dev rates the matched rows reached."""


class Document(NamedTuple):
    """What table.md, table.tex and report.html have in common."""

    title: str
    sections: Sequence[Section]
    missing: Sequence[str]  # which rows have no mean over families
    notes: Sequence[str]
    legend: Sequence[str]


def document(
    summary: pd.DataFrame, columns: Columns, title: str, notes: Sequence[str], beside: Supplement = NOTHING
) -> Document:
    """Arrange a summary by family and group; headings, rows and remarks say what is ``beside`` the scores."""
    sections = []
    for name, of_family in summary.groupby("family", sort=False):
        family, measured = str(name), of_family.loc[of_family["mean"].notna(), "column"]
        groups = grouped(chosen(columns, measured))
        unreached = beside.unreached.get(family, ())
        tables = [table(of_family, group, shown, unreached) for group, shown in groups.items()]
        rows, title_of = of_family["row"].unique().tolist(), family_heading(family, beside.marks)
        remarks = beside.remarks.get(family, ())
        sections.append(Section(family, title_of, rows, tables, unscored(of_family), remarks))
    return Document(title, sections, missing(summary), list(notes), legend(summary))


def family_heading(family: str, marks: Mapping[str, str]) -> str:
    """Return the heading of a family, with its mark (a missed gate); the mean over all bears all."""
    if family == ALL:
        return "; ".join([family, *map(": ".join, marks.items())])
    if family in marks:
        return f"{family} ({marks[family]})"
    return family


def table(of_family: pd.DataFrame, caption: str, columns: Columns, unreached: Sequence[str] = ()) -> Table:
    """Return the table of some columns for all rows of a family; rows ``unreached`` have no numbers."""
    entries = {}
    for name, column in columns.items():
        measured = (of_family["column"] == name) & of_family["mean"].notna()
        entries[name] = _entries(of_family[measured].set_index("row"), column)
    rows = {}
    for row in of_family["row"].unique():
        rows[row] = {name: of_column.get(row) for name, of_column in entries.items()}
    for row in unreached:
        rows[row] = dict.fromkeys(columns, _UNREACHED)
    return Table(caption, columns, rows)


def _entries(values: pd.DataFrame, column: Column) -> dict[str, Entry]:
    best = best_methods(values["mean"], column.direction)
    shown = {}
    for row, mean, low, high in values[["mean", "ci_low", "ci_high"]].itertuples(name=None):
        reach = ""
        if np.isfinite(low):
            reach = interval(low, high, column.decimals)
        shown[row] = Entry(mean, number(mean, column.decimals), reach, row in best)
    return shown


def best_methods(means: pd.Series[float], direction: Direction) -> set[str]:
    """Return the best methods of a column, ties included; none where all are alike or only differ."""
    methods = means[means.index.map(is_method).astype(bool)]
    if direction == "info" or methods.nunique() < 2:
        return set()
    top = methods.max() if direction == "up" else methods.min()
    return set(methods.index[methods == top])


def unscored(of_family: pd.DataFrame) -> list[str]:
    """Return what could not be scored, a line for columns that lack as many samples of the same rows."""
    lacking = of_family[of_family["unscored"] > 0]
    columns: dict[str, list[str]] = {}
    for column, of in lacking.groupby("column", sort=False):
        rows = ", ".join(of["row"] + " " + of["unscored"].astype(str))
        columns.setdefault(rows, []).append(str(column))
    return [f"{', '.join(names)} unscored: {rows}" for rows, names in columns.items()]


def missing(summary: pd.DataFrame) -> list[str]:
    """Return one line with the rows that are not in every family, and so have no mean over families."""
    if not summary["family"].eq(ALL).any():
        return []
    families = summary["family"].unique()
    lines = []
    for row, of_row in summary.groupby("row", sort=False):
        lacking = families[~np.isin(families, [*of_row["family"], ALL])]
        if len(lacking):
            lines.append(f"{row!s} (not in {', '.join(lacking)})")
    return [f"No mean over families: {'; '.join(lines)}"] * bool(lines)


def legend(summary: pd.DataFrame) -> list[str]:
    """Return what a reader must know to read the tables."""
    text = template("legend.txt").render(
        seeds=summary["seeds"].max() >= LEAST_SEEDS, families=summary["family"].eq(ALL).any(),
        level=LEVEL, resamples=RESAMPLES, least_seeds=LEAST_SEEDS, kappa=KAPPA,
    )  # fmt: skip
    return text.splitlines()


def markdown_table(shown: Table) -> str:
    """Return one GitHub table; the best method of a column is bold."""
    header = ["row", *map(escape_markdown, map(heading, shown.columns.values()))]
    body = []
    for row, entries in shown.rows.items():
        body.append([escape_markdown(row), *map(_markdown_entry, entries.values())])
    align = ("left", *["right"] * len(shown.columns))
    return tabulate(body, header, tablefmt="pipe", disable_numparse=True, colalign=align)


def _markdown_entry(entry: Entry | None) -> str:
    if entry is None:
        return NONE
    mean = f"**{entry.mean}**" if entry.best else entry.mean
    return f"{mean} {entry.interval}".strip()


def markdown(shown: Document) -> str:
    """Render ``table.md``: the tables of each family, over all families first, then the notes."""
    return template("table.md", pipe=markdown_table).render(shown._asdict())


def latex(shown: Document) -> str:
    """Render ``table.tex``: the same tables as floats for booktabs, then the notes as a list."""
    return template("table.tex").render(shown._asdict(), arrows=_TEX_ARROWS)
