"""Curves over the layers: drift and AQI of every row, and tau after figure 2 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from eval.report.canvas import INK, RowStyles, freeze, grid_of, scale, sheet, whole_numbers
from eval.stats.estimates import ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

TAU_ROWS = ("base", "anchor", "average", "fisher_soup", "alignmerge")
"""The rows whose tau is shown: what alignment training adds, and what merging leaves of it."""
_SIDES = {
    "tau_safe_by_layer": ("benign prompts", "#228833"),
    "tau_unsafe_by_layer": ("harmful prompts", "#cc3311"),
}
_TAU = "Separation of harmful from benign by layer: τ"
_TAU_READING = (
    "τ is how much nearer an MLP activation is to the mean of the benign prompts than to that of the harmful ones, "
    "in pooled standard deviations"
)


def by_layer(
    scores: pd.DataFrame, panels: Mapping[str, str], styles: RowStyles, title: str, caption: str
) -> Figure | None:
    """Draw one line a row over the layers, one panel for each column (name -> label) that was measured."""
    profiles = {label: profile(scores, column) for column, label in panels.items()}
    profiles = {label: found for label, found in profiles.items() if len(found)}
    if not profiles:
        return None
    rows = ordered(row for found in profiles.values() for row in found.index)
    size = (8.0 if len(profiles) == 1 else 10.5, max(5.2, 1.2 + 0.18 * len(rows)))
    figure = sheet(title, caption, size)
    axes = figure.subplots(ncols=len(profiles), squeeze=False)
    lines = {}
    for panel, (label, found) in zip(axes[0], profiles.items(), strict=True):
        for row in found.index:
            lines[row] = panel.plot(found.columns, found.loc[row], **styles[row])[0]
        panel.set(xlabel="layer", ylabel=label)
        scale(panel, found.to_numpy())
        whole_numbers(panel)
    handles = [lines[row] for row in rows]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8, handlelength=2.8)
    return freeze(figure)


def profile(scores: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return rows x layers, averaged over seeds, without rows of zeros (the anchor's drift from itself)."""
    found = with_layers(scores, column).pivot_table(
        index="row", columns="layer", values="value", aggfunc="mean"
    )
    found = found.reindex(ordered(scores.loc[scores["column"] == column, "row"].unique()))
    return found[(found.fillna(0) != 0).any(axis=1)]


def with_layers(scores: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the samples of a column by layer, with the number of their layer."""
    samples = scores[scores["column"] == column]
    return samples.assign(layer=samples["id"].str.removeprefix("layer/").astype(int))


def tau(scores: pd.DataFrame, styles: RowStyles, caption: str) -> Figure | None:
    """Draw the gap of tau over the layers for the rows of TAU_ROWS, then both sides of each row.

    Lines are means over seeds, bands their range.
    """
    rows = _tau_rows(scores)
    if not rows:
        return None
    figure = sheet(_TAU, f"{caption}. {_TAU_READING}. Lines: mean over seeds; bands: their range", (11.0, 6.4))
    axes = figure.subplots(2, 3, sharex=True)
    _gaps(axes[0, 0], scores, rows, styles)
    axes[0, 0].set_title("gap, benign less harmful", fontsize=9, loc="left")
    axes[0, 0].legend(frameon=False, fontsize=7.5, handlelength=2.8)
    sides = list(axes.flat[1:])
    for panel in sides[1:]:
        panel.sharey(sides[0])
    for panel, row in zip(sides, rows, strict=False):
        for column, (label, colour) in _SIDES.items():
            _band(panel, scores, column, row, {"color": colour, "label": label, "lw": 1.4})
        panel.axhline(0, color=INK, lw=0.6)
        panel.set_title(row, fontsize=9, loc="left")
    for panel in sides[len(rows) :]:
        panel.set_visible(False)
    sides[0].legend(frameon=False, fontsize=7.5)
    for panel in axes.flat:
        whole_numbers(panel)
    for panel in axes[1]:
        panel.set_xlabel("layer")
    for panel in axes[:, 0]:
        panel.set_ylabel("τ, pooled sd")
    return freeze(figure)


def tau_of_families(scores: pd.DataFrame, styles: RowStyles, caption: str) -> Figure | None:
    """Draw the gap of tau over the layers for the rows of TAU_ROWS, one panel a family."""
    families = [str(family) for family, of in scores.groupby("family", sort=False) if _tau_rows(of)]
    if not families:
        return None
    figure, panels = grid_of(
        _TAU, f"{caption}. {_TAU_READING}. Lines: mean over seeds; bands: their range", families
    )
    for panel, family in zip(panels, families, strict=True):
        of_family = scores[scores["family"] == family]
        _gaps(panel, of_family, _tau_rows(of_family), styles)
        panel.set_title(family, fontsize=9, loc="left")
        panel.set(xlabel="layer", ylabel="τ gap, pooled sd")
        whole_numbers(panel)
    handles = {
        str(line.get_label()): line for panel in panels for line in panel.lines if line.get_label() in TAU_ROWS
    }
    shown = [handles[row] for row in TAU_ROWS if row in handles]
    figure.legend(
        handles=shown, loc="outside upper right", ncols=5, frameon=False, fontsize=8, handlelength=2.8
    )
    return freeze(figure)


def _tau_rows(scores: pd.DataFrame) -> list[str]:
    measured = set(scores.loc[(scores["column"] == "tau_by_layer") & scores["value"].notna(), "row"])
    return [row for row in TAU_ROWS if row in measured]


def _gaps(axes: Axes, scores: pd.DataFrame, rows: Sequence[str], styles: RowStyles) -> None:
    for row in rows:
        _band(axes, scores, "tau_by_layer", row, styles[row])


def _band(axes: Axes, scores: pd.DataFrame, column: str, row: str, style: Mapping[str, Any]) -> None:
    """Draw a column of one row over the layers: the mean over seeds and, where there are several, their range."""
    of_row = with_layers(scores[scores["row"] == row], column)
    by_seed = of_row.pivot_table(index="seed", columns="layer", values="value")
    if by_seed.empty:
        return
    axes.plot(by_seed.columns, by_seed.mean(), **style)
    if len(by_seed) > 1:
        axes.fill_between(by_seed.columns, by_seed.min(), by_seed.max(), color=style["color"], alpha=0.15, lw=0)
