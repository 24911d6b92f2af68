"""The main columns of every row, averaged over families, after figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from eval.report.canvas import FAMILY_COLOURS, GREY, INK, OURS, OURS_COLOUR, freeze, sheet
from eval.report.tables import ARROWS, LAYOUT, Column, best_methods
from eval.stats.estimates import Estimate, is_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN = {
    "Alignment": ("aqi", "refusal_rate", "over_refusal_rate", "judge_score", "toxicity_rate"),
    "Utility": ("instruction_following", "reasoning", "helpfulness", "delta_utility"),
}


def overview(columns: Mapping[str, Estimate], families: Sequence[str], caption: str) -> Figure | None:
    """Draw the mean over families of the columns of MAIN with its interval, and each family as a dot, row by row."""
    by_name = {column.name: column for layout in LAYOUT.values() for column in layout}
    groups = {group: [by_name[name] for name in names if name in columns] for group, names in MAIN.items()}
    groups = {group: shown for group, shown in groups.items() if shown}
    if not groups:
        return None
    rows = next(iter(columns.values())).rows
    height = 1.3 + len(groups) * (0.75 + 0.19 * len(rows))
    reading = (
        "Circles: mean over families with its interval, filled for methods, red: best; dots below: families"
    )
    figure = sheet("Alignment and utility over all families", f"{caption}. {reading}", (12.5, height))
    width = max(map(len, groups.values()))
    axes = figure.subplots(len(groups), width, sharey=True, squeeze=False)
    for line, shown in zip(axes, groups.values(), strict=True):
        for panel, column in zip(line, shown, strict=False):
            _draw(panel, columns[column.name], column)
        for panel in line[len(shown) :]:
            panel.set_visible(False)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    _dots_legend(figure, families)
    return freeze(figure)


def _draw(axes: Axes, measured: Estimate, column: Column) -> None:
    rows = measured.rows
    best = best_methods(pd.Series(measured.mean, index=list(rows)).dropna(), measured.direction)
    y = np.arange(len(rows))
    for place, part in enumerate(measured.parts):
        colour = FAMILY_COLOURS[place % len(FAMILY_COLOURS)]
        axes.plot(part.mean, y + 0.27, "o", color=colour, ms=2.8, zorder=2, mew=0)
    axes.hlines(y, measured.low, measured.high, color="#555555", lw=1.3, zorder=3)
    for i, row in enumerate(rows):
        edge = OURS_COLOUR if row in best else INK if is_method(row) else GREY
        axes.plot(measured.mean[i], i, "o", ms=5, mec=edge, mfc=edge if is_method(row) else "white", zorder=4)
    axes.axhline(sum(not is_method(row) for row in rows) - 0.5, color="#bbbbbb", lw=0.8)
    axes.set_title(f"{column.label} {ARROWS[measured.direction]}".strip(), fontsize=9, loc="left")
    axes.set_yticks(y, rows, fontsize=7.5)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)


def _dots_legend(figure: Figure, families: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    dots = [
        Line2D(
            [], [], ls="", marker="o", ms=5, mew=0, color=FAMILY_COLOURS[i % len(FAMILY_COLOURS)], label=family
        )
        for i, family in enumerate(families)
    ]
    figure.legend(handles=dots, loc="outside upper right", ncols=len(dots), frameon=False, fontsize=8)
