"""Control: one natural-gradient step on the alignment examples, from the plain average or another merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.merger import Block, Inputs, MergeContext, Rule, average, check_choice, check_range
from alignmerge.fisher import damped, fisher, mean_value
from alignmerge.gradients import VERSION, weighted_sum
from alignmerge.start import Started, begin_at


@dataclass(frozen=True, kw_only=True)
class GradientStep(Started):
    """theta = start - eta G^-1 mean_i g_i, with the gradients and the diagonal metric G taken at ``at``.

    It sees the very examples that AlignMerge sees, and no anchor: the rest is AlignMerge's geometry.
    """

    name = "gradient_step"
    version = 2
    length: float = 0.06  # Euclidean length of the step relative to the average's delta, whatever the start
    at: str = "barycentre"  # where the gradient is taken: ``barycentre`` (the start), ``base`` as in AlignMerge
    damping: float = 1.0  # eps of the metric, in units of its mean

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("method.length", self.length, 0, 1e3)
        check_choice("method.at", self.at, ("base", "barycentre"))
        check_range("method.damping", self.damping, 0, 1e6, open_low=True)

    @property
    def inputs(self) -> Inputs:
        """The gradient sees ``alignment``, the metric ``metric``: the sets that AlignMerge sees."""
        return replace(super().inputs, examples=("alignment", "metric"))

    def fit(self, ctx: MergeContext) -> Rule:
        """Take the gradient and scale the step."""
        started = self.started(ctx)
        start, point = begin_at(started), ctx.models.base
        if self.at == "barycentre":
            point = ctx.barycentre() if started is None else started
        diagonal = fisher(ctx, point, "metric")
        mean = mean_value(diagonal)
        gradient = _mean_gradient(ctx, point)
        step, squared = {}, 0.0
        for name in gradient:
            step[name] = -gradient.read(name) / damped(diagonal.read(name), mean, self.damping)
            squared += float(step[name].double().square().sum())
        scale = self.length * _average_length(ctx) / math.sqrt(squared)
        ctx.record(step_scale=scale)

        def rule(block: Block) -> Tensor:
            merged = start(block)
            return merged + scale * step[block.name][block.rows] if block.name in step else merged

        return rule

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Name a step of no length."""
        return "length 0: no step" if self.length == 0 else ""


def _mean_gradient(ctx: MergeContext, point: Checkpoint) -> Checkpoint:
    """Return mean_i g_i on the alignment examples, an artifact that every length shares."""
    data = ctx.examples_digest("alignment")
    recipe = {"of": point.identity, "examples": data, "precision": ctx.precision, "version": VERSION}

    def make(folder: Path) -> None:
        examples = ctx.examples("alignment")
        uniform = torch.full((len(examples),), 1 / len(examples))
        save_tensors(folder, weighted_sum(ctx.loaded(point), examples, uniform, precision=ctx.precision))

    return load_tensors(ctx.cached("gradient", recipe, make).path)


def _average_length(ctx: MergeContext) -> float:
    models, total = ctx.models, 0.0
    for name in models.base.views:
        delta = average([checkpoint.read(name) for checkpoint in models.pool]) - models.base.read(name)
        total += float(delta.double().square().sum())
    return math.sqrt(total)
