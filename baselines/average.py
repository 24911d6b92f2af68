"""The plain average, or uniform soup (Wortsman et al., arXiv 2203.05482): what a merge has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from alignmerge.engine.merger import MergeContext, Merger, Rule, average


@dataclass(frozen=True, kw_only=True)
class Average(Merger):
    """theta = mean_k theta_k over the pool; theta_IT itself is not among the averaged models."""

    name = "average"

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once: it needs no data."""
        return lambda block: average(block.pool)
