"""Diagonal Fishers as cached artifacts: per-example squared gradients of the response NLL; their soup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, row_blocks, save_tensors
from alignmerge.engine.merger import Block, MergeContext, average, own
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import VERSION, Labels, squares
from alignmerge.objective import fisher_barycentre


def fisher(ctx: MergeContext, of: Checkpoint, examples: str, labels: Labels = "data") -> Checkpoint:
    """Return the diagonal Fisher of a model on an example set: weight name -> (d_out, d_in) fp32.

    F_i = E_x (d log p(y|x) / d theta_i)^2 over examples (Matena and Raffel, arXiv 2111.09832, eq. 2;
    the metric G of AlignMerge, arXiv 2512.16245, figure 3), for the linear weights of the decoder
    layers.
    """
    data = ctx.examples_digest(examples)
    recipe = {
        "of": of.identity,
        "examples": data,
        "labels": labels,
        "precision": ctx.precision,
        "version": VERSION,
    }
    generator = None
    if labels == "sampled":
        recipe["seed"] = ctx.seed
        generator = torch_stream(ctx.seed, "fisher", data)  # no alias: under a new name, the same draws

    def make(folder: Path) -> None:
        model, rows = ctx.loaded(of), ctx.examples(examples)
        save_tensors(folder, squares(model, rows, labels=labels, generator=generator, precision=ctx.precision))

    return load_tensors(ctx.cached("fisher", recipe, make).path)


def pool_fishers(ctx: MergeContext, labels: Labels = "data") -> dict[str, Checkpoint]:
    """Return alias -> the diagonal Fisher of each model of the pool on its own examples."""
    models = zip(ctx.models.aliases, ctx.models.pool, strict=True)
    return {alias: fisher(ctx, model, own(alias), labels) for alias, model in models}


def mean_value(statistic: Checkpoint) -> float:
    """Return the mean of all entries of the tensors of a statistic."""
    total = count = 0.0
    for name, spec in statistic.items():
        total += float(statistic.read(name).double().sum())
        count += spec.numel
    return total / count


def damped(diagonal: Tensor, mean: float, damping: float) -> Tensor:
    """G / mean(G) + damping: zero-Fisher coordinates stay invertible and lambda_align has no unit."""
    return diagonal / mean + damping


class NormalisedFishers(NamedTuple):
    """The Fishers of a pool on one scale: divided by their global L2 norms, none below a common floor."""

    fishers: Mapping[str, Checkpoint]  # alias -> diagonal Fisher, in pool order
    norms: Mapping[str, float]  # alias -> L2 norm over all coordinates
    floor: float  # least value of a normalised Fisher

    @classmethod
    def of(cls, fishers: Mapping[str, Checkpoint], floor: float) -> NormalisedFishers:
        """Measure the Fishers; ``floor`` is given in units of the mean of the normalised ones.

        Raises:
            ArithmeticError: if one of them is zero everywhere.
        """
        norms, means = {}, []
        for alias, diagonal in fishers.items():
            norm, mean = _norm_and_mean(diagonal)
            if norm == 0:
                raise ArithmeticError(f"the Fisher of '{alias}' is zero everywhere: its examples say nothing")
            norms[alias] = norm
            means.append(mean / norm)
        return cls(fishers, norms, floor * fmean(means))

    def barycentre(self, block: Block, weights: Sequence[float] | None = None) -> Tensor:
        """A rule: Fisher-weighted averages; tensors without a Fisher (embeddings) are plain averages.

        ``weights``: lambda_k of sum 1; None: uniform.
        """
        if any(block.name not in diagonal for diagonal in self.fishers.values()):
            return average(block.pool, weights)
        pairs = zip(self.fishers.values(), self.norms.values(), strict=True)
        fishers = [diagonal.read(block.name, block.rows, torch.float64) / norm for diagonal, norm in pairs]
        return fisher_barycentre(block.pool, fishers, self.floor, weights)


def _norm_and_mean(diagonal: Checkpoint) -> tuple[float, float]:
    squared = total = 0.0
    for name, spec in diagonal.items():
        for rows in row_blocks(spec.shape):
            values = diagonal.read(name, rows, torch.float64)
            squared += float(values.square().sum())
            total += float(values.sum())
    return math.sqrt(squared), total / sum(spec.numel for spec in diagonal.values())
