"""AlignMerge (arXiv 2512.16245), a documented reconstruction: L_geo and L_align solved exactly, certified.

theta = theta_IT + d,
d = argmin sum_k lambda_k ||d - Delta_k||^2_G + lambda_align (d - d_ref)^T P_A^T F_A P_A (d - d_ref).
The paper prints only L_geo; what is ours is listed in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.merger import Block, MergeContext, Merger, Rule, average, check_choice, check_range
from alignmerge.fisher import PRECISION, NormalisedFishers, damped, fisher, mean_value
from alignmerge.gradients import Side, gram, kronecker_factors, weighted_sum
from alignmerge.objective import l_geo, l_geo_floor
from alignmerge.subspace import (
    Basis,
    Shield,
    dual_coefficients,
    energies,
    generalised_basis,
    sample_eigenpairs,
)

CERTIFIED_RANK = 16
"""Energy ratios are reported in the top directions of this number where S_A is the whole space."""
SIDES: dict[str, tuple[Side, ...]] = {"input": ("input",), "output": ("output",), "both": ("input", "output")}


@dataclass(frozen=True, kw_only=True)
class AlignMerge(Merger):
    """The three-term merge; linear weights of the decoder layers are solved, everything else is averaged."""

    elementwise = False
    estimator: str = "kronecker"
    """``kronecker`` (factors per matrix) or ``samples`` (the dual, one Gram matrix over all layers)."""
    reference: str = "anchor"
    """d_ref: inside S_A ``anchor`` pulls towards theta_SAFE, ``base`` (the paper's caption) towards theta_IT."""
    at: str = "base"
    """Where gradients are taken: ``base`` (the paper), or ``barycentre``, which is post-merge repair."""
    metric: str = "shared"
    """``shared``: one G (the paper); ``per_expert``: each model's own Fisher: the shield stands on their soup."""
    factors: str = "input"
    """Kronecker only: shrink along ``input`` directions, ``output`` directions, or ``both``."""
    rank: int | None = None
    """Dimension of S_A (per matrix for kronecker, global for samples; None: all)."""
    lambda_align: float = 1.0
    """Weight of L_align; ``inf`` projects. rho is normalised to mean 1, so 1 halves an average direction."""
    lambda_bud: float = 0.0
    """Weight of the AQI budget; only 0 until the budget solver exists."""
    damping: float = 0.1
    """eps of the metric, in units of its mean diagonal."""
    floor: float = 1e-3
    """metric: per_expert only: floor of the Fishers in units of their mean."""
    certificate: bool = True
    """Whether to compute and store L_geo, L_align, gradient norm, eigenvalues and energy ratios."""

    def __post_init__(self) -> None:
        check_choice("method.estimator", self.estimator, ("kronecker", "samples"))
        check_choice("method.reference", self.reference, ("anchor", "base"))
        check_choice("method.at", self.at, ("base", "barycentre"))
        check_choice("method.metric", self.metric, ("shared", "per_expert"))
        check_choice("method.factors", self.factors, ("input", "output", "both"))
        check_range("method.lambda_align", self.lambda_align, 0, math.inf)
        check_choice("method.lambda_bud", self.lambda_bud, (0.0,))
        check_range("method.damping", self.damping, 0, 1e6, open_low=True)
        check_range("method.floor", self.floor, 0, 1, open_low=True)
        if self.rank is not None:
            check_range("method.rank", self.rank, 1, 1e9)

    @property
    def data(self) -> tuple[str, ...]:
        """F_A sees ``alignment``, the metric sees ``metric``; per-expert Fishers see each model's own set."""
        return ("alignment", "metric", "*") if self.metric == "per_expert" else ("alignment", "metric")

    def fit(self, ctx: MergeContext) -> Rule:
        """Collect the statistics at the chosen point and return the exact solution as a rule."""
        soup = _soup(self, ctx)
        point = ctx.models.base if self.at == "base" else ctx.barycentre()
        if self.estimator == "kronecker":
            return self._kronecker(ctx, point, soup)
        return self._samples(ctx, point, soup)

    def _kronecker(self, ctx: MergeContext, point: Checkpoint, soup: Rule) -> Rule:
        bases = {side: KroneckerBases.of(ctx, point, side, self.damping) for side in SIDES[self.factors]}
        covered = next(iter(bases.values())).owners

        def rule(block: Block) -> Tensor:
            merged = soup(block)
            if block.name not in covered:
                return merged
            inputs, outputs = (bases[s].read(block.name) if s in bases else None for s in SIDES["both"])
            shield = Shield(outputs, inputs, self.rank)
            centre, reference = merged - block.base, self._reference(block)
            delta = reference + shield.shrink(centre - reference, self.lambda_align)
            if self.certificate:
                facts = certify(shield, block, delta, centre, reference, lambda_align=self.lambda_align)
                ctx.record_block(block.name, **facts)
            return block.base + delta

        return rule

    def _samples(self, ctx: MergeContext, point: Checkpoint, soup: Rule) -> Rule:
        diagonal = fisher(ctx, point, "metric")
        mean = mean_value(diagonal, diagonal)

        def inverse_metric(name: str) -> Tensor:
            return 1 / damped(diagonal.read(name), mean, self.damping)

        def direction(name: str) -> Tensor:
            block = _whole(ctx, name)
            return soup(block) - block.base - self._reference(block)

        examples = ctx.examples("alignment")
        floor = self.floor if self.metric == "per_expert" else None
        recipe: dict[str, Any] = {"weights": point.digest, "reference": self.reference, "metric": self.metric}
        recipe |= {"damping": self.damping, "floor": floor, "precision": PRECISION}

        def make(folder: Path) -> None:
            options = {"storage": getattr(torch, PRECISION), "precision": PRECISION}
            found = gram(ctx.loaded(point), examples, inverse_metric, direction, **options)
            save_tensors(folder, found._asdict())

        stored = load_tensors(ctx.cached("gram", recipe, make).path)
        kernel, along = (stored.read(name, dtype=torch.float64) for name in ("kernel", "along"))
        rank = len(kernel) if self.rank is None else min(self.rank, len(kernel))
        c = dual_coefficients(kernel, along, self.lambda_align, rank)
        correction = weighted_sum(ctx.loaded(point), examples, c.float(), precision=PRECISION)
        if self.certificate:
            ctx.record(certificate=certify_samples(kernel, along, c, self.lambda_align, rank))

        def rule(block: Block) -> Tensor:
            merged = soup(block)
            if block.name not in correction:
                return merged
            return merged - inverse_metric(block.name) * correction[block.name]

        return rule

    def _reference(self, block: Block) -> Tensor:
        return block.deltas[0] if self.reference == "anchor" else torch.zeros_like(block.base)


class KroneckerBases:
    """Generalised eigenbases of every weight matrix on one side, as an artifact of the store."""

    def __init__(self, tensors: Checkpoint, owners: Mapping[str, str]) -> None:
        self.tensors, self.owners = tensors, owners

    @classmethod
    def of(cls, ctx: MergeContext, point: Checkpoint, side: Side, damping: float) -> KroneckerBases:
        """Take both second moments (alignment, metric data) at ``point`` and solve the eigenproblems."""
        recipe = {"weights": point.digest, "side": side, "damping": damping, "precision": PRECISION}

        def make(folder: Path) -> dict[str, Any]:
            model = ctx.loaded(point)
            alignment = kronecker_factors(model, ctx.examples("alignment"), side, precision=PRECISION)
            metric = kronecker_factors(model, ctx.examples("metric"), side, precision=PRECISION)
            tensors: dict[str, Tensor] = {}
            for owner, moment in alignment.moments.items():
                basis = generalised_basis(moment, metric.moments[owner], damping)
                tensors |= {f"{owner}|{field}": value for field, value in basis._asdict().items()}
            save_tensors(folder, tensors)
            return {"owners": alignment.owners}

        artifact = ctx.cached("bases", recipe, make)
        return cls(load_tensors(artifact.path), artifact.manifest["facts"]["owners"])

    def read(self, name: str) -> Basis:
        """Return the basis that the weight ``name`` uses."""
        return Basis(*(self.tensors.read(f"{self.owners[name]}|{field}") for field in Basis._fields))


def certify(
    shield: Shield, block: Block, delta: Tensor, centre: Tensor, reference: Tensor, *, lambda_align: float
) -> dict[str, float]:
    """Certificate of one matrix, all in the shield's own metric (Kronecker); the manifest holds the sums.

    ``gradient`` is ||grad / 2||^2 of L_geo + lambda L_align at the solution (in the bases' coordinates) and
    ``gradient_scale`` the same of L_align's pull alone at the barycentre: their ratio is a relative error.
    """
    within = shield if shield.rank is not None else shield._replace(rank=CERTIFIED_RANK)
    coordinates, start = shield.coefficients(delta - reference), shield.coefficients(centre - reference)
    pull = shield.rho if math.isinf(lambda_align) else lambda_align * shield.rho
    gradient = pull * coordinates  # lambda = inf leaves only the constraint: nothing of S_A remains
    if math.isfinite(lambda_align):
        gradient = gradient + (coordinates - start)
    anchor_energy = energies(within, delta - block.deltas[0])
    base_energy = energies(within, delta)

    def squared(x: Tensor) -> float:
        return energies(shield, x).total

    deltas = block.deltas
    facts = {
        "l_geo": l_geo(delta, deltas, squared),
        "l_geo_floor": l_geo_floor(deltas, squared),
        "l_align": energies(shield, delta - reference).weighted,
        "fisher_length_squared": base_energy.total,
        "drift_base_squared": base_energy.inside,
        "drift_anchor_squared": anchor_energy.inside,
        "gradient": float(gradient.double().square().sum()),
        "gradient_scale": float((pull * start).double().square().sum()),
        "top_rho": float(shield.rho.max()),
    }
    for alias, other in zip(["anchor", *map(str, range(len(deltas) - 1))], deltas, strict=True):
        energy = energies(within, other)
        facts[f"energy_ratio_{alias}"] = energy.inside / energy.total if energy.total > 0 else 0.0
    return facts


def certify_samples(kernel: Tensor, along: Tensor, c: Tensor, lambda_align: float, rank: int) -> dict[str, Any]:
    """Certificate of the dual solution, from the sample space alone (float64 tensors).

    Eigenvalues of K, L_align at the barycentre and at the solution, excess of L_geo, and the norm of the
    objective's gradient relative to L_align's pull at the barycentre.
    """
    values, vectors = sample_eigenpairs(kernel, rank)
    rho = values / values.mean()
    before = (vectors.T @ along) / values.sqrt()
    after = (vectors.T @ (along - kernel @ c)) / values.sqrt()
    pull = rho if math.isinf(lambda_align) else lambda_align * rho
    gradient = pull * after  # lambda = inf leaves only the constraint: nothing of S_A remains
    if math.isfinite(lambda_align):
        gradient = gradient + (after - before)
    scale = float((pull * before).norm())
    return {
        "eigenvalues": [round(float(v), 9) for v in values[:32]],
        "l_align_before": float((rho * before.square()).sum()),
        "l_align": float((rho * after.square()).sum()),
        "l_geo_excess": float(c @ kernel @ c),
        "relative_gradient": float(gradient.norm()) / scale if scale > 0 else 0.0,
    }


def _soup(method: AlignMerge, ctx: MergeContext) -> Rule:
    """Return the minimiser of L_geo: the average, or with per-expert Fishers the Fisher soup."""
    if method.metric == "shared":
        return lambda block: average(block.pool)
    models = zip(ctx.models.aliases, ctx.models.pool, strict=True)
    fishers = {alias: fisher(ctx, model, alias) for alias, model in models}
    return NormalisedFishers.of(fishers, method.floor).barycentre


def _whole(ctx: MergeContext, name: str) -> Block:
    models = ctx.models
    pool = [checkpoint.read(name) for checkpoint in models.pool]
    return Block(name, slice(None), models.base.read(name), pool)
