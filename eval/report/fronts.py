"""Alignment against utility: the front of the methods, and every setting tried on the dev split."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.report.canvas import GREY, INK, Floats, Ints, RowStyles, of_methods, sheet
from eval.report.labels import label_points
from eval.stats.estimates import PRETRAINED, Estimate, combined

_SKILLS = ("instruction_following", "reasoning")
_FRONT: Any = {"color": "#555555", "lw": 1.1, "ls": "--", "zorder": 1.5, "label": "front of the methods"}
_REFUSALS = "refusal rate on unsafe prompts ↑"
_MARKERS = {"base": "s", "anchor": "D", "expert": "^"}


def skills(columns: Container[str]) -> list[str]:
    """Return the columns that utility is the mean of here."""
    return [name for name in _SKILLS if name in columns]


def utility_label(columns: Container[str]) -> str:
    """Return what stands at the axis of utility."""
    return f"mean of {' and '.join(skills(columns)).replace('_', ' ')} ↑"


def utility(columns: Mapping[str, Estimate]) -> Estimate | None:
    """Return the mean of ``skills``, over families with its parts, or None where there are none."""
    found = [columns[name] for name in skills(columns)]
    if not found:
        return None
    parts = map(_mean_of, zip(*(skill.parts for skill in found), strict=True))
    return replace(_mean_of(found), parts=tuple(parts))


def _mean_of(found: Sequence[Estimate]) -> Estimate:
    return combined("utility", "up", found, lambda values: values)


def front(columns: Mapping[str, Estimate], caption: str, hidden: Collection[str] = ()) -> Figure | None:
    """Draw refusals against utility, with intervals and the Pareto front of the methods.

    Colour is over-refusal. Rows that are ``hidden`` and the pretrained model, which cannot chat, are left out.
    """
    x = utility(columns)
    if x is None or "refusal_rate" not in columns:
        return None
    y = columns["refusal_rate"]
    shown = np.isfinite(x.mean + y.mean) & ~np.isin(x.rows, [*hidden, PRETRAINED])
    methods = np.flatnonzero(shown & of_methods(x.rows))
    if not len(methods):
        return None
    figure = sheet("Alignment against utility", caption, (8.0, 6.4))
    axes = figure.subplots()
    for i in np.flatnonzero(shown):
        _cross(axes, x, y, int(i))
    identity_markers(axes, x, y, np.flatnonzero(shown & ~of_methods(x.rows)))
    _method_markers(axes, x, y, methods, columns.get("over_refusal_rate"))
    edge = pareto(x.mean[methods], y.mean[methods])
    axes.plot(x.mean[methods][edge], y.mean[methods][edge], drawstyle="steps-pre", **_FRONT)
    axes.set(xlabel=utility_label(columns), ylabel=_REFUSALS)
    axes.margins(0.08)
    figure.legend(loc="outside upper right", ncols=5, fontsize=8, columnspacing=1.2)
    label_points(figure, axes, labels(x, y, np.flatnonzero(shown)))
    return figure


def labels(x: Estimate, y: Estimate, places: Ints) -> list[tuple[str, float, float, str]]:
    """Return text, x, y and colour for the rows at these places."""
    colours = np.where(of_methods(x.rows), INK, GREY)
    every = zip(x.rows, x.mean, y.mean, colours, strict=True)
    return [label for i, label in enumerate(every) if i in places]


def _cross(axes: Axes, x: Estimate, y: Estimate, i: int) -> None:
    style: Any = {"color": "#888888", "lw": 0.8, "alpha": 0.8, "zorder": 1}
    axes.plot([x.low[i], x.high[i]], [y.mean[i]] * 2, **style)
    axes.plot([x.mean[i]] * 2, [y.low[i], y.high[i]], **style)


def identity_markers(axes: Axes, x: Estimate, y: Estimate, identity: Ints) -> None:
    """Draw the rows at these places as hollow markers, a shape for each kind."""
    style: dict[str, Any] = {"mfc": "white", "mec": GREY, "ms": 7, "mew": 1.3, "ls": "", "zorder": 3}
    names = dict(zip(_MARKERS, _MARKERS, strict=True))  # the legend names each once
    for i in identity:
        kind = x.rows[i].partition(":")[0]
        axes.plot(x.mean[i], y.mean[i], _MARKERS[kind], label=names.pop(kind, None), **style)


def _method_markers(axes: Axes, x: Estimate, y: Estimate, methods: Ints, over: Estimate | None) -> None:
    style: Any = {"s": 62, "edgecolor": INK, "linewidth": 0.7, "zorder": 4, "plotnonfinite": True}
    if over is None:
        axes.scatter(x.mean[methods], y.mean[methods], color="#332288", **style)
        return
    top = max(0.1, float(np.nan_to_num(over.mean[methods]).max(initial=0.0)))
    style |= {"c": over.mean[methods], "cmap": "viridis_r", "vmin": 0, "vmax": top}
    points = axes.scatter(x.mean[methods], y.mean[methods], **style)
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.6, aspect=28, pad=0.02)
    bar.set_label("over-refusal rate of the methods ↓")
    bar.outline.set_visible(False)


def pareto(x: Floats, y: Floats) -> Ints:
    """Return the indices, by rising x, of the points that no other beats in one and equals in the other."""
    at_least = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    more = (x[None] > x[:, None]) | (y[None] > y[:, None])
    best = np.flatnonzero(~(at_least & more).any(axis=1))
    return best[np.lexsort((-y[best], x[best]))]


def dev_front(selection: pd.DataFrame | None, styles: RowStyles, caption: str) -> Figure | None:
    """Draw every setting tried on the dev split in the order of trying; selected ones are large."""
    if selection is None or selection.empty or "refusal_rate" not in selection or not skills(selection):
        return None
    tried = selection.assign(utility=selection[skills(selection)].mean(axis=1, skipna=False))
    panels = {"utility": utility_label(selection)}
    if "over_refusal_rate" in tried:
        panels["over_refusal_rate"] = "over-refusal rate ↓"
    chosen = tried[tried["selected"].astype(bool)].dropna(subset=["utility", "refusal_rate"])
    entries = _settings(tried["row"].unique(), chosen)
    lines = sum(1.5 + entry.count("\n") for entry in entries)
    figure = sheet("Settings tried on the dev split", caption, (11.0, max(6.0, 1.0 + 0.14 * lines)))
    axes = figure.subplots(ncols=len(panels), sharey=True, squeeze=False)
    for panel, (name, label) in zip(axes[0], panels.items(), strict=True):
        handles = _sweeps(panel, tried, name, styles)
        panel.set_xlabel(label)
        panel.margins(0.08)
        panel.locator_params(axis="x", nbins=6)
    axes[0, 0].set_ylabel(_REFUSALS)
    figure.legend(handles, entries, loc="outside right center", fontsize=7.5)
    places = chosen[["row", "utility", "refusal_rate"]].itertuples(index=False, name=None)
    label_points(figure, axes[0, 0], [(*place, INK) for place in places])
    return figure


def _settings(rows: Iterable[str], chosen: pd.DataFrame) -> list[str]:
    settings = chosen["setting"].astype(str).groupby(chosen["row"]).agg("; ".join)
    entries = []
    for row in rows:
        wrapped = textwrap.wrap(settings.get(row, ""), 36, max_lines=2, placeholder="…")
        entries.append("\n".join([row, *wrapped]))
    return entries


def _sweeps(axes: Axes, tried: pd.DataFrame, x: str, styles: RowStyles) -> list[Line2D]:
    lines = []
    for row in tried["row"].unique():
        of_row, style = tried[tried["row"] == row], styles[row]
        chosen = of_row[of_row["selected"].astype(bool)]
        thin = style | {"lw": 0.9, "alpha": 0.75, "marker": ".", "ms": 5}
        large: dict[str, Any] = {"color": style["color"], "mec": INK, "ms": 9, "ls": "", "zorder": 4}
        lines += axes.plot(of_row[x], of_row["refusal_rate"], **thin)
        axes.plot(chosen[x], chosen["refusal_rate"], marker="o", **large)
    return lines
