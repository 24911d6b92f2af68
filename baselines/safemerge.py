"""SafeMERGE (Djuhera et al., arXiv 2503.17239), adapted from LoRA adapters to full weights.

The paper compares each LoRA layer with the alignment subspace of its weight matrix and mixes a safety adapter
into the layers that left it. Here the adapter is the experts' mean delta, the safety adapter is the anchor's
delta, and matrices are matched by name. Embeddings, output matrix and vectors keep the experts' mean delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Block, MergeContext, Merger, Models, Rule, average, check_range

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class SafeMerge(Merger):
    """W_IT + (1 - m) Delta_f + m Delta_s in matrices with cosine below the threshold, else W_IT + Delta_f."""

    threshold: float | None = None
    """Merge the matrices with a cosine below this; it depends on rank and width, none suits all models."""
    fraction: float | None = 0.5
    """Or: merge this share of the matrices, those with the lowest cosines."""
    safe_weight: float = 0.5
    """m: the share of the anchor's delta in a merged matrix."""

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.fraction is None):
            given = f"threshold {self.threshold} and fraction {self.fraction}"
            raise BadRequest.of(
                "method.threshold, method.fraction", given, "exactly one of the two, the other null"
            )
        if self.threshold is not None:
            check_range("method.threshold", self.threshold, 0, 1, open_low=True)
        if self.fraction is not None:
            check_range("method.fraction", self.fraction, 0, 1)
        check_range("method.safe_weight", self.safe_weight, 0, 1)

    def fit(self, ctx: MergeContext) -> Rule:
        """Compare every matrix with its alignment subspace and decide which ones the anchor is mixed into."""
        cosines = _cosines(ctx.models)
        values = list(cosines.values())
        threshold = self.threshold if self.fraction is None else lowest(values, self.fraction)
        assert threshold is not None
        merged = {name for name, cosine in cosines.items() if cosine < threshold}
        ctx.record(
            alignment_direction="base - pretrained" if ctx.models.pretrained is not None else "anchor - base",
            threshold=threshold,
            fraction_merged=len(merged) / max(1, len(cosines)),
            cosine_quantiles=_quantiles(values),
        )

        def rule(block: Block) -> Tensor:
            safe, *experts = block.deltas
            delta = average(experts)
            if block.name in merged:
                delta = (1 - self.safe_weight) * delta + self.safe_weight * safe
            return block.base + delta

        return rule


def subspace_cosine(V: Tensor, delta: Tensor) -> float:
    """Return cos(vec(C delta), vec(delta)), C = V V^T / ||V||_F, of (out, in) matrices; 0 if one vanishes."""
    if not bool(V.any()) or not bool(delta.any()):
        return 0.0
    V, delta = _unit(V), _unit(delta)  # the scales cancel: at unit length nothing underflows
    projected = (V @ V.T) @ delta if len(V) <= V.shape[1] else V @ (V.T @ delta)
    length = float(projected.norm())
    return float((projected * delta).sum()) / length if length > 0 else 0.0


def lowest(cosines: list[float], fraction: float) -> float:
    """Return the threshold below which the given share (rounded half up) of the cosines lies."""
    count = math.floor(fraction * len(cosines) + 0.5)
    return math.nextafter(sorted(cosines)[count - 1], math.inf) if count else 0.0


def _unit(matrix: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return matrix / length


def _cosines(models: Models) -> dict[str, float]:
    cosines = {}
    reference = models.anchor if models.pretrained is None else models.pretrained
    for name, view in models.base.views.items():
        if len(view.shape) == 2 and "embed" not in name and "lm_head" not in name:
            base = models.base.read(name)
            delta = average([expert.read(name) - base for expert in models.experts.values()])
            cosines[name] = subspace_cosine(base - reference.read(name), delta)  # the sign of V cancels
    return cosines


def _quantiles(cosines: list[float]) -> dict[str, float]:
    if not cosines:
        return {}
    values = torch.tensor(cosines, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"{share:g}": float(value) for share, value in zip(QUANTILES, values, strict=True)}
