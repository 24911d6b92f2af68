"""The estimates of one measured column for all rows of a family, with confidence intervals.

A row is a merged, fine-tuned or reference model. Every row of a family answered the same prompts,
possibly for several seeds, each with models of its own. The estimate is the mean over prompts of the
mean over seeds. Its interval (``eval.stats.intervals``) comes from a bootstrap over clusters of prompts,
crossed with seeds where a family has ``LEAST_SEEDS`` of them. All rows share the resamples, so
differences between rows are paired (``eval.stats.resampling``). A row that was measured for one of
several seeds (a deterministic method on models that all seeds share) stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eval.columns import BOOTSTRAP, Direction
from eval.stats.intervals import interval, mean_interval
from eval.stats.resampling import Floats, Ints, Resampled, clusters_of, resample, stacked, variance_of_seeds

ALL = "all families"
"""The name of the mean over families where a family is named (``summary.csv``, ``comparisons.csv``)."""
EXPERT = "expert:"
PRETRAINED = "pretrained"
"""The row that cannot chat: figures leave it out, as it would only stretch their scales."""
_IDENTITY = ("base", PRETRAINED, "anchor")


@dataclass(frozen=True, kw_only=True)
class Estimate(Resampled):
    """One column of one family, or its mean over families, with intervals; NaN where a row has none."""

    family: str
    name: str
    direction: Direction
    rows: tuple[str, ...]
    low: Floats  # [R], lower end of the interval; NaN where neither prompts nor seeds can be resampled
    high: Floats  # [R], upper end
    drawn_by_seed: Floats  # [R, S, B], the scorer's own bootstrap replicates; B = 0 where it has none
    unscored: Ints  # [R], samples that are NaN, over all seeds
    binary: bool  # whether every sample is 0 or 1
    derived: bool = False  # computed from other estimates: differences come from the replicates alone
    parts: tuple[Estimate, ...] = ()  # the estimates of the families, if this is their mean

    @property
    def experts(self) -> NDArray[np.bool_]:
        """[R], whether the row is an expert."""
        return np.strings.startswith(np.array(self.rows), EXPERT)

    def select(self, rows: tuple[str, ...]) -> Estimate:
        """Return the estimate for these of its rows, in this order."""
        index = list(map(self.rows.index, rows))  # the rows are the first axis of every array
        arrays = {name: value[index] for name, value in vars(self).items() if hasattr(value, "shape")}
        return replace(self, rows=rows, **arrays)


def is_method(row: str) -> bool:
    """Whether a row is a merged model, not theta_IT, the pretrained model, the anchor or an expert."""
    return row not in _IDENTITY and not row.startswith(EXPERT)


def ordered(rows: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct rows: theta_IT, theta_0, anchor, experts, methods, each in order of appearance."""

    def place(row: str) -> int:
        if row in _IDENTITY:
            return _IDENTITY.index(row)
        return len(_IDENTITY) + is_method(row)

    return tuple(sorted(dict.fromkeys(rows), key=place))


def measure(samples: pd.DataFrame, rows: Sequence[str], seeds: Sequence[int] | None = None) -> Estimate:
    """Estimate one column of one family, whose seeds are ``seeds`` (by default those of the samples).

    ``samples`` has one sample a line: family, row, seed, column, id, value, direction. Raises ValueError
    when a sample is there twice.
    """
    if seeds is None:
        seeds = sorted(samples["seed"].unique())
    replicate = samples["id"].str.startswith(BOOTSTRAP)
    scored = samples[~replicate]
    family, name, direction = scored[["family", "column", "direction"]].iloc[0]
    by_seed, row_seeds = _by_seed(scored, rows, seeds)
    drawn_by_seed, _ = _by_seed(samples[replicate], rows, seeds)
    clusters = clusters_of(sorted(scored["id"].unique()))
    means = resample(by_seed, drawn_by_seed, row_seeds, clusters, column=name, family=family)
    unscored = scored["value"].isna().groupby(scored["row"]).sum().reindex(list(rows), fill_value=0)
    binary = bool(scored["value"].dropna().isin((0.0, 1.0)).all())
    low, high = interval(means, means.varies, binary=binary, least=0.0)
    return Estimate(
        **vars(means),
        family=family,
        name=name,
        direction=direction,
        rows=tuple(rows),
        low=low,
        high=high,
        drawn_by_seed=drawn_by_seed,
        unscored=np.asarray(unscored, dtype=np.int64),
        binary=binary,
    )


def _by_seed(samples: pd.DataFrame, rows: Sequence[str], seeds: Sequence[int]) -> tuple[Floats, Ints]:
    """Return [R, S, n] values, ids sorted, and [R] seeds with samples; ``pivot`` refuses duplicates."""
    wide = samples.pivot(index=["row", "seed"], columns="id", values="value")
    places = pd.MultiIndex.from_product([rows, seeds])
    values = wide.reindex(places).to_numpy(np.float64, copy=True).reshape(len(rows), len(seeds), -1)
    measured = places.isin(wide.index).reshape(len(rows), len(seeds))
    count = measured.sum(axis=1)
    single = count == 1
    values[single] = values[single, measured[single].argmax(axis=1)][:, None]
    return values, count


def combined(
    name: str, direction: Direction, parts: Sequence[Estimate], rule: Callable[[Floats], Floats]
) -> Estimate:
    """Return the unweighted mean over F columns of ``rule``, which maps their [F, R, ...] to the same.

    The prompts of the columns are resampled independently, as they differ; their seeds are drawn
    together. A row that lacks one of the columns has no value.
    """

    def average(attribute: str) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            values: Floats = rule(stacked(parts, attribute)).mean(axis=0)
        return np.where(np.isfinite(values), values, np.nan)

    means, replicates = average("mean"), average("replicates")
    by_seed = average("seed_means")[:, :, None]
    seeds = stacked(parts, "seeds").max(axis=0)
    of_seeds = variance_of_seeds(by_seed[:, :, 0], seeds)
    found = replace(
        parts[0],
        name=name,
        direction=direction,
        mean=means,
        by_seed=by_seed,
        drawn_by_seed=by_seed[:, :, :0],
        over_prompts=average("over_prompts"),
        replicates=replicates,
        n=np.where(np.isnan(means), 0, stacked(parts, "n").sum(axis=0)),
        seeds=seeds,
        clusters=(0,),
        units=stacked(parts, "units").min(axis=0),
        of_seeds=of_seeds["of_seeds"],
        of_seeds_squared=of_seeds["of_seeds_squared"],
        unscored=np.zeros(len(means), dtype=np.int64),
        binary=False,
        derived=True,
        parts=(),
    )
    low, high = mean_interval(found)
    return replace(found, low=low, high=high)
