"""Where a model lies in the chart: drift inside S_A, L_geo and its excess, Fisher length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import REPORTED, Inputs, MergeContext, check_range
from alignmerge.engine.views import layer_of
from alignmerge.fisher import fisher
from alignmerge.kronecker import KroneckerBases
from alignmerge.objective import l_geo, l_geo_floor
from alignmerge.subspace import Basis, Shield, energies
from eval.columns import Column
from eval.scorers.interface import Sample, Scorer, Subject


@dataclass(frozen=True, kw_only=True)
class Geometry(Scorer):
    """Distances in the Fisher chart at theta_IT (arXiv 2512.16245, figures 4 and 5).

    ``l_geo``: sum_k lambda_k ||d - Delta_k||^2_G with the diagonal Fisher G of theta_IT on the metric
    set (not damped) and uniform lambda over anchor and experts; ``l_geo_excess`` subtracts the floor V
    that no merge can go below; ``fisher_length`` = sqrt(d^T G d). ``drift_anchor`` = ||P_A (theta -
    theta_SAFE)||, ``drift_base`` likewise from theta_IT: S_A is spanned in each weight matrix by the
    ``rank`` leading input directions of the reported AQI probes relative to the metric data, and the norm is
    that metric's. No method sees those prompts or has this damping, so no row is near by construction. These
    are the definitions of the tables; a merge's certificate has its own, in the metric that it minimised.
    """

    name = "geometry"
    version = 3  # 3: S_A of prompts that no method sees
    relative = True
    inputs = Inputs(examples=(REPORTED, "metric"))
    kept_sides = ("input",)
    columns: ClassVar[Mapping[str, Column]] = {
        "drift_anchor": Column("drift from anchor", "Geometry", "down", None, rank=1),
        "drift_base": Column("drift from base", "Geometry", "info", None, rank=2),
        "l_geo": Column("L_geo", "Geometry", "info", None, rank=4, tex=r"$L_\mathrm{geo}$"),
        "l_geo_excess": Column(
            "L_geo excess", "Geometry", "info", None, rank=5, tex=r"$L_\mathrm{geo}$ excess"
        ),
        "fisher_length": Column("Fisher length", "Geometry", "info", None, rank=6),
        "drift_anchor_by_layer": Column("drift from anchor in S_A", "Geometry", "info", by_layer=True),
        "drift_base_by_layer": Column("drift from base in S_A", "Geometry", "info", by_layer=True),
    }
    rank: int = 16  # directions of S_A in each weight matrix
    damping: float = 0.3  # eps of the metric of S_A, in units of its mean diagonal

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
        """Return L_geo, its floor V and ||d||^2_G."""
        base = ctx.models.base
        diagonal = fisher(ctx, base, "metric")
        geo = floor = length = 0.0
        for name in sorted(diagonal):
            weight, origin = diagonal.read(name), base.read(name)

            def squared(d: Tensor, weight: Tensor = weight) -> float:
                return float((weight * d.square()).sum(dtype=torch.float64))

            delta = merged.read(name) - origin
            pool = [model.read(name) - origin for model in ctx.models.pool]
            geo += l_geo(delta, pool, squared)
            floor += l_geo_floor(pool, squared)
            length += squared(delta)
        return geo, floor, length

    def _drift(self, ctx: MergeContext, merged: Checkpoint) -> dict[str, dict[int, float]]:
        """Return column -> decoder layer -> ||P_A x||^2."""
        bases = KroneckerBases.of(ctx, ctx.models.base, "input", self.damping, examples=REPORTED)
        origins = {"drift_anchor": ctx.models.anchor, "drift_base": ctx.models.base}
        drift: dict[str, dict[int, float]] = {column: defaultdict(float) for column in origins}
        for name in sorted(bases.owners):
            scored = merged.read(name)
            values, vectors, dual = bases.read(name)
            shield = Shield(None, Basis(values[: self.rank], vectors[:, : self.rank], dual[:, : self.rank]))
            for column, origin in origins.items():
                away = shield.coefficients(scored - origin.read(name))
                drift[column][layer_of(name) or 0] += energies(away, shield.rho).inside
        return drift
