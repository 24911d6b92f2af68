"""What all figures share: style, colours of rows, the sheet with title and caption, how it is saved."""

from __future__ import annotations

import colorsys
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from eval.stats.claims import OURS
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
OURS_COLOUR = "#cc3311"
FAMILY_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
_COLOURS = {
    "average": "#0077bb", "task_arithmetic": "#332288", "ties": "#117733", "ties/per_tensor": "#55aa66",
    "fisher_soup": "#009988", "dare": "#667722", "safemerge": "#a09a00", "identity": "#9999bb",
    "mergealign/hammoud": "#aa4499", "mergealign/thakkar": "#6a3d9a",
    "interpolate": "#22aacc", "interpolate/base": "#88ccdd", "interpolate/soup": "#226688",
    "gradient_step": "#4466ee", "gradient_step/soup": "#88a0ff",
    OURS: OURS_COLOUR, "alignmerge/reference_base": "#ee7733", "alignmerge/reference_anchor": "#aa1144",
    "alignmerge/kronecker": "#ee3377", "alignmerge/soup": "#882255", "alignmerge/task_arithmetic": "#dd7788",
    "alignmerge/experts": "#ddaa33", "alignmerge/random": "#c4a484", "alignmerge/utility": "#997755",
    "alignmerge/identity": "#6b4a2f", "alignmerge/no_align": "#f0a090", "alignmerge/no_budget": "#ff6644",
}  # fmt: skip
"""Row -> its colour in every figure of every experiment: ours are warm, rivals cool. Other rows have one by name."""
_HUES = {OURS: (0.93, 1.11)}
"""Method -> the range of hues of its rows that are not listed; other methods have the cool half."""
_COOL = (0.3, 0.85)
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_IDENTITY = {"base": ("#8a8a8a", "-"), "pretrained": ("#c4c4c4", "-"), "anchor": (INK, "--")}
_LOG_SPAN = 30.0  # largest over smallest value from which a profile is drawn on a log scale

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]  # of the R rows of an estimate
RowStyles = Mapping[str, dict[str, Any]]
"""Row -> colour, dash, width, label and order of its line; the same in all figures of a report."""


def row_styles(rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return row -> style, a function of its name alone: the same in every figure of every experiment."""
    return {row: _style(row) for row in rows}


def colour_of(row: str) -> str:
    """Return the colour of a row, a function of its name alone."""
    if not is_method(row):
        return _IDENTITY[row][0] if row in _IDENTITY else _grey(row)
    if row in _COLOURS:
        return _COLOURS[row]
    low, high = _HUES.get(row.partition("/")[0], _COOL)
    hue, light, saturation = _shares(row)
    made = colorsys.hls_to_rgb((low + hue * (high - low)) % 1, 0.3 + 0.3 * light, 0.45 + 0.5 * saturation)
    return to_hex(made)


def _style(row: str) -> dict[str, Any]:
    dash, width = "-", 1.4
    if row in _IDENTITY:
        dash, width = _IDENTITY[row][1], 1.3
    elif not is_method(row) or "/" in row:
        dash = _DASHES[1 + zlib.crc32(row.encode()) % (len(_DASHES) - 1)]
    if row == OURS:
        width = 2.0
    order = 2 + is_method(row) + (row == OURS)
    return {"color": colour_of(row), "ls": dash, "lw": width, "label": row, "zorder": order}


def _grey(row: str) -> str:
    return to_hex((0.35 + 0.3 * _shares(row)[0],) * 3)


def _shares(row: str) -> list[float]:
    """Return three numbers in [0, 1) that hang on the name alone."""
    return [zlib.crc32(f"{part} {row}".encode()) / 2**32 for part in range(3)]


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
