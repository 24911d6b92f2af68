"""Paired comparisons of rows, within a family and over all families: difference, interval, test, verdict."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest, Fault
from eval.stats.estimates import UTILITY, Estimate, best_expert, equally_many, ordered, resample, side_by_side
from eval.stats.resampling import LEAST_SEEDS, LEVEL, STREAM, interval, mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eval.columns import Direction
    from eval.stats.resampling import Floats, Ints

SIGN_FLIPS = 4999
ROUNDING = 1e-9
"""Differences that vary by less than this share of their mean do not vary."""
MARGIN = 0.05
"""A row matches the best expert when it is shown to lose less than this, in the units of the column."""
BOUNDED_UTILITY = (*UTILITY, "gsm8k", "mmlu")
"""Columns in [0, 1], on which MARGIN has a meaning."""
_COLUMNS = (
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


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """All R rows of a column less one of them."""

    mean: Floats
    """[R]"""
    by_seed: Floats
    """[R, S, n], paired by seed and prompt."""
    over_prompts: Floats
    """[R, B]"""
    replicates: Floats
    """[R, B]"""
    n: Ints
    """[R], prompts that both have."""
    seeds: Ints
    """[R], seeds that both have; 1 where seeds are not resampled, or where one of either stands for all."""

    @property
    def fixed(self) -> NDArray[np.bool_]:
        """[R], whether neither prompts nor seeds vary in the resamples."""
        few: NDArray[np.bool_] = self.seeds < LEAST_SEEDS
        return few if self.over_prompts.shape[1] == 0 else np.zeros_like(few)


def comparisons(measured: Mapping[str, Mapping[str, Estimate]], against: Sequence[str]) -> pd.DataFrame:
    """Compare every row with each row of ``against``, column by column (``comparisons.csv``).

    ``difference`` is row minus ``against`` on the prompts and seeds that both have, with its paired interval;
    over all families it is the mean of the differences. ``p`` is two-sided: from ``min_f`` over all families and
    wherever seeds are resampled; else from the exact McNemar test for 0/1 columns, from random sign flips for
    other columns with prompts, and from the replicates for columns that have only those. ``p_holm`` is corrected
    within family and column, over all its tests. On columns of BOUNDED_UTILITY every row is also compared with
    the best expert: ``non_inferior_to_best_expert`` says whether the interval lies above -MARGIN, and is empty
    where the best expert itself does not exceed MARGIN. Those lines have a p only if the expert is among
    ``against``.

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
    return pd.concat(frames, ignore_index=True)[list(_COLUMNS)] if frames else pd.DataFrame(columns=_COLUMNS)


def _compare_column(column: Estimate, against: Sequence[str]) -> list[pd.DataFrame]:
    """Return at most one frame, with all comparisons of a column, Holm-corrected together."""
    named = [column.rows.index(row) for row in against if row in column.rows]
    best = best_expert(column) if column.name in BOUNDED_UTILITY else None
    others = named if best is None else list(dict.fromkeys([*named, best]))
    frames = [_compare_rows(column, other, tested=other in named) for other in others]
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


def _compare_rows(column: Estimate, other: int, *, tested: bool) -> pd.DataFrame:
    """Compare all rows of a column that have a value with the row at index ``other``."""
    parts = [_difference(part, other) for part in column.parts or (column,)]
    difference = np.mean([part.mean for part in parts], axis=0)
    replicates = np.mean(equally_many([part.replicates for part in parts]), axis=0)
    low, high = interval(
        side_by_side([part.by_seed for part in parts]), replicates, (-1.0, 1.0) if column.binary else None
    )
    fixed = np.any([part.fixed for part in parts], axis=0)
    test, p = _test(column, other, parts) if tested else ("", np.full(len(difference), np.nan))
    frame = pd.DataFrame(
        {
            "row": column.rows,
            "column": column.name,
            "against": column.rows[other],
            "difference": difference,
            "ci_low": np.where(fixed, np.nan, low),
            "ci_high": np.where(fixed, np.nan, high),
            "n": np.sum([part.n for part in parts], axis=0),
            "test": test,
            "p": p,
        }
    )
    return frame.drop(index=other).dropna(subset="difference")


def _difference(column: Estimate, other: int) -> _Difference:
    by_seed = column.by_seed - column.by_seed[other]
    if column.derived:
        difference = column.mean - column.mean[other]
        over_prompts = column.over_prompts - column.over_prompts[other]
        replicates = column.replicates - column.replicates[other]
    else:
        drawn = None if column.drawn_by_seed is None else column.drawn_by_seed - column.drawn_by_seed[other]
        difference = mean(mean(by_seed, axis=1))
        over_prompts, replicates = resample(by_seed, drawn, column.draws, column.name)
    both = (~np.isnan(mean(by_seed))).sum(axis=1)
    alone = (column.seeds == 1) & (column.seeds[other] == 1)
    prompts = (~np.isnan(by_seed)).any(axis=1).sum(axis=1)
    return _Difference(
        mean=difference,
        by_seed=by_seed,
        over_prompts=over_prompts,
        replicates=replicates,
        n=(~np.isnan(difference)).astype(np.int64) if column.derived else prompts,
        seeds=np.where(alone | (column.draws is None), 1, both),
    )


def _test(column: Estimate, other: int, parts: Sequence[_Difference]) -> tuple[Sequence[str], Floats]:
    """Return for each of R rows the name of the paired test that fits its data, and the p-values."""
    if column.parts:
        p = min_f_p(parts)
        return np.where(np.isnan(p), "", "min_f").tolist(), p
    (part,) = parts
    seeds_vary = part.seeds >= LEAST_SEEDS
    if seeds_vary.all():
        return ["min_f"] * len(seeds_vary), min_f_p(parts)
    name, p = _test_of_prompts(column, other, part)
    if not seeds_vary.any():
        return [name] * len(p), p
    return np.where(seeds_vary, "min_f", name).tolist(), np.where(seeds_vary, min_f_p(parts), p)


def _test_of_prompts(column: Estimate, other: int, part: _Difference) -> tuple[str, Floats]:
    """Return the test, and its [R] p-values, that takes the models as they are and only the prompts as drawn."""
    if column.by_seed.shape[2] < 2:
        if part.over_prompts.shape[1]:
            return "replicates", replicate_p(part.over_prompts)
        return "", np.full(len(part.mean), np.nan)
    values = column.values
    if np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
        return "mcnemar", mcnemar_p(values, values[other])
    return "sign_flip", sign_flip_p(mean(part.by_seed, axis=1))


def min_f_p(parts: Sequence[_Difference]) -> Floats:
    """Return the [R] two-sided p of difference 0 on other prompts and other seeds: min F' of Clark (1973).

    F' = d^2 / (V_seeds + V_prompts) with V_seeds the variance of the mean over seeds, summed over F families and
    divided by F^2, and V_prompts that of the mean over prompts, from its replicates; the degrees of freedom are
    Satterthwaite's. What prompts and seeds do together counts twice, so the test errs on the safe side. Where
    nothing varies p is that of sign flips, 2^(1 - n); NaN where there is one value alone.
    """
    from scipy.special import stdtr

    difference = np.mean([part.mean for part in parts], axis=0)
    of_seeds, squared = _variance_of_seeds(parts)
    replicates = np.mean(equally_many([part.over_prompts for part in parts]), axis=0)
    prompts = np.min([part.n for part in parts], axis=0)
    freedom = np.where(prompts > 1, prompts - 1, max(replicates.shape[1] - 1, 1))
    of_prompts = np.zeros(len(difference))
    if replicates.shape[1]:
        with np.errstate(invalid="ignore"):
            of_prompts = np.nan_to_num(replicates.var(axis=1, ddof=1)) * (freedom + 1) / freedom
    variance = of_seeds + of_prompts
    seeds = np.sum([part.seeds for part in parts], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(
            variance**2 / (squared + of_prompts**2 / freedom), -np.abs(difference) / np.sqrt(variance)
        )
    certain = np.where(difference == 0, 1.0, 2.0 ** (1 - np.where(prompts > 1, prompts, seeds)))
    p = np.where(variance > 0, p, certain)
    alone = (seeds == len(parts)) & (replicates.shape[1] == 0)
    return np.where(np.isnan(difference) | alone, np.nan, p)


def _variance_of_seeds(parts: Sequence[_Difference]) -> tuple[Floats, Floats]:
    """Return [R] sums over families of V_f = s_f^2 / (S_f F^2) and of V_f^2 / (S_f - 1), for families of many seeds."""
    total = squared = np.zeros(len(parts[0].mean))
    for part in parts:
        of_models = mean(part.by_seed)
        count = np.where(part.seeds >= LEAST_SEEDS, part.seeds, 2)
        scatter = np.nansum((of_models - mean(of_models)[:, None]) ** 2, axis=1)
        of_family = np.where(part.seeds >= LEAST_SEEDS, scatter / (count - 1) / count, 0.0) / len(parts) ** 2
        total, squared = total + of_family, squared + of_family**2 / (count - 1)
    return total, squared


def mcnemar_p(left: Floats, right: Floats) -> Floats:
    """Return the [R] two-sided p of the exact McNemar test for [R, n] against [n] of 0, 1 and NaN (unscored)."""
    from scipy.special import bdtr

    scored = ~(np.isnan(left) | np.isnan(right))
    only_left = (scored & (left > right)).sum(axis=1)
    only_right = (scored & (left < right)).sum(axis=1)
    tail = bdtr(np.minimum(only_left, only_right), only_left + only_right, 0.5)
    return np.where(scored.any(axis=1), np.minimum(2 * tail, 1.0), np.nan)


def sign_flip_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of mean 0 for [R, n] paired differences; NaN pairs do not count."""
    values = np.nan_to_num(differences)  # a zero is the same under either sign, and so takes no part
    signs = _signs(values.shape[1])
    observed, flipped = values.sum(axis=1), values @ signs.T.astype(np.float64)
    slack = 1e-12 * np.abs(values).sum(axis=1)
    below = (flipped <= (observed + slack)[:, None]).sum(axis=1)
    above = (flipped >= (observed - slack)[:, None]).sum(axis=1)
    one = 0 if len(signs) == 2 ** values.shape[1] else 1  # a sample of the flips has the observed one beside it
    p = np.minimum(2 * (np.minimum(below, above) + one) / (len(signs) + one), 1.0)
    return np.where(np.isnan(differences).all(axis=1), np.nan, p)


@functools.lru_cache(maxsize=8)
def _signs(n: int) -> NDArray[np.int8]:
    """Return all 2^n signs of n values, or SIGN_FLIPS of them where they are more: int8 [flips, n].

    They are those of ``scipy.stats.permutation_test``, which draws them anew for every row and column.
    """
    if 2**n <= SIGN_FLIPS:
        return np.array(list(itertools.product((1, -1), repeat=n)), dtype=np.int8)
    pairs = np.tile(np.array([1, -1], dtype=np.int8), (SIGN_FLIPS, n, 1))
    return np.random.default_rng(STREAM).permuted(pairs, axis=-1)[..., 0]


def replicate_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of [R, B] bootstrap differences: twice the smaller tail at 0.

    Where no difference reaches 0 that says only p < 2 / B, which no correction for a table of comparisons survives:
    there the normal tail goes on, with the mean and deviation of the differences.
    """
    from scipy.special import ndtr

    scored = (~np.isnan(differences)).sum(axis=1)
    tails = np.minimum((differences <= 0).sum(axis=1), (differences >= 0).sum(axis=1))
    p = np.minimum(2 * (tails + 1) / (scored + 1), 1.0)
    for row in np.flatnonzero((tails == 0) & (scored > 1)):
        beyond = differences[row][~np.isnan(differences[row])]
        centre, deviation = abs(beyond.mean()), beyond.std(ddof=1)
        if deviation > ROUNDING * centre:
            p[row] = min(p[row], 2 * ndtr(-centre / deviation))
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
