"""Task arithmetic (Ilharco et al., arXiv 2212.04089): a scaled sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

from alignmerge.engine.merger import MergeContext, Merger, Rule, check_range, step
from alignmerge.pool import anchored, anchored_total, check_share


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Merger):
    """theta = theta_IT + scale * K sum_k w_k Delta_k over the pool of K; w_k = 1/K: scale times the plain sum."""

    name = "task_arithmetic"
    scale: float = 0.4  # lambda in the paper; 0.4 is its usual value where nothing is tuned
    anchor_share: float | None = None  # w of the anchor, the experts sharing the rest; None: 1/K each

    def __post_init__(self) -> None:
        check_range("method.scale", self.scale, 0, 10)
        check_share(self.anchor_share)

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once: it needs no data."""
        shares = anchored(len(ctx.models.pool), self.anchor_share)
        if shares is not None:
            scale = self.scale * len(shares)
            return lambda block: (block.base + scale * anchored_total(block.deltas, shares)).float()
        return lambda block: step(block.base, block.pool, self.scale)
