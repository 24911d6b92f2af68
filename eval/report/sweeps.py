"""Swept rows: their fronts, to compare methods at equal utility, and what each swept value does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.columns import Column
from eval.report.canvas import INK, Floats, Ints, Mask, RowStyles, freeze, of_methods, row_styles, sheet
from eval.report.fronts import identity_markers, labels, utility, utility_label
from eval.report.labels import label_points
from eval.report.layout import Columns, heading
from eval.stats.estimates import PRETRAINED, Estimate

HEIGHTS = {"refusal_rate": "refusal rate on unsafe prompts", "aqi": "AQI"}  # over utility, in the fronts
EFFECTS = ("refusal_rate", "over_refusal_rate", "aqi", "utility", "drift_anchor")  # over the swept value
_UTILITY = Column("mean utility", "Utility", "up")
_DECADE = 10.0  # largest over smallest value above 0 from which a swept value is drawn on a log scale
_MARGIN = 0.16  # how far 0 (on a log scale), infinity and null stand apart, in widths of the others
_LABELLED = 6  # the most methods beside the swept ones that are named in the fronts
_OTHER: dict[str, Any] = {"color": INK, "ms": 6, "mec": "white", "mew": 0.6, "ls": "", "zorder": 4.5}
_READING = "Lines join the settings of a row in their order, from the small to the large point"
_PARTS = "; pale lines: families. AQI has no common scale across architectures"


class Line(NamedTuple):
    """One swept row with N settings in the order of the grid, those without a measured row left out."""

    sweep: str
    field: str
    values: Floats  # [N]; NaN is null
    at: Ints  # [N], places of the settings among the rows


class Ruler(NamedTuple):
    """Where swept values stand on an axis."""

    values: Floats  # [V], in order; NaN, for null, comes last
    places: Floats  # [V], rising
    breaks: Sequence[float]
    """Between the values that have a place on the scale and those that have none."""

    def place(self, values: Floats) -> Floats:
        """Return where some of the values stand."""
        return self.places[np.searchsorted(self.values, values)]

    @property
    def labels(self) -> list[str]:
        """The values in short."""
        return list(map(short, self.values))


def lines_of(sweeps: pd.DataFrame, rows: Sequence[str]) -> list[Line]:
    """Return the swept rows of a supplement that have at least one of ``rows``."""
    there = sweeps[sweeps["row"].isin(list(rows))]
    lines = []
    for (sweep, field), of_line in there.groupby(["sweep", "field"], sort=False):
        at = pd.Index(rows).get_indexer(pd.Index(of_line["row"]))
        lines.append(Line(str(sweep), str(field), of_line["value"].to_numpy(dtype=np.float64), at))
    return lines


def ruler(values: Floats) -> Ruler:
    """Place swept values: in logarithms where those above 0 span a decade and none is below 0.

    What has no place there stands beside it: 0 on a log scale to the left, infinity and null to the right.
    """
    values = np.unique(values)  # rising, infinity and NaN last
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    beyond = np.arange(1.0, 1 + len(values) - len(finite))
    scaled, breaks = finite, list[float]()
    if len(positive) and positive[-1] / positive[0] >= _DECADE and finite[0] >= 0:
        scaled = np.log10(positive)
    if not len(scaled):
        return Ruler(values, beyond - 1, breaks)
    gap = 1.0
    if len(scaled) > 1:
        gap = _MARGIN * float(np.ptp(scaled))
    places: Floats = np.concatenate([scaled, scaled[-1] + gap * beyond])
    if len(places) < len(values):
        breaks.append(scaled[0] - gap / 2)
        places = np.insert(places, 0, scaled[0] - gap)
    if len(beyond):
        breaks.append(scaled[-1] + gap / 2)
    return Ruler(values, places, breaks)


def short(value: float) -> str:
    """Write a swept value; NaN is null."""
    if math.isnan(value):
        return "null"
    return "∞" if math.isinf(value) else f"{value:g}"


def sweep_fronts(measured: Mapping[str, Estimate], sweeps: pd.DataFrame | None, caption: str) -> Figure | None:
    """Draw refusals and AQI over utility: swept rows as lines through their settings, others as points."""
    x = utility(measured)
    heights = [measured[name] for name in HEIGHTS if name in measured]
    if sweeps is None or x is None or not heights or not (lines := lines_of(sweeps, x.rows)):
        return None
    reading = f"{_READING}; bars: intervals{_PARTS * bool(x.parts)}"
    styles = row_styles(sweeps["sweep"].unique().tolist())
    size = (3.0 + 4.8 * len(heights), max(5.6, 1.4 + 0.34 * len(lines)))
    figure = sheet("Fronts of the swept rows", f"{caption}. {reading}", size)
    axes = figure.subplots(ncols=len(heights), squeeze=False)[0]
    others = np.isfinite(x.mean) & (np.array(x.rows) != PRETRAINED)
    others[np.concatenate([line.at for line in lines])] = False
    methods = of_methods(x.rows)
    for panel, y in zip(axes, heights, strict=True):
        for line in lines:
            _front(panel, x, y, line, styles[line.sweep])
        identity_markers(panel, x, y, np.flatnonzero(others & ~methods))
        panel.plot(x.mean[others & methods], y.mean[others & methods], "X", **_OTHER)
        panel.set(xlabel=utility_label(measured), ylabel=f"{HEIGHTS[y.name]} ↑")
        panel.margins(0.08)
    _legend(figure, lines, styles, others=bool((others & methods).any()))
    for panel, y in zip(axes, heights, strict=True):
        label_points(figure, panel, _labels(x, y, others))
    return figure


def _legend(figure: Figure, lines: Sequence[Line], styles: RowStyles, *, others: bool) -> None:
    axes = figure.axes[0]
    handles, entries = [], []
    for line in lines:
        handles += axes.plot([], [], **styles[line.sweep], marker="o", ms=5)
        ends = " … ".join(map(short, line.values[[0, -1]]))
        entries.append(f"{line.sweep}\n{line.field} {ends}")
    if others:
        handles += axes.plot([], [], "X", **_OTHER)
        entries.append("rows that are not swept")
    figure.legend(handles, entries, loc="outside right center", fontsize=7.5, handlelength=2.8)


def _labels(x: Estimate, y: Estimate, others: Mask) -> list[tuple[str, float, float, str]]:
    shown, methods = others & np.isfinite(y.mean), of_methods(x.rows)
    if np.count_nonzero(shown & methods) > _LABELLED:
        shown &= ~methods  # theirs would cover the lines
    return labels(x, y, np.flatnonzero(shown))


def _front(axes: Axes, x: Estimate, y: Estimate, line: Line, style: Mapping[str, Any]) -> None:
    """Draw one line with its points, which grow along it, in light interval bars."""
    at, colour = line.at, style["color"]
    bars: dict[str, Any] = {"color": colour, "lw": 0.7, "alpha": 0.28, "zorder": 1}
    axes.hlines(y.mean[at], x.low[at], x.high[at], **bars)
    axes.vlines(x.mean[at], y.low[at], y.high[at], **bars)
    for own_x, own_y in zip(x.parts, y.parts, strict=True):
        axes.plot(own_x.mean[at], own_y.mean[at], color=colour, lw=0.6, alpha=0.2, zorder=0.8)
    axes.plot(x.mean[at], y.mean[at], **style, alpha=0.85)
    points: dict[str, Any] = {"s": np.linspace(6, 46, len(at)), "edgecolor": "white", "linewidth": 0.5}
    axes.scatter(x.mean[at], y.mean[at], color=colour, zorder=4, **points)


def sweep_effects(
    measured: Mapping[str, Estimate], columns: Columns, sweeps: pd.DataFrame | None, caption: str
) -> Figure | None:
    """Draw what each swept field does to the columns of EFFECTS: a line of panels for each field."""
    both = {**measured, "utility": utility(measured)}
    shown = [column for column in map(both.get, EFFECTS) if column is not None]
    if sweeps is None or not shown or not (lines := lines_of(sweeps, shown[0].rows)):
        return None
    styles = row_styles(sweeps["sweep"].unique().tolist())
    fields: dict[str, list[Line]] = {}
    for line in lines:
        fields.setdefault(line.field, []).append(line)
    reading = f"Bands: intervals{_PARTS * bool(shown[0].parts)}"
    size = (1.9 + 2.35 * len(shown), 1.5 + 2.2 * len(fields))
    figure = sheet(f"What a swept value does: {', '.join(fields)}", f"{caption}. {reading}", size)
    axes = figure.subplots(len(fields), len(shown), sharey="col", sharex="row", squeeze=False)
    for across, of_field in zip(axes, fields.values(), strict=True):
        _effects(across, shown, of_field, styles)
    for panel, column in zip(axes[0], shown, strict=True):
        panel.set_title(heading(columns.get(column.name, _UTILITY)), fontsize=9, loc="left")
    return freeze(figure)


def _effects(
    panels: Sequence[Axes], columns: Sequence[Estimate], lines: Sequence[Line], styles: RowStyles
) -> None:
    scale = ruler(np.concatenate([line.values for line in lines]))
    for panel, column in zip(panels, columns, strict=True):
        for line in lines:
            _effect(panel, column, line, scale, styles[line.sweep])
        panel.set_xticks(scale.places, scale.labels, fontsize=7)
        for place in scale.breaks:
            panel.axvline(place, color="#bbbbbb", lw=0.7, ls=":", zorder=0.5)
        panel.locator_params(axis="y", nbins=5)
        panel.tick_params(axis="y", labelsize=7.5)
        panel.set_xlabel(lines[0].field, fontsize=8)
    last, handles = panels[-1], []
    for line in lines:
        handles += last.plot([], [], **styles[line.sweep])
    last.legend(handles=handles, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _effect(axes: Axes, column: Estimate, line: Line, scale: Ruler, style: Mapping[str, Any]) -> None:
    """Draw one row over its swept value, by rising value: mean in a band, and each family behind."""
    x = scale.place(line.values)
    order = np.argsort(x)
    x, at = x[order], line.at[order]
    for part in column.parts:
        axes.plot(x, part.mean[at], color=style["color"], lw=0.7, alpha=0.25, zorder=1)
    band: dict[str, Any] = {"color": style["color"], "alpha": 0.18, "lw": 0, "zorder": 1}
    axes.fill_between(x, column.low[at], column.high[at], **band)
    axes.plot(x, column.mean[at], **style, marker="o", ms=3)
