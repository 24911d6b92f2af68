"""What the anchor's training does to AQI, after figure 1 of the paper."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import FAMILY_COLOURS, GREY, OURS_COLOUR, freeze, sheet, whole_numbers
from eval.report.profiles import with_layers

_TITLE = "The anchor's alignment training"
_MEASURES = {"aqi": "AQI ↑", "tau_gap": "τ gap, pooled sd"}
_SHARES = (
    "0 is theta_IT, 1 the anchor. Lines: mean over seeds; bands: their range. AQI has no common scale "
    "across architectures: compare rises, not levels"
)
_STEPS = "Step 0 is theta_IT. Grey: single seeds; curves over the layers: mean over seeds, pale to dark"
_LAYERS = {"aqi_by_layer": "AQI ↑", "tau_by_layer": "τ gap, pooled sd"}


def training_of_families(trajectory: pd.DataFrame | None, caption: str) -> Figure | None:
    """Draw AQI and tau along the training of every family's anchor: mean and range over seeds."""
    if trajectory is None or not (measures := _measured(trajectory, _MEASURES)):
        return None
    figure = sheet(_TITLE, f"{caption}. {_SHARES}", (9.5, 4.6))
    axes = figure.subplots(ncols=len(measures), squeeze=False)[0]
    for panel, (column, label) in zip(axes, measures.items(), strict=True):
        families = trajectory.groupby("family", sort=False)
        for colour, (family, of_family) in zip(itertools.cycle(FAMILY_COLOURS), families, strict=False):
            by_seed = _along(of_family, column, "share")
            style = {"color": colour, "label": family, "lw": 1.8, "marker": "o", "ms": 3}
            panel.plot(by_seed.index, by_seed.mean(axis=1), **style)
            if by_seed.shape[1] > 1:
                ends = by_seed.min(axis=1), by_seed.max(axis=1)
                panel.fill_between(by_seed.index, *ends, color=colour, alpha=0.15, lw=0)
        panel.set(xlabel="share of the training steps", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return freeze(figure)


def training(trajectory: pd.DataFrame | None, caption: str) -> Figure | None:
    """Draw AQI and tau along the training of one family's anchor, and both over the layers."""
    if trajectory is None or not (measures := _measured(trajectory, _MEASURES)):
        return None
    layers = _measured(trajectory, _LAYERS)
    figure = sheet(_TITLE, f"{caption}. {_STEPS}", (9.5, 3.4 * (1 + bool(layers))))
    axes = figure.subplots(1 + bool(layers), max(len(measures), len(layers)), squeeze=False)
    for panel, (column, label) in zip(axes[0], measures.items(), strict=False):
        by_seed = _along(trajectory, column, "step")
        panel.plot(by_seed.index, by_seed, color=GREY, lw=0.8, alpha=0.7)
        panel.plot(by_seed.index, by_seed.mean(axis=1), color=OURS_COLOUR, lw=2, marker="o", ms=4)
        panel.set(xlabel="training step", ylabel=label)
    for panel, (column, label) in zip(axes[-1], layers.items(), strict=False):
        _over_layers(panel, with_layers(trajectory, column))
        panel.set(xlabel="layer", ylabel=label)
    return freeze(figure)


def _measured(trajectory: pd.DataFrame, columns: dict[str, str]) -> dict[str, str]:
    there = set(trajectory.loc[trajectory["value"].notna(), "column"])
    return {column: label for column, label in columns.items() if column in there}


def _along(trajectory: pd.DataFrame, column: str, by: str) -> pd.DataFrame:
    """Return steps x seeds of a column, interpolated at steps that only other seeds have."""
    samples = trajectory[(trajectory["column"] == column) & (trajectory["id"] == "all")]
    by_seed = samples.pivot(index=by, columns="seed", values="value")
    return by_seed.interpolate("index", limit_area="inside")


def _over_layers(axes: Axes, samples: pd.DataFrame) -> None:
    curves = samples.pivot_table(index="step", columns="layer", values="value")
    colours = matplotlib.colormaps["YlGnBu"](np.linspace(0.25, 1, len(curves)))
    for (step, curve), colour in zip(curves.iterrows(), colours, strict=True):
        axes.plot(curves.columns, curve, color=colour, lw=1.4, label=f"step {step}")
    whole_numbers(axes)
    axes.legend(fontsize=7)
