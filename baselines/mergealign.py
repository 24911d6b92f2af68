"""MergeAlign: Hammoud et al. (arXiv 2406.14563) and Thakkar et al. (arXiv 2411.06824), two methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from alignmerge.engine.merger import (
    Block,
    Inputs,
    MergeContext,
    Merger,
    Rule,
    average,
    check_choice,
    check_range,
)
from alignmerge.pool import mean_nll, shares

MOST = 0.9
"""Largest weight of one model with which hammoud's is still a merge."""


@dataclass(frozen=True, kw_only=True)
class MergeAlign(Merger):
    """theta = sum_k w_k theta_k, w = softmax(-loss_k / T) (hammoud, with the weights of LM-Cocktail, Xiao et
    al., arXiv 2311.13534), or theta_0 + alpha (mean expert - theta_0) + beta (anchor - theta_0) (thakkar;
    theta_IT without a theta_0)."""

    name = "mergealign"
    variant: Literal["hammoud", "thakkar"] = "hammoud"
    temperature: float = 1.0  # T of hammoud's weights: small picks the best model, large the average
    alpha: float = 0.5  # thakkar: how much of the experts' mean vector
    beta: float = 0.5  # thakkar: how much of the anchor's vector

    def __post_init__(self) -> None:
        check_choice("method.variant", self.variant, ("hammoud", "thakkar"))
        check_range("method.temperature", self.temperature, 0, 1000, open_low=True)
        check_range("method.alpha", self.alpha, 0, 2)
        check_range("method.beta", self.beta, 0, 2)

    @property
    def inputs(self) -> Inputs:
        """The balanced safety and domain examples, for hammoud's losses."""
        return Inputs() if self.variant == "thakkar" else Inputs(examples=("metric",))

    def fit(self, ctx: MergeContext) -> Rule:
        """Measure the losses (hammoud) or settle on theta_0 (thakkar), and return the rule."""
        if self.variant == "thakkar":
            ctx.record(theta_pre="base" if ctx.models.pretrained is None else "pretrained")
            return self._thakkar
        models = zip(ctx.models.aliases, ctx.models.pool, strict=True)
        losses = {alias: mean_nll(ctx, model) for alias, model in models}
        best = min(losses.values())
        weights = shares({name: math.exp((best - loss) / self.temperature) for name, loss in losses.items()})
        ctx.record(losses=losses, weights=weights)
        return lambda block: average(block.pool, list(weights.values()))

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Name hammoud's temperature where one model has more than ``MOST`` of the weight, or thakkar's zero."""
        if self.variant == "thakkar":
            unused = [name for name, factor in (("alpha", self.alpha), ("beta", self.beta)) if factor == 0]
            return f"{', '.join(unused)} 0: nothing of these vectors is merged" if unused else ""
        for alias, weight in facts.get("weights", {}).items():
            if weight > MOST:
                return f"temperature {self.temperature:g}: {weight:.4g} of the weight is on '{alias}', above {MOST:g}"
        return ""

    def _thakkar(self, block: Block) -> Tensor:
        origin = block.base if block.pretrained is None else block.pretrained
        anchor, *experts = block.pool
        return origin + self.alpha * (average(experts) - origin) + self.beta * (anchor - origin)
