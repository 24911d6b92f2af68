"""Where a model lies in the chart: drift inside S_A, L_geo and its excess, Fisher length; in total and by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import MergeContext, check_range
from alignmerge.engine.views import layer_of
from eval.columns import Direction
from eval.scorers.interface import Sample, Scorer, Subject

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Geometry(Scorer):
    """Distances in the Fisher chart at theta_IT (arXiv 2512.16245, figures 4 and 5).

    ``l_geo``: sum_k lambda_k ||d - Delta_k||^2_G with the diagonal Fisher G of theta_IT on the metric set (not damped)
    and uniform lambda over anchor and experts; ``l_geo_excess`` subtracts the floor V that no merge can go below;
    ``fisher_length`` = sqrt(d^T G d). ``drift_anchor`` = ||P_A (theta - theta_SAFE)||, ``drift_base`` likewise from
    theta_IT: S_A is spanned in each weight matrix by the ``rank`` leading input directions of the alignment data
    relative to the metric data, and the norm is that metric's.
    """

    version = 2
    relative = True
    columns: ClassVar[Mapping[str, Direction]] = {
        "l_geo": "info", "l_geo_excess": "info", "fisher_length": "info", "drift_anchor": "down", "drift_base": "info",
        "drift_anchor_by_layer": "info", "drift_base_by_layer": "info",
    }  # fmt: skip
    rank: int = 16
    """Directions of S_A in each weight matrix."""
    damping: float = 0.1
    """eps of the metric of S_A, in units of its mean diagonal."""

    def __post_init__(self) -> None:
        check_range("scorer.geometry.rank", self.rank, 1, 1e6)
        check_range("scorer.geometry.damping", self.damping, 0, 1e6, open_low=True)

    def score(self, subject: Subject) -> Iterable[Sample]:
        """Yield totals and values by layer."""
        ctx = subject.context()
        merged = Checkpoint.open(subject.folder, "scored model")
        geo, floor, length = self._fisher_terms(ctx, merged)
        yield Sample("all", "l_geo", geo)
        yield Sample("all", "l_geo_excess", max(0.0, geo - floor))
        yield Sample("all", "fisher_length", math.sqrt(length))
        for column, by_layer in self._drift(ctx, merged).items():
            yield Sample("all", column, math.sqrt(sum(by_layer.values())))
            for layer, squared in sorted(by_layer.items()):
                yield Sample(f"layer/{layer:02d}", f"{column}_by_layer", math.sqrt(squared))

    def _fisher_terms(self, ctx: MergeContext, merged: Checkpoint) -> tuple[float, float, float]:
        from alignmerge.fisher import fisher
        from alignmerge.objective import l_geo, l_geo_floor

        diagonal = fisher(ctx, ctx.models.base, "metric")
        geo = floor = length = 0.0
        for name, delta, pool in _deltas(ctx, merged, diagonal):
            weight = diagonal.read(name)

            def squared(d: Tensor, weight: Tensor = weight) -> float:
                return float((weight * d.square()).sum(dtype=d.double().dtype))

            geo += l_geo(delta, pool, squared)
            floor += l_geo_floor(pool, squared)
            length += squared(delta)
        return geo, floor, length

    def _drift(self, ctx: MergeContext, merged: Checkpoint) -> dict[str, dict[int, float]]:
        from alignmerge.method import KroneckerBases
        from alignmerge.subspace import Shield, energies, leading

        bases = KroneckerBases.of(ctx, ctx.models.base, "input", self.damping)
        drift: dict[str, dict[int, float]] = {
            "drift_anchor": defaultdict(float),
            "drift_base": defaultdict(float),
        }
        for name in sorted(bases.owners):
            scored = merged.read(name)
            layer = layer_of(name) or 0
            shield = Shield(None, leading(bases.read(name), self.rank))
            drift["drift_anchor"][layer] += energies(shield, scored - ctx.models.anchor.read(name)).inside
            drift["drift_base"][layer] += energies(shield, scored - ctx.models.base.read(name)).inside
        return drift


def _deltas(
    ctx: MergeContext, merged: Checkpoint, names: Iterable[str]
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield (name, d, [Delta_k]) for the given weights."""
    for name in sorted(names):
        base = ctx.models.base.read(name)
        yield name, merged.read(name) - base, [model.read(name) - base for model in ctx.models.pool]
