"""Safety against utility of every setting that was tried on dev, and the area under each method's front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from eval.stats.claims import with_safety
from eval.stats.derived import SIDES, UTILITY, best_expert
from eval.stats.estimates import ALL, Estimate, combined, measure, ordered
from eval.stats.intervals import critical
from eval.stats.resampling import Floats

WANTED = (*SIDES, *UTILITY)
"""The columns that a front is made of."""
_SETTING = "\t"
"""Between a row and its setting, where both are one name."""


@dataclass(frozen=True)
class Fronts:
    """What was tried on dev, and what each method made of it."""

    points: pd.DataFrame
    """family, row, setting, safety, utility: one setting a line; over several families their mean."""
    areas: pd.DataFrame
    """family, row, settings, area, ci_low, ci_high (``fronts.csv``)."""

    def of(self, family: str) -> Fronts:
        """Return what is of one family."""
        return Fronts(*(frame[frame["family"] == family] for frame in (self.points, self.areas)))


def fronts(tried: pd.DataFrame, directions: Mapping[str, str]) -> Fronts | None:
    """Return points and areas of samples of the dev split: family, row, setting, seed, column, id, value.

    Safety is the refusal rate less the over-refusal rate, utility the mean over tasks of the score relative to
    the best expert, at most 1 (the score itself where no expert was measured). ``area`` is that of ``area()``
    over a method's settings; its interval is normal, from resamples of the prompts, and holds for these
    models. None where a side was not measured.
    """
    wanted = tried[tried["column"].isin(WANTED)]
    if not set(SIDES) <= set(wanted["column"]) or not set(UTILITY) & set(wanted["column"]):
        return None
    names = wanted["row"].where(wanted["setting"] == "", wanted["row"] + _SETTING + wanted["setting"])
    named = wanted.assign(row=names, direction=wanted["column"].map(directions))
    planes = {}
    for family, of_family in named.groupby("family", sort=False):
        planes[str(family)] = _plane(of_family)
    if len(planes) > 1 and len({plane.rows for plane in planes.values()}) == 1:
        planes = {ALL: _mean_plane(list(planes.values())), **planes}
    points = [_points(family, plane) for family, plane in planes.items()]
    areas = [_areas(family, plane) for family, plane in planes.items()]
    return Fronts(pd.concat(points, ignore_index=True), pd.concat(areas, ignore_index=True))


@dataclass(frozen=True)
class _Plane:
    """Where R settings lie, and where they do on B resamples of the prompts."""

    rows: tuple[str, ...]
    safety: Floats  # [R, 1 + B], the estimate first
    utility: Floats  # [R, 1 + B]


def _plane(samples: pd.DataFrame) -> _Plane:
    rows = ordered(samples["row"].unique())
    columns = {str(name): measure(of, rows) for name, of in samples.groupby("column", sort=False)}
    safety = with_safety(columns)["safety"]
    settings = [i for i, row in enumerate(rows) if _SETTING in row]
    kept = tuple(rows[i] for i in settings)
    return _Plane(kept, _drawn(safety)[settings], _drawn(_utility(columns))[settings])


def _utility(columns: Mapping[str, Estimate]) -> Estimate:
    tasks = [columns[name] for name in UTILITY if name in columns]
    judged = [task for task in tasks if best_expert(task) is not None]
    if not judged:
        return combined("utility", "up", tasks, lambda values: values)
    return combined("utility", "up", judged, partial(_relative, judged[0]))


def _relative(first: Estimate, values: Floats) -> Floats:
    best = np.fmax.reduce(values[:, first.experts], axis=1, keepdims=True)
    return np.minimum(values / best, 1.0)


def _drawn(estimate: Estimate) -> Floats:
    return np.concatenate([estimate.mean[:, None], estimate.over_prompts], axis=1)


def _mean_plane(planes: Sequence[_Plane]) -> _Plane:
    return _Plane(
        planes[0].rows,
        np.mean([plane.safety for plane in planes], axis=0),
        np.mean([plane.utility for plane in planes], axis=0),
    )


def _points(family: str, plane: _Plane) -> pd.DataFrame:
    names = pd.Series(plane.rows).str.split(_SETTING, n=1, expand=True)
    return pd.DataFrame({
        "family": family, "row": names[0], "setting": names[1],
        "safety": plane.safety[:, 0], "utility": plane.utility[:, 0],
    })  # fmt: skip


def _areas(family: str, plane: _Plane) -> pd.DataFrame:
    methods = np.array([row.partition(_SETTING)[0] for row in plane.rows])
    lines = []
    for method in dict.fromkeys(methods):
        mine = np.flatnonzero(methods == method)
        drawn = area(plane.utility[mine], plane.safety[mine])
        reach = float(critical(np.array(np.inf))) * drawn[1:].std(ddof=1) if len(drawn) > 2 else np.nan
        line = {"family": family, "row": method, "settings": len(mine), "area": drawn[0]}
        lines.append({**line, "ci_low": max(0.0, drawn[0] - reach), "ci_high": min(1.0, drawn[0] + reach)})
    return pd.DataFrame(lines)


def area(x: Floats, y: Floats) -> Floats:
    """Return [B]: the area that [K, B] points dominate in [0, 1] x [0, 1], towards (0, 0)."""
    x, y = np.nan_to_num(x), np.nan_to_num(y)  # what was not scored reaches nothing
    order = np.argsort(-x, axis=0)
    right = np.clip(np.take_along_axis(x, order, axis=0), 0.0, 1.0)
    top = np.maximum.accumulate(np.clip(np.take_along_axis(y, order, axis=0), 0.0, 1.0), axis=0)
    widths = right - np.concatenate([right[1:], np.zeros((1, x.shape[1]))])
    found: Floats = (top * widths).sum(axis=0)
    return found
