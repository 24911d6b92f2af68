"""What a merge can be held to afterwards: the terms of the objective and the gradient at the solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.merger import Block, average
from alignmerge.objective import l_geo
from alignmerge.subspace import Shield, energies_of, sample_eigenpairs

CERTIFIED_RANK = 16
"""Energy ratios are reported in the top directions of this number where S_A is the whole space."""


def certify(
    shield: Shield,
    block: Block,
    delta: Tensor,
    reference: str,
    *,
    lambda_align: float,
    weights: Sequence[float] | None = None,
    centre: Tensor | None = None,
) -> dict[str, float]:
    """Certificate of one matrix, all in the shield's own metric (Kronecker); the manifest holds the sums.

    ``gradient`` is ||grad / 2||^2 of L_geo + lambda L_align at the solution (in the bases' coordinates) and
    ``gradient_scale`` the same of L_align's pull alone at the barycentre: their ratio is a relative error, and where
    an AQI budget has moved the merge, the pull of the budget.

    Args:
        delta: the solution d, (d_out, d_in), whose coordinates are taken anew.
        reference: d_ref: the ``anchor``'s delta, or none (``base``).
        lambda_align: of the objective; may be inf.
        weights: lambda_k of sum 1; None: uniform.
        centre: minimiser of L_geo, (d_out, d_in), where it is not the weighted mean of the deltas.
    """
    within = shield if shield.rank is not None else shield._replace(rank=CERTIFIED_RANK, scale=None)
    rho, inside = shield.rho, within.rho
    solution, pool = shield.coefficients(delta), [shield.coefficients(x) for x in block.deltas]
    mean = average(pool, weights)
    start = mean if centre is None else shield.coefficients(centre)
    goal = pool[0] if reference == "anchor" else torch.zeros_like(mean)
    pull = rho if math.isinf(lambda_align) else lambda_align * rho
    gradient = pull * (solution - goal)  # lambda = inf leaves only the constraint: nothing of S_A remains
    if math.isfinite(lambda_align):
        gradient = gradient + (solution - start)
    anchor_energy, base_energy = energies_of(solution - pool[0], inside), energies_of(solution, inside)
    floor = l_geo(mean, pool, _squared, weights)
    facts = {
        "l_geo": floor + _squared(solution - mean),  # sum_k lambda_k ||d - Delta_k||^2 about the mean
        "l_geo_floor": floor,
        "l_align": energies_of(solution - goal, rho).weighted,
        "fisher_length_squared": base_energy.total,
        "drift_base_squared": base_energy.inside,
        "drift_anchor_squared": anchor_energy.inside,
        "gradient": _squared(gradient),
        "gradient_scale": _squared(pull * (start - goal)),
        "top_rho": float(rho.max()),
    }
    for alias, other in zip(["anchor", *map(str, range(len(pool) - 1))], pool, strict=True):
        energy = energies_of(other, inside)
        facts[f"energy_ratio_{alias}"] = energy.inside / energy.total if energy.total > 0 else 0.0
    return facts


def _squared(coefficients: Tensor) -> float:
    """The squared Fisher length, from coordinates in the metric's own basis; rows in fp32, their sum in float64."""
    return float(torch.linalg.vecdot(coefficients, coefficients).sum(dtype=torch.float64))


class Moved(NamedTuple):
    """A displacement D from the dual solution, seen from the sample space."""

    along: Tensor
    """J D, (n,) float64."""
    squared: float
    """||D||^2_G."""


def certify_samples(
    kernel: Tensor, along: Tensor, c: Tensor, lambda_align: float, rank: int, moved: Moved | None = None
) -> dict[str, Any]:
    """Certificate of the dual solution, from the sample space alone (float64 tensors).

    Eigenvalues of K, L_align at the barycentre and at the solution, excess of L_geo, and the norm of the
    objective's gradient (without L_bud) in S_A relative to L_align's pull at the barycentre. ``moved``: where an AQI
    budget has put the merge.
    """
    left, excess = along - kernel @ c, float(c @ kernel @ c)
    if moved is not None:
        left, excess = left + moved.along, excess - 2 * float(c @ moved.along) + moved.squared
    values, vectors = sample_eigenpairs(kernel, rank)
    rho = values / values.mean()
    before = (vectors.T @ along) / values.sqrt()
    after = (vectors.T @ left) / values.sqrt()
    pull = rho if math.isinf(lambda_align) else lambda_align * rho
    gradient = pull * after  # lambda = inf leaves only the constraint: nothing of S_A remains
    if math.isfinite(lambda_align):
        gradient = gradient + (after - before)
    scale = float((pull * before).norm())
    return {
        "eigenvalues": [round(float(v), 9) for v in values[:32]],
        "l_align_before": float((rho * before.square()).sum()),
        "l_align": float((rho * after.square()).sum()),
        "l_geo_excess": excess,
        "relative_gradient": float(gradient.norm()) / scale if scale > 0 else 0.0,
    }
