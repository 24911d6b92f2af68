"""Control: one natural-gradient step on the alignment examples, from the plain average.

theta = average - eta G^-1 mean_i g_i, with the gradients and the diagonal metric G taken at ``at`` and eta
chosen so that the step's Euclidean length is ``length`` times that of the average's delta. It sees exactly the
examples that AlignMerge sees, and no anchor: whatever AlignMerge keeps beyond this is due to its geometry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.merger import Block, MergeContext, Merger, Rule, average, check_choice, check_range
from alignmerge.fisher import PRECISION, damped, fisher, mean_value
from alignmerge.gradients import weighted_sum


@dataclass(frozen=True, kw_only=True)
class GradientStep(Merger):
    """One step -G^-1 mean gradient on the alignment examples."""

    length: float = 0.06
    """Length of the step relative to the average's delta."""
    at: str = "barycentre"
    """Where the gradient is taken: ``barycentre`` or ``base`` (where AlignMerge's shield takes its own)."""
    damping: float = 1.0
    """eps of the metric, in units of its mean."""

    def __post_init__(self) -> None:
        check_range("method.length", self.length, 0, 1e3)
        check_choice("method.at", self.at, ("base", "barycentre"))
        check_range("method.damping", self.damping, 0, 1e6, open_low=True)

    @property
    def data(self) -> tuple[str, ...]:
        """The gradient sees ``alignment``, the metric ``metric``: the sets that AlignMerge sees."""
        return ("alignment", "metric")

    def fit(self, ctx: MergeContext) -> Rule:
        """Take the gradient and scale the step."""
        point = ctx.models.base if self.at == "base" else ctx.barycentre()
        diagonal = fisher(ctx, point, "metric")
        mean = mean_value(diagonal, diagonal)
        gradient = _mean_gradient(ctx, point)
        step = {
            name: -gradient.read(name) / damped(diagonal.read(name), mean, self.damping) for name in gradient
        }
        norm = math.sqrt(sum(float(s.double().square().sum()) for s in step.values()))
        scale = self.length * _average_length(ctx) / norm
        ctx.record(step_scale=scale)

        def rule(block: Block) -> Tensor:
            merged = average(block.pool)
            if block.name in step:
                merged = merged + scale * step[block.name][block.rows]
            return merged

        return rule


def _mean_gradient(ctx: MergeContext, point: Checkpoint) -> Checkpoint:
    """Return mean_i g_i on the alignment examples, an artifact that every length shares."""

    def make(folder: Path) -> None:
        examples = ctx.examples("alignment")
        uniform = torch.full((len(examples),), 1 / len(examples))
        save_tensors(folder, weighted_sum(ctx.loaded(point), examples, uniform, precision=PRECISION))

    return load_tensors(ctx.cached("gradient", {"weights": point.digest, "precision": PRECISION}, make).path)


def _average_length(ctx: MergeContext) -> float:
    models = ctx.models
    total = 0.0
    for name in models.base.views:
        delta = average([checkpoint.read(name) for checkpoint in models.pool]) - models.base.read(name)
        total += float(delta.double().square().sum())
    return math.sqrt(total)
