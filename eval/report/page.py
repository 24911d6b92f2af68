"""``report.html``: everything of a report on one page, its figures inside, that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from alignmerge.engine.store import MANIFEST
from eval.report.figures import Drawn
from eval.report.layout import Columns, chosen, heading
from eval.report.ledger import claim_lines, entries
from eval.report.markup import template
from eval.report.numbers import number
from eval.report.supplement import Supplement
from eval.report.tables import Document
from eval.stats.claims import FAILS, HOLDS
from eval.stats.comparisons import MARGIN
from eval.stats.estimates import ALL, is_method
from eval.stats.resampling import LEVEL

_DESCRIPTIVE = "Geometry"  # its comparisons are in ``comparisons.csv`` alone
_SHADES = {HOLDS: "better", FAILS: "worse"}
_SIGNS = {"better": "▲", "worse": "▼", "differs": "◆"}


class Matrix(NamedTuple):
    """How rows and columns differ from one row that all were tested against."""

    against: str
    columns: Columns
    lines: Mapping[tuple[str, str], Mapping[Hashable, Any]]
    """(row, column) -> line of ``comparisons.csv``."""


class Proof(NamedTuple):
    """The numbers of a report: the frames of ``comparisons.csv``, ``claims.csv`` and ``summary.csv``."""

    comparisons: pd.DataFrame
    claims: pd.DataFrame
    summary: pd.DataFrame


def html(
    shown: Document,
    columns: Columns,
    proof: Proof,
    drawn: Sequence[Drawn],
    supplement: Supplement,
    folder: Path,
) -> str:
    """Render the page of ``folder``, which links to the files there; all that models and users wrote is escaped.

    The manifest is not there yet: whoever publishes the folder writes it.
    """
    compared, ledger = proof.comparisons, []
    if supplement.ledger is not None:
        ledger = entries(supplement.ledger, proof.summary, proof.claims, columns)
    matrices = {family: _matrices(of_family, columns) for family, of_family in compared.groupby("family")}
    matched = compared[compared["non_inferior_to_best_expert"].fillna(False).astype(bool)]
    files = [MANIFEST, *sorted(path.name for path in folder.iterdir() if path.is_file())]
    pictures = {one.path: _inline(folder / "figures" / one.path) for one in drawn}
    made = template("report.html", heading=heading, number=number, short=_short, is_method=is_method)
    return made.render(
        shown._asdict(), drawn=drawn, matrices=matrices, signs=_SIGNS, shades=_SHADES, files=files, pictures=pictures,
        as_good=set(matched[["family", "row", "column"]].itertuples(index=False, name=None)),
        claims={family: claim_lines(of, columns) for family, of in proof.claims.groupby("family", sort=False)},
        ledger=ledger, gates=supplement.gates, selection=supplement.selection, all=ALL, level=LEVEL, margin=MARGIN,
    )  # fmt: skip


def _inline(picture: Path) -> str:
    """Return a PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


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
