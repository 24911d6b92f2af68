"""The plain average, or uniform soup (Wortsman et al., arXiv 2203.05482): what any merge has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignmerge.engine.merger import Block, MergeContext, Merger, Rule, average


@dataclass(frozen=True, kw_only=True)
class Average(Merger):
    """theta = mean_k theta_k over the pool; theta_IT itself is not among the averaged models."""

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once: it needs no data."""
        return rule


def rule(block: Block) -> Tensor:
    """Return the mean of the pool, of the shape of the block, fp32."""
    return average(block.pool)
