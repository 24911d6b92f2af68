"""Alignment against utility: the front of the methods, and every setting that was tried on the dev split."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from eval.report.canvas import GREY, INK, RowStyles, plain, sheet
from eval.report.labels import label_points
from eval.stats.estimates import PRETRAINED, Estimate, combined, is_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SKILLS = ("instruction_following", "reasoning")
_FRONT: dict[str, Any] = {
    "color": "#555555",
    "lw": 1.1,
    "ls": "--",
    "zorder": 1.5,
    "label": "front of the methods",
}
_MARKERS = {"base": ("base", "s"), "anchor": ("anchor", "D")}


def skills(columns: Mapping[str, Estimate]) -> list[str]:
    """Return the columns that utility is the mean of here."""
    return [name for name in _SKILLS if name in columns]


def utility(columns: Mapping[str, Estimate]) -> Estimate | None:
    """Return the mean of ``skills``, over families with the parts of each, or None where there are none."""
    found = [columns[name] for name in skills(columns)]
    if not found:
        return None
    parts = [_mean_of(of_family) for of_family in zip(*(skill.parts for skill in found), strict=True)]
    return replace(_mean_of(found), parts=tuple(parts))


def _mean_of(found: Sequence[Estimate]) -> Estimate:
    return combined("utility", "up", found, lambda values: values)


def front(columns: Mapping[str, Estimate], caption: str, hidden: Collection[str] = ()) -> Figure | None:
    """Draw refusals against utility, with intervals and the Pareto front of the methods; colour is over-refusal.

    ``hidden`` are rows that have a figure of their own; the pretrained model, which cannot chat, is not shown either.
    """
    x = utility(columns)
    if x is None or "refusal_rate" not in columns:
        return None
    y = columns["refusal_rate"]
    left_out = {*hidden, PRETRAINED}
    shown = [i for i, row in enumerate(x.rows) if np.isfinite(x.mean[i] + y.mean[i]) and row not in left_out]
    methods = [i for i in shown if is_method(x.rows[i])]
    if not methods:
        return None
    figure = sheet("Alignment against utility", caption, (8.0, 6.4))
    axes = figure.subplots()
    for i in shown:
        _cross(axes, x, y, i)
    identity_markers(axes, x, y, [i for i in shown if i not in methods])
    _method_markers(axes, x, y, methods, columns.get("over_refusal_rate"))
    edge = pareto(x.mean[methods], y.mean[methods])
    axes.plot(x.mean[methods][edge], y.mean[methods][edge], drawstyle="steps-pre", **_FRONT)
    axes.set(
        xlabel=f"mean of {' and '.join(map(plain, skills(columns)))} ↑",
        ylabel="refusal rate on unsafe prompts ↑",
    )
    axes.margins(0.08)
    figure.legend(loc="outside upper right", ncols=5, frameon=False, fontsize=8, columnspacing=1.2)
    labels = [(x.rows[i], x.mean[i], y.mean[i], INK if i in methods else GREY) for i in shown]
    label_points(figure, axes, labels)
    return figure


def _cross(axes: Axes, x: Estimate, y: Estimate, i: int) -> None:
    """Draw the intervals of one row as a thin cross."""
    axes.plot([x.low[i], x.high[i]], [y.mean[i]] * 2, color="#888888", lw=0.8, alpha=0.8, zorder=1)
    axes.plot([x.mean[i]] * 2, [y.low[i], y.high[i]], color="#888888", lw=0.8, alpha=0.8, zorder=1)


def identity_markers(axes: Axes, x: Estimate, y: Estimate, identity: Sequence[int]) -> None:
    """Draw the rows at these places as hollow markers, a shape for each kind."""
    named = set()
    for i in identity:
        kind, marker = _MARKERS.get(x.rows[i], ("expert", "^"))
        label = kind if kind not in named else None
        named.add(kind)
        axes.plot(
            x.mean[i], y.mean[i], marker, mfc="white", mec=GREY, ms=7, mew=1.3, ls="", label=label, zorder=3
        )


def _method_markers(
    axes: Axes, x: Estimate, y: Estimate, methods: Sequence[int], over: Estimate | None
) -> None:
    """Draw the methods, coloured by over-refusal where it was measured."""
    style: dict[str, Any] = {"s": 62, "edgecolor": INK, "linewidth": 0.7, "zorder": 4, "plotnonfinite": True}
    if over is None:
        axes.scatter(x.mean[methods], y.mean[methods], color="#332288", **style)
        return
    top = max(0.1, float(np.nan_to_num(over.mean[methods]).max(initial=0.0)))
    colours = over.mean[methods]
    points = axes.scatter(
        x.mean[methods], y.mean[methods], c=colours, cmap="viridis_r", vmin=0, vmax=top, **style
    )
    label = "over-refusal rate of the methods ↓"
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.6, aspect=28, pad=0.02, label=label)
    bar.outline.set_visible(False)


def pareto(x: Floats, y: Floats) -> NDArray[np.int64]:
    """Return the indices, by rising x, of the points that no other beats in one of x, y and equals in the other."""
    at_least = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    more = (x[None] > x[:, None]) | (y[None] > y[:, None])
    best = np.flatnonzero(~(at_least & more).any(axis=1))
    return best[np.lexsort((-y[best], x[best]))]


def dev_front(selection: pd.DataFrame, styles: RowStyles, caption: str) -> Figure | None:
    """Draw every setting tried on the dev split, joined in the order of trying; selected ones are large."""
    names = [name for name in _SKILLS if name in selection]
    if not names or "refusal_rate" not in selection or selection.empty:
        return None
    tried = selection.assign(utility=selection[names].mean(axis=1, skipna=False))
    panels = {
        "utility": f"mean of {' and '.join(map(plain, names))} ↑",
        "over_refusal_rate": "over-refusal rate ↓",
    }
    panels = {name: label for name, label in panels.items() if name in tried}
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
    axes[0, 0].set_ylabel("refusal rate on unsafe prompts ↑")
    figure.legend(handles, entries, loc="outside right center", frameon=False, fontsize=7.5)
    places = chosen[["row", "utility", "refusal_rate"]].itertuples(index=False, name=None)
    label_points(figure, axes[0, 0], [(row, x, y, INK) for row, x, y in places])
    return figure


def _settings(rows: Iterable[str], chosen: pd.DataFrame) -> list[str]:
    """Return each row's name with the setting that was selected for it below."""
    settings = {row: "; ".join(map(str, of_row)) for row, of_row in chosen.groupby("row")["setting"]}
    return [
        "\n".join([row, *textwrap.wrap(settings.get(row, ""), 36, max_lines=2, placeholder="…")])
        for row in rows
    ]


def _sweeps(axes: Axes, tried: pd.DataFrame, x: str, styles: RowStyles) -> list[Line2D]:
    """Draw refusals against column ``x``, one line a row in the order of the rows."""
    lines = []
    for row in tried["row"].unique():
        of_row, style = tried[tried["row"] == row], styles[row]
        chosen = of_row[of_row["selected"].astype(bool)]
        thin = style | {"lw": 0.9, "alpha": 0.75, "marker": ".", "ms": 5}
        large: dict[str, Any] = {"color": style["color"], "mec": INK, "ms": 9, "ls": "", "zorder": 4}
        lines += axes.plot(of_row[x], of_row["refusal_rate"], **thin)
        axes.plot(chosen[x], chosen["refusal_rate"], marker="o", **large)
    return lines
