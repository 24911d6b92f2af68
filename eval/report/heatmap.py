"""All columns by row as one picture, after figures 4 and 5 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import INK, Floats, freeze, of_methods, sheet
from eval.report.layout import Columns, chosen, grouped, heading
from eval.report.numbers import number
from eval.report.tables import NONE, best_methods
from eval.stats.estimates import PRETRAINED, Estimate

_LUMA = (0.299, 0.587, 0.114)  # how light red, green and blue are to the eye


def heatmap(measured: Mapping[str, Estimate], columns: Columns, caption: str) -> Figure | None:
    """Draw all columns of the tables by row, pale for the worst row of a column to dark for its best."""
    names = [name for name, column in measured.items() if np.isfinite(column.mean).any()]
    groups = grouped(chosen(columns, names))
    if not groups:
        return None
    rows = next(iter(measured.values())).rows
    size = (max(6.5, 2.2 + 0.46 * sum(map(len, groups.values()))), 2.3 + 0.27 * len(rows))
    reading = "Pale to dark: worst to best row of a column; grey: no better direction; bold: the best method"
    figure = sheet("All columns", f"{caption}. {reading}", size)
    axes = figure.subplots()
    left, places, headings = 0.0, list[float](), list[str]()
    for group, shown in groups.items():
        _heat(axes, measured, shown, left)
        axes.text(left + len(shown) / 2, len(rows) + 0.2, group, ha="center", va="top", weight="bold")
        places.extend(left + 0.5 + np.arange(len(shown)))
        headings.extend(map(heading, shown.values()))
        left += len(shown) + 0.3
    axes.xaxis.tick_top()
    axes.set_xticks(places, headings, rotation=40, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.set(xlim=(0, left - 0.3), ylim=(len(rows) + 0.9, 0))
    axes.axhline(int((~of_methods(rows)).sum()), color="white", lw=5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return freeze(figure)


def _heat(axes: Axes, measured: Mapping[str, Estimate], columns: Columns, left: float) -> None:
    shown = list(map(measured.__getitem__, columns))
    colours = np.stack(list(map(shades, shown)), axis=1)
    ink = np.where(colours @ _LUMA < 0.5, "white", INK)
    edges = left + np.arange(len(columns) + 1)
    axes.pcolormesh(edges, np.arange(len(ink) + 1), colours, edgecolor="white", linewidth=1.2)
    style: dict[str, Any] = {"ha": "center", "va": "center", "size": 7, "in_layout": False}
    for j, (column, declared) in enumerate(zip(shown, columns.values(), strict=True)):
        means = pd.Series(column.mean, index=list(column.rows)).dropna()
        best = best_methods(means, column.direction)
        for i, row in enumerate(column.rows):
            text = number(means[row], declared.decimals, digits=2) if row in means else NONE
            weight = "bold" if row in best else "normal"
            axes.text(edges[j] + 0.5, i + 0.5, text, color=ink[i, j], weight=weight, **style)


def shades(measured: Estimate) -> Floats:
    """Return the [R, 3] colours of a column; the pretrained model does not stretch the scale."""
    colours = np.full((len(measured.rows), 3), 1.0)
    there = np.isfinite(measured.mean)
    if measured.direction == "info":
        colours[there] = 0.92
        return colours
    values = measured.mean[there]
    if measured.direction == "down":
        values = -values
    compared = (np.array(measured.rows) != PRETRAINED)[there]
    scale = values[compared] if compared.any() else values
    span = np.ptp(scale)
    good = np.full(len(values), 0.5)
    if span > 0:
        good = np.clip((values - scale.min()) / span, 0, 1)
    colours[there] = matplotlib.colormaps["YlGnBu"](0.03 + 0.8 * good)[:, :3]
    return colours
