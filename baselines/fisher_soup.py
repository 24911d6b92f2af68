"""Fisher-weighted averaging (Matena and Raffel, arXiv 2111.09832) with per-example diagonal Fishers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from alignmerge.engine.merger import EVERY_OWN, Inputs, MergeContext, Merger, Rule, check_choice, check_range
from alignmerge.fisher import NormalisedFishers, pool_fishers
from alignmerge.pool import anchored, check_share


@dataclass(frozen=True, kw_only=True)
class FisherSoup(Merger):
    """theta_i = sum_k w_k F_ki theta_ki / sum_k w_k F_ki, F_k from model k's own data, divided by its L2 norm.

    Tensors without a Fisher (embeddings, norms, biases, output matrix) take the average with weights w_k.
    """

    name = "fisher_soup"
    anchor_share: float | None = None
    """w of the anchor, the experts sharing the rest: the coefficients that the original tunes; None: all alike."""
    labels: Literal["sampled", "data"] = "sampled"
    """``sampled``: one label a position from the model itself (as in the paper); ``data``: as given."""
    floor: float = 1.0e-6
    """Least F_ki, times the mean of the normalised Fishers; the same for all models, so that coordinates that
    no Fisher sees fall back to the plain average (the paper: to the first model)."""

    def __post_init__(self) -> None:
        check_choice("method.labels", self.labels, ("sampled", "data"))
        check_range("method.floor", self.floor, 0, 1, open_low=True)
        check_share(self.anchor_share)

    @property
    def inputs(self) -> Inputs:
        """Every model's own examples, and the seed where labels are drawn."""
        return Inputs(examples=(EVERY_OWN,), seed=self.labels == "sampled")

    def fit(self, ctx: MergeContext) -> Rule:
        """Obtain the Fisher of each model of the pool, and their norms and floor."""
        normalised = NormalisedFishers.of(pool_fishers(ctx, self.labels), self.floor)
        ctx.record(fisher_norms=dict(normalised.norms), fisher_floor=normalised.floor)
        weights = anchored(len(ctx.models.pool), self.anchor_share)
        return partial(normalised.barycentre, weights=weights)
