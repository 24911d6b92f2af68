"""All columns by row as one picture, after figures 4 and 5 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd

from eval.report.canvas import INK, freeze, sheet
from eval.report.tables import ARROWS, LAYOUT, Column, best_methods, number
from eval.stats.estimates import PRETRAINED, Estimate, is_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def heatmap(columns: Mapping[str, Estimate], caption: str) -> Figure | None:
    """Draw all columns of the tables by row: colour from the worst row of a column (pale) to its best."""
    groups = {
        group: [c for c in layout if c.name in columns and np.isfinite(columns[c.name].mean).any()]
        for group, layout in LAYOUT.items()
    }
    groups = {group: layout for group, layout in groups.items() if layout}
    if not groups:
        return None
    rows = next(iter(columns.values())).rows
    size = (max(6.5, 2.2 + 0.46 * sum(map(len, groups.values()))), 2.3 + 0.27 * len(rows))
    reading = "Pale to dark: worst to best row of a column; grey: no better direction; bold: the best method"
    figure = sheet("All columns", f"{caption}. {reading}", size)
    axes = figure.subplots()
    left, places, headings = 0.0, [], []
    for group, layout in groups.items():
        shown = [(column, columns[column.name]) for column in layout]
        _heat(axes, shown, left)
        axes.text(left + len(layout) / 2, len(rows) + 0.2, group, ha="center", va="top", weight="bold")
        places += [left + 0.5 + j for j in range(len(layout))]
        headings += [f"{column.label} {ARROWS[measured.direction]}".strip() for column, measured in shown]
        left += len(layout) + 0.3
    axes.xaxis.tick_top()
    axes.set_xticks(places, headings, rotation=40, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.set(xlim=(0, left - 0.3), ylim=(len(rows) + 0.9, 0))
    axes.axhline(sum(not is_method(row) for row in rows), color="white", lw=5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return freeze(figure)


def _heat(axes: Axes, columns: Sequence[tuple[Column, Estimate]], left: float) -> None:
    """Draw one group of columns from x = left, a square for each row and column with its number."""
    rows = columns[0][1].rows
    colours = np.stack([shades(measured) for _, measured in columns], axis=1)
    edges = left + np.arange(len(columns) + 1)
    axes.pcolormesh(edges, np.arange(len(rows) + 1), colours, edgecolor="white", linewidth=1.2)
    for j, (column, measured) in enumerate(columns):
        best = best_methods(pd.Series(measured.mean, index=list(rows)).dropna(), measured.direction)
        for i, (row, value) in enumerate(zip(rows, measured.mean, strict=True)):
            axes.text(
                edges[j] + 0.5,
                i + 0.5,
                number(value, column.decimals, digits=2) if np.isfinite(value) else "–",
                ha="center",
                va="center",
                size=7,
                color="white" if colours[i, j] @ (0.299, 0.587, 0.114) < 0.5 else INK,
                weight="bold" if row in best else "normal",
                in_layout=False,
            )


def shades(measured: Estimate) -> Floats:
    """Return the [R, 3] colours of a column; the pretrained model, which cannot chat, does not stretch the scale."""
    colours = np.full((len(measured.rows), 3), 1.0)
    there = np.isfinite(measured.mean)
    if measured.direction == "info":
        colours[there] = 0.92
        return colours
    values = measured.mean[there] if measured.direction == "up" else -measured.mean[there]
    compared = np.array([row != PRETRAINED for row in measured.rows])[there]
    scale = values[compared] if compared.any() else values
    span = np.ptp(scale)
    good = np.clip((values - scale.min()) / span, 0, 1) if span > 0 else np.full(len(values), 0.5)
    colours[there] = matplotlib.colormaps["YlGnBu"](0.03 + 0.8 * good)[:, :3]
    return colours
