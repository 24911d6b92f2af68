"""Diagonal Fishers: per-example squared gradients of the response NLL as cached artifacts, and their soup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, row_blocks, save_tensors
from alignmerge.engine.merger import Block, MergeContext, average
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import Labels, squares
from alignmerge.objective import fisher_barycentre

PRECISION = "bfloat16"
"""Autocast dtype of the passes on checkpoints; sums are fp32."""


def fisher(ctx: MergeContext, of: Checkpoint, examples: str, labels: Labels = "data") -> Checkpoint:
    """Return the diagonal Fisher of ``of`` on an example set: weight name -> (d_out, d_in) fp32, on disk.

    F_i = E_x (d log p(y|x) / d theta_i)^2 over examples (Matena and Raffel, arXiv 2111.09832, eq. 2; the
    metric G of AlignMerge, arXiv 2512.16245, figure 3), for the linear weights of the decoder layers.
    """
    recipe = {"weights": of.digest, "examples": examples, "labels": labels, "precision": PRECISION}
    if labels == "sampled":
        recipe["seed"] = str(ctx.seed)

    def make(folder: Path) -> None:
        generator = torch_stream(ctx.seed, "fisher", examples)
        model, rows = ctx.loaded(of), ctx.examples(examples)
        save_tensors(folder, squares(model, rows, labels=labels, generator=generator, precision=PRECISION))

    return load_tensors(ctx.cached("fisher", recipe, make).path)


def mean_value(tensors: Mapping[str, object], read: Checkpoint) -> float:
    """Return the mean of all entries of the tensors of a statistic."""
    total = sum(float(read.read(name).double().sum()) for name in tensors)
    return total / sum(read[name].numel for name in tensors)


def damped(diagonal: Tensor, mean: float, damping: float) -> Tensor:
    """G / mean(G) + damping: zero-Fisher coordinates stay invertible and lambda_align has no unit."""
    return diagonal / mean + damping


class NormalisedFishers(NamedTuple):
    """The Fishers of a pool on one scale: each divided by its global L2 norm, none below a common floor."""

    fishers: Mapping[str, Checkpoint]
    """Alias -> diagonal Fisher, in pool order."""
    norms: Mapping[str, float]
    """Alias -> L2 norm over all coordinates."""
    floor: float
    """Least value of a normalised Fisher."""

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
        """A rule: Fisher-weighted averages; tensors without a Fisher (embeddings, norms) are plain averages.

        ``weights``: lambda_k of sum 1; None: uniform.
        """
        if any(block.name not in diagonal for diagonal in self.fishers.values()):
            return average(block.pool, weights)
        pairs = zip(self.fishers.values(), self.norms.values(), strict=True)
        fishers = [diagonal.read(block.name, block.rows, torch.float64) / norm for diagonal, norm in pairs]
        return fisher_barycentre(block.pool, fishers, self.floor, weights)


def _norm_and_mean(diagonal: Checkpoint) -> tuple[float, float]:
    """Return the L2 norm and the mean of a Fisher over all its coordinates."""
    squared = total = 0.0
    for name, spec in diagonal.items():
        for rows in row_blocks(spec.shape):
            values = diagonal.read(name, rows, torch.float64)
            squared += float(values.square().sum())
            total += float(values.sum())
    return math.sqrt(squared), total / sum(spec.numel for spec in diagonal.values())
