"""The figures of a report, each as PNG and SVG: drawn from the estimates, never from an earlier file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from eval.report.canvas import STYLE, RowStyles, row_styles, save
from eval.report.dev_fronts import dev_front
from eval.report.fronts import front
from eval.report.heatmap import heatmap
from eval.report.layout import Columns
from eval.report.overview import overview
from eval.report.profiles import by_layer, tau, tau_of_families
from eval.report.supplement import NOTHING, Supplement
from eval.report.sweeps import sweep_effects, sweep_fronts
from eval.report.training import training, training_of_families
from eval.stats.estimates import ALL, Estimate, ordered

_DRIFT = "Where the merges leave the anchor", ("drift_anchor_by_layer", "drift_base_by_layer")
_AQI = "Separation of harmful from benign", ("aqi_by_layer",)


class Drawn(NamedTuple):
    """A figure as written."""

    family: str  # the family that it shows, or ``stats.ALL``
    path: str
    """Of the PNG, relative to the folder of the figures, with slashes; the SVG stands beside it."""
    title: str


class Scene(NamedTuple):
    """What figures are drawn of: one family, or all of them."""

    measured: Mapping[str, Estimate]  # by column; over several families their means
    scores: pd.DataFrame
    columns: Columns
    styles: RowStyles
    caption: str
    families: Sequence[str] = ()  # those that the means are over; none for one family
    supplement: Supplement = NOTHING


def write(
    folder: Path,
    measured: Mapping[str, Mapping[str, Estimate]],
    scores: pd.DataFrame,
    columns: Columns,
    notes: Sequence[str],
    supplement: Supplement,
) -> list[Drawn]:
    """Write ``NAME.png`` and ``NAME.svg`` for each figure that the scores allow.

    With several families these are the figures over all of them, and those of a family stand in a folder of
    its name, with - for /. The same scores give the same bytes.
    """
    styles = row_styles(_styled_rows(measured, supplement))
    families = [family for family in measured if family != ALL]
    drawn = []
    for family, of_family in measured.items():
        if family == ALL:
            name, within = f"{ALL}: mean over {', '.join(families)}", ""
            parts, own, beside = families, scores, supplement.over_all(ALL)
        else:
            name, within = family, ""
            if len(families) > 1:
                within = re.sub(r"[^\w.]+", "-", family) + "/"
            parts, own, beside = [], scores[scores["family"] == family], supplement.of(family)
        scene = Scene(
            measured=of_family, scores=own, columns=columns, styles=styles,
            caption=". ".join([name, *notes[:1]]).rstrip("."), families=parts, supplement=beside,
        )  # fmt: skip
        (folder / within).mkdir(parents=True, exist_ok=True)
        for stem, figure in draw(scene).items():
            save(figure, folder / within / stem)
            drawn.append(Drawn(family, f"{within}{stem}.png", figure.get_suptitle()))
    return drawn


def _styled_rows(measured: Mapping[str, Mapping[str, Estimate]], supplement: Supplement) -> list[str]:
    rows: list[str] = []
    for columns in measured.values():
        rows += next(iter(columns.values())).rows
    if supplement.selection is not None:
        rows += supplement.selection["row"].tolist()
    return [row for row in ordered(rows) if row not in supplement.swept]


def draw(scene: Scene) -> dict[str, Figure]:
    """Return name -> figure of a scene; a figure whose columns are missing is left out."""
    measured, columns, caption, sweeps = scene.measured, scene.columns, scene.caption, scene.supplement.sweeps
    with matplotlib.rc_context(STYLE):
        figures = {
            "sweep_fronts": sweep_fronts(measured, sweeps, caption),
            "sweep_effects": sweep_effects(measured, columns, sweeps, caption),
            "heatmap": heatmap(measured, columns, caption),
        }
        if sweeps is None:  # the other rows of a sweep are those of its main experiment, which draws them
            figures |= _of_rows(scene)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _of_rows(scene: Scene) -> dict[str, Figure | None]:
    """Return the figures of rows that are compared, as an experiment without sweeps has them."""
    measured, scores, columns, styles, caption, families, beside = scene
    figures = {
        "overview": overview(measured, columns, families, caption),
        "front": front(measured, caption),
        "dev_front": dev_front(beside.fronts, None if families else beside.selection, styles, caption),
    }
    if families:
        figures["tau_by_layer"] = tau_of_families(scores, styles, caption)
        figures["training"] = training_of_families(beside.trajectory, caption)
    else:
        figures["drift_by_layer"] = by_layer(scores, columns, styles, *_DRIFT, caption)
        figures["aqi_by_layer"] = by_layer(scores, columns, styles, *_AQI, caption)
        figures["tau_by_layer"] = tau(scores, styles, caption)
        figures["training"] = training(beside.trajectory, caption)
    return figures
