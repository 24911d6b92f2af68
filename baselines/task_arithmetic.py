"""Task arithmetic (Ilharco et al., arXiv 2212.04089): a scaled sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

from alignmerge.engine.merger import MergeContext, Merger, Rule, check_range, step


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Merger):
    """theta = theta_IT + scale * sum_k Delta_k over the pool: a sum, so scale 1/K is the plain average."""

    name = "task_arithmetic"
    scale: float = 0.4  # lambda in the paper; 0.4 is its usual value where nothing is tuned

    def __post_init__(self) -> None:
        check_range("method.scale", self.scale, 0, 10)

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once: it needs no data."""
        return lambda block: step(block.base, block.pool, self.scale)
