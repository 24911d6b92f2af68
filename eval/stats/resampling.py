"""Bootstrap resamples of prompts and of seeds, shared by all rows, and the intervals that follow.

Two things could have been others: the prompts and, where a family has models of several seeds, the
seeds. Every model of an experiment answers the same prompts, so the two factors are crossed: a
resample draws prompts and, independently, seeds, and takes the drawn prompts for each drawn seed (the
pigeonhole bootstrap of Owen, Ann. Appl. Stat. 2007). Drawing prompts anew within each seed would count
the same prompt several times.

Shapes: R rows, S seeds, n prompts, B replicates, which are the values of a statistic on B resamples.
NaN is a missing value.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVEL = 0.95
"""Coverage of every interval; 1 - LEVEL is the size of every test."""
RESAMPLES = 1000
LEAST_SEEDS = 3
"""From so many on, seeds are resampled; fewer are averaged: intervals then hold for these models only."""
STREAM = 20251216
"""Root seed of all random numbers drawn here."""


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """The means of R rows, or their differences from one row, with replicates on shared resamples."""

    mean: Floats  # [R]
    by_seed: Floats  # [R, S, n]; n = 1 for a single value. A row of one seed has its values S times
    over_prompts: Floats  # [R, B], on resamples of the prompts; B = 0 for a single value
    replicates: Floats  # [R, B], on resamples of the prompts and, where there are enough, of the seeds
    n: Ints  # [R], prompts with a value
    seeds: Ints  # [R], seeds that were measured

    @property
    def seed_means(self) -> Floats:
        """[R, S], the mean over prompts for each seed."""
        return mean(self.by_seed)

    @property
    def varies(self) -> Bools:
        """[R], whether prompts or seeds vary in the resamples."""
        either: Bools = (self.seeds >= LEAST_SEEDS) | (self.over_prompts.shape[1] > 0)
        return either


def mean(values: Floats, axis: int = -1, weights: Floats | float = 1.0) -> Floats:
    """Return the weighted mean over an axis without the NaN; NaN where nothing is left."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        total = (np.where(scored, values, 0.0) * weights).sum(axis=axis)
        means: Floats = total / (scored * weights).sum(axis=axis)
    return means


def scored_prompts(by_seed: Floats) -> Ints:
    """Return [R], the number of prompts of [R, S, n] that have a value for at least one seed."""
    count: Ints = (~np.isnan(by_seed)).any(axis=1).sum(axis=1)
    return count


@functools.lru_cache(maxsize=32)
def prompt_weights(prompts: int, column: str) -> Floats:
    """Return [RESAMPLES, prompts]: how often each prompt occurs in each resample of the named column.

    A column has the same resamples in every family, as it has the same prompts there. Each column has
    its own random stream: columns with equally many prompts must not share their resamples.
    """
    generator = np.random.default_rng([STREAM, zlib.crc32(column.encode())])
    drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    return drawn.astype(np.float64)


@functools.lru_cache(maxsize=32)
def seed_weights(seeds: int, family: str) -> Floats:
    """Return [RESAMPLES, seeds]: the share of each seed in each resample of the named family.

    All columns of a family share them, as they describe the same models; families are independent. A
    resample draws S - 1 of S seeds with replacement: S draws would give only (S - 1) / S of the
    variance between seeds, 2/3 for three (Rao and Wu, JASA 1988).
    """
    generator = np.random.default_rng([STREAM, zlib.crc32(b"seeds"), zlib.crc32(family.encode())])
    drawn = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return drawn / (seeds - 1)


def resample(by_seed: Floats, drawn_by_seed: Floats, seeds: Ints, *, column: str, family: str) -> Resampled:
    """Resample [R, S, n] values, or their differences, of rows that have ``seeds`` [R].

    Replicates that the scorer made itself, ``drawn_by_seed`` [R, S, B > 0], replace resamples of prompts.
    """
    crossed = by_seed.shape[1] >= LEAST_SEEDS
    if drawn_by_seed.shape[2]:
        over_prompts = replicates = mean(drawn_by_seed, axis=1)
        if crossed:
            weights = seed_weights(by_seed.shape[1], family)[: drawn_by_seed.shape[2]]
            replicates = mean(drawn_by_seed, axis=1, weights=weights.T)
    else:
        over_prompts = replicates = resampled_means(mean(by_seed, axis=1), column)
        if crossed:
            replicates = crossed_means(by_seed, column, family)
    return Resampled(
        mean=mean(mean(by_seed, axis=1)),
        by_seed=by_seed,
        over_prompts=over_prompts,
        replicates=replicates,
        n=scored_prompts(by_seed),
        seeds=seeds,
    )


def resampled_means(values: Floats, column: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, n] values over resamples of the prompts of a column.

    Prompts without a value drop out of the resample. A single prompt cannot be resampled: [R, 0].
    """
    prompts = values.shape[1]
    if prompts < 2:
        return np.empty((len(values), 0))
    means = _weighted(values, prompt_weights(prompts, column))
    means[(~np.isnan(values)).sum(axis=1) < 2] = np.nan
    return means


def crossed_means(by_seed: Floats, column: str, family: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, S, n] values over resamples of seeds crossed with prompts.

    NaN where a resample has no value of the row. A single prompt stays as it is: only the seeds vary.
    """
    prompts = by_seed.shape[2]
    weights = prompt_weights(prompts, column)
    means = np.empty((len(by_seed), RESAMPLES))
    # Few seeds can be drawn in few ways: the resamples that have the same seeds are made together.
    ways, chosen = np.unique(seed_weights(by_seed.shape[1], family), axis=0, return_inverse=True)
    for number, way in enumerate(ways):
        drawn = chosen == number
        means[:, drawn] = _weighted(mean(by_seed, axis=1, weights=way[:, None]), weights[drawn])
    if prompts > 1:
        means[scored_prompts(by_seed) < 2] = np.nan
    return means


def _weighted(values: Floats, weights: Floats) -> Floats:
    """Return the [R, B] means of [R, n] values by [B, n] weights."""
    scored = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: Floats = (np.where(scored, values, 0.0) @ weights.T) / (scored @ weights.T)
    return means


def stacked(parts: Sequence[object], name: str) -> NDArray[Any]:
    """Return [F, R, ...]: the array ``name`` of each of F parts, the last axis cut to the smallest."""
    arrays = list(map(attrgetter(name), parts))
    smallest = min(array.shape[-1] for array in arrays)
    return np.stack([array[..., :smallest] for array in arrays])


def mean_over_families(parts: Sequence[Resampled]) -> Resampled:
    """Return the unweighted mean over families with the same rows; S counts the seeds of all families."""
    means = stacked(parts, "mean").mean(axis=0)
    scored = ~np.isnan(means)
    most = max(part.by_seed.shape[2] for part in parts)
    by_seed = []
    for part in parts:
        missing = most - part.by_seed.shape[2]
        by_seed.append(np.pad(part.by_seed, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan))
    return Resampled(
        mean=means,
        by_seed=np.concatenate(by_seed, axis=1),
        over_prompts=stacked(parts, "over_prompts").mean(axis=0),
        replicates=stacked(parts, "replicates").mean(axis=0),
        n=np.where(scored, stacked(parts, "n").sum(axis=0), 0),
        seeds=np.where(scored, stacked(parts, "seeds").min(axis=0), 0),
    )


def interval(means: Resampled, varies: Bools, *, binary: bool, least: float) -> tuple[Floats, Floats]:
    """Return the [R] lower and upper ends of the percentile intervals; NaN for rows that do not vary.

    Binary values, or differences of such, lie between ``least`` and 1. Where all of a row agree, every
    resample does, and the percentile interval is a point: 0 refusals of 64 prompts would be certain.
    There, the share of other values is taken to be Wilson's upper limit for 0 of n, z^2 / (n + z^2).
    """
    low, high = percentile_interval(means.replicates)
    if binary and means.by_seed.shape[2] > 1:
        prompts = scored_prompts(means.by_seed)
        same = np.isnan(means.by_seed) | (means.by_seed == means.mean[:, None, None])
        agree = (prompts > 1) & same.all(axis=(1, 2))
        z = NormalDist().inv_cdf((1 + LEVEL) / 2)
        other = z**2 / (np.maximum(prompts, 1) + z**2)
        low = np.where(agree, means.mean - other * (means.mean - least), low)
        high = np.where(agree, means.mean + other * (1.0 - means.mean), high)
    return np.where(varies, low, np.nan), np.where(varies, high, np.nan)


def percentile_interval(replicates: Floats) -> tuple[Floats, Floats]:
    """Return the [R] outer percentiles of [R, B] replicates without the NaN; NaN for B = 0."""
    low, high = pd.DataFrame(replicates.T).quantile([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).to_numpy()
    return low, high
