"""What the trainings of anchor and experts do to AQI, after figure 1 of the paper."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import FAMILY_COLOURS, freeze, sheet, whole_numbers
from eval.report.profiles import with_layers

_TITLE = "Alignment along training"
_MEASURES = {"aqi": "AQI ↑", "tau_gap": "τ gap, pooled sd"}
_SHARES = (
    "0 is theta_IT, 1 the model itself. Lines: mean over seeds; bands: their range. AQI has no common scale "
    "across architectures: compare rises, not levels"
)
_STEPS = "Step 0 is theta_IT, the last one the model itself. Lines: mean over seeds; bands: their range"
_LAYERS = {"aqi_by_layer": "AQI ↑", "tau_by_layer": "τ gap, pooled sd"}


def training_of_families(trajectory: pd.DataFrame | None, caption: str) -> Figure | None:
    """Draw AQI and tau along the training of every family's anchor and experts, a line of panels a model."""
    if trajectory is None or not (measures := _measured(trajectory, _MEASURES)):
        return None
    models = trajectory["model"].unique()
    figure = sheet(_TITLE, f"{caption}. {_SHARES}", (9.5, 1.4 + 2.7 * len(models)))
    axes = figure.subplots(len(models), len(measures), squeeze=False, sharey="col", sharex=True)
    for across, model in zip(axes, models, strict=True):
        families = trajectory[trajectory["model"] == model].groupby("family", sort=False)
        for panel, (column, label) in zip(across, measures.items(), strict=True):
            for colour, (family, of) in zip(itertools.cycle(FAMILY_COLOURS), families, strict=False):
                _curve(panel, _along(of, column, "share"), str(family), colour)
            panel.set_ylabel(label)
            panel.set_title(str(model), fontsize=9, loc="left")
    setp(axes[-1], xlabel="share of the training steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return freeze(figure)


def training(trajectory: pd.DataFrame | None, caption: str) -> Figure | None:
    """Draw AQI and tau along the trainings of one family, and both over the layers for the first model."""
    if trajectory is None or not (measures := _measured(trajectory, _MEASURES)):
        return None
    layers = _measured(trajectory, _LAYERS)
    models = trajectory.groupby("model", sort=False)
    first = trajectory[trajectory["model"] == trajectory["model"].iloc[0]]
    figure = sheet(_TITLE, f"{caption}. {_STEPS}", (9.5, 3.4 * (1 + bool(layers))))
    axes = figure.subplots(1 + bool(layers), max(len(measures), len(layers)), squeeze=False)
    for panel, (column, label) in zip(axes[0], measures.items(), strict=False):
        for colour, (model, of_model) in zip(itertools.cycle(FAMILY_COLOURS), models, strict=False):
            _curve(panel, _along(of_model, column, "step"), str(model), colour)
        panel.set(xlabel="training step", ylabel=label)
    axes[0, 0].legend(fontsize=7.5)
    for panel, (column, label) in zip(axes[-1], layers.items(), strict=False):
        _over_layers(panel, with_layers(first, column))
        panel.set(xlabel="layer", ylabel=f"{label}, {first['model'].iloc[0]}")
    return freeze(figure)


def _curve(axes: Axes, by_seed: pd.DataFrame, label: str, colour: str) -> None:
    """Draw steps x seeds: their mean in the band of their range."""
    axes.plot(by_seed.index, by_seed.mean(axis=1), color=colour, label=label, lw=1.8, marker="o", ms=3)
    if by_seed.shape[1] > 1:
        ends = by_seed.min(axis=1), by_seed.max(axis=1)
        axes.fill_between(by_seed.index, *ends, color=colour, alpha=0.15, lw=0)


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
