"""The figures of a report, each as PNG and SVG: drawn from the estimates, never from a file of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from eval.report.canvas import STYLE, RowStyles, row_styles, save
from eval.report.fronts import dev_front, front
from eval.report.heatmap import heatmap
from eval.report.overview import overview
from eval.report.profiles import by_layer, tau, tau_of_families
from eval.report.sweeps import sweep_effects, sweep_fronts
from eval.report.training import training, training_of_families
from eval.stats.estimates import ALL, Estimate, ordered

_DRIFT = {
    "drift_anchor_by_layer": "drift from anchor in S_A",
    "drift_base_by_layer": "drift from base in S_A",
}


class Drawn(NamedTuple):
    """A figure as written."""

    family: str
    """The family that it shows, or ``stats.ALL``."""
    path: str
    """Of the PNG, relative to the folder of the figures, with slashes; the SVG stands beside it."""
    title: str


def write(
    folder: Path,
    measured: Mapping[str, Mapping[str, Estimate]],
    scores: pd.DataFrame,
    *,
    notes: Sequence[str],
    selection: pd.DataFrame | None,
    trajectory: pd.DataFrame | None,
    sweeps: pd.DataFrame | None = None,
) -> list[Drawn]:
    """Write ``NAME.png`` and ``NAME.svg`` for each figure that the scores allow, and return what was written.

    The settings of ``sweeps`` (row, sweep, field, value) are lines of two figures of their own, not rows of the
    others. With several families these are the figures over all of them, and those of a family stand in a folder of
    its name, with - for /. The same scores give the same bytes.
    """
    styles = row_styles(_all_rows(measured, selection, sweeps))
    families = [family for family in measured if family != ALL]
    provenance = [note.rstrip(".") for note in notes[:1]]
    drawn = []
    if ALL in measured:
        caption = ". ".join([f"{ALL}: mean over {', '.join(families)}", *provenance])
        made = draw_families(
            measured[ALL],
            families,
            scores,
            styles=styles,
            caption=caption,
            trajectory=trajectory,
            sweeps=sweeps,
        )
        drawn += _save_all(made, ALL, folder, "")
    for family in families:
        made = draw(
            measured[family],
            scores[scores["family"] == family],
            styles=styles,
            caption=". ".join([family, *provenance]),
            selection=_of_family(selection, family),
            trajectory=_of_family(trajectory, family),
            sweeps=sweeps,
        )
        drawn += _save_all(made, family, folder, f"{folder_name(family)}/" if len(families) > 1 else "")
    return drawn


def folder_name(family: str) -> str:
    """Return the name of the folder with the figures of a family."""
    return re.sub(r"[^\w.]+", "-", family)


def _all_rows(
    measured: Mapping[str, Mapping[str, Estimate]], selection: pd.DataFrame | None, sweeps: pd.DataFrame | None
) -> tuple[str, ...]:
    """Return every row that has a style of its own: those that are not settings of a sweep."""
    rows = [row for columns in measured.values() for row in next(iter(columns.values())).rows]
    hidden = set() if sweeps is None else set(sweeps["row"])
    return ordered(
        row for row in [*rows, *([] if selection is None else selection["row"])] if row not in hidden
    )


def _of_family(frame: pd.DataFrame | None, family: str) -> pd.DataFrame | None:
    return frame if frame is None or "family" not in frame else frame[frame["family"] == family]


def _save_all(figures: Mapping[str, Figure], family: str, folder: Path, within: str) -> list[Drawn]:
    (folder / within).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save(figure, folder / within / name)
    return [Drawn(family, f"{within}{name}.png", figure.get_suptitle()) for name, figure in figures.items()]


def draw(
    columns: Mapping[str, Estimate],
    scores: pd.DataFrame,
    *,
    styles: RowStyles,
    caption: str,
    selection: pd.DataFrame | None,
    trajectory: pd.DataFrame | None,
    sweeps: pd.DataFrame | None = None,
) -> dict[str, Figure]:
    """Return name -> figure for one family; a figure whose columns are missing is left out."""
    scores, hidden = _without_swept(scores, sweeps)
    with matplotlib.rc_context(STYLE):
        figures = {
            "sweep_fronts": None if sweeps is None else sweep_fronts(columns, sweeps, caption),
            "sweep_effects": None if sweeps is None else sweep_effects(columns, sweeps, caption),
            "front": front(columns, caption, hidden),
            "heatmap": heatmap(columns, caption),
            "drift_by_layer": by_layer(scores, _DRIFT, styles, "Where the merges leave the anchor", caption),
            "aqi_by_layer": by_layer(
                scores, {"aqi_by_layer": "AQI"}, styles, "Separation of harmful from benign", caption
            ),
            "tau_by_layer": tau(scores, styles, caption),
            "training": None if trajectory is None else training(trajectory, caption),
            "dev_front": None if selection is None else dev_front(selection, styles, caption),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_families(
    columns: Mapping[str, Estimate],
    families: Sequence[str],
    scores: pd.DataFrame,
    *,
    styles: RowStyles,
    caption: str,
    trajectory: pd.DataFrame | None,
    sweeps: pd.DataFrame | None = None,
) -> dict[str, Figure]:
    """Return name -> figure over several families, whose means are ``columns``."""
    scores, hidden = _without_swept(scores, sweeps)
    with matplotlib.rc_context(STYLE):
        figures = {
            "sweep_fronts": None if sweeps is None else sweep_fronts(columns, sweeps, caption),
            "sweep_effects": None if sweeps is None else sweep_effects(columns, sweeps, caption),
            "overview": overview(columns, families, caption),
            "front": front(columns, caption, hidden),
            "heatmap": heatmap(columns, caption),
            "tau_by_layer": tau_of_families(scores, styles, caption),
            "training": None if trajectory is None else training_of_families(trajectory, caption),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _without_swept(scores: pd.DataFrame, sweeps: pd.DataFrame | None) -> tuple[pd.DataFrame, frozenset[str]]:
    """Return the scores of the rows that are not settings of a sweep, and the rows that are."""
    hidden = frozenset() if sweeps is None else frozenset(sweeps["row"])
    return scores[~scores["row"].isin(hidden)], hidden
