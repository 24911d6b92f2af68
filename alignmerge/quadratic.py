"""The quadratic part of the objective, Q = L_geo + lambda_align L_align, for both estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import mul
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import Block, MergeContext, Rule, average, block_of, own
from alignmerge.fisher import NormalisedFishers, pool_fishers
from alignmerge.spaces import Directions, Space

if TYPE_CHECKING:
    from alignmerge.method import AlignMerge

SUBSPACES = {"alignment": "alignment", "refusals": "refusals", "utility": "utility", "random": "alignment"}
"""``subspace_from`` -> the example set whose gradients (or, for ``random``, eigenvalues) S_A has."""


class Quadratic(ABC):
    """The minimiser theta* of Q, and the metric G about it.

    ``soup`` is the minimiser of L_geo; gradients are taken at ``point``, for S_A on the set ``examples``.
    """

    names: Sequence[str]  # the matrices that are solved; everything else is averaged

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        """Take the method's fields, and lambda_k of sum 1 (None: uniform)."""
        self.method, self.ctx, self.weights = method, ctx, weights
        self.examples = SUBSPACES[method.subspace_from]
        self.soup = self._soup()
        self.point = self._point()

    @abstractmethod
    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""

    @abstractmethod
    def rule(self, moved: Mapping[str, Tensor]) -> Rule:
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

    def floor(self) -> float:
        """V in the solver's metric; 1 where all models are equal: there is nowhere to move."""
        total = 0.0
        for name in self.names:
            block, coordinates = block_of(self.ctx.models, name), self.coordinates(name)
            centre = self.soup(block)
            away = (coordinates(theta - centre) for theta in block.pool)
            squares = [float(x.square().sum(dtype=torch.float64)) for x in away]
            shares = self.weights or [1 / len(squares)] * len(squares)
            total += sum(map(mul, shares, squares))
        return total or 1.0

    def soup_inputs(self) -> list[str]:
        """Return what the minimiser of L_geo reads beside the pool, for keys: the own sets where it is a soup."""
        if self.method.metric == "shared":
            return []
        return [self.ctx.examples_digest(own(alias)) for alias in self.ctx.models.aliases]

    def _soup(self) -> Rule:
        weights = self.weights
        if self.method.metric == "shared":
            return lambda block: average(block.pool, weights)
        normalised = NormalisedFishers.of(pool_fishers(self.ctx), self.method.floor)
        return lambda block: normalised.barycentre(block, weights)

    def _point(self) -> Checkpoint:
        if self.method.at == "base":
            return self.ctx.models.base
        if self.method.at == "barycentre":
            return self.ctx.barycentre(self.weights)
        return self.ctx.merged(self.method.first_iterate())
