"""TIES: trim, elect sign, merge disjointly (Yadav et al., arXiv 2306.01708), and mergekit's variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import row_blocks
from alignmerge.engine.merger import Block, MergeContext, Merger, Models, Rule, check_choice, check_range

Stream = Callable[[], Iterable[Sequence[Tensor]]]  # a pass over the deltas: block by block, all models'


@dataclass(frozen=True, kw_only=True)
class Ties(Merger):
    """theta = theta_IT + scale * mean over the trimmed deltas that agree with the elected sign."""

    name = "ties"
    density: float = 0.2
    """Share of the entries of each delta that is kept, the largest by magnitude. Biases that are zero in every
    model do not count: the layout has a place for them (Qwen2's attention), the model has none."""
    scale: float = 1.0
    variant: Literal["global", "per_tensor"] = "global"
    """``global`` (the paper): trimmed over all parameters of a model, zero sums take the majority's sign.
    ``per_tensor`` (mergekit): trimmed tensor by tensor, zero sums count as +."""

    def __post_init__(self) -> None:
        check_range("method.density", self.density, 0, 1, open_low=True)
        check_range("method.scale", self.scale, 0, 10)
        check_choice("method.variant", self.variant, ("global", "per_tensor"))

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether row blocks will do: trimming a tensor by itself needs the whole of it."""
        return self.variant == "global"

    def fit(self, ctx: MergeContext) -> Rule:
        """Find each model's threshold and the global majority sign (three passes over the weights)."""
        if self.variant == "per_tensor":
            return self._per_tensor
        models = ctx.models
        kept = max(1, int(self.density * _parameters(models)))
        thresholds = kth_largest(lambda: _deltas(models), kept)
        votes = sum(int(_sum(_trim(deltas, thresholds)).sign().sum()) for deltas in _deltas(models))
        majority = float((votes > 0) - (votes < 0))
        ctx.record(thresholds=dict(zip(models.aliases, thresholds, strict=True)), majority_sign=majority)

        def rule(block: Block) -> Tensor:
            trimmed = _trim(block.deltas, thresholds)
            sign = _sum(trimmed).sign()
            sign[sign == 0] = majority  # a tied majority is 0: then such a coordinate stays at the base
            return block.base + self.scale * disjoint_mean(trimmed, sign)

        return rule

    def _per_tensor(self, block: Block) -> Tensor:
        trimmed = [top_k(delta, max(1, int(self.density * delta.numel()))) for delta in block.deltas]
        sign = torch.where(_sum(trimmed) >= 0, 1.0, -1.0)
        return block.base + self.scale * disjoint_mean(trimmed, sign)


def kth_largest(stream: Stream, k: int) -> list[float]:
    """Return each model's exact ``k``-th largest magnitude over its fp32 blocks, in constant memory.

    The bits of non-negative floats sort like the floats: one pass counts their upper halves, a second
    one the lower halves within the bucket that holds rank ``k``.
    """
    upper = [_rank(counts, k) for counts in _histograms(stream, lambda model, bits: bits >> 16)]
    lower = _histograms(stream, lambda model, bits: bits[bits >> 16 == upper[model][0]] & 0xFFFF)
    found = zip(upper, lower, strict=True)
    bits = [bucket << 16 | _rank(counts, left)[0] for (bucket, left), counts in found]
    return list(map(float, torch.tensor(bits, dtype=torch.int32).view(torch.float32)))


def top_k(delta: Tensor, k: int) -> Tensor:
    """Zero all but the ``k`` entries of largest magnitude; of equal ones the first are kept."""
    size = delta.abs().flatten()
    threshold = size.kthvalue(size.numel() - k + 1).values
    above, tied = size > threshold, size == threshold
    keep = above | (tied & (tied.cumsum(0) <= k - above.sum()))
    return torch.where(keep.view_as(delta), delta, 0.0)


def disjoint_mean(trimmed: Sequence[Tensor], sign: Tensor) -> Tensor:
    """Average, per coordinate, the entries whose sign is the elected one (fp32); 0 without any."""
    agreeing = [torch.where(delta * sign > 0, delta, 0.0) for delta in trimmed]
    count = torch.stack([delta != 0 for delta in agreeing]).sum(0)
    return (_sum(agreeing) / count.clamp(min=1)).float()


def _parameters(models: Models) -> int:
    """Return the number of parameters, without the biases that are zero in every model."""
    total = 0
    for name, spec in models.base.items():
        used = (model.read(name).any() for model in (models.base, *models.pool))
        if not name.endswith(".bias") or any(used):
            total += spec.numel
    return total


def _deltas(models: Models) -> Iterator[list[Tensor]]:
    for name, spec in models.base.items():
        for rows in row_blocks(spec.shape):
            base = models.base.read(name, rows)
            yield [model.read(name, rows) - base for model in models.pool]


def _histograms(stream: Stream, bucket: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    counts: dict[int, Tensor] = {}
    for deltas in stream():
        for model, delta in enumerate(deltas):
            bits = delta.abs().flatten().view(torch.int32)
            found = torch.bincount(bucket(model, bits), minlength=1 << 16)
            counts[model] = counts.get(model, 0) + found
    return list(counts.values())


def _rank(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket of the ``k``-th largest value and which rank it has within this bucket."""
    from_top = counts.flip(0).cumsum(0)
    bucket = len(counts) - 1 - int((from_top >= k).int().argmax())
    return bucket, k - int(counts[bucket + 1 :].sum())


def _trim(deltas: Sequence[Tensor], thresholds: Sequence[float]) -> list[Tensor]:
    return [torch.where(d.abs() >= least, d, 0.0) for d, least in zip(deltas, thresholds, strict=True)]


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum in fp64, so that the order of the experts does not show."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return total
