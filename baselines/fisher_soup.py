"""Fisher-weighted averaging (Matena and Raffel, arXiv 2111.09832) with per-example diagonal Fishers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, row_blocks
from alignmerge.engine.merger import Block, MergeContext, Merger, Rule, average, check_choice, check_range
from alignmerge.fisher import fisher


@dataclass(frozen=True, kw_only=True)
class FisherSoup(Merger):
    """theta_i = sum_k F_ki theta_ki / sum_k F_ki, F_k from model k's own data, divided by its global L2 norm.

    Tensors without a Fisher (embeddings, norms, biases, output matrix) take the plain average.
    """

    variant: Literal["original"] = "original"
    labels: Literal["sampled", "data"] = "sampled"
    """``sampled``: one label a position from the model itself (as in the paper); ``data``: as given."""
    floor: float = 1.0e-6
    """Least F_ki, times the mean of the normalised Fishers; the same for all models, so that coordinates that
    no Fisher sees fall back to the plain average (the paper: to the first model)."""

    def __post_init__(self) -> None:
        check_choice("method.variant", self.variant, ("original",))
        check_choice("method.labels", self.labels, ("sampled", "data"))
        check_range("method.floor", self.floor, 0, 1, open_low=True)

    @property
    def stochastic(self) -> bool:
        """Whether labels are drawn."""
        return self.labels == "sampled"

    @property
    def data(self) -> tuple[str, ...]:
        """Every model's own examples."""
        return ("*",)

    def fit(self, ctx: MergeContext) -> Rule:
        """Obtain the Fisher of each model of the pool, and their norms and floor."""
        models = zip(ctx.models.aliases, ctx.models.pool, strict=True)
        fishers = {alias: fisher(ctx, model, alias, self.labels) for alias, model in models}
        norms, means = zip(*(_norm_and_mean(of) for of in fishers.values()), strict=True)
        if min(norms) == 0:
            blind = list(fishers)[norms.index(0)]
            raise ArithmeticError(f"the Fisher of '{blind}' is zero everywhere: its examples say nothing")
        floor = self.floor * fmean(mean / norm for mean, norm in zip(means, norms, strict=True))
        ctx.record(fisher_norms=dict(zip(fishers, norms, strict=True)), fisher_floor=floor)

        def rule(block: Block) -> Tensor:
            if any(block.name not in of for of in fishers.values()):
                return average(block.pool)
            pairs = zip(fishers.values(), norms, strict=True)
            normalised = [of.read(block.name, block.rows, torch.float64) / norm for of, norm in pairs]
            return soup(block.pool, normalised, floor)

        return rule


def soup(thetas: Sequence[Tensor], fishers: Sequence[Tensor], floor: float) -> Tensor:
    """Return sum_k F_k theta_k / sum_k F_k, each F_k at least ``floor``, coordinate by coordinate (fp32)."""
    above = torch.zeros_like(thetas[0], dtype=torch.float64)
    below = torch.zeros_like(above)
    for theta, of in zip(thetas, fishers, strict=True):
        weight = of.double().clamp(min=floor)
        above += weight * theta
        below += weight
    return (above / below).float()


def _norm_and_mean(of: Checkpoint) -> tuple[float, float]:
    """Return the L2 norm and the mean of a Fisher over all its coordinates."""
    squares = total = 0.0
    for name, spec in of.items():
        for rows in row_blocks(spec.shape):
            values = of.read(name, rows, torch.float64)
            squares += float(values.square().sum())
            total += float(values.sum())
    return math.sqrt(squares), total / sum(spec.numel for spec in of.values())
