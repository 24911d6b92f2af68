"""TIES: trim, elect sign, merge disjointly (Yadav et al., arXiv 2306.01708), and mergekit's variant."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignmerge.engine.loop import blocks
from alignmerge.engine.merger import (
    Block,
    MergeContext,
    Merger,
    Models,
    Rule,
    check_choice,
    check_range,
    compiled,
    flat,
    total,
)
from alignmerge.pool import anchored, anchored_total, check_share

Counts = Any
"""Counts as a numpy array: models by buckets."""
Weights = Sequence[float] | None
TINY = 1e-300
"""Less than any sum of weights above 0: what agrees in no model with a weight is 0."""
Pass = Callable[[Callable[[Tensor, Sequence[Tensor]], None]], Iterable[None]]
"""A pass over all models: does something with each block of the base and of the pool, as it is iterated."""


@dataclass(frozen=True, kw_only=True)
class Ties(Merger):
    """theta = theta_IT + scale * (weighted) mean over the trimmed deltas that agree with the elected sign."""

    name = "ties"
    density: float = 0.2
    """Share of the entries of each delta that is kept, the largest by magnitude. Biases that are zero in every
    model do not count: the layout has a place for them (Qwen2's attention), the model has none."""
    scale: float = 1.0
    variant: Literal["global", "per_tensor"] = "global"
    """``global`` (the paper): trimmed over all parameters of a model, zero sums take the majority's sign.
    ``per_tensor`` (mergekit): trimmed tensor by tensor, zero sums count as +."""
    anchor_share: float | None = None
    """Weight of the anchor, the experts sharing the rest, as in mergekit: before the signs are elected, and in
    the mean. None: all alike (the paper)."""

    def __post_init__(self) -> None:
        check_range("method.density", self.density, 0, 1, open_low=True)
        check_range("method.scale", self.scale, 0, 10)
        check_choice("method.variant", self.variant, ("global", "per_tensor"))
        check_share(self.anchor_share)

    def fit(self, ctx: MergeContext) -> Rule:
        """Find the thresholds: two passes over the weights, and one for the global majority sign."""
        models = ctx.models
        weights = anchored(len(models.pool), self.anchor_share)
        if self.variant == "per_tensor":
            found = {name: _cuts_of(models, name, self.density) for name in models.base.views}
            return lambda block: self._merged(block, found[block.name], 1.0, weights)
        kept = max(1, int(self.density * _parameters(models)))
        cuts = [Cut(rank.value) for rank in kth_largest(partial(_pass, models, None), kept)]
        votes = sum(blocks(models, partial(_votes, cuts, weights)))
        majority = float((votes > 0) - (votes < 0))
        thresholds = dict(zip(models.aliases, (cut.least for cut in cuts), strict=True))
        ctx.record(thresholds=thresholds, majority_sign=majority)
        return lambda block: self._merged(block, cuts, majority, weights)

    def _merged(self, block: Block, cuts: Sequence[Cut], majority: float, weights: Weights) -> Tensor:
        fused = compiled([block.base, *block.pool])
        if fused and weights is None:
            merged = torch.empty_like(block.base)
            least, ends = _bounds(block, cuts)
            arrays = flat(merged), flat(block.base), tuple(map(flat, block.pool))
            fused.ties_into(*arrays, least, ends, majority, self.scale)
            return merged
        trimmed = _trimmed(block, cuts)
        sign = elected(trimmed, majority, weights)
        return block.base + self.scale * disjoint_mean(trimmed, sign, weights)

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Name a density at which nothing is trimmed."""
        return "density 1: nothing is trimmed" if self.density == 1 else ""


class Rank(NamedTuple):
    """A ``k``-th largest magnitude."""

    value: float
    kept: int
    """How many of the entries that equal it are among the ``k`` largest."""
    equal: int
    """How many there are."""


class Cut(NamedTuple):
    """What is kept of a delta: magnitudes above ``least``, and those equal to it before place ``end`` of the view."""

    least: float
    end: float = math.inf


def kth_largest(over: Pass, k: int) -> list[Rank]:
    """Return each model's exact ``k``-th largest magnitude over its fp32 blocks, in constant memory.

    The bits of non-negative floats sort like the floats: one pass counts their upper halves, a second
    one the lower halves within the bucket that holds rank ``k``.
    """
    upper = [_rank(counts, k) for counts in _counted(over, _add_upper_halves, 1 << 15)]
    buckets = [bucket for bucket, _ in upper]
    lower = _counted(over, partial(_add_lower_halves, buckets), 1 << 16)
    found = []
    for (bucket, left), counts in zip(upper, lower, strict=True):
        half, kept = _rank(counts, left)
        value = np.uint32(bucket << 16 | half).view(np.float32)
        found.append(Rank(float(value), kept, int(counts[half])))
    return found


def trim(delta: Tensor, least: float) -> Tensor:
    """Zero the entries whose magnitude is less than ``least``, an fp32 number."""
    below = np.nextafter(np.float32(least), np.float32(-1))
    return torch.nn.functional.hardshrink(delta, float(below))


def elected(trimmed: Sequence[Tensor], majority: float, weights: Weights = None) -> Tensor:
    """Return the sign (-1 or 1, fp32) of each coordinate's (weighted) sum, ``majority`` where it is 0."""
    sign = anchored_total(trimmed, weights).float().sign()
    return sign + majority * (1 - sign.abs())


def disjoint_mean(trimmed: Sequence[Tensor], sign: Tensor, weights: Weights = None) -> Tensor:
    """Average, per coordinate, the entries whose sign is the elected one (fp32); 0 without any."""
    agreeing = [(delta * sign).relu() for delta in trimmed]
    if weights is not None:
        shared = anchored_total([one.sign() for one in agreeing], weights)
        return (anchored_total(agreeing, weights) / shared.clamp(min=TINY)).float() * sign
    count = torch.zeros_like(sign)
    for one in agreeing:
        count += one.sign()
    return (total(agreeing) / count.clamp(min=1)).float() * sign


def _parameters(models: Models) -> int:
    """Return the number of parameters, without the biases that are zero in every model."""
    found = 0
    for name, spec in models.base.items():
        used = (model.read(name).any() for model in (models.base, *models.pool))
        if not name.endswith(".bias") or any(used):
            found += spec.numel
    return found


def _pass(
    models: Models, names: Sequence[str] | None, count: Callable[[Tensor, Sequence[Tensor]], None]
) -> Iterator[None]:
    return blocks(models, lambda block: count(block.base, block.pool), names)


def _votes(cuts: Sequence[Cut], weights: Weights, block: Block) -> int:
    """Return how many more coordinates rise than fall."""
    fused = compiled([block.base, *block.pool])
    if fused and weights is None:
        return int(fused.votes(flat(block.base), tuple(map(flat, block.pool)), *_bounds(block, cuts)))
    return int(elected(_trimmed(block, cuts), 0.0, weights).sum())


def _start(block: Block) -> int:
    """Return the place of a block's first number in its view."""
    return int((block.rows.start or 0) * math.prod(block.base.shape[1:]))


def _bounds(block: Block, cuts: Sequence[Cut]) -> tuple[Any, Any]:
    """Return, for each model, the least magnitude that is kept, and the place in the block where ties end."""
    start, size = _start(block), block.base.numel()
    least = np.array([cut.least for cut in cuts], np.float32)
    ends = [max(0, min(cut.end - start, size)) for cut in cuts]
    return least, np.array(ends, np.int64)


def _trimmed(block: Block, cuts: Sequence[Cut]) -> list[Tensor]:
    start = _start(block)
    found = []
    for delta, (least, end) in zip(block.deltas, cuts, strict=True):
        kept = trim(delta, least)
        if end < start + delta.numel():
            after = max(0, int(end) - start)
            kept.view(-1)[after:] = torch.nn.functional.hardshrink(delta.view(-1)[after:], least)
        found.append(kept)
    return found


def _cuts_of(models: Models, name: str, density: float) -> list[Cut]:
    """Return what is kept of one view: of equal magnitudes the first."""
    kept = max(1, int(density * math.prod(models.base.views[name].shape)))
    ranks = kth_largest(partial(_pass, models, [name]), kept)
    cuts = []
    for place, rank in enumerate(ranks):
        split = rank.value > 0 and rank.kept < rank.equal
        cuts.append(Cut(rank.value, _end(models, name, place, rank) if split else math.inf))
    return cuts


def _end(models: Models, name: str, place: int, rank: Rank) -> int:
    """Return the place in a view after the last entry of a model of the pool that ``rank`` keeps."""

    def ties(block: Block) -> tuple[slice, Any]:
        sizes = np.abs(flat(block.pool[place] - block.base))
        return block.rows, np.flatnonzero(sizes == np.float32(rank.value))

    left, row = rank.kept, math.prod(models.base.views[name].shape[1:])
    for rows, tied in blocks(models, ties, [name]):
        if len(tied) >= left:
            return (rows.start or 0) * row + int(tied[left - 1]) + 1
        left -= len(tied)
    raise AssertionError("there are as many as were counted")


def _counted(over: Pass, add: Callable[[Counts, Tensor, Sequence[Tensor]], None], buckets: int) -> Counts:
    """Return what ``add`` counts in a pass, (models, buckets): each thread has counts of its own, summed at the end."""
    made: list[Counts] = []
    own = local()

    def count(base: Tensor, pool: Sequence[Tensor]) -> None:
        if not hasattr(own, "counts"):
            own.counts = np.zeros((len(pool), buckets), np.int64)
            made.append(own.counts)
        add(own.counts, base, pool)

    deque(over(count), maxlen=0)
    return sum(made)


def _add_upper_halves(found: Counts, base: Tensor, pool: Sequence[Tensor]) -> None:
    for k, theta in enumerate(pool):
        if fused := compiled([base, theta]):
            fused.count_upper(found[k], flat(base), flat(theta))
        else:
            found[k] += np.bincount(_bits(base, theta) >> 16, minlength=1 << 15)


def _add_lower_halves(buckets: Sequence[int], found: Counts, base: Tensor, pool: Sequence[Tensor]) -> None:
    for k, (theta, bucket) in enumerate(zip(pool, buckets, strict=True)):
        if fused := compiled([base, theta]):
            fused.count_lower(found[k], flat(base), flat(theta), bucket)
        else:
            bits = _bits(base, theta)
            found[k] += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)


def _bits(base: Tensor, theta: Tensor) -> Any:
    """Return the magnitudes of a delta as integers."""
    return flat((theta - base).abs()).view(np.uint32)


def _rank(counts: Any, k: int) -> tuple[int, int]:
    """Return the bucket of the ``k``-th largest value and which rank it has within this bucket."""
    from_top = counts[::-1].cumsum()
    bucket = len(counts) - 1 - int(np.argmax(from_top >= k))
    return bucket, k - int(counts[bucket + 1 :].sum())
