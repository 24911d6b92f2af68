"""Estimates with intervals and paired comparisons, all from one value per prompt.

Every row of a family answered the same prompts, so each resample of a column is drawn once and shared by all
rows: differences between rows are then paired without further ado. Several seeds of a row are averaged
prompt by prompt before anything is resampled; the intervals speak of other prompts, not of other seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest, Fault
from eval.scorer import BOOTSTRAP, Direction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

LEVEL = 0.95
"""Coverage of every interval; 1 - LEVEL is the size of every test."""
RESAMPLES = 1000
SIGN_FLIPS = 4999
MARGIN = 0.05
"""A row matches the best expert when it is shown to lose less than this, in the units of the column."""
KAPPA = 1.0
"""A_min = A(theta_SAFE) - KAPPA * sd of its bootstrap replicates (paper.md 2.5)."""
BY_LAYER = "_by_layer"
UTILITY = ("instruction_following", "reasoning", "helpfulness")
"""The metrics that delta_utility averages (paper.md 2.6)."""
BOUNDED_UTILITY = (*UTILITY, "gsm8k", "mmlu")
"""Columns in [0, 1], on which MARGIN has a meaning."""

_SEED = 20251216
_EXPERT = "expert:"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One column of one family; R rows, n prompts, B replicates, NaN where a row has nothing."""

    name: str
    direction: Direction
    rows: tuple[str, ...]
    mean: Floats
    """[R]"""
    low: Floats
    """[R], lower end of the interval; NaN for a column of a single value."""
    high: Floats
    """[R]"""
    values: Floats
    """[R, n], averaged over seeds; n = 1 where the column is not a mean over prompts."""
    replicates: Floats
    """[R, B], the column on B resamples that all rows share; B = 0 for a column of a single value."""
    n: Ints
    """[R], prompts with a value (budget_violations: replicates)."""
    seeds: Ints
    """[R]"""
    unscored: Ints
    """[R], samples that are NaN, over all seeds."""
    binary: bool
    """Whether every sample is 0 or 1."""


def is_method(row: str) -> bool:
    """Whether a row is a merged model, not theta_IT, the anchor or an expert."""
    return row not in ("base", "anchor") and not row.startswith(_EXPERT)


def ordered(rows: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct rows: theta_IT, anchor, experts, then the methods, each in the order of coming."""
    places = {"base": 0, "anchor": 1}
    return tuple(sorted(dict.fromkeys(rows), key=lambda row: places.get(row, 2 + is_method(row))))


def refuse_different_prompts(scores: pd.DataFrame) -> None:
    """Raise BadRequest for each column in which rows of one family saw different texts under the same id."""
    single = scores[~scores["id"].str.startswith(BOOTSTRAP)]
    texts = single.groupby(["family", "column", "id"], sort=False)["prompt"].nunique(dropna=False)
    different = texts[texts > 1].reset_index()
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


def measure_all(scores: pd.DataFrame) -> dict[str, dict[str, Measured]]:
    """Return family -> column -> estimate, with the two derived columns; columns by layer are left out.

    ``scores`` has one sample a line: family, row, seed, column, id, value, prompt, direction. Raises
    BadRequest when there is nothing to summarise or when rows saw different prompts.
    """
    summarised = scores[~scores["column"].str.endswith(BY_LAYER)]
    if summarised.empty:
        raise BadRequest.of("scores", "no samples", "at least one scored row")
    refuse_different_prompts(summarised)
    return {str(family): _measure_family(of_family) for family, of_family in summarised.groupby("family", sort=False)}


def _measure_family(scores: pd.DataFrame) -> dict[str, Measured]:
    rows = ordered(scores["row"].tolist())
    columns = {str(name): measure(samples, rows) for name, samples in scores.groupby("column", sort=False)}
    derived = [delta_utility(columns)]
    if "aqi" in columns:
        derived.append(budget_violations(scores[scores["column"] == "aqi"], rows))
    return columns | {column.name: column for column in derived if column is not None}


def measure(samples: pd.DataFrame, rows: Sequence[str]) -> Measured:
    """Estimate one column of one family; raises ValueError when a sample is there twice."""
    name, direction = samples["column"].iloc[0], samples["direction"].iloc[0]
    replicate = samples["id"].str.startswith(BOOTSTRAP)
    scored = samples[~replicate]
    values = _by_prompt(scored, rows)
    binary = bool(scored["value"].dropna().isin((0.0, 1.0)).all())
    replicates = _by_prompt(samples[replicate], rows) if replicate.any() else resampled_means(values, name)
    low, high = _interval(values, replicates, (0.0, 1.0) if binary else None)
    per_row = scored.groupby("row")["value"]
    return Measured(
        name=name,
        direction=direction,
        rows=tuple(rows),
        mean=_mean(values),
        low=low,
        high=high,
        values=values,
        replicates=replicates,
        n=(~np.isnan(values)).sum(axis=1),
        seeds=_whole(scored.groupby("row")["seed"].nunique(), rows),
        unscored=_whole(per_row.size() - per_row.count(), rows),
        binary=binary,
    )


def _by_prompt(samples: pd.DataFrame, rows: Sequence[str]) -> Floats:
    """Return [R, n] values averaged over seeds, ids sorted; ``pivot`` refuses a sample that comes twice."""
    wide = samples.pivot(index=["row", "seed"], columns="id", values="value")
    return wide.groupby(level="row").mean().reindex(list(rows)).to_numpy(dtype=np.float64)


def _whole(counts: pd.Series[int], rows: Sequence[str]) -> Ints:
    return np.asarray(counts.reindex(list(rows), fill_value=0), dtype=np.int64)


def _mean(values: Floats) -> Floats:
    """Mean over the last axis without the NaN; NaN where nothing is left."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(scored, values, 0.0).sum(axis=-1) / scored.sum(axis=-1)
    return mean


def resampled_means(values: Floats, column: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, n] values, over resamples of the prompts that all rows share.

    Prompts without a value drop out of the resample. A single prompt cannot be resampled: [R, 0].
    """
    n = values.shape[1]
    if n < 2:
        return np.empty((len(values), 0))
    # Each column has its own stream: columns with equally many prompts must not share their resamples.
    generator = np.random.default_rng([_SEED, zlib.crc32(column.encode())])
    weights = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: Floats = (np.where(scored, values, 0.0) @ weights.T) / (scored @ weights.T)
    means[scored.sum(axis=1) < 2] = np.nan
    return means


def _interval(values: Floats, replicates: Floats, bounds: tuple[float, float] | None) -> tuple[Floats, Floats]:
    """Return the [R] ends of the percentile interval of the replicates.

    Where all n 0/1 values (or their differences) agree, every resample agrees too and the percentile
    interval is a point: 0 refusals of 64 would be certain. ``bounds`` says between which values others could
    lie; the share of such others is then below Wilson's limit for 0 of n.
    """
    low = high = np.full(len(values), np.nan)
    if replicates.shape[1]:
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        low, high = pd.DataFrame(replicates).quantile(tails, axis=1).to_numpy(dtype=np.float64)
    if bounds is None or values.shape[1] < 2:
        return low, high
    from statsmodels.stats.proportion import proportion_confint

    n = (~np.isnan(values)).sum(axis=1)
    mean = _mean(values)
    agree = (n > 1) & np.all(np.isnan(values) | (values == mean[:, None]), axis=1)
    other = proportion_confint(np.zeros(len(n)), np.maximum(n, 1), alpha=1 - LEVEL, method="wilson")[1]
    low = np.where(agree, mean - other * (mean - bounds[0]), low)
    high = np.where(agree, mean + other * (bounds[1] - mean), high)
    return low, high


def combined(name: str, direction: Direction, parts: Sequence[Measured], rule: Callable[[Floats], Floats]) -> Measured:
    """Return the unweighted mean over ``parts`` of ``rule``, which maps [R, B] to [R, B].

    The parts are resampled independently of each other, as they have different prompts. A row that lacks a
    part has no value.
    """
    smallest = min(part.replicates.shape[1] for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.mean([rule(part.mean[:, None])[:, 0] for part in parts], axis=0)
        replicates = np.mean([rule(part.replicates[:, :smallest]) for part in parts], axis=0)
    replicates = np.where(np.isfinite(replicates), replicates, np.nan)
    return _derived(
        name,
        direction,
        parts[0].rows,
        mean=mean,
        replicates=replicates,
        n=np.where(np.isnan(mean), 0, sum(part.n for part in parts)),
        seeds=np.max([part.seeds for part in parts], axis=0),
    )


def _derived(
    name: str,
    direction: Direction,
    rows: Sequence[str],
    *,
    mean: Floats,
    replicates: Floats,
    n: Ints,
    seeds: Ints,
) -> Measured:
    low, high = _interval(mean[:, None], replicates, None)
    return Measured(
        name=name,
        direction=direction,
        rows=tuple(rows),
        mean=mean,
        low=low,
        high=high,
        values=mean[:, None],
        replicates=replicates,
        n=n,
        seeds=seeds,
        unscored=np.zeros(len(mean), dtype=np.int64),
        binary=False,
    )


def delta_utility(columns: Mapping[str, Measured]) -> Measured | None:
    """Return the mean over metrics of 100 (U - max_k U_k) / max_k U_k in percent, or None without experts.

    paper.md 2.6. The maximum runs over the experts, metric by metric, and is taken anew in every resample. A
    metric on which no expert is above 0 has no relative change and is left out.
    """
    parts = [columns[name] for name in UTILITY if name in columns and _best_expert(columns[name]) is not None]
    if not parts:
        return None
    experts = [row.startswith(_EXPERT) for row in parts[0].rows]

    def relative(values: Floats) -> Floats:
        best = np.fmax.reduce(values[experts], axis=0)
        change: Floats = 100 * (values - best) / best
        return change

    return combined("delta_utility", "up", parts, relative)


def _best_expert(column: Measured) -> int | None:
    """Return the index of the expert with the largest value above 0."""
    values = {
        index: column.mean[index]
        for index, row in enumerate(column.rows)
        if row.startswith(_EXPERT) and column.mean[index] > 0
    }
    return max(values, key=lambda index: values[index], default=None)


def budget_violations(aqi: pd.DataFrame, rows: Sequence[str]) -> Measured | None:
    """Return the fraction of a row's AQI replicates below A_min of the same seed, or None without an anchor.

    A_min = A(anchor) - KAPPA * sd over the replicates of the anchor (paper.md 2.5). The fraction is over
    replicates, so it has no interval of its own.
    """
    replicate = aqi["id"].str.startswith(BOOTSTRAP)
    values = aqi[~replicate].pivot(index="row", columns="seed", values="value")
    replicates = aqi[replicate].pivot(index=["row", "seed"], columns="id", values="value")
    if "anchor" not in values.index or "anchor" not in replicates.index.get_level_values("row"):
        return None
    floor = values.loc["anchor"] - KAPPA * replicates.std(axis=1, ddof=1).xs("anchor", level="row")
    limits = floor.reindex(replicates.index.get_level_values("seed")).to_numpy(dtype=np.float64)
    below = replicates.lt(limits, axis=0).sum(axis=1) / replicates.notna().sum(axis=1)
    below = below.where(~np.isnan(limits))
    mean = below.groupby(level="row").mean().reindex(list(rows)).to_numpy(dtype=np.float64)
    return _derived(
        "budget_violations",
        "down",
        rows,
        mean=mean,
        replicates=np.empty((len(mean), 0)),
        n=np.where(np.isnan(mean), 0, _whole(replicates.notna().sum(axis=1).groupby(level="row").sum(), rows)),
        seeds=_whole(below.groupby(level="row").count(), rows),
    )


def summary(measured: Mapping[str, Mapping[str, Measured]]) -> pd.DataFrame:
    """Return one line per family, row and column that has at least one sample (``summary.csv``)."""
    return pd.concat([_summarise(family, columns.values()) for family, columns in measured.items()], ignore_index=True)


def _summarise(family: str, columns: Iterable[Measured]) -> pd.DataFrame:
    """Return the lines of one family, row by row."""
    frames = []
    for column in columns:
        frame = pd.DataFrame(
            {
                "family": family,
                "row": column.rows,
                "column": column.name,
                "mean": column.mean,
                "ci_low": column.low,
                "ci_high": column.high,
                "n": column.n,
                "seeds": column.seeds,
                "unscored": column.unscored,
                "better_direction": column.direction,
            }
        )
        frames.append(frame[(column.n > 0) | (column.unscored > 0)])
    # Every column has the rows of the family at the same index, in their order.
    return pd.concat(frames).sort_index(kind="stable")


def comparisons(measured: Mapping[str, Mapping[str, Measured]], against: Sequence[str]) -> pd.DataFrame:
    """Compare every row with each row of ``against``, column by column (``comparisons.csv``).

    ``difference`` is row minus ``against`` on the prompts that both have, with its paired interval. ``p`` is
    from the exact McNemar test for 0/1 columns, from random sign flips for other columns with prompts, and
    from the replicates for columns that have only those; ``p_holm`` is corrected within family and column,
    over all its tests. On columns of BOUNDED_UTILITY every row is also compared with the best expert:
    ``non_inferior_to_best_expert`` says whether the interval lies above -MARGIN, and is empty where the best
    expert itself does not exceed MARGIN. Those lines have a p only if the expert is among ``against``.

    Raises BadRequest for an ``against`` that no family has.
    """
    known = ordered(row for columns in measured.values() for row in next(iter(columns.values())).rows)
    missing = [row for row in against if row not in known]
    if missing:
        raise BadRequest(Fault("report.against", row, "one of " + ", ".join(known)) for row in missing)
    frames = [
        frame.assign(family=family)
        for family, columns in measured.items()
        for column in columns.values()
        for frame in _compare_column(column, against)
    ]
    return pd.concat(frames, ignore_index=True)[list(_COMPARISON)] if frames else pd.DataFrame(columns=_COMPARISON)


_COMPARISON = (
    "family",
    "row",
    "column",
    "against",
    "difference",
    "ci_low",
    "ci_high",
    "n",
    "test",
    "p",
    "p_holm",
    "verdict",
    "non_inferior_to_best_expert",
)


def _compare_column(column: Measured, against: Sequence[str]) -> list[pd.DataFrame]:
    """Return at most one frame, with all comparisons of a column, Holm-corrected together."""
    named = [column.rows.index(row) for row in against if row in column.rows]
    best = _best_expert(column) if column.name in BOUNDED_UTILITY else None
    others = named if best is None else list(dict.fromkeys([*named, best]))
    frames = [_differences(column, other, tested=other in named) for other in others]
    if not frames:
        return []
    frame = pd.concat(frames, ignore_index=True)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    frame["verdict"] = _verdicts(frame, column.direction)
    frame["non_inferior_to_best_expert"] = pd.Series(pd.NA, index=frame.index, dtype="boolean")
    if best is not None and column.mean[best] > MARGIN:
        judged = (frame["against"] == column.rows[best]) & frame["ci_low"].notna()
        frame.loc[judged, "non_inferior_to_best_expert"] = frame.loc[judged, "ci_low"] > -MARGIN
    return [frame]


def _differences(column: Measured, other: int, *, tested: bool) -> pd.DataFrame:
    """Compare all rows of a column that have a value with the row at index ``other``."""
    if column.values.shape[1] > 1:
        values = column.values - column.values[other]
        difference = _mean(values)
        replicates = resampled_means(values, column.name)
        low, high = _interval(values, replicates, (-1.0, 1.0) if column.binary else None)
    else:
        values = column.mean[:, None] - column.mean[other]
        difference = values[:, 0]
        replicates = column.replicates - column.replicates[other]
        low, high = _interval(values, replicates, None)
    test, p = _test(column, other, values, replicates) if tested else ("", np.full(len(values), np.nan))
    frame = pd.DataFrame(
        {
            "row": column.rows,
            "column": column.name,
            "against": column.rows[other],
            "difference": difference,
            "ci_low": low,
            "ci_high": high,
            "n": (~np.isnan(values)).sum(axis=1),
            "test": test,
            "p": p,
        }
    )
    return frame.drop(index=other).dropna(subset="difference")


def _test(column: Measured, other: int, values: Floats, replicates: Floats) -> tuple[str, Floats]:
    """Return the name of the paired test that fits the data and its [R] p-values."""
    if values.shape[1] < 2:
        return ("replicates", replicate_p(replicates)) if replicates.shape[1] else ("", np.full(len(values), np.nan))
    if np.isin(column.values[~np.isnan(column.values)], (0.0, 1.0)).all():
        return "mcnemar", np.array([mcnemar_p(row, column.values[other]) for row in column.values])
    return "sign_flip", sign_flip_p(values)


def mcnemar_p(left: Floats, right: Floats) -> float:
    """Return the two-sided p of the exact McNemar test for two [n] vectors of 0, 1 and NaN (unscored)."""
    from statsmodels.stats.contingency_tables import mcnemar

    scored = ~(np.isnan(left) | np.isnan(right))
    if not scored.any():
        return float("nan")
    table = np.histogram2d(left[scored], right[scored], bins=2, range=((0, 1), (0, 1)))[0]
    return float(mcnemar(table, exact=True).pvalue)


def sign_flip_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of mean 0 for [R, n] paired differences; NaN pairs do not count."""
    from scipy.stats import permutation_test

    def total(values: Floats, axis: int) -> Floats:
        sums: Floats = values.sum(axis=axis)
        return sums

    result = permutation_test(
        (np.nan_to_num(differences),),  # a zero is the same under either sign, and so takes no part
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        batch=1000,
        axis=-1,
        rng=np.random.default_rng(_SEED),
    )
    return np.where(np.isnan(differences).all(axis=1), np.nan, result.pvalue)


def replicate_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of [R, B] bootstrap differences: twice the smaller tail at 0."""
    scored = (~np.isnan(differences)).sum(axis=1)
    tails = np.minimum((differences <= 0).sum(axis=1), (differences >= 0).sum(axis=1))
    p = np.minimum(2 * (tails + 1) / (scored + 1), 1.0)
    return np.where(scored > 0, p, np.nan)


def holm(p: Floats) -> Floats:
    """Return Holm's step-down correction of the p-values that are there; the NaN stay.

    Four lines instead of statsmodels' ``multipletests``, which collects all garbage of the process in each
    call.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    steps = np.arange(len(order), 0, -1) * p[order]
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def _verdicts(frame: pd.DataFrame, direction: Direction) -> list[str]:
    """Say what the corrected test shows about ``row``; columns without a better direction can only differ."""

    def verdict(difference: float, p: float) -> str:
        if np.isnan(p):
            return "not tested"
        if p >= 1 - LEVEL:
            return "no difference shown"
        if direction == "info":
            return "differs"
        return "better" if (difference > 0) == (direction == "up") else "worse"

    return [verdict(d, p) for d, p in zip(frame["difference"], frame["p_holm"], strict=True)]
