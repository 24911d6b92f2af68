"""SafeMERGE (Djuhera et al., arXiv 2503.17239), adapted from LoRA adapters to full weights.

The paper compares each LoRA layer with the alignment subspace of its weight matrix and mixes a safety
adapter into the layers that left it. Here the adapter is the experts' mean delta, and the safety adapter
the anchor's. Embeddings, output matrix and vectors keep the experts' mean delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import (
    Block,
    MergeContext,
    Merger,
    Models,
    Rule,
    average,
    block_of,
    by_rows,
    check_range,
)
from alignmerge.engine.views import is_matrix

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class SafeMerge(Merger):
    """W_IT + (1 - m) Delta_f + m Delta_s in matrices whose cosine is low, else W_IT + Delta_f."""

    name = "safemerge"
    threshold: float | None = None  # merge the matrices with a cosine below this; rank and width move it
    fraction: float | None = 0.5  # or: merge this share of the matrices, those with the lowest cosines
    safe_weight: float = 0.5  # m: the share of the anchor's delta in a merged matrix

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.fraction is None):
            given = f"threshold {self.threshold} and fraction {self.fraction}"
            allowed = "exactly one of the two, the other null"
            raise BadRequest.of("method.threshold, method.fraction", given, allowed)
        if self.threshold is not None:
            check_range("method.threshold", self.threshold, 0, 1, open_low=True)
        if self.fraction is not None:
            check_range("method.fraction", self.fraction, 0, 1)
        check_range("method.safe_weight", self.safe_weight, 0, 1)

    def fit(self, ctx: MergeContext) -> Rule:
        """Compare every matrix with its alignment subspace: into which ones is the anchor mixed?"""
        direction, origin = "anchor - base", ctx.models.anchor
        if ctx.models.pretrained is not None:
            direction, origin = "base - pretrained", ctx.models.pretrained
        cosines = _cosines(ctx.models, origin)
        values = list(cosines.values())
        threshold = self.threshold or lowest(values, self.fraction or 0.0)  # one of the two is given
        merged = {name for name, cosine in cosines.items() if cosine < threshold}
        share = len(merged) / max(1, len(cosines))
        ctx.record(alignment_direction=direction, threshold=threshold, fraction_merged=share)
        ctx.record(cosine_quantiles=_quantiles(values))

        def rule(block: Block) -> Tensor:
            safe, *experts = block.deltas
            delta = average(experts)
            if block.name in merged:
                delta = (1 - self.safe_weight) * delta + self.safe_weight * safe
            return block.base + delta

        return rule

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Say where the criterion decides nothing: all matrices are merged, or none."""
        share = facts.get("fraction_merged", self.fraction)
        words = {0.0: "no matrix is merged", 1.0: "every matrix is merged, whatever its cosine"}
        return words.get(share, "")


def subspace_cosine(V: Tensor, delta: Tensor) -> float:
    """Return cos(vec(C delta), vec(delta)), C = V V^T / ||V||_F, of (out, in) matrices; 0 if one is."""
    if not bool(V.any()) or not bool(delta.any()):
        return 0.0
    # The scales cancel: at unit length nothing underflows.
    V = V / torch.linalg.vector_norm(V, dtype=torch.float64)
    delta = delta / torch.linalg.vector_norm(delta, dtype=torch.float64)
    projected = (V @ V.T) @ delta if len(V) <= V.shape[1] else V @ (V.T @ delta)
    length = float(projected.norm())
    return float((projected * delta).sum()) / length if length > 0 else 0.0


def lowest(cosines: list[float], fraction: float) -> float:
    """Return the threshold below which the given share (rounded half up) of the cosines lies."""
    count = math.floor(fraction * len(cosines) + 0.5)
    return math.nextafter(sorted(cosines)[count - 1], math.inf) if count else 0.0


def _cosines(models: Models, origin: Checkpoint) -> dict[str, float]:
    cosines = {}
    for name, view in models.base.views.items():
        if is_matrix(name, view.shape):
            block = block_of(models, name)
            moved = partial(_moved, origin)  # by the alignment, the other way round: the sign of V cancels
            cosines[name] = subspace_cosine(by_rows(moved, block), by_rows(_mean, block))
    return cosines


def _moved(origin: Checkpoint, block: Block) -> Tensor:
    return block.base - origin.read(block.name, block.rows)


def _mean(block: Block) -> Tensor:
    """Return the mean delta of the experts."""
    return average(block.deltas[1:])


def _quantiles(cosines: list[float]) -> dict[str, float]:
    if not cosines:
        return {}
    shares = torch.tensor(QUANTILES, dtype=torch.float64)
    values = torch.tensor(cosines, dtype=torch.float64).quantile(shares)
    return dict(zip(map("{:g}".format, QUANTILES), values.tolist(), strict=True))
