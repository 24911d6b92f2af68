"""Swept rows: their fronts, so that methods are compared at equal utility, and what each swept value does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eval.report.canvas import GREY, INK, freeze, plain, sheet, sweep_styles
from eval.report.fronts import identity_markers, skills, utility
from eval.report.labels import label_points
from eval.report.tables import ARROWS
from eval.stats.estimates import PRETRAINED, Estimate, is_method

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

HEIGHTS = {"refusal_rate": "refusal rate on unsafe prompts", "aqi": "AQI"}
"""What stands over utility in the fronts."""
EFFECTS = ("refusal_rate", "over_refusal_rate", "aqi", "utility", "drift_anchor")
"""What is drawn over the swept value."""
_LABELS = {
    "refusal_rate": "refusal rate",
    "over_refusal_rate": "over-refusal rate",
    "aqi": "AQI",
    "utility": "mean utility",
    "drift_anchor": "drift from anchor",
}
_DECADE = 10.0
"""Largest over smallest value above 0 from which a swept value is drawn on a log scale."""
_MARGIN = 0.16
"""How far 0 (on a log scale), infinity and null stand from their neighbours, in widths of all other values."""
_LABELLED = 6
"""The most methods beside the swept ones that are named in the fronts."""
_OTHER: dict[str, Any] = {"color": INK, "ms": 6, "mec": "white", "mew": 0.6, "ls": "", "zorder": 4.5}
_NO_SCALE = "AQI has no common scale across architectures"


class Line(NamedTuple):
    """One swept row with N settings in the order of the grid, those without a measured row left out."""

    sweep: str
    field: str
    values: Floats
    """[N]; NaN is null."""
    at: NDArray[np.int64]
    """[N], places of the settings among the rows."""


class Ruler(NamedTuple):
    """Where swept values stand on an axis."""

    values: Floats
    """[V], in order; NaN, for null, comes last."""
    places: Floats
    """[V], rising."""
    breaks: Sequence[float]
    """Between the values that have a place on the scale and those that have none."""

    def place(self, value: float) -> float:
        """Return where a value stands."""
        same = np.isnan(self.values) if math.isnan(value) else self.values == value
        return float(self.places[same][0])

    @property
    def labels(self) -> list[str]:
        """The values in short."""
        return [short(value) for value in self.values]


def lines_of(sweeps: pd.DataFrame, rows: Sequence[str]) -> list[Line]:
    """Return the swept rows that have at least one of ``rows``; ``sweeps`` has row, sweep, field and value."""
    there = sweeps[sweeps["row"].isin(list(rows))]
    return [
        Line(
            str(sweep),
            str(of["field"].iloc[0]),
            of["value"].to_numpy(dtype=np.float64),
            np.array([rows.index(row) for row in of["row"]], dtype=np.int64),
        )
        for sweep, of in there.groupby("sweep", sort=False)
    ]


def ruler(values: Floats) -> Ruler:
    """Place swept values: in logarithms where those above 0 span a decade and none is below 0, else as they are.

    What has no place on the scale stands beside it: 0 on a log scale to the left, infinity and null to the right.
    """
    known = np.unique(values[~np.isnan(values)])  # sorted
    finite = known[np.isfinite(known)]
    positive = finite[finite > 0]
    log = len(positive) > 0 and positive[-1] / positive[0] >= _DECADE and not (finite < 0).any()
    scaled = np.log10(positive) if log else finite
    gap = _MARGIN * float(np.ptp(scaled)) if len(scaled) > 1 else 1.0
    first, last = (float(scaled[0]), float(scaled[-1])) if len(scaled) else (0.0, -gap)
    left = [first - gap] if log and 0.0 in finite else []
    beyond = int(np.isinf(known).sum()) + int(np.isnan(values).any())
    right = [last + gap * (i + 1) for i in range(beyond)]
    breaks = [first - gap / 2] * len(left) + [last + gap / 2] * bool(right and len(scaled))
    null = [math.nan] * int(np.isnan(values).any())
    return Ruler(np.array([*known, *null]), np.array([*left, *scaled, *right]), breaks)


def short(value: float) -> str:
    """Write a swept value; NaN is null."""
    return "null" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:g}"


def sweep_fronts(columns: Mapping[str, Estimate], sweeps: pd.DataFrame, caption: str) -> Figure | None:
    """Draw refusals and AQI over utility: a line through the settings of each swept row, other rows as points."""
    x = utility(columns)
    heights = [columns[name] for name in HEIGHTS if name in columns]
    if x is None or not heights or not (lines := lines_of(sweeps, x.rows)):
        return None
    note = f"; pale lines: families. {_NO_SCALE}" if x.parts else ""
    reading = (
        "Lines join the settings of a row in their order, from the small to the large point; bars: intervals"
    )
    styles = sweep_styles(sweeps["sweep"].unique().tolist())
    size = (3.0 + 4.8 * len(heights), max(5.6, 1.4 + 0.34 * len(lines)))
    figure = sheet("Fronts of the swept rows", f"{caption}. {reading}{note}", size)
    axes = figure.subplots(ncols=len(heights), squeeze=False)[0]
    swept = {at for line in lines for at in line.at}
    others = [
        i for i, row in enumerate(x.rows) if i not in swept and np.isfinite(x.mean[i]) and row != PRETRAINED
    ]
    for panel, y in zip(axes, heights, strict=True):
        for line in lines:
            _front(panel, x, y, line, styles[line.sweep])
        _others(panel, x, y, others)
        panel.set(
            xlabel=f"mean of {' and '.join(map(plain, skills(columns)))} ↑", ylabel=f"{HEIGHTS[y.name]} ↑"
        )
        panel.margins(0.08)
    handles = [axes[0].plot([], [], **styles[line.sweep], marker="o", ms=5)[0] for line in lines]
    entries = [
        f"{line.sweep}\n{line.field} {short(line.values[0])} … {short(line.values[-1])}" for line in lines
    ]
    if any(is_method(x.rows[i]) for i in others):
        handles += axes[0].plot([], [], "X", **_OTHER)
        entries.append("rows that are not swept")
    figure.legend(handles, entries, loc="outside right center", frameon=False, fontsize=7.5, handlelength=2.8)
    for panel, y in zip(axes, heights, strict=True):
        label_points(figure, panel, _labels(x, y, others))
    return figure


def _others(axes: Axes, x: Estimate, y: Estimate, others: Sequence[int]) -> None:
    """Draw the rows that are not swept."""
    identity_markers(axes, x, y, [i for i in others if not is_method(x.rows[i])])
    methods = [i for i in others if is_method(x.rows[i])]
    axes.plot(x.mean[methods], y.mean[methods], "X", **_OTHER)


def _labels(x: Estimate, y: Estimate, others: Sequence[int]) -> list[tuple[str, float, float, str]]:
    """Return the labels of the rows that are not swept; many methods would cover the lines with theirs."""
    shown = [i for i in others if np.isfinite(y.mean[i])]
    methods = [i for i in shown if is_method(x.rows[i])]
    identity = [i for i in shown if not is_method(x.rows[i])]
    named = [(i, GREY) for i in identity] + [(i, INK) for i in methods if len(methods) <= _LABELLED]
    return [(x.rows[i], float(x.mean[i]), float(y.mean[i]), colour) for i, colour in named]


def _front(axes: Axes, x: Estimate, y: Estimate, line: Line, style: Mapping[str, Any]) -> None:
    """Draw one line with its points, which grow along it, in light interval bars."""
    at, colour = line.at, style["color"]
    bars: dict[str, Any] = {"color": colour, "lw": 0.7, "alpha": 0.28, "zorder": 1}
    axes.hlines(y.mean[at], x.low[at], x.high[at], **bars)
    axes.vlines(x.mean[at], y.low[at], y.high[at], **bars)
    for own_x, own_y in zip(x.parts, y.parts, strict=True):
        axes.plot(own_x.mean[at], own_y.mean[at], color=colour, lw=0.6, alpha=0.2, zorder=0.8)
    axes.plot(x.mean[at], y.mean[at], **style, alpha=0.85)
    sizes = np.linspace(6, 46, len(at))
    axes.scatter(x.mean[at], y.mean[at], s=sizes, color=colour, edgecolor="white", linewidth=0.5, zorder=4)


def sweep_effects(columns: Mapping[str, Estimate], sweeps: pd.DataFrame, caption: str) -> Figure | None:
    """Draw what each swept field does to the columns of EFFECTS: a line of panels for each field."""
    both = {**columns, "utility": utility(columns)}
    shown = [column for name in EFFECTS if (column := both.get(name)) is not None]
    if not shown or not (lines := lines_of(sweeps, shown[0].rows)):
        return None
    styles = sweep_styles(sweeps["sweep"].unique().tolist())
    fields = list(dict.fromkeys(line.field for line in lines))
    families = f"; pale lines: families. {_NO_SCALE}" if shown[0].parts else ""
    figure = sheet(
        f"What a swept value does: {', '.join(fields)}",
        f"{caption}. Bands: intervals{families}",
        (1.9 + 2.35 * len(shown), 1.5 + 2.2 * len(fields)),
    )
    axes = figure.subplots(len(fields), len(shown), sharey="col", sharex="row", squeeze=False)
    for across, field in zip(axes, fields, strict=True):
        mine = [line for line in lines if line.field == field]
        scale = ruler(np.concatenate([line.values for line in mine]))
        for panel, column in zip(across, shown, strict=True):
            for line in mine:
                _effect(panel, column, line, scale, styles[line.sweep])
            _graduate(panel, scale)
            panel.set_xlabel(field, fontsize=8)
        names = [panel.plot([], [], **styles[line.sweep])[0] for line in mine]
        across[-1].legend(
            names,
            [line.sweep for line in mine],
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            frameon=False,
            fontsize=7.5,
        )
    for panel, column in zip(axes[0], shown, strict=True):
        panel.set_title(
            f"{_LABELS.get(column.name, plain(column.name))} {ARROWS[column.direction]}".strip(),
            fontsize=9,
            loc="left",
        )
    return freeze(figure)


def _effect(axes: Axes, column: Estimate, line: Line, scale: Ruler, style: Mapping[str, Any]) -> None:
    """Draw one row over its swept value, by rising value: mean in a band, and each family behind."""
    x = np.array([scale.place(value) for value in line.values])
    order = np.argsort(x)
    x, at = x[order], line.at[order]
    for part in column.parts:
        axes.plot(x, part.mean[at], color=style["color"], lw=0.7, alpha=0.25, zorder=1)
    axes.fill_between(x, column.low[at], column.high[at], color=style["color"], alpha=0.18, lw=0, zorder=1)
    axes.plot(x, column.mean[at], **style, marker="o", ms=3)


def _graduate(axes: Axes, scale: Ruler) -> None:
    axes.set_xticks(scale.places, scale.labels, fontsize=7)
    for place in scale.breaks:
        axes.axvline(place, color="#bbbbbb", lw=0.7, ls=":", zorder=0.5)
    axes.locator_params(axis="y", nbins=5)
    axes.tick_params(axis="y", labelsize=7.5)
