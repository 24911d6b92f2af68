"""All files that are made of the scores of one experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from eval.columns import BOOTSTRAP
from eval.report import figures, page, tables
from eval.stats import comparisons
from eval.stats import estimates as stats

_TRAJECTORY = ["family", "seed", "step", "share", "column", "id", "value"]


def write(
    folder: Path,
    scores: pd.DataFrame,
    *,
    title: str,
    notes: Sequence[str],
    against: Sequence[str],
    selection: pd.DataFrame | None = None,
    trajectory: pd.DataFrame | None = None,
    gates: pd.DataFrame | None = None,
    sweeps: pd.DataFrame | None = None,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Write ``summary.csv``, ``comparisons.csv``, ``table.md``, ``table.tex``, ``report.html`` and figures.

    ``scores`` holds one sample a line: family, row, seed, column, id, value, prompt, direction. ``notes`` stand
    below the tables; the first is the provenance and stands below every figure too. ``against`` names the rows
    that all others are compared with. The others are optional: ``selection`` has one
    setting a line, as tried on the dev split: row, setting, selected and the dev values (with ``family`` where
    there are several); ``trajectory`` has the scores of the checkpoints of the anchors' training: family, seed,
    step (0 is theta_IT), share of the last step, column, id, value; ``gates`` has one gate a line: its texts and
    numbers, and whether it was ``met``; ``marks`` (family -> text) is what headings say of missed gates;
    ``sweeps`` (``sweeps.csv``) has one setting of a swept row a line:
    row (as in the scores), sweep, field, value (NaN is null). The folder is the caller's to stage: nothing is written
    if the scores are refused (BadRequest, see ``stats.measure_all`` and ``comparisons.comparisons``).
    """
    measured = stats.measure_all(scores)
    compared = comparisons.comparisons(measured, against)
    summary = stats.summary(measured)
    folder.mkdir(parents=True, exist_ok=True)
    _csv(summary, folder / "summary.csv")
    _csv(compared, folder / "comparisons.csv")
    if selection is not None:
        _csv(selection, folder / "selection.csv")
    if trajectory is not None:
        _csv(
            trajectory.loc[~trajectory["id"].str.startswith(BOOTSTRAP), _TRAJECTORY], folder / "trajectory.csv"
        )
    if sweeps is not None:
        _csv(sweeps, folder / "sweeps.csv")
    (folder / "table.md").write_text(tables.markdown(summary, title, notes, marks or {}), encoding="utf-8")
    (folder / "table.tex").write_text(tables.latex(summary, title, notes, marks or {}), encoding="utf-8")
    drawn = figures.write(
        folder / "figures",
        measured,
        scores,
        notes=notes,
        selection=selection,
        trajectory=trajectory,
        sweeps=sweeps,
    )
    text = page.html(
        summary, compared, drawn, title=title, notes=notes, selection=selection, gates=gates, marks=marks or {}
    )
    (folder / "report.html").write_text(text, encoding="utf-8")


def _csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
