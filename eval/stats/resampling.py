"""Bootstrap resamples of prompts and of seeds, shared by all rows.

Two things could have been others: the prompts and, where a family has models of several seeds, the
seeds. Prompts that share a cluster (a thing, a category) are drawn together. Every model of an experiment
answers the same prompts, so the two factors are crossed: a
resample draws prompts and, independently, seeds, and takes the drawn prompts for each drawn seed (the
pigeonhole bootstrap of Owen, Ann. Appl. Stat. 2007). Drawing prompts anew within each seed would count
the same prompt several times.

Shapes: R rows, S seeds, n prompts in G clusters, B replicates, which are the values of a statistic on B resamples.
NaN is a missing value.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVEL = 0.95
"""Coverage of every interval; 1 - LEVEL is the size of every test."""
RESAMPLES = 1000
LEAST_SEEDS = 3
"""From so many on, seeds are resampled; fewer are averaged: intervals then hold for these models only."""
CAUTION = 3
"""By simulation: 1 lets the test of one family of three seeds err in .08 of the experiments, 3 in .06 at most."""
CLUSTER = "#"
"""In the id of a prompt, the name of its cluster follows this mark."""
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
    clusters: tuple[int, ...]  # [n], the cluster of each prompt, from 0 on
    units: Ints  # [R], clusters with a value
    of_seeds: Floats  # [R], variance of the mean that comes from the seeds; 0 where they are not resampled
    of_seeds_squared: Floats  # [R], the sum over families of its square over S - 1

    @property
    def seed_means(self) -> Floats:
        """[R, S], the mean over prompts for each seed."""
        return mean(self.by_seed)

    @property
    def varies(self) -> Bools:
        """[R], whether prompts or seeds vary in the resamples."""
        either: Bools = (self.seeds >= LEAST_SEEDS) | (self.over_prompts.shape[1] > 0)
        return either

    @property
    def of_prompts(self) -> Floats:
        """[R], variance of the mean that comes from the prompts."""
        if self.over_prompts.shape[1] < 2:
            return np.zeros(len(self.mean))
        with np.errstate(invalid="ignore"):
            variance: Floats = np.nan_to_num(self.over_prompts.var(axis=1, ddof=1))
        return variance

    @property
    def variance(self) -> Floats:
        """[R], variance of the mean. Prompts and seeds each hold their interaction: it is too large, if anything."""
        return self.of_seeds + self.of_prompts

    @property
    def freedom(self) -> Floats:
        """[R], degrees of freedom of ``variance``: Satterthwaite's, cautious of seeds; infinite where nothing varies.

        The variance of seeds counts CAUTION times, as few seeds often show too little of it, and the formula would
        then give the freedom of the many prompts.
        """
        of_prompts = np.where(self.units > 1, self.units - 1, np.inf)  # a scorer's own replicates have no count
        whole = CAUTION * self.of_seeds + self.of_prompts
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = whole**2 / (CAUTION**2 * self.of_seeds_squared + self.of_prompts**2 / of_prompts)
        return np.where(self.variance > 0, freedom, np.inf)


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


def clusters_of(ids: Iterable[str]) -> tuple[int, ...]:
    """Return the cluster of each prompt, numbered from 0: what follows ``#`` in its id, else the prompt's own."""
    names = [name.partition(CLUSTER)[2] or name for name in ids]
    return tuple(np.unique(names, return_inverse=True)[1].tolist())


@functools.lru_cache(maxsize=32)
def prompt_weights(clusters: tuple[int, ...], column: str) -> Floats:
    """Return [RESAMPLES, n]: how often each prompt occurs in each resample of the named column.

    A resample draws G - 1 of G clusters with replacement, whole, which gives the variance of G of them
    without bias (Rao and Wu, JASA 1988). A column has the same resamples in every family, as it has the
    same prompts there. Each column has its own random stream: columns with equally many prompts must not
    share their resamples.
    """
    generator = np.random.default_rng([STREAM, zlib.crc32(column.encode())])
    count = max(clusters) + 1
    drawn = generator.multinomial(max(count - 1, 1), np.full(count, 1 / count), size=RESAMPLES)
    return drawn[:, list(clusters)].astype(np.float64)


@functools.lru_cache(maxsize=32)
def seed_weights(seeds: int, family: str) -> Floats:
    """Return [RESAMPLES, seeds]: the share of each seed in each resample of the named family.

    All columns of a family share them, as they describe the same models; families are independent. S - 1
    of S seeds are drawn, as of clusters: S would give (S - 1) / S of their variance, 2/3 for three.
    """
    generator = np.random.default_rng([STREAM, zlib.crc32(b"seeds"), zlib.crc32(family.encode())])
    drawn = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return drawn / (seeds - 1)


def resample(
    by_seed: Floats, drawn_by_seed: Floats, seeds: Ints, clusters: tuple[int, ...], *, column: str, family: str
) -> Resampled:
    """Resample [R, S, n] values, or their differences, of rows that have ``seeds`` [R]; [n] ``clusters``.

    Replicates that the scorer made itself, ``drawn_by_seed`` [R, S, B > 0], replace resamples of prompts.
    """
    crossed = by_seed.shape[1] >= LEAST_SEEDS
    if drawn_by_seed.shape[2]:
        over_prompts = replicates = mean(drawn_by_seed, axis=1)
        if crossed:
            weights = seed_weights(by_seed.shape[1], family)[: drawn_by_seed.shape[2]]
            replicates = mean(drawn_by_seed, axis=1, weights=weights.T)
    else:
        over_prompts = replicates = resampled_means(mean(by_seed, axis=1), clusters, column)
        if crossed:
            replicates = crossed_means(by_seed, clusters, column, family)
    return Resampled(
        mean=mean(mean(by_seed, axis=1)),
        by_seed=by_seed,
        over_prompts=over_prompts,
        replicates=replicates,
        n=scored_prompts(by_seed),
        seeds=seeds,
        clusters=clusters,
        units=scored_clusters(by_seed, clusters),
        **variance_of_seeds(mean(by_seed), seeds),
    )


def scored_clusters(by_seed: Floats, clusters: tuple[int, ...]) -> Ints:
    """Return [R], the number of clusters with a prompt of [R, S, n] that has a value."""
    answers = (~np.isnan(by_seed)).sum(axis=1)
    counted: Ints = (in_clusters(answers, clusters) > 0).sum(axis=1)
    return counted


def in_clusters(values: NDArray[Any], clusters: tuple[int, ...]) -> Floats:
    """Return the [R, G] sums of [R, n] values over the prompts of each cluster."""
    member = np.asarray(clusters)[:, None] == np.arange(max(clusters) + 1)
    sums: Floats = values.astype(np.float64) @ member
    return sums


def variance_of_seeds(seed_means: Floats, seeds: Ints) -> dict[str, Floats]:
    """Return ``of_seeds`` = s^2 / S, s^2 the variance of [R, S] means, and its square over S - 1; 0 for few."""
    scatter = np.nansum((seed_means - mean(seed_means)[:, None]) ** 2, axis=1)
    count = np.maximum(seeds, LEAST_SEEDS)
    variance = np.where(seeds >= LEAST_SEEDS, scatter / (count - 1) / count, 0.0)
    return {"of_seeds": variance, "of_seeds_squared": variance**2 / (count - 1)}


def resampled_means(values: Floats, clusters: tuple[int, ...], column: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, n] values over resamples of the prompts of a column.

    Prompts without a value drop out of the resample. A single cluster cannot be resampled: [R, 0].
    """
    if len(set(clusters)) < 2:
        return np.empty((len(values), 0))
    means = _weighted(values, prompt_weights(clusters, column))
    means[scored_clusters(values[:, None], clusters) < 2] = np.nan
    return means


def crossed_means(by_seed: Floats, clusters: tuple[int, ...], column: str, family: str) -> Floats:
    """Return the [R, RESAMPLES] means of [R, S, n] values over resamples of seeds crossed with prompts.

    NaN where a resample has no value of the row. A single cluster stays as it is: only the seeds vary.
    """
    weights = prompt_weights(clusters, column)
    means = np.empty((len(by_seed), RESAMPLES))
    # Few seeds can be drawn in few ways: the resamples that have the same seeds are made together.
    ways, chosen = np.unique(seed_weights(by_seed.shape[1], family), axis=0, return_inverse=True)
    for number, way in enumerate(ways):
        drawn = chosen == number
        means[:, drawn] = _weighted(mean(by_seed, axis=1, weights=way[:, None]), weights[drawn])
    if len(set(clusters)) > 1:
        means[scored_clusters(by_seed, clusters) < 2] = np.nan
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
    longest = max(parts, key=lambda part: part.by_seed.shape[2])
    by_seed = []
    for part in parts:
        missing = longest.by_seed.shape[2] - part.by_seed.shape[2]
        by_seed.append(np.pad(part.by_seed, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan))
    return Resampled(
        mean=means,
        by_seed=np.concatenate(by_seed, axis=1),
        over_prompts=stacked(parts, "over_prompts").mean(axis=0),
        replicates=stacked(parts, "replicates").mean(axis=0),
        n=np.where(scored, stacked(parts, "n").sum(axis=0), 0),
        seeds=np.where(scored, stacked(parts, "seeds").min(axis=0), 0),
        clusters=longest.clusters,
        units=stacked(parts, "units").min(axis=0),
        of_seeds=stacked(parts, "of_seeds").sum(axis=0) / len(parts) ** 2,
        of_seeds_squared=stacked(parts, "of_seeds_squared").sum(axis=0) / len(parts) ** 4,
    )
