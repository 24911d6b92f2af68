"""``report.html``: everything of a report on one page that needs no network, next to its ``figures/``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from eval.report.figures import Drawn
from eval.report.layout import Columns, chosen, heading
from eval.report.markup import template
from eval.report.supplement import Supplement
from eval.report.tables import Document, number
from eval.stats.comparisons import MARGIN
from eval.stats.estimates import ALL, is_method
from eval.stats.resampling import LEVEL

_DESCRIPTIVE = "Geometry"  # its comparisons are in ``comparisons.csv`` alone
_SIGNS = {"better": "▲", "worse": "▼", "differs": "◆"}


class Matrix(NamedTuple):
    """How rows and columns differ from one row that all were tested against."""

    against: str
    columns: Columns
    lines: Mapping[tuple[str, str], Mapping[Hashable, Any]]
    """(row, column) -> line of ``comparisons.csv``."""


def html(
    shown: Document, columns: Columns, compared: pd.DataFrame, drawn: Sequence[Drawn], supplement: Supplement
) -> str:
    """Render the page; all that models and users wrote is escaped."""
    matrices = {family: _matrices(of_family, columns) for family, of_family in compared.groupby("family")}
    matched = compared[compared["non_inferior_to_best_expert"].fillna(False).astype(bool)]
    made = template("report.html", heading=heading, number=number, short=_short, is_method=is_method)
    return made.render(
        shown._asdict(), drawn=drawn, matrices=matrices, signs=_SIGNS,
        as_good=set(matched[["family", "row", "column"]].itertuples(index=False, name=None)),
        gates=supplement.gates, selection=supplement.selection, all=ALL, level=LEVEL, margin=MARGIN,
    )  # fmt: skip


def _matrices(compared: pd.DataFrame, columns: Columns) -> list[Matrix]:
    matrices = []
    for against, of_row in compared[compared["test"] != ""].groupby("against", sort=False):
        tested = chosen(columns, of_row["column"]).items()
        shown = {name: column for name, column in tested if column.group not in ("", _DESCRIPTIVE)}
        lines: Any = of_row.set_index(["row", "column"]).to_dict("index")
        matrices.append(Matrix(str(against), shown, lines))
    return matrices


def _short(value: Any) -> str:
    """Return a value of a table that is shown as it is, numbers with three digits."""
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    if pd.isna(value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
