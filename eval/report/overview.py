"""The main columns of every row, averaged over families, after figure 4 of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.report.canvas import FAMILY_COLOURS, INK, colour_of, freeze, of_methods, sheet
from eval.report.layout import Columns, chosen, grouped, heading
from eval.report.tables import best_methods
from eval.stats.claims import OURS
from eval.stats.estimates import Estimate

_READING = (
    "Circles: mean over families with its interval, filled for methods, ringed: best; dots below: families"
)


def overview(
    measured: Mapping[str, Estimate], columns: Columns, families: Sequence[str], caption: str
) -> Figure | None:
    """Draw the mean over families of the main columns with its interval, and each family as a dot."""
    main = [name for name in measured if columns[name].main]
    groups = grouped(chosen(columns, main))
    if not groups or not families:
        return None
    rows = next(iter(measured.values())).rows
    height = 1.3 + len(groups) * (0.75 + 0.19 * len(rows))
    figure = sheet("Main columns over all families", f"{caption}. {_READING}", (12.5, height))
    axes = figure.subplots(len(groups), max(map(len, groups.values())), sharey=True, squeeze=False)
    for line, shown in zip(axes, groups.values(), strict=True):
        for panel, name in zip(line, shown, strict=False):
            _draw(panel, measured[name])
            panel.set_title(heading(shown[name]), fontsize=9, loc="left")
        setp(line[len(shown) :], visible=False)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    dots = []
    for family, colour in zip(families, itertools.cycle(FAMILY_COLOURS), strict=False):
        dots.append(Line2D([], [], ls="", marker="o", ms=5, mew=0, color=colour, label=family))
    figure.legend(handles=dots, loc="outside upper right", ncols=len(dots), fontsize=8)
    return freeze(figure)


def _draw(axes: Axes, measured: Estimate) -> None:
    rows, methods = measured.rows, of_methods(measured.rows)
    best = best_methods(pd.Series(measured.mean, index=list(rows)).dropna(), measured.direction)
    y = np.arange(len(rows))
    for part, colour in zip(measured.parts, itertools.cycle(FAMILY_COLOURS), strict=False):
        axes.plot(part.mean, y + 0.27, "o", color=colour, ms=2.8, zorder=2, mew=0)
    axes.hlines(y, measured.low, measured.high, color="#555555", lw=1.3, zorder=3)
    for i, (row, mean) in enumerate(zip(rows, measured.mean, strict=True)):
        colour = colour_of(row)
        axes.plot(mean, i, "o", ms=5, mec=colour, mfc=colour if methods[i] else "white", zorder=4)
        if row in best:
            axes.plot(mean, i, "o", ms=9, mec=INK, mfc="none", mew=0.9, zorder=4)
    axes.axhline(np.count_nonzero(~methods) - 0.5, color="#bbbbbb", lw=0.8)
    axes.set_yticks(y, rows, fontsize=7.5)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
