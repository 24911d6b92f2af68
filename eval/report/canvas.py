"""What all figures share: style, colours of rows, the sheet with title and caption, how it is saved."""

from __future__ import annotations

import colorsys
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from eval.stats.estimates import is_method

DPI = 150
GREY = "#777777"
INK = "#222222"
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "figure.dpi": DPI, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "svg.hashsalt": "alignmerge",  # else ids in the SVG are random
    "text.parse_math": False,  # a $ in the name of a row is a $
}  # fmt: skip
OURS = "alignmerge"
OURS_COLOUR = "#cc3311"
FAMILY_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
_COLOURS = (
    "#332288", "#117733", "#0077bb", "#ee7733", "#aa4499", "#888822", "#44aa99",
    "#882255", "#66aadd", "#7a5230", "#cc9900", "#ee3377", "#5566cc", "#669944",
)  # fmt: skip
"""From Paul Tol's schemes for the colour-blind, none too pale for a line on white."""
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_IDENTITY = {"base": ("#8a8a8a", "-"), "pretrained": ("#c4c4c4", "-"), "anchor": (INK, "--")}
_LOG_SPAN = 30.0  # largest over smallest value from which a profile is drawn on a log scale

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]  # of the R rows of an estimate
RowStyles = Mapping[str, dict[str, Any]]
"""Row -> colour, dash, width, label and order of its line; the same in all figures of a report."""


def row_styles(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return row -> style: a hue for each method, its shades and dashes for the variants, else greys.

    No two rows have the same colour unless there are more methods than hues.
    """
    variants: dict[str, list[str]] = {}
    experts = []
    styles = {}
    for row in rows:
        if is_method(row):
            variants.setdefault(row.partition("/")[0], []).append(row)
        elif row in _IDENTITY:
            styles[row] = _style(row, *_IDENTITY[row], 1.3)
        else:
            experts.append(row)
    for method, hue in _hues(variants).items():
        of_method = variants.get(method, [])
        for place, row in enumerate(of_method):
            width = 1.4 + 0.6 * (row == OURS)
            colour = _shade(hue, place, len(of_method))
            styles[row] = _style(row, colour, _DASHES[place % len(_DASHES)], width)
    for place, row in enumerate(experts):
        grey = 0.35 + 0.3 * place / max(1, len(experts) - 1)
        styles[row] = _style(row, str(round(grey, 3)), _DASHES[2 + place % (len(_DASHES) - 2)], 1.1)
    return {row: styles[row] for row in rows}


def sweep_styles(sweeps: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return swept row -> style: a hue for each, as often all are variants of one method."""
    hues, variants = _hues(sweeps), Counter[str]()
    styles = {}
    for row in sweeps:
        method = row.partition("/")[0]
        styles[row] = _style(row, hues[row], _DASHES[variants[method] % len(_DASHES)], 1.4)
        variants[method] += 1
    return styles


def _style(row: str, colour: Any, dash: Any, width: float) -> dict[str, Any]:
    order = 2 + is_method(row) + (row == OURS)
    return {"color": colour, "ls": dash, "lw": width, "label": row, "zorder": order}


def _hues(methods: Iterable[str]) -> dict[str, str]:
    hues = itertools.cycle(_COLOURS)
    return {OURS: OURS_COLOUR} | {method: next(hues) for method in methods if method != OURS}


def _shade(colour: str, place: int, count: int) -> tuple[float, float, float]:
    """Return the colour itself for the first of ``count`` variants, others from dark to light."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    share = (place - 1) / max(1, count - 2)
    if place == 1 and count > 2:
        light -= 0.45 * light
    elif place:
        light += (0.74 - light) * (0.35 + 0.65 * share)
    return colorsys.hls_to_rgb(hue, light, saturation)


def sheet(title: str, caption: str, size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches with its title and, below, its caption."""
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)  # with it at hand, asking for the size of a text does not draw the figure
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    wrapped = "\n".join(textwrap.wrap(caption, width=int(size[0] * 17)))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def freeze(figure: Figure) -> Figure:
    """Lay the figure out once for all: places in pixels need it, and each save would do it again."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Write PNG, in at most 256 colours, and SVG."""
    with matplotlib.rc_context(STYLE):  # from their canvases: ``savefig`` would draw each twice
        freeze(figure)
        png: Any = figure.canvas  # that of ``sheet``, whose renderer has measured every text before
        png.draw()
        picture = Image.fromarray(np.asarray(png.buffer_rgba())).convert("RGB")
        picture = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        picture.save(stem.with_name(stem.name + ".png"), dpi=(DPI, DPI))
        svg: Any = FigureCanvasSVG(figure)
        svg.print_svg(stem.with_name(stem.name + ".svg"), metadata={"Date": None, "Creator": None})


def of_methods(rows: Sequence[str]) -> Mask:
    """Return [R], whether each row is a method; the others come first wherever rows are ordered."""
    return np.array(list(map(is_method, rows)), dtype=bool)


def scale(axes: Axes, values: Floats) -> None:
    """Draw on a log scale, with plain numbers, what spans more than a linear scale can show."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > _LOG_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def whole_numbers(axes: Axes) -> None:
    """Let the ticks of the x axis stand at layers."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
