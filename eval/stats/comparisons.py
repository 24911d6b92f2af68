"""Paired comparisons of rows, in each family and over all: difference, interval, test, verdict."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import chain, product
from operator import attrgetter

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from alignmerge.engine.faults import BadRequest, Fault
from eval.columns import Direction
from eval.stats.derived import UTILITY, best_expert
from eval.stats.estimates import Estimate, ordered
from eval.stats.intervals import interval
from eval.stats.resampling import (
    LEAST_SEEDS,
    LEVEL,
    STREAM,
    Floats,
    Resampled,
    in_clusters,
    mean,
    mean_over_families,
    resample,
    stacked,
    variance_of_seeds,
)

SIGN_FLIPS = 4999
ROUNDING = 1e-24
"""A variance below this share of the squared mean is rounding error."""
DECIMALS = 2
"""Digits after the point of a column that declares none here."""
MARGIN = 0.05
"""Non-inferiority margin: a row matches the best expert if it is shown to lose less than this."""
BOUNDED_UTILITY = (*UTILITY, "gsm8k", "mmlu")
"""Columns in [0, 1], on which MARGIN has a meaning."""
_COLUMNS = (
    "family", "row", "column", "against", "difference", "ci_low", "ci_high", "n", "test", "p", "p_holm",
    "verdict", "non_inferior_to_best_expert",
)  # fmt: skip


def comparisons(
    measured: Mapping[str, Mapping[str, Estimate]],
    against: Sequence[str],
    decimals: Mapping[str, int | None] | None = None,
) -> pd.DataFrame:
    """Compare every row with each row of ``against``, column by column (``comparisons.csv``).

    ``difference`` is row minus ``against`` on the prompts and seeds that both have, with its paired
    interval; over all families it is the mean of the differences. ``p`` is two-sided: from min F' over all
    families and wherever seeds are resampled; else from the exact McNemar test for 0/1 columns whose
    prompts share nothing, from sign flips of whole clusters for other columns with prompts, and from the
    replicates for columns that have only those. A p from B random draws is at least 1 / (B + 1).
    ``p_holm`` is Holm's correction over all tests of family and column, the declared family of tests.
    ``decimals`` says how many digits of a column the tables print (None: three significant ones): a
    difference that would be printed as zero has no verdict but "no difference shown".

    On columns of BOUNDED_UTILITY every row is also compared with the best expert, without a test unless
    it is among ``against``: ``non_inferior_to_best_expert`` says whether the interval lies above -MARGIN,
    and is empty where the best expert itself does not exceed MARGIN.

    Raises BadRequest for an ``against`` that no family has.
    """
    estimates = list(chain.from_iterable(columns.values() for columns in measured.values()))
    known = ordered(chain.from_iterable(map(attrgetter("rows"), estimates)))
    missing = [row for row in against if row not in known]
    if missing:
        raise BadRequest(Fault("report.against", row, "one of " + ", ".join(known)) for row in missing)
    frames: list[pd.DataFrame] = []
    for estimate in estimates:
        digits = (decimals or {}).get(estimate.name, DECIMALS)
        frames += _compare_column(estimate, against, digits)
    if not frames:
        return pd.DataFrame(columns=_COLUMNS)
    return pd.concat(frames, ignore_index=True)


def _compare_column(estimate: Estimate, against: Sequence[str], digits: int | None) -> list[pd.DataFrame]:
    """Return at most one frame, with all comparisons of a column, Holm-corrected together."""
    tested = [estimate.rows.index(row) for row in dict.fromkeys(against) if row in estimate.rows]
    references = list(tested)
    best = None
    if estimate.name in BOUNDED_UTILITY:
        best = best_expert(estimate)
    if best is not None and best not in tested:
        references.append(best)
    if not references:
        return []
    frames = [_compare_rows(estimate, reference, tested=reference in tested) for reference in references]
    frame = pd.concat(frames, ignore_index=True)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    frame["verdict"] = _verdicts(frame, estimate.direction, digits)
    judged = pd.Series(False, index=frame.index)
    if best is not None and estimate.mean[best] > MARGIN:
        judged = (frame["against"] == estimate.rows[best]) & frame["ci_low"].notna()
    frame["non_inferior_to_best_expert"] = (frame["ci_low"] > -MARGIN).astype("boolean").where(judged)
    return [frame]


def _compare_rows(estimate: Estimate, reference: int, *, tested: bool) -> pd.DataFrame:
    """Compare all rows of a column that have a value with the row at index ``reference``."""
    parts = [_difference(part, reference) for part in estimate.parts or (estimate,)]
    difference = mean_over_families(parts)
    in_all = np.logical_and.reduce(stacked(parts, "varies"))
    low, high = interval(difference, in_all, binary=estimate.binary, least=-1.0)
    test, p = np.full(len(low), ""), np.full(len(low), np.nan)
    if tested:
        test, p = _test(estimate, reference, parts)
    lines = {
        "family": estimate.family,
        "row": estimate.rows,
        "column": estimate.name,
        "against": estimate.rows[reference],
        "difference": difference.mean,
        "ci_low": low,
        "ci_high": high,
        "n": difference.n,
        "test": test,
        "p": p,
    }
    return pd.DataFrame(lines).drop(index=reference).dropna(subset="difference")


def _difference(estimate: Estimate, reference: int) -> Resampled:
    """Subtract the row at index ``reference`` of a column of one family from all its rows.

    ``n`` and ``seeds`` count what both rows have; ``seeds`` is 1 where seeds are not resampled or both
    rows have a single one.
    """
    by_seed = estimate.by_seed - estimate.by_seed[reference]
    both = (~np.isnan(mean(by_seed))).sum(axis=1)
    single = (estimate.seeds == 1) & (estimate.seeds[reference] == 1)
    seeds = np.where(single | (by_seed.shape[1] < LEAST_SEEDS), 1, both)
    if not estimate.derived:
        drawn = estimate.drawn_by_seed - estimate.drawn_by_seed[reference]
        return resample(by_seed, drawn, seeds, estimate.clusters, column=estimate.name, family=estimate.family)
    difference = estimate.mean - estimate.mean[reference]
    return Resampled(
        mean=difference,
        by_seed=by_seed,
        over_prompts=estimate.over_prompts - estimate.over_prompts[reference],
        replicates=estimate.replicates - estimate.replicates[reference],
        n=(~np.isnan(difference)).astype(np.int64),
        seeds=seeds,
        clusters=estimate.clusters,
        units=np.minimum(estimate.units, estimate.units[reference]),
        **variance_of_seeds(mean(by_seed), seeds),
    )


def _test(estimate: Estimate, reference: int, parts: Sequence[Resampled]) -> tuple[NDArray[np.str_], Floats]:
    """Return for each of R rows the name of the paired test that fits its data, and the p-values."""
    of_seeds = min_f_p(parts)
    if estimate.parts:
        return np.where(np.isnan(of_seeds), "", "min_f"), of_seeds
    (part,) = parts
    name, of_prompts = _test_over_prompts(estimate, reference, part)
    seeds_vary = part.seeds >= LEAST_SEEDS
    return np.where(seeds_vary, "min_f", name), np.where(seeds_vary, of_seeds, of_prompts)


def _test_over_prompts(estimate: Estimate, reference: int, part: Resampled) -> tuple[str, Floats]:
    """Return the test with fixed models and sampled prompts, and its [R] p-values."""
    if part.over_prompts.shape[1] == 0:
        return "", np.full(len(part.mean), np.nan)
    if estimate.by_seed.shape[2] < 2:
        return "replicates", replicate_p(part.over_prompts)
    values = mean(estimate.by_seed, axis=1)
    alone = max(estimate.clusters) + 1 == len(estimate.clusters)
    if alone and np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
        return "mcnemar", mcnemar_p(values, values[reference])
    differences = mean(part.by_seed, axis=1)
    together = in_clusters(np.nan_to_num(differences), estimate.clusters)
    together[np.isnan(differences).all(axis=1)] = np.nan
    return "sign_flip", sign_flip_p(together)


def min_f_p(parts: Sequence[Resampled]) -> Floats:
    """Return the [R] two-sided p of difference 0 for sampled prompts and seeds: min F' of Clark (1973).

    F' = d^2 / (V_seeds + V_prompts) with V_seeds the variance of the mean over seeds, summed over F
    families and divided by F^2, and V_prompts that of the mean over prompts, from its replicates; the
    degrees of freedom are Satterthwaite's, with G - 1 for G clusters of prompts. The interaction of prompts
    and seeds counts twice: the test is conservative. Where nothing varies p is that of sign flips,
    2^(1 - G); NaN for a single value.
    """
    from scipy.stats import t

    whole = mean_over_families(parts)
    seeds = stacked(parts, "seeds").sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * t.sf(np.abs(whole.mean) / np.sqrt(whole.variance), whole.freedom)
    certain = np.where(whole.mean == 0, 1.0, 2.0 ** (1 - np.where(whole.units > 1, whole.units, seeds)))
    p = np.where(whole.variance > ROUNDING * whole.mean**2, p, certain)
    single = (seeds == len(parts)) & (whole.over_prompts.shape[1] == 0)
    return np.where(np.isnan(whole.mean) | single, np.nan, p)


def mcnemar_p(left: Floats, right: Floats) -> Floats:
    """Return the [R] two-sided p of the exact McNemar test, for [R, n] against [n] of 0, 1 and NaN."""
    from scipy.special import bdtr  # the distribution function of the binomial

    scored = ~(np.isnan(left) | np.isnan(right))
    only_left = (scored & (left > right)).sum(axis=1)
    only_right = (scored & (left < right)).sum(axis=1)
    tail = bdtr(np.minimum(only_left, only_right), only_left + only_right, 0.5)
    return np.where(scored.any(axis=1), np.minimum(2 * tail, 1.0), np.nan)


def sign_flip_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of mean 0 of [R, n] paired differences by sign flips, without the NaN."""
    values = np.nan_to_num(differences)  # a zero is the same under either sign, and so takes no part
    signs = _signs(values.shape[1])
    observed, flipped = values.sum(axis=1), values @ signs.T.astype(np.float64)
    slack = 1e-12 * np.abs(values).sum(axis=1)
    below = (flipped <= (observed + slack)[:, None]).sum(axis=1)
    above = (flipped >= (observed - slack)[:, None]).sum(axis=1)
    one = int(len(signs) < 2 ** values.shape[1])  # a sample of the flips has the observed one beside it
    p = np.minimum(2 * (np.minimum(below, above) + one) / (len(signs) + one), 1.0)
    return np.where(np.isnan(differences).all(axis=1), np.nan, p)


@functools.lru_cache(maxsize=8)
def _signs(n: int) -> NDArray[np.int8]:
    """Return all 2^n signs of n values, or SIGN_FLIPS random ones where they are more: int8 [flips, n].

    They are those of ``scipy.stats.permutation_test``, which would draw them again for every column.
    """
    if 2**n <= SIGN_FLIPS:
        return np.array(list(product((1, -1), repeat=n)), dtype=np.int8)
    pairs = np.tile(np.array([1, -1], dtype=np.int8), (SIGN_FLIPS, n, 1))
    return np.random.default_rng(STREAM).permuted(pairs, axis=-1)[..., 0]


def replicate_p(differences: Floats) -> Floats:
    """Return the [R] two-sided p of [R, B] bootstrap differences: twice the smaller tail at 0.

    The difference itself counts as one more on that side, so p is at least 2 / (B + 1): B replicates
    cannot say more, whatever a normal tail would promise.
    """
    scored = (~np.isnan(differences)).sum(axis=1)
    tails = np.minimum((differences <= 0).sum(axis=1), (differences >= 0).sum(axis=1))
    p = np.minimum(2 * (tails + 1) / (scored + 1), 1.0)
    return np.where(scored > 0, p, np.nan)


def holm(p: Floats) -> Floats:
    """Return Holm's step-down correction of the p-values that are not NaN; the NaN stay.

    Not statsmodels' ``multipletests``: each call runs Python's garbage collector, which takes 0.15 s once
    torch is loaded, and there is one call for each column of each family.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    steps = np.arange(len(order), 0, -1) * p[order]
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def _verdicts(frame: pd.DataFrame, direction: Direction, digits: int | None) -> NDArray[np.str_]:
    """Say what the corrected test shows about ``row``; rows of an "info" column can only differ."""
    p, difference = frame["p_holm"].to_numpy(), frame["difference"].to_numpy()
    better = (difference > 0) == (direction == "up")
    shown = np.where(better, "better", "worse")
    if direction == "info":
        shown = np.full(len(frame), "differs")
    printed = difference if digits is None else difference.round(digits)
    unshown = (p >= 1 - LEVEL) | (printed == 0)
    return np.select([np.isnan(p), unshown], ["not tested", "no difference shown"], shown)
