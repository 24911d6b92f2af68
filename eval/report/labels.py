"""Labels beside points that do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import Floats, freeze

_STYLE: Any = {
    "textcoords": "offset points", "ha": "center", "va": "center", "size": 7.5, "zorder": 5,
    "bbox": {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.2},
    "arrowprops": {"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkA": 0, "shrinkB": 6},
}  # fmt: skip


def label_points(figure: Figure, axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write (text, x, y, colour) beside each point, where it covers least of labels and points.

    The layout is frozen first, as places are found in pixels.
    """
    freeze(figure)
    if not labels:
        return
    notes = [axes.annotate(text, (x, y), (0, 0), color=colour, **_STYLE) for text, x, y, colour in labels]
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    points = np.asarray(axes.transData.transform([note.xy for note in notes]))
    sizes = np.array([note.get_window_extent(renderer).size for note in notes]) + np.array([4, 2])
    places = _places(points, sizes, np.asarray(axes.bbox.extents))
    beside = (np.abs(places - points) < sizes / 2 + 13).all(axis=1)
    for note, offset, near in zip(notes, (places - points) * 72 / figure.dpi, beside, strict=True):
        note.set_position(tuple(offset))
        if near and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)


def _places(points: Floats, sizes: Floats, frame: Floats) -> Floats:
    """Return the [N, 2] centres of labels of these sizes, in pixels, for N points within a frame."""
    places = points.copy()
    around = np.full_like(points, 18.0)
    for placed in range(3 * len(points)):  # three rounds: the first labels did not know the last
        i = placed % len(points)
        others = np.arange(len(points))
        known = (others < i) | ((others > i) & (placed >= len(points)))
        taken = np.vstack([np.hstack([places, sizes])[known], np.hstack([points, around])])
        places[i] = _best_place(points[i], sizes[i], taken, frame)
    return places


def _best_place(point: Floats, size: Floats, taken: Floats, frame: Floats) -> Floats:
    """Return the centre of the cheapest of 168 boxes; ``taken`` is [O, 4] of centres and sizes."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    angles, gaps = np.meshgrid(turn, (10, 18, 30, 46, 66, 92, 124))
    way = np.stack([np.cos(angles.ravel()), np.sin(angles.ravel())], axis=1)
    centres = point + way * (size / 2 + gaps.reshape(-1, 1))
    others, sizes = taken[:, :2], taken[:, 2:]
    apart = np.abs(centres[:, None] - others[None])
    shared = np.clip((size + sizes) / 2 - apart, 0, np.minimum(size, sizes))  # [C, O, 2]
    covered = shared.prod(axis=-1).sum(axis=1)
    before, after = frame[:2] - (centres - size / 2), centres + size / 2 - frame[2:]
    outside = np.maximum(before, 0) + np.maximum(after, 0)
    best: Floats = centres[np.argmin(4 * covered + 1e3 * outside.sum(axis=1) + 2.0 * gaps.ravel())]
    return best
