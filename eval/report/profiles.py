"""Curves over the layers: drift and AQI of every row, and tau after figure 2 of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import INK, RowStyles, freeze, scale, sheet, whole_numbers
from eval.report.layout import Columns
from eval.stats.estimates import ordered

TAU_ROWS = ("base", "anchor", "average", "fisher_soup", "alignmerge")
"""The rows whose tau is shown: what alignment training adds, and what merging leaves of it."""
_SIDES = {
    "tau_safe_by_layer": ("benign prompts", "#228833"),
    "tau_unsafe_by_layer": ("harmful prompts", "#cc3311"),
}
_TAU = "Separation of harmful from benign by layer: τ"
_TAU_READING = (
    "τ is how much nearer an MLP activation is to the mean of the benign prompts than to that of the "
    "harmful ones, in pooled standard deviations. Lines: mean over seeds; bands: their range"
)


def by_layer(
    scores: pd.DataFrame, columns: Columns, styles: RowStyles, title: str, names: Iterable[str], caption: str
) -> Figure | None:
    """Draw one line a row over the layers, a panel for each of the columns that was measured."""
    measured = {name: profile(scores, name) for name in names}
    profiles = {name: found for name, found in measured.items() if len(found)}
    if not profiles:
        return None
    rows = ordered(pd.concat(profiles.values()).index)
    size = (8.0 if len(profiles) == 1 else 10.5, max(5.2, 1.2 + 0.18 * len(rows)))
    figure = sheet(title, caption, size)
    axes = figure.subplots(ncols=len(profiles), squeeze=False)
    lines = {}
    for panel, (name, found) in zip(axes[0], profiles.items(), strict=True):
        for row in found.index:
            lines[row] = panel.plot(found.columns, found.loc[row], **styles[row])[0]
        panel.set(xlabel="layer", ylabel=columns[name].label)
        scale(panel, found.to_numpy())
        whole_numbers(panel)
    handles = list(map(lines.__getitem__, rows))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, handlelength=2.8)
    return freeze(figure)


def profile(scores: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return rows x layers, the mean over seeds, without rows of zeros (the anchor's drift from itself)."""
    samples = with_layers(scores, column)
    found = samples.pivot_table(index="row", columns="layer", values="value", aggfunc="mean")
    found = found.reindex(ordered(samples["row"].unique()))
    return found[(found.fillna(0) != 0).any(axis=1)]


def with_layers(scores: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the samples of a column by layer, with the number of their layer, from 1 on.

    Scorers that read layers off the names of tensors count them from 0.
    """
    samples = scores[scores["column"] == column]
    layers = samples["id"].str.removeprefix("layer/").astype(int)
    return samples.assign(layer=layers + int(0 in layers.to_numpy()))


def tau(scores: pd.DataFrame, styles: RowStyles, caption: str) -> Figure | None:
    """Draw the gap of tau over the layers for the rows of TAU_ROWS, then both sides of each row."""
    rows = _tau_rows(scores)
    if not rows:
        return None
    figure = sheet(_TAU, f"{caption}. {_TAU_READING}", (11.0, 6.4))
    axes = figure.subplots(2, 3, sharex=True)
    for row in rows:
        _band(axes[0, 0], scores, "tau_by_layer", row, styles[row])
    axes[0, 0].set_title("gap, benign less harmful", fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=7.5, handlelength=2.8)
    sides = list(axes.flat[1:])
    for panel in sides[1:]:
        panel.sharey(sides[0])
    for panel, row in zip(sides, rows, strict=False):
        for column, (label, colour) in _SIDES.items():
            _band(panel, scores, column, row, {"color": colour, "label": label, "lw": 1.4})
        panel.axhline(0, color=INK, lw=0.6)
        panel.set_title(row, fontsize=9, loc="left")
    for spare in sides[len(rows) :]:
        spare.set_visible(False)
    sides[0].legend(fontsize=7.5)
    for panel in axes.flat:
        whole_numbers(panel)
    setp(axes[1], xlabel="layer")
    setp(axes[:, 0], ylabel="τ, pooled sd")
    return freeze(figure)


def tau_of_families(scores: pd.DataFrame, styles: RowStyles, caption: str) -> Figure | None:
    """Draw the gap of tau over the layers for the rows of TAU_ROWS, one panel a family."""
    of_families = scores.groupby("family", sort=False)
    families = [str(family) for family, of_family in of_families if _tau_rows(of_family)]
    if not families:
        return None
    wide = min(3, len(families))
    lines = -(-len(families) // wide)
    figure = sheet(_TAU, f"{caption}. {_TAU_READING}", (10.8, 1.0 + 2.7 * lines))
    axes = figure.subplots(lines, wide, squeeze=False)
    panels = axes.flat[: len(families)]
    for spare in axes.flat[len(families) :]:
        spare.set_visible(False)
    for panel, family in zip(panels, families, strict=True):
        of_family = scores[scores["family"] == family]
        for row in _tau_rows(of_family):
            _band(panel, of_family, "tau_by_layer", row, styles[row])
        panel.set_title(family, fontsize=9, loc="left")
        panel.set(xlabel="layer", ylabel="τ gap, pooled sd")
        whole_numbers(panel)
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    shown = [handles[row] for row in TAU_ROWS if row in handles]
    figure.legend(handles=shown, loc="outside upper right", ncols=5, fontsize=8, handlelength=2.8)
    return freeze(figure)


def _tau_rows(scores: pd.DataFrame) -> list[str]:
    measured = set(scores.loc[(scores["column"] == "tau_by_layer") & scores["value"].notna(), "row"])
    return [row for row in TAU_ROWS if row in measured]


def _band(axes: Axes, scores: pd.DataFrame, column: str, row: str, style: Mapping[str, Any]) -> None:
    """Draw a column of one row over the layers: the mean over seeds and their range."""
    of_row = with_layers(scores[scores["row"] == row], column)
    by_seed = of_row.pivot_table(index="seed", columns="layer", values="value")
    if by_seed.empty:
        return
    layers = by_seed.columns
    axes.plot(layers, by_seed.mean(), **style)
    if len(by_seed) > 1:
        axes.fill_between(layers, by_seed.min(), by_seed.max(), color=style["color"], alpha=0.15, lw=0)
