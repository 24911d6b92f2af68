"""The quadratic part of the objective, Q = L_geo + lambda_align L_align, for both estimators.

Where the merge starts from another one, L_geo is ||d - d_start||^2_G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import Block, MergeContext, Rule, average, block_of, own
from alignmerge.fisher import NormalisedFishers, pool_fishers
from alignmerge.pool import POOLS
from alignmerge.spaces import Directions, Displacement, Space
from alignmerge.start import begin_at

if TYPE_CHECKING:
    from alignmerge.method import AlignMerge

SUBSPACES = {"alignment": "alignment", "refusals": "refusals", "utility": "utility", "random": "alignment"}
"""``subspace_from`` -> the example set whose gradients (or, for ``random``, eigenvalues) S_A has."""


class Quadratic(ABC):
    """The minimiser theta* of Q, and the metric G about it.

    ``soup`` is the minimiser of L_geo; gradients are taken at ``point``, for S_A on the set ``examples``.
    """

    names: Sequence[str]  # the matrices that are solved; everything else stays at the soup

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        """Take the method's fields, and lambda_k of sum 1 over its pool (None: uniform)."""
        self.method, self.ctx, self.weights = method, ctx, weights
        self.examples = SUBSPACES[method.subspace_from]
        self.members = POOLS[method.pool]
        self.start = method.started(ctx)
        self.soup = self._soup()
        self.point = self._point()

    @abstractmethod
    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""

    @abstractmethod
    def rule(self, moved: Displacement) -> Rule:
        """Return the rule of the merge, ``moved`` from theta*; it records the certificate."""

    @abstractmethod
    def space(self, directions: Directions) -> Space:
        """Return where a budget may move the merge."""

    @abstractmethod
    def coordinates(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what maps a difference in one matrix to coordinates orthonormal in the metric."""

    def reference(self, block: Block) -> Tensor:
        """Return d_ref of one view."""
        return block.deltas[0] if self.method.reference == "anchor" else torch.zeros_like(block.base)

    def unit(self) -> float:
        """V, the mean over anchor and experts of ||theta_k - soup||^2_G: the budget's unit; 1 where it is 0."""
        total, models = 0.0, self.ctx.models
        for name in self.names:
            block, coordinates = block_of(models, name), self.coordinates(name)
            centre = self.soup(block)
            for theta in block.pool:
                total += float(coordinates(theta - centre).square().sum(dtype=torch.float64))
        return total / len(models.pool) or 1.0

    @property
    def plain(self) -> bool:
        """Whether the soup is the average of the pool, and so linear in its deltas."""
        return self.start is None and self.method.metric == "shared"

    def shares(self) -> list[float]:
        """Return lambda_k of anchor and experts; 0 for who is not in the pool."""
        everyone = len(self.ctx.models.pool)
        places = range(everyone)[self.members]
        found = [0.0] * everyone
        for place, share in zip(places, self.weights or [1 / len(places)] * len(places), strict=True):
            found[place] = share
        return found

    def soup_recipe(self) -> dict[str, Any]:
        """Return what the minimiser of L_geo is a function of, for keys."""
        if self.start is not None:
            return {"start": self.start.identity}
        pool = [model.identity for model in self.ctx.models.pool[self.members]]
        recipe: dict[str, Any] = {"pool": pool, "lambda_k": self.weights}
        if self.method.metric == "per_expert":
            aliases = self.ctx.models.aliases[self.members]
            recipe["own"] = [self.ctx.examples_digest(own(alias)) for alias in aliases]
            recipe["floor"] = self.method.floor
        return recipe

    def _soup(self) -> Rule:
        if self.start is not None:
            return begin_at(self.start)
        weights, members = self.weights, self.members
        if self.method.metric == "shared":
            return lambda block: average(block.pool[members], weights)
        fishers = dict(list(pool_fishers(self.ctx).items())[members])
        normalised = NormalisedFishers.of(fishers, self.method.floor)

        def soup(block: Block) -> Tensor:
            inside = Block(block.name, block.rows, block.base, block.pool[members])
            return normalised.barycentre(inside, weights)

        return soup

    def _point(self) -> Checkpoint:
        if self.method.at == "base":
            return self.ctx.models.base
        if self.method.at == "iterate":
            return self.ctx.merged(self.method.first_iterate())
        if self.start is not None:
            return self.start
        usual = self.weights is None and self.method.pool == "all"
        return self.ctx.barycentre(None if usual else self.shares())
