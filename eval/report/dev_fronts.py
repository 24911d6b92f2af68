"""Safety against utility of every setting tried on the dev split, and the area under each method's front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import INK, RowStyles, freeze, sheet
from eval.report.fronts import pareto
from eval.stats.claims import OURS
from eval.stats.fronts import Fronts

_READING = (
    "Steps: front of a method over all its settings (dots); large: the selected one. Utility: mean over tasks of the "
    "score relative to the best expert, at most 1. Area: what a method's front dominates in [0, 1] x [0, 1], with its "
    "interval over prompts"
)


def dev_front(
    fronts: Fronts | None, selection: pd.DataFrame | None, styles: RowStyles, caption: str
) -> Figure | None:
    """Draw the fronts of the methods, and beside them the areas under them, the largest first.

    ``selection`` says which settings were selected, one family's; over several families none is marked.
    """
    if fronts is None or fronts.points.empty:
        return None
    areas = fronts.areas.sort_values("area", ascending=False, kind="stable")
    height = max(5.6, 1.6 + 0.24 * len(areas))
    figure = sheet("Fronts of all settings on the dev split", f"{caption}. {_READING}", (12.5, height))
    left, right = figure.subplots(ncols=2, width_ratios=(3, 2))
    for row, of_row in fronts.points.groupby("row", sort=False):
        _front(left, of_row, styles[str(row)])
    _chosen(left, fronts.points, selection, styles)
    left.set(
        xlabel="utility relative to the best expert ↑", ylabel="safety: refusal rate less over-refusal rate ↑"
    )
    left.margins(0.06)
    _bars(right, areas, styles)
    return freeze(figure)


def _front(axes: Axes, points: pd.DataFrame, style: Mapping[str, Any]) -> None:
    x, y = points["utility"].to_numpy(), points["safety"].to_numpy()
    edge = pareto(x, y)
    axes.plot(x, y, ".", ms=4, alpha=0.45, color=style["color"], zorder=style["zorder"])
    axes.plot(x[edge], y[edge], drawstyle="steps-pre", marker="o", ms=3.5, **style)


def _chosen(axes: Axes, points: pd.DataFrame, selection: pd.DataFrame | None, styles: RowStyles) -> None:
    """Mark the selected settings of one family."""
    if selection is None:
        return
    key = ["family", "row", "setting"]
    chosen = selection[selection["selected"].astype(bool)]
    shown = points.merge(chosen[[name for name in key if name in chosen]].astype(str))
    colours = [styles[row]["color"] for row in shown["row"]]
    axes.scatter(shown["utility"], shown["safety"], c=colours, s=70, edgecolor=INK, linewidth=0.8, zorder=6)


def _bars(axes: Axes, areas: pd.DataFrame, styles: RowStyles) -> None:
    places = np.arange(len(areas))
    colours = [styles[row]["color"] for row in areas["row"]]
    axes.hlines(places, areas["ci_low"], areas["ci_high"], color=colours, lw=1.6)
    axes.scatter(areas["area"], places, c=colours, s=34, zorder=3)
    axes.set_yticks(places, areas["row"].tolist(), fontsize=8)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    axes.set(ylim=(len(areas) - 0.4, -0.6), xlabel="area under the front ↑")
    axes.tick_params(axis="y", length=0)
