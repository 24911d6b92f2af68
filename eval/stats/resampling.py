"""Resamples of prompts and of seeds, drawn once and shared by everything that is compared, and their intervals.

Two things could have been others: the prompts and, where a family has models of several seeds, the models.
Every model of an experiment answers the same prompts, so the two are crossed: a resample draws prompts and
draws seeds, and takes the drawn prompts for each drawn seed (the pigeonhole bootstrap of Owen, Ann. Appl. Stat.
2007). Prompts drawn anew within each seed would count the same prompt as several.
"""

from __future__ import annotations

import functools
import zlib
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

LEVEL = 0.95
"""Coverage of every interval; 1 - LEVEL is the size of every test."""
RESAMPLES = 1000
LEAST_SEEDS = 3
"""Seeds from which they are resampled; fewer are averaged and the intervals speak of these models only."""
STREAM = 20251216


class SeedDraws(NamedTuple):
    """Which seeds each resample has: few seeds can be drawn in few ways."""

    ways: Floats
    """[K, S], the share of each seed in each of K ways."""
    way: Ints
    """[RESAMPLES], the way that each resample takes."""


def mean(values: Floats, axis: int = -1) -> Floats:
    """Mean over an axis without the NaN; NaN where nothing is left."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(scored, values, 0.0).sum(axis=axis) / scored.sum(axis=axis)
    return means


@functools.lru_cache(maxsize=32)
def prompt_weights(prompts: int, column: str) -> Floats:
    """Return [RESAMPLES, prompts]: how often each prompt of a column counts.

    A column has the same draws in every family, as it has the same prompts there. Each has its own stream:
    columns with equally many prompts must not share their resamples.
    """
    generator = np.random.default_rng([STREAM, zlib.crc32(column.encode())])
    return generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES).astype(np.float64)


@functools.lru_cache(maxsize=32)
def seed_draws(seeds: int, family: str) -> SeedDraws | None:
    """Draw the seeds of a family for each resample; None below LEAST_SEEDS.

    All columns of a family share the draws, as they speak of the same models; families draw for themselves.
    One seed less than there are is drawn with replacement: as many as there are would give (S - 1) / S of the
    variance between S seeds, 2/3 for three (Rao and Wu, JASA 1988).
    """
    if seeds < LEAST_SEEDS:
        return None
    generator = np.random.default_rng([STREAM, zlib.crc32(b"seeds"), zlib.crc32(family.encode())])
    drawn = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=RESAMPLES)
    ways, way = np.unique(drawn, axis=0, return_inverse=True)
    return SeedDraws(ways / (seeds - 1), way.ravel())


def resampled_means(values: Floats, column: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, n] values, over resamples of the prompts that all rows share.

    Prompts without a value drop out of the resample. A single prompt cannot be resampled: [R, 0].
    """
    prompts = values.shape[1]
    if prompts < 2:
        return np.empty((len(values), 0))
    means = _weighted(values, prompt_weights(prompts, column))
    means[(~np.isnan(values)).sum(axis=1) < 2] = np.nan
    return means


def crossed_means(by_seed: Floats, column: str, draws: SeedDraws) -> Floats:
    """Return the [R, RESAMPLES] means of [R, S, n] values over resamples of seeds and of prompts.

    A resample counts for the rows that have a value in it. A single prompt stays what it is, so that only the
    seeds vary.
    """
    prompts = by_seed.shape[2]
    weights = prompt_weights(prompts, column) if prompts > 1 else np.ones((RESAMPLES, 1))
    means = np.empty((len(by_seed), RESAMPLES))
    for number, share in enumerate(draws.ways):
        drawn = draws.way == number
        means[:, drawn] = _weighted(_over_seeds(by_seed, share[:, None]), weights[drawn])
    if prompts > 1:
        means[(~np.isnan(by_seed)).any(axis=1).sum(axis=1) < 2] = np.nan
    return means


def crossed_replicates(replicates: Floats, draws: SeedDraws) -> Floats:
    """Return [R, B]: the average over the drawn seeds of [R, S, B] replicates, replicate by replicate."""
    return _over_seeds(replicates, draws.ways[draws.way[: replicates.shape[2]]].T)


def _over_seeds(values: Floats, share: Floats) -> Floats:
    """Return the [R, n] averages of [R, S, n] over seeds by ``share`` [S, n or 1]; NaN where none is scored."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        averages: Floats = (np.where(scored, values, 0.0) * share).sum(axis=1) / (scored * share).sum(axis=1)
    return averages


def _weighted(values: Floats, weights: Floats) -> Floats:
    """Return the [R, B] means of [R, n] values by [B, n] weights, without the NaN."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = (np.where(scored, values, 0.0) @ weights.T) / (scored @ weights.T)
    return means


def interval(by_seed: Floats, replicates: Floats, bounds: tuple[float, float] | None) -> tuple[Floats, Floats]:
    """Return the [R] ends of the interval of a mean of [R, S, n] values with [R, B] replicates.

    Where all n 0/1 values (or their differences) of a row agree, every resample agrees too and the percentile
    interval is a point: 0 refusals of 64 would be certain. ``bounds`` says between which values others could
    lie; the share of such others is then below Wilson's limit for 0 of n.
    """
    low, high = percentile_interval(replicates)
    if bounds is None or by_seed.shape[2] < 2:
        return low, high
    centre = mean(mean(by_seed, axis=1))
    prompts = (~np.isnan(by_seed)).any(axis=1).sum(axis=1)
    same = np.isnan(by_seed) | (by_seed == centre[:, None, None])
    agree = (prompts > 1) & same.all(axis=(1, 2))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    other = z**2 / (np.maximum(prompts, 1) + z**2)
    low = np.where(agree, centre - other * (centre - bounds[0]), low)
    high = np.where(agree, centre + other * (bounds[1] - centre), high)
    return low, high


def percentile_interval(replicates: Floats) -> tuple[Floats, Floats]:
    """Return the [R] outer percentiles of [R, B] replicates without the NaN; NaN for B = 0."""
    if not replicates.shape[1]:
        return np.full(len(replicates), np.nan), np.full(len(replicates), np.nan)
    ranked = np.sort(replicates, axis=1)  # the NaN come last
    last = np.maximum((~np.isnan(ranked)).sum(axis=1) - 1, 0)
    return _quantile(ranked, last, (1 - LEVEL) / 2), _quantile(ranked, last, (1 + LEVEL) / 2)


def _quantile(ranked: Floats, last: Ints, share: float) -> Floats:
    """Return the [R] values at a share of the way to the place ``last`` of ranked [R, B], interpolated."""
    rows, below = np.arange(len(ranked)), np.floor(share * last).astype(np.int64)
    left, right = ranked[rows, below], ranked[rows, np.minimum(below + 1, last)]
    quantile: Floats = left + (right - left) * (share * last - below)
    return quantile
