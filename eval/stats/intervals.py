"""Confidence intervals of means, rates and differences (``docs/statistics.md`` shows how they cover)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eval.stats.resampling import LEAST_SEEDS, LEVEL, Bools, Floats, Resampled, in_clusters, scored_prompts


def interval(means: Resampled, varies: Bools, *, binary: bool, least: float) -> tuple[Floats, Floats]:
    """Return the [R] lower and upper ends of the intervals; NaN for rows that do not vary.

    Rates (``binary``, ``least`` 0) have Wilson's. Other means have Student's where seeds are resampled,
    which are few, and expanded percentiles of the replicates where they are not. Differences of binary
    values (``least`` -1) are cut at -1 and 1; where all pairs agree the share that would not is taken to
    be Wilson's upper limit.
    """
    if binary and means.by_seed.shape[2] > 1:
        low, high = _rate_interval(means) if least == 0 else _binary_difference(means)
    else:
        low, high = mean_interval(means)
    return np.where(varies, low, np.nan), np.where(varies, high, np.nan)


def mean_interval(means: Resampled) -> tuple[Floats, Floats]:
    """Return Student's interval where seeds are resampled, else the expanded percentiles of the replicates.

    Percentiles are those of a normal distribution with a known variance: they are moved away from the mean
    by Student's quantile over the normal one (Hesterberg, Am. Stat. 2015).
    """
    low, high = percentile_interval(means.replicates)
    stretch = critical(means.freedom) / critical(np.array(np.inf))
    low, high = (means.mean + stretch * (end - means.mean) for end in (low, high))
    reach: Floats = critical(means.freedom) * np.sqrt(means.variance)
    crossed = means.seeds >= LEAST_SEEDS
    return np.where(crossed, means.mean - reach, low), np.where(crossed, means.mean + reach, high)


def critical(freedom: Floats) -> Floats:
    """Return the two-sided quantile of Student's t at LEVEL."""
    from scipy.stats import t

    return np.asarray(t.ppf((1 + LEVEL) / 2, freedom), dtype=np.float64)


def wilson(rate: Floats, size: Floats, quantile: Floats) -> tuple[Floats, Floats]:
    """Return Wilson's interval of a rate among ``size`` independent answers, which need not be whole."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shrunk = 1 + quantile**2 / size
        middle = (rate + quantile**2 / (2 * size)) / shrunk
        reach = quantile * np.sqrt(rate * (1 - rate) / size + quantile**2 / (4 * size**2)) / shrunk
    return np.clip(middle - reach, 0.0, rate), np.clip(middle + reach, rate, 1.0)


def _rate_interval(means: Resampled) -> tuple[Floats, Floats]:
    return wilson(means.mean, effective_size(means), critical(means.freedom))


def effective_size(means: Resampled) -> Floats:
    """Return [R]: how many independent answers would give the rate the variance that it has.

    A few answers that differ say little of how alike a cluster's are. So a cluster whose answers all agree
    counts as one answer at most, and another as its prompts: where nobody refuses, that is the clusters.
    """
    seen = (~np.isnan(means.by_seed)).sum(axis=1)
    prompts, answered = in_clusters(seen > 0, means.clusters), in_clusters(seen, means.clusters)
    hits = in_clusters(np.nansum(means.by_seed, axis=1), means.clusters)
    mixed = (hits > 0) & (hits < answered)
    bound = np.maximum(np.where(mixed, prompts, np.minimum(prompts, 1.0)).sum(axis=1), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = means.mean * (1 - means.mean) / means.variance
    size: Floats = np.where(means.variance > 0, np.fmin(found, bound), bound)
    return size


def _binary_difference(means: Resampled) -> tuple[Floats, Floats]:
    low, high = mean_interval(means)
    same = np.isnan(means.by_seed) | (means.by_seed == means.mean[:, None, None])
    agree = (scored_prompts(means.by_seed) > 1) & same.all(axis=(1, 2))
    size = np.maximum(means.units, 1).astype(np.float64)
    _, other = wilson(np.zeros(len(size)), size, critical(np.full(len(size), np.inf)))
    low = np.where(agree, means.mean - other * (means.mean + 1.0), low)
    high = np.where(agree, means.mean + other * (1.0 - means.mean), high)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def percentile_interval(replicates: Floats) -> tuple[Floats, Floats]:
    """Return the [R] outer percentiles of [R, B] replicates without the NaN; NaN for B = 0."""
    low, high = pd.DataFrame(replicates.T).quantile([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).to_numpy()
    return low, high
