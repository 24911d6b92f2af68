"""The diagonal Fisher: per-example squared gradients of the response NLL, as a cached artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.merger import MergeContext
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import Labels, squares

PRECISION = "bfloat16"
"""Autocast dtype of the passes on checkpoints; sums are fp32."""


def fisher(ctx: MergeContext, of: Checkpoint, examples: str, labels: Labels = "data") -> Checkpoint:
    """Return the diagonal Fisher of ``of`` on an example set: weight name -> (d_out, d_in) fp32, on disk.

    F_i = E_x (d log p(y|x) / d theta_i)^2 over examples (Matena and Raffel, arXiv 2111.09832, eq. 2; the metric G of
    AlignMerge, arXiv 2512.16245, figure 3), for the linear weights of the decoder layers.
    """
    recipe = {"weights": of.digest, "examples": examples, "labels": labels, "precision": PRECISION}
    if labels == "sampled":
        recipe["seed"] = str(ctx.seed)

    def make(folder: Path) -> None:
        generator = torch_stream(ctx.seed, "fisher", examples)
        options = {"labels": labels, "generator": generator, "precision": PRECISION}
        save_tensors(folder, squares(ctx.loaded(of), ctx.examples(examples), **options))

    return load_tensors(ctx.cached("fisher", recipe, make).path)


def mean_value(tensors: Mapping[str, object], read: Checkpoint) -> float:
    """Return the mean of all entries of the tensors of a statistic."""
    total = sum(float(read.read(name).double().sum()) for name in tensors)
    return total / sum(read[name].numel for name in tensors)


def damped(diagonal: Tensor, mean: float, damping: float) -> Tensor:
    """G / mean(G) + damping: zero-Fisher coordinates stay invertible and lambda_align has no unit."""
    return diagonal / mean + damping


def squared_length(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return d^T G d over (G, d) parts, summed in float64."""
    return float(sum(((g.double() * d.double().square()).sum() for g, d in parts), torch.tensor(0.0).double()))
