"""All files that are made of the scores of one experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from eval.columns import BOOTSTRAP
from eval.report import figures, page, tables
from eval.report.layout import Columns, chosen, in_order, write_columns
from eval.report.numbers import WRITTEN
from eval.report.supplement import NOTHING, Supplement
from eval.stats import claims, comparisons, families, fronts
from eval.stats.derived import DERIVED
from eval.stats.estimates import Estimate

_TRAJECTORY = ["family", "model", "seed", "step", "share", "column", "id", "value"]


def write(
    folder: Path,
    scores: pd.DataFrame,
    *,
    columns: Columns,
    title: str,
    notes: Sequence[str],
    against: Sequence[str],
    supplement: Supplement = NOTHING,
) -> None:
    """Write ``summary.csv``, ``columns.csv``, ``comparisons.csv``, ``claims.csv``, tables, page and figures.

    ``scores`` holds one sample a line: family, row, seed, column, id, value, prompt. ``columns`` are those
    that the scorers declare. ``notes`` stand below the tables; the first is the provenance and stands below
    every figure too. ``against`` names the rows that all others are compared with. The folder is the caller's
    to stage: nothing is written if the scores are refused (ValueError for a column that is not declared;
    BadRequest, see ``families.measure_all`` and ``comparisons.comparisons``).
    """
    if unknown := sorted(set(scores["column"]).difference(columns)):
        raise ValueError(f"scores in columns that no scorer declares: {', '.join(unknown)}")
    columns = in_order({**columns, **DERIVED})
    directions = {name: column.direction for name, column in columns.items()}
    scores = scores.assign(direction=scores["column"].map(directions))
    by_layer = [name for name, column in columns.items() if column.by_layer]
    measured = families.measure_all(scores[~scores["column"].isin(by_layer)])
    proof = _proof(measured, columns, against, supplement)
    if supplement.tried is not None:
        supplement = replace(supplement, fronts=fronts.fronts(supplement.tried, directions))
    document = tables.document(proof.summary, columns, title, notes, supplement)
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in proof._asdict().items():
        _csv(frame, folder / f"{name}.csv")
    write_columns(chosen(columns, proof.summary["column"]), folder / "columns.csv")
    _write_supplement(folder, supplement)
    (folder / "table.md").write_text(tables.markdown(document), encoding="utf-8")
    (folder / "table.tex").write_text(tables.latex(document), encoding="utf-8")
    drawn = figures.write(folder / "figures", measured, scores, columns, notes, supplement)
    text = page.html(document, columns, proof, drawn, supplement, folder)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _proof(
    measured: Mapping[str, Mapping[str, Estimate]],
    columns: Columns,
    against: Sequence[str],
    supplement: Supplement,
) -> page.Proof:
    """Return the numbers of the report."""
    decimals = {name: column.decimals for name, column in columns.items()}
    compared = comparisons.comparisons(measured, against, decimals)
    tested = supplement.ledger.claims if supplement.ledger is not None else {}
    judged = claims.judge(measured, tested, decimals)
    return page.Proof(compared, judged, families.summary(measured))


def _write_supplement(folder: Path, supplement: Supplement) -> None:
    if (trajectory := supplement.trajectory) is not None:
        values = ~trajectory["id"].str.startswith(BOOTSTRAP)
        _csv(trajectory.loc[values, _TRAJECTORY], folder / "trajectory.csv")
    if supplement.selection is not None:
        _csv(supplement.selection, folder / "selection.csv")
    if supplement.fronts is not None:
        _csv(supplement.fronts.areas, folder / "fronts.csv")
    if supplement.sweeps is not None:
        _csv(supplement.sweeps, folder / "sweeps.csv")


def _csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False, float_format=f"%{WRITTEN}", lineterminator="\n")
