"""A control: walk from the plain average straight to the anchor. What does a cleverer method add to this?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignmerge.engine.merger import Block, MergeContext, Merger, Rule, average, check_range


@dataclass(frozen=True, kw_only=True)
class Interpolate(Merger):
    """delta = (1 - t) * mean_k Delta_k + t * Delta_SAFE: the plain average at t = 0, the anchor at t = 1."""

    t: float = 0.5

    def __post_init__(self) -> None:
        check_range("method.t", self.t, 0, 1)

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once: it needs no data."""

        def rule(block: Block) -> Tensor:
            # theta_IT cancels, since the weights sum to 1; without it both ends are exact.
            return (1 - self.t) * average(block.pool) + self.t * block.pool[0]

        return rule
