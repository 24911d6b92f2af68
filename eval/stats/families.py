"""All columns of every family and their means over families, from the samples to ``summary.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest, Fault
from eval.columns import BOOTSTRAP
from eval.stats.derived import budget_violations, delta_utility
from eval.stats.estimates import ALL, Estimate, measure, ordered
from eval.stats.intervals import interval
from eval.stats.resampling import mean_over_families, stacked

BY_LAYER = "_by_layer"


def measure_all(scores: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Return family -> column -> estimate, with the two derived columns; columns by layer are left out.

    With several families the mean over them, ``ALL``, comes first, if they share anything. ``scores``
    has one sample a line: family, row, seed, column, id, value, prompt, direction. Raises BadRequest if
    there is nothing to summarise or if rows saw different prompts.
    """
    summarised = scores[~scores["column"].str.endswith(BY_LAYER)]
    if summarised.empty:
        raise BadRequest.of("scores", "no samples", "at least one scored row")
    refuse_different_prompts(summarised)
    families = {str(name): _measure_family(of) for name, of in summarised.groupby("family", sort=False)}
    if len(families) == 1:
        return families
    means = _over_families(list(families.values()))
    if not means:
        return families
    return {ALL: means} | families


def refuse_different_prompts(scores: pd.DataFrame) -> None:
    """Raise BadRequest for each column in which rows of one family saw different texts under one id."""
    single = scores[~scores["id"].str.startswith(BOOTSTRAP)]
    key = ["family", "column", "id"]
    seen = single[[*key, "prompt"]].drop_duplicates()
    different = seen[seen.duplicated(key)].drop_duplicates(key)
    faults = []
    for (family, column), ids in different.groupby(["family", "column"], sort=False)["id"]:
        first = ids.iloc[0]
        samples = single.query("family == @family and column == @column and id == @first")
        names = samples["row"] + " (seed " + samples["seed"].astype(str) + ")"
        usual = samples["prompt"] == samples["prompt"].mode().iloc[0]
        given = (
            f"{family}: {', '.join(names[~usual])} saw another text than {', '.join(names[usual])}"
            f" on {len(ids)} prompts, the first is {first}"
        )
        faults.append(Fault(f"scores.{column}", given, "the same prompts for every row of a family"))
    if faults:
        raise BadRequest(faults)


def _measure_family(scores: pd.DataFrame) -> dict[str, Estimate]:
    rows, seeds = ordered(scores["row"].unique()), sorted(scores["seed"].unique())
    estimates = {}
    for name, samples in scores.groupby("column", sort=False):
        estimates[str(name)] = measure(samples, rows, seeds)
    derived = [delta_utility(estimates)]
    if "aqi" in estimates:
        derived.append(budget_violations(scores[scores["column"] == "aqi"], rows, seeds))
    for estimate in derived:
        if estimate is not None:
            estimates[estimate.name] = estimate
    return estimates


def _over_families(families: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Return the unweighted mean over families of the columns and rows that all families have.

    The families are fixed, not a sample of families: the seeds of each are resampled independently, the
    prompts together, since they are the same.
    """
    means = {}
    for name in _in_all(families):
        parts = [estimates[name] for estimates in families]
        rows = _in_all([part.rows for part in parts])
        if rows:
            means[name] = _mean_of([part.select(rows) for part in parts])
    return means


def _in_all(names: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """Return what all have, in the order of the first."""
    common = set.intersection(*map(set, names))
    return tuple(name for name in names[0] if name in common)


def _mean_of(parts: Sequence[Estimate]) -> Estimate:
    means = mean_over_families(parts)
    binary = all(part.binary for part in parts)
    in_all = ~np.isnan(stacked(parts, "low")).any(axis=0)
    low, high = interval(means, in_all, binary=binary, least=0.0)
    return replace(
        parts[0],
        **vars(means),
        family=ALL,
        low=low,
        high=high,
        drawn_by_seed=means.by_seed[:, :, :0],
        unscored=np.where(np.isnan(means.mean), 0, stacked(parts, "unscored").sum(axis=0)),
        binary=binary,
        derived=True,
        parts=tuple(parts),
    )


def summary(measured: Mapping[str, Mapping[str, Estimate]]) -> pd.DataFrame:
    """Return one line per family, row and column that has at least one sample (``summary.csv``)."""
    families = []
    for estimates in measured.values():
        # All columns have the rows of the family at the same index: sorting puts those of a row together.
        families.append(pd.concat(map(_lines, estimates.values())).sort_index(kind="stable"))
    return pd.concat(families, ignore_index=True)


def _lines(estimate: Estimate) -> pd.DataFrame:
    lines = {
        "family": estimate.family,
        "row": estimate.rows,
        "column": estimate.name,
        "mean": estimate.mean,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "n": estimate.n,
        "seeds": estimate.seeds,
        "unscored": estimate.unscored,
        "better_direction": estimate.direction,
    }
    return pd.DataFrame(lines)[(estimate.n > 0) | (estimate.unscored > 0)]
