"""What the manifest of an experiment records: what made its numbers, and the digests behind each of
them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from alignmerge.engine.device import cpu_name, machine_class
from alignmerge.engine.kernels import overridden
from alignmerge.engine.keys import plain_fields
from alignmerge.engine.manifest import all_versions, git_state
from alignmerge.engine.merger import Merger, Models
from eval import stats
from eval.columns import BOOTSTRAP
from eval.grid.cells import CellResult
from eval.grid.gates import Verdict
from eval.scorers.interface import Scorer
from eval.stats.families import BY_LAYER

PASSING = ("git", "cpu")
"""What a manifest records of its making that its numbers do not depend on."""
Place = tuple[str, int]
"""Family and seed."""


def of_making(scorers: Iterable[Scorer], mergers: Iterable[Merger]) -> dict[str, Any]:
    """Return what made the numbers: versions of statistics, scorers, methods and packages, the machine,
    the commit.
    """
    return {
        "statistics": stats.VERSION,
        "scorers": {scorer.name: of_scorer(scorer) for scorer in scorers},
        "methods": {merger.name: merger.version for merger in mergers},
        "machine": machine_class(),
        "overridden": overridden(),
        "cpu": cpu_name(),
        "versions": all_versions(),
        "git": git_state(),
    }


def of_scorer(scorer: Scorer) -> dict[str, Any]:
    """Return version, fields and columns of a scorer."""
    return {"version": scorer.version, "fields": plain_fields(scorer), "columns": sorted(scorer.columns)}


def of_method(merger: Merger) -> dict[str, Any]:
    """Return name and fields of a method: it can be built from them again."""
    return {"name": merger.name, **plain_fields(merger)}


def of_models(models: Models) -> dict[str, str]:
    """Return name -> digest of the weights of a family's models."""
    named = {"base": models.base, **dict(zip(models.aliases, models.pool, strict=True))}
    if models.pretrained is not None:
        named["pretrained"] = models.pretrained
    return {name: model.digest for name, model in named.items()}


def of_row(one: CellResult) -> dict[str, Any]:
    """Return what stands behind a row: keys and digests of its scores, their means, its model or merge."""
    row: dict[str, Any] = {"scores": {}, "digests": {}, "means": {}}
    for name, artifact in one.scores.items():
        samples = one.frames[name]
        row["scores"][name], row["digests"][name] = artifact.key, digest_of(samples)
        row["means"][name] = means_of(samples)
    if one.cell.merger is None or one.merge is None:
        return row | {"model": one.cell.model}
    facts = dict(one.merge.manifest["facts"])
    for key in ("blocks", "seconds"):  # too many, and not a result
        facts.pop(key, None)
    return row | {"method": of_method(one.cell.merger), "merge": one.merge.key, "facts": facts}


def of_rows(results: Iterable[CellResult], place: Place) -> dict[str, Any]:
    """Return row -> what stands behind it, for one family with one seed; of two of a name the last."""
    rows = {}
    for one in results:
        if (one.cell.family, one.cell.seed) == place:
            rows[one.cell.row] = of_row(one)
    return rows


def of_gates(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return the gates with what was measured; None for what there is no number of."""
    gates = []
    for verdict in verdicts:
        fields = verdict._asdict().items()
        gates.append({key: None if _is_nan(value) else value for key, value in fields})
    return gates


def digest_of(samples: pd.DataFrame) -> str:
    """Return the sha256 of samples: every column and line, values bit by bit, whatever file they lie
    in.
    """
    sha = hashlib.sha256()
    for name in samples.columns:
        column = samples[name]
        if column.dtype.kind == "f":
            values = column.to_numpy(np.float64, copy=True)
            values[np.isnan(values)] = np.nan  # there are many bit patterns of NaN
            content = values.tobytes()
        else:
            content = "\0".join(column.astype(str)).encode()
        sha.update(f"{name} {len(content)} ".encode() + content)
    return sha.hexdigest()


def means_of(samples: pd.DataFrame) -> dict[str, float]:
    """Return column -> mean over its scored samples, to six digits; columns by layer or without any are
    left out.
    """
    drawn, by_layer = samples["id"].str.startswith(BOOTSTRAP), samples["column"].str.endswith(BY_LAYER)
    means = samples[~drawn & ~by_layer].groupby("column")["value"].mean().dropna()
    rounded: dict[Any, float] = means.map("{:.6g}".format).astype(float).to_dict()
    return rounded


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
