"""DARE (Yu et al., arXiv 2311.03099): drop most of each delta at random, rescale the rest, add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignmerge.engine.merger import (
    Block,
    Inputs,
    MergeContext,
    Merger,
    Rule,
    by_rows,
    check_choice,
    check_range,
)
from alignmerge.engine.seeding import torch_stream
from alignmerge.pool import pool_weights


@dataclass(frozen=True, kw_only=True)
class Dare(Merger):
    """theta = theta_IT + scale * sum_k w_k m_k * Delta_k / (1 - drop), each m_k ~ Bernoulli(1 - drop)."""

    name: ClassVar[str] = "dare"
    elementwise: ClassVar[bool] = False  # a mask is drawn for a whole tensor, row by row: in order
    drop: float = 0.5
    """p in the paper: the share of each delta that is dropped."""
    scale: float = 1.0
    """Factor on the weighted sum of the thinned deltas."""
    weights: Literal["uniform", "validation"] = "uniform"
    """w_k: 1/K each, or proportional to exp(-NLL_k), the mean probability of a response token of the metric set."""

    def __post_init__(self) -> None:
        check_range("method.drop", self.drop, 0, 0.999)
        check_range("method.scale", self.scale, 0, 10)
        check_choice("method.weights", self.weights, ("uniform", "validation"))

    @property
    def inputs(self) -> Inputs:
        """The seed of the masks; the metric examples where they weigh the pool."""
        examples = ("metric",) if self.weights == "validation" else ()
        return Inputs(seed=True, examples=examples)

    def fit(self, ctx: MergeContext) -> Rule:
        """Settle the weights and return the rule; masks are drawn tensor by tensor."""
        aliases = ctx.models.aliases
        weights = pool_weights(ctx, self.weights) or dict.fromkeys(aliases, 1 / len(aliases))
        ctx.record(weights=weights)
        seed, digests = ctx.seed, [model.digest for model in ctx.models.pool]
        streams: list[torch.Generator] = []

        def rule(block: Block) -> Tensor:
            if not block.rows.start:  # a tensor begins
                streams[:] = [torch_stream(seed, "dare", digest, block.name) for digest in digests]
            return by_rows(partial(self._merged, list(weights.values()), streams), block)

        return rule

    def _merged(self, weights: Sequence[float], streams: Sequence[torch.Generator], block: Block) -> Tensor:
        total = torch.zeros_like(block.base, dtype=torch.float64)
        for delta, weight, stream in zip(block.deltas, weights, streams, strict=True):
            kept = torch.rand(delta.shape, generator=stream) >= self.drop
            total += weight * kept * delta.double()
        return (block.base + self.scale / (1 - self.drop) * total).float()
