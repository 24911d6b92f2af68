"""Safety against utility of the rows: their front on the test split."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import GREY, INK, Floats, Ints, colour_of, of_methods, sheet
from eval.report.labels import label_points
from eval.stats.claims import SAFETY, with_safety
from eval.stats.derived import UTILITY
from eval.stats.estimates import PRETRAINED, Estimate, combined

_FRONT: Any = {"color": "#555555", "lw": 1.1, "ls": "--", "zorder": 1.5, "label": "front of the methods"}
_REFUSALS = "refusal rate on unsafe prompts ↑"
_SAFETY = "safety: refusal rate less over-refusal rate ↑"
_RELATIVE = "ΔUtility: mean change against the best expert, % ↑"
_MARKERS = {"base": "s", "anchor": "D", "expert": "^"}


def skills(columns: Container[str]) -> list[str]:
    """Return the columns that utility is the mean of here."""
    return [name for name in UTILITY if name in columns]


def utility_label(columns: Container[str]) -> str:
    """Return what stands at the axis of utility."""
    return f"mean of {', '.join(skills(columns)).replace('_', ' ')} ↑"


def utility(columns: Mapping[str, Estimate]) -> Estimate | None:
    """Return the mean of ``skills``, over families with its parts, or None where there are none."""
    found = [columns[name] for name in skills(columns)]
    if not found:
        return None
    parts = map(_mean_of, zip(*(skill.parts for skill in found), strict=True))
    return replace(_mean_of(found), parts=tuple(parts))


def _mean_of(found: Sequence[Estimate]) -> Estimate:
    return combined("utility", "up", found, lambda values: values)


def front(columns: Mapping[str, Estimate], caption: str) -> Figure | None:
    """Draw safety against utility, with intervals and the Pareto front of the methods.

    The pretrained model, which cannot chat, is left out.
    """
    x, across = _across(columns)
    columns = with_safety(columns)
    if x is None or "refusal_rate" not in columns:
        return None
    y, upward = columns["refusal_rate"], _REFUSALS
    if SAFETY in columns:
        y, upward = columns[SAFETY], _SAFETY
    shown = np.isfinite(x.mean + y.mean) & (np.array(x.rows) != PRETRAINED)
    methods = np.flatnonzero(shown & of_methods(x.rows))
    if not len(methods):
        return None
    figure = sheet("Safety against utility", caption, (8.0, 6.4))
    axes = figure.subplots()
    for i in np.flatnonzero(shown):
        _cross(axes, x, y, int(i))
    identity_markers(axes, x, y, np.flatnonzero(shown & ~of_methods(x.rows)))
    colours = [colour_of(x.rows[i]) for i in methods]
    axes.scatter(x.mean[methods], y.mean[methods], c=colours, s=62, edgecolor=INK, linewidth=0.7, zorder=4)
    edge = pareto(x.mean[methods], y.mean[methods])
    axes.plot(x.mean[methods][edge], y.mean[methods][edge], drawstyle="steps-pre", **_FRONT)
    axes.set(xlabel=across, ylabel=upward)
    axes.margins(0.08)
    figure.legend(loc="outside upper right", ncols=5, fontsize=8, columnspacing=1.2)
    label_points(figure, axes, labels(x, y, np.flatnonzero(shown)))
    return figure


def _across(columns: Mapping[str, Estimate]) -> tuple[Estimate | None, str]:
    """Return utility and its label: relative to the best expert where one can do anything."""
    if "delta_utility" in columns and np.isfinite(columns["delta_utility"].mean).any():
        return columns["delta_utility"], _RELATIVE
    return utility(columns), utility_label(columns)


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


def pareto(x: Floats, y: Floats) -> Ints:
    """Return the indices, by rising x, of the points that no other beats in one and equals in the other."""
    at_least = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    more = (x[None] > x[:, None]) | (y[None] > y[:, None])
    best = np.flatnonzero(~(at_least & more).any(axis=1))
    return best[np.lexsort((-y[best], x[best]))]
