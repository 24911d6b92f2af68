"""The figures of a report, each as PNG and SVG: drawn from the estimates, never from a file of an earlier
run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from eval.report.tables import ARROWS, LAYOUT, Column, best_methods, number
from eval.stats import Measured, combined, is_method, ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DPI = 150
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "figure.dpi": DPI,
    "svg.hashsalt": "alignmerge",  # else ids in the SVG are random
    "text.parse_math": False,  # a $ in the name of a row is a $
}
_COLOURS = ("#332288", "#cc6677", "#117733", "#88ccee", "#aa4499", "#999933", "#44aa99", "#882255", "#ddcc77")
"""Paul Tol's muted scheme: nine colours that the colour-blind can tell apart."""
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_GREY = "#777777"
_SKILLS = ("instruction_following", "reasoning")
_LOG_SPAN = 30.0
"""Largest over smallest value from which a layer profile is drawn on a log scale."""


def write(
    folder: Path,
    measured: Mapping[str, Mapping[str, Measured]],
    scores: pd.DataFrame,
    *,
    notes: Sequence[str],
    selection: pd.DataFrame | None,
) -> None:
    """Write ``NAME.png`` and ``NAME.svg`` for each figure that the scores allow.

    With several families the name is ``NAME-FAMILY``. The same scores give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for family, columns in measured.items():
        suffix = "" if len(measured) == 1 else "-" + re.sub(r"[^\w.]+", "-", family)
        of_family = scores[scores["family"] == family]
        caption = ". ".join([family, *(note.rstrip(".") for note in notes[:1])])
        tried = selection if selection is None or "family" not in selection else selection.query("family == @family")
        for name, figure in draw(columns, of_family, caption=caption, selection=tried).items():
            _save(figure, folder / f"{name}{suffix}")


def _save(figure: Figure, stem: Path) -> None:
    """Write PNG and SVG straight from their canvases, as ``savefig`` would draw each a second time."""
    with matplotlib.rc_context(_STYLE):
        png: Any = FigureCanvasAgg(figure)
        png.print_png(stem.with_name(stem.name + ".png"), metadata={"Software": None})
        svg: Any = FigureCanvasSVG(figure)
        svg.print_svg(stem.with_name(stem.name + ".svg"), metadata={"Date": None, "Creator": None})


def draw(
    columns: Mapping[str, Measured], scores: pd.DataFrame, *, caption: str, selection: pd.DataFrame | None
) -> dict[str, Figure]:
    """Return name -> figure for one family; a figure whose columns are missing is left out."""
    with matplotlib.rc_context(_STYLE):
        figures = {
            "front": front(columns, caption),
            "heatmap": heatmap(columns, caption),
            "drift_by_layer": by_layer(
                scores,
                {
                    "drift_anchor_by_layer": "drift from anchor in S_A",
                    "drift_base_by_layer": "drift from base in S_A",
                },
                "Where the merges leave the anchor",
                caption,
            ),
            "aqi_by_layer": by_layer(scores, {"aqi_by_layer": "AQI"}, "Separation of harmful from benign", caption),
            "dev_front": None if selection is None else dev_front(selection, caption),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def front(columns: Mapping[str, Measured], caption: str) -> Figure | None:
    """Draw refusals against utility, with intervals and the Pareto front of the methods; colour is
    over-refusal."""
    skills = [columns[name] for name in _SKILLS if name in columns]
    if not skills or "refusal_rate" not in columns:
        return None
    x, y = combined("utility", "up", skills, lambda values: values), columns["refusal_rate"]
    shown = [i for i in range(len(x.rows)) if np.isfinite(x.mean[i]) and np.isfinite(y.mean[i])]
    methods = [i for i in shown if is_method(x.rows[i])]
    figure = _canvas("Alignment against utility", caption, (8.0, 6.4))
    axes = figure.subplots()
    for i in shown:
        _cross(axes, x, y, i)
    _identity_markers(axes, x, y, [i for i in shown if i not in methods])
    _method_markers(axes, x, y, methods, columns.get("over_refusal_rate"))
    edge = pareto(x.mean[methods], y.mean[methods])
    axes.plot(x.mean[methods][edge], y.mean[methods][edge], drawstyle="steps-pre", **_FRONT)
    axes.set(
        xlabel=f"mean of {' and '.join(map(_plain, _names(skills)))} ↑",
        ylabel="refusal rate on unsafe prompts ↑",
    )
    axes.margins(0.08)
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    labels = [(x.rows[i], x.mean[i], y.mean[i], "#222222" if i in methods else _GREY) for i in shown]
    _label_points(figure, axes, labels)
    return figure


_FRONT: dict[str, Any] = {
    "color": "#555555",
    "lw": 1.1,
    "ls": "--",
    "zorder": 1.5,
    "label": "front of the methods",
}


def _names(parts: Sequence[Measured]) -> list[str]:
    return [part.name for part in parts]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _canvas(title: str, caption: str, size: tuple[float, float]) -> Figure:
    """Return an empty figure with its title and, below, its caption."""
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    wrapped = "\n".join(textwrap.wrap(caption, width=int(size[0] * 17)))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=7.5, color=_GREY)
    return figure


def _freeze(figure: Figure) -> Figure:
    """Lay the figure out once for all: places in pixels need it, and each save would do it again."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def _cross(axes: Axes, x: Measured, y: Measured, i: int) -> None:
    """Draw the intervals of one row as a thin cross."""
    axes.plot([x.low[i], x.high[i]], [y.mean[i]] * 2, color="#999999", lw=0.7, alpha=0.55, zorder=1)
    axes.plot([x.mean[i]] * 2, [y.low[i], y.high[i]], color="#999999", lw=0.7, alpha=0.55, zorder=1)


def _identity_markers(axes: Axes, x: Measured, y: Measured, identity: Sequence[int]) -> None:
    kinds = {"base": ("base", "s"), "anchor": ("anchor", "D")}
    named = set()
    for i in identity:
        kind, marker = kinds.get(x.rows[i], ("expert", "^"))
        label = kind if kind not in named else None
        named.add(kind)
        axes.plot(x.mean[i], y.mean[i], marker, mfc="white", mec=_GREY, ms=7, mew=1.3, ls="", label=label, zorder=3)


def _method_markers(axes: Axes, x: Measured, y: Measured, methods: Sequence[int], over: Measured | None) -> None:
    """Draw the methods, coloured by over-refusal where it was measured."""
    style: dict[str, Any] = {
        "s": 62,
        "edgecolor": "#222222",
        "linewidth": 0.7,
        "zorder": 4,
        "plotnonfinite": True,
    }
    if over is None:
        axes.scatter(x.mean[methods], y.mean[methods], color=_COLOURS[0], **style)
        return
    top = max(0.1, float(np.nan_to_num(over.mean[methods]).max(initial=0.0)))
    colours = over.mean[methods]
    points = axes.scatter(x.mean[methods], y.mean[methods], c=colours, cmap="viridis_r", vmin=0, vmax=top, **style)
    label = "over-refusal rate of the methods ↓"
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.6, aspect=28, pad=0.02, label=label)
    bar.outline.set_visible(False)


def pareto(x: Floats, y: Floats) -> NDArray[np.int64]:
    """Return the indices, by rising x, of the points that no other beats in one of x, y and equals in the
    other."""
    at_least = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    more = (x[None] > x[:, None]) | (y[None] > y[:, None])
    best = np.flatnonzero(~(at_least & more).any(axis=1))
    return best[np.lexsort((-y[best], x[best]))]


def heatmap(columns: Mapping[str, Measured], caption: str) -> Figure | None:
    """Draw all columns of figures 4 and 5 by row: colour from the worst row of a column (pale) to its
    best."""
    groups = {
        group: [c for c in layout if c.name in columns and np.isfinite(columns[c.name].mean).any()]
        for group, layout in LAYOUT.items()
    }
    groups = {group: layout for group, layout in groups.items() if layout}
    if not groups:
        return None
    rows = next(iter(columns.values())).rows
    size = (max(6.5, 2.2 + 0.46 * sum(map(len, groups.values()))), 2.3 + 0.27 * len(rows))
    reading = "Pale to dark: worst to best row of a column; grey: no better direction; bold: the best method"
    figure = _canvas("All columns", f"{caption}. {reading}", size)
    axes = figure.subplots()
    left, places, headings = 0.0, [], []
    for group, layout in groups.items():
        shown = [(column, columns[column.name]) for column in layout]
        _heat(axes, shown, left)
        axes.text(left + len(layout) / 2, len(rows) + 0.2, group, ha="center", va="top", weight="bold")
        places += [left + 0.5 + j for j in range(len(layout))]
        headings += [f"{column.label} {ARROWS[measured.direction]}".strip() for column, measured in shown]
        left += len(layout) + 0.3
    axes.xaxis.tick_top()
    axes.set_xticks(places, headings, rotation=40, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.set(xlim=(0, left - 0.3), ylim=(len(rows) + 0.9, 0))
    axes.axhline(sum(not is_method(row) for row in rows), color="white", lw=5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return _freeze(figure)


def _heat(axes: Axes, columns: Sequence[tuple[Column, Measured]], left: float) -> None:
    """Draw one group of columns from x = left, a square for each row and column with its number."""
    rows = columns[0][1].rows
    colours = np.stack([_shades(measured) for _, measured in columns], axis=1)
    edges = left + np.arange(len(columns) + 1)
    axes.pcolormesh(edges, np.arange(len(rows) + 1), colours, edgecolor="white", linewidth=1.2)
    for j, (column, measured) in enumerate(columns):
        best = best_methods(pd.Series(measured.mean, index=list(rows)).dropna(), measured.direction)
        for i, (row, value) in enumerate(zip(rows, measured.mean, strict=True)):
            axes.text(
                edges[j] + 0.5,
                i + 0.5,
                number(value, column.decimals, digits=2) if np.isfinite(value) else "–",
                ha="center",
                va="center",
                size=7,
                color="white" if colours[i, j] @ (0.299, 0.587, 0.114) < 0.5 else "#222222",
                weight="bold" if row in best else "normal",
                in_layout=False,
            )


def _shades(measured: Measured) -> Floats:
    """Return the [R, 3] colours of a column."""
    colours = np.full((len(measured.rows), 3), 1.0)
    there = np.isfinite(measured.mean)
    if measured.direction == "info":
        colours[there] = 0.92
        return colours
    values = measured.mean[there] if measured.direction == "up" else -measured.mean[there]
    span = np.ptp(values)
    good = (values - values.min()) / span if span > 0 else np.full(len(values), 0.5)
    colours[there] = matplotlib.colormaps["YlGnBu"](0.03 + 0.8 * good)[:, :3]
    return colours


def by_layer(scores: pd.DataFrame, panels: Mapping[str, str], title: str, caption: str) -> Figure | None:
    """Draw one line a row over the layers, one panel for each column that was measured."""
    profiles = {label: _profile(scores, column) for column, label in panels.items()}
    profiles = {label: profile for label, profile in profiles.items() if len(profile)}
    if not profiles:
        return None
    styles = line_styles(ordered(row for profile in profiles.values() for row in profile.index))
    size = (8.0 if len(profiles) == 1 else 10.0, max(5.2, 1.2 + 0.18 * len(styles)))
    figure = _canvas(title, caption, size)
    axes = figure.subplots(ncols=len(profiles), squeeze=False)
    lines = {}
    for panel, (label, profile) in zip(axes[0], profiles.items(), strict=True):
        for row in profile.index:
            lines[row] = panel.plot(profile.columns, profile.loc[row], **styles[row])[0]
        panel.set(xlabel="layer", ylabel=label)
        _scale(panel, profile.to_numpy())
    handles = [lines[row] for row in styles]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return _freeze(figure)


def _profile(scores: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return rows x layers, averaged over seeds, without rows of zeros (the anchor's drift from itself)."""
    samples = scores[scores["column"] == column]
    layers = samples["id"].str.removeprefix("layer/").astype(int)
    profile = samples.assign(layer=layers).pivot_table(index="row", columns="layer", values="value", aggfunc="mean")
    profile = profile.reindex(ordered(samples["row"]))
    return profile[(profile.fillna(0) != 0).any(axis=1)]


def _scale(axes: Axes, values: Floats) -> None:
    """Draw on a log scale, with plain numbers, what spans more than a linear scale can show."""
    positive = values[values > 0]
    if len(positive) == np.isfinite(values).sum() and positive.max() / positive.min() > _LOG_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def line_styles(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return row -> style: a colour for each method, a dash for each of its variants, greys for identity
    rows."""
    methods = list(dict.fromkeys(row.split("/")[0] for row in rows if is_method(row)))
    used: dict[str, int] = {}
    styles = {}
    for row in rows:
        method = row.split("/")[0] if is_method(row) else ""
        place = methods.index(method) if method else 0
        # From the tenth method on the colours come again, with the dashes that the first nine use least.
        dash = used.get(method, 0) + 2 * (place // len(_COLOURS))
        used[method] = used.get(method, 0) + 1
        styles[row] = {
            "color": _COLOURS[place % len(_COLOURS)] if method else _GREY,
            "ls": _DASHES[dash % len(_DASHES)],
            "lw": 1.6 if method else 1.1,
            "label": row,
            "zorder": 3 if method else 2,
        }
    return styles


def dev_front(selection: pd.DataFrame, caption: str) -> Figure | None:
    """Draw every setting tried on the dev split, joined in the order of trying; selected ones are large."""
    skills = [name for name in _SKILLS if name in selection]
    if not skills or "refusal_rate" not in selection or selection.empty:
        return None
    tried = selection.assign(utility=selection[skills].mean(axis=1, skipna=False))
    panels = {
        "utility": f"mean of {' and '.join(map(_plain, skills))} ↑",
        "over_refusal_rate": "over-refusal rate ↓",
    }
    panels = {name: label for name, label in panels.items() if name in tried}
    chosen = tried[tried["selected"].astype(bool)].dropna(subset=["utility", "refusal_rate"])
    entries = _settings(tried["row"].unique(), chosen)
    lines = sum(1.5 + entry.count("\n") for entry in entries)
    figure = _canvas("Settings tried on the dev split", caption, (10.0, max(6.0, 1.0 + 0.14 * lines)))
    axes = figure.subplots(ncols=len(panels), sharey=True, squeeze=False)
    for panel, (name, label) in zip(axes[0], panels.items(), strict=True):
        handles = _sweeps(panel, tried, name)
        panel.set_xlabel(label)
        panel.margins(0.08)
    axes[0, 0].set_ylabel("refusal rate on unsafe prompts ↑")
    figure.legend(handles, entries, loc="outside right center", frameon=False, fontsize=7.5)
    places = chosen[["row", "utility", "refusal_rate"]].itertuples(index=False, name=None)
    _label_points(figure, axes[0, 0], [(row, x, y, "#222222") for row, x, y in places])
    return figure


def _settings(rows: Iterable[str], chosen: pd.DataFrame) -> list[str]:
    """Return each row's name with the setting that was selected for it below."""
    settings = {row: "; ".join(map(str, of_row)) for row, of_row in chosen.groupby("row")["setting"]}
    return ["\n".join([row, *textwrap.wrap(settings.get(row, ""), 36, max_lines=2, placeholder="…")]) for row in rows]


def _sweeps(axes: Axes, tried: pd.DataFrame, x: str) -> list[Line2D]:
    """Draw refusals against column ``x``, one line a row in the order of the rows."""
    lines = []
    for row, style in line_styles(list(tried["row"].unique())).items():
        of_row = tried[tried["row"] == row]
        chosen = of_row[of_row["selected"].astype(bool)]
        thin = style | {"lw": 0.9, "alpha": 0.75, "marker": ".", "ms": 5}
        large: dict[str, Any] = {"color": style["color"], "mec": "#222222", "ms": 9, "ls": "", "zorder": 4}
        lines += axes.plot(of_row[x], of_row["refusal_rate"], **thin)
        axes.plot(chosen[x], chosen["refusal_rate"], marker="o", **large)
    return lines


def _label_points(figure: Figure, axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write (text, x, y, colour) beside each point, where it covers least of labels, points and the frame.

    The layout is frozen first, as places are found in pixels. Two rounds: the first labels did not know the
    last.
    """
    _freeze(figure)
    if not labels:
        return
    halo = [withStroke(linewidth=2.2, foreground="white")]
    leader = {"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkA": 0, "shrinkB": 6}
    style: Any = {"textcoords": "offset points", "ha": "center", "va": "center", "size": 7.5, "zorder": 5}
    notes = [
        axes.annotate(text, (x, y), (0, 0), color=colour, path_effects=halo, arrowprops=leader, **style)
        for text, x, y, colour in labels
    ]
    points = axes.transData.transform([(x, y) for _, x, y, _ in labels])
    sizes = np.array([_extent(note) for note in notes])
    places = points.copy()
    frame = np.asarray(axes.bbox.extents)
    for placed in range(2 * len(notes)):
        i = placed % len(notes)
        known = np.arange(len(notes)) != i if placed >= len(notes) else np.arange(len(notes)) < i
        taken = np.vstack([np.hstack([places, sizes])[known], np.hstack([points, np.full_like(points, 18.0)])])
        places[i] = _best_place(points[i], sizes[i], taken, frame)
    beside = (np.abs(places - points) < sizes / 2 + 13).all(axis=1)
    for note, offset, near in zip(notes, (places - points) * 72 / figure.dpi, beside, strict=True):
        note.set_position(tuple(offset))
        if near and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)


def _extent(note: Annotation) -> tuple[float, float]:
    box = note.get_window_extent()
    return box.width + 4, box.height + 2


def _best_place(point: Floats, size: Floats, taken: Floats, frame: Floats) -> Floats:
    """Return the centre of the cheapest of 120 boxes around a point; ``taken`` is [O, 4] of centres and
    sizes."""
    angles, gaps = np.meshgrid(np.linspace(0, 2 * np.pi, 24, endpoint=False), (10.0, 18.0, 30.0, 46.0, 66.0))
    way = np.stack([np.cos(angles.ravel()), np.sin(angles.ravel())], axis=1)
    centres = point + way * (size / 2 + gaps.reshape(-1, 1))
    covered = _overlap(centres, size, taken[:, :2], taken[:, 2:]).sum(axis=1)
    outside = np.maximum(frame[:2] - (centres - size / 2), 0) + np.maximum(centres + size / 2 - frame[2:], 0)
    best: Floats = centres[np.argmin(4 * covered + 1e3 * outside.sum(axis=1) + 2 * gaps.ravel())]
    return best


def _overlap(centres: Floats, size: Floats, others: Floats, other_sizes: Floats) -> Floats:
    """Return the [C, O] areas that boxes around C centres share with O other boxes."""
    apart = np.abs(centres[:, None] - others[None])
    shared = np.clip((size + other_sizes) / 2 - apart, 0, np.minimum(size, other_sizes))
    return np.asarray(shared.prod(axis=-1))
