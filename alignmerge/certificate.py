"""What a merge can be held to: the terms of the objective and the gradient at the solution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.keys import significant
from alignmerge.engine.merger import Block, average
from alignmerge.objective import l_geo
from alignmerge.subspace import Shield, energies, sample_eigenpairs

CERTIFIED_RANK = 16  # energy ratios are those in so many top directions where S_A is the whole space


class Geometry(NamedTuple):
    """What L_geo is: its weights on the pool, and its minimiser where that is not the weighted mean."""

    shares: Sequence[float]  # lambda_k of anchor and experts; none: L_geo is the distance to ``centre`` alone
    centre: Tensor | None = None  # (d_out, d_in)


def certify(
    shield: Shield, block: Block, delta: Tensor, reference: str, lambda_align: float, geometry: Geometry
) -> dict[str, float]:
    """Certificate of one matrix in the shield's own metric (Kronecker); the manifest holds the sums.

    ``gradient`` is ||grad / 2||^2 of L_geo + lambda L_align at the solution (in the bases'
    coordinates), and ``gradient_scale`` the same of L_align's pull alone at the minimiser of L_geo. Their
    ratio is a relative error or, where an AQI budget has moved the merge, the pull of the budget.

    ``delta`` is the solution d, (d_out, d_in), whose coordinates are taken anew; ``reference`` is
    ``anchor`` or ``base``.
    """
    rho, solution = shield.rho, shield.coefficients(delta)
    pool = list(map(shield.coefficients, block.deltas))
    start, floor, value = _geometry(shield, solution, pool, geometry)
    goal = pool[0] if reference == "anchor" else torch.zeros_like(start)
    facts = {
        "l_geo": value,
        "l_geo_floor": floor,
        "l_align": energies(solution - goal, rho).weighted,
        "gradient": _squared(_gradient(rho, lambda_align, solution - goal, solution - start)),
        "gradient_scale": _squared(_pull(rho, lambda_align) * (start - goal)),
        "top_rho": float(rho.max()),
    }
    return facts | _lengths(shield, solution, pool)


def _geometry(
    shield: Shield, solution: Tensor, pool: Sequence[Tensor], geometry: Geometry
) -> tuple[Tensor, float, float]:
    """Return coordinates of L_geo's minimiser, its floor, and its value at the solution."""
    if not geometry.shares:
        assert geometry.centre is not None
        start = shield.coefficients(geometry.centre)
        return start, 0.0, _squared(solution - start)
    mean = average(pool, geometry.shares)
    start = mean if geometry.centre is None else shield.coefficients(geometry.centre)
    floor = l_geo(mean, pool, _squared, geometry.shares)
    return start, floor, floor + _squared(solution - mean)  # sum_k lambda_k ||d - Delta_k||^2 about the mean


def _lengths(shield: Shield, solution: Tensor, pool: Sequence[Tensor]) -> dict[str, float]:
    if shield.rank is None:
        shield = shield._replace(rank=CERTIFIED_RANK, scale=None)
    inside = shield.rho
    from_base = energies(solution, inside)
    facts = {
        "fisher_length_squared": from_base.total,
        "drift_base_squared": from_base.inside,
        "drift_anchor_squared": energies(solution - pool[0], inside).inside,
    }
    for alias, other in zip(["anchor", *map(str, range(len(pool) - 1))], pool, strict=True):
        energy = energies(other, inside)
        facts[f"energy_ratio_{alias}"] = _ratio(energy.inside, energy.total)
    return facts


def _pull(rho: Tensor, lambda_align: float) -> Tensor:
    return rho if math.isinf(lambda_align) else lambda_align * rho


def _gradient(rho: Tensor, lambda_align: float, from_goal: Tensor, from_start: Tensor) -> Tensor:
    """grad / 2 of Q from d - d_ref and d - d_soup; lambda = inf leaves only the constraint."""
    pulled = _pull(rho, lambda_align) * from_goal
    return pulled if math.isinf(lambda_align) else pulled + from_start


def _squared(coefficients: Tensor) -> float:
    """The squared Fisher length of coordinates; rows in fp32, their sum in float64."""
    return float(torch.linalg.vecdot(coefficients, coefficients).sum(dtype=torch.float64))


def summed(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sum the squares of ``certify`` over matrices; return roots, L_geo's excess and the relative gradient."""
    total = {key: math.fsum(block[key] for block in blocks.values()) for key in next(iter(blocks.values()))}
    ratios = [key for key in total if key.startswith("energy_ratio")]
    found = {key: total[key] / len(blocks) for key in ratios}
    found |= {"l_geo": total["l_geo"], "l_geo_floor": total["l_geo_floor"], "l_align": total["l_align"]}
    found["l_geo_excess"] = total["l_geo"] - total["l_geo_floor"]
    for key in ("fisher_length", "drift_base", "drift_anchor"):
        found[key] = math.sqrt(total[f"{key}_squared"])
    found["relative_gradient"] = math.sqrt(_ratio(total["gradient"], total["gradient_scale"]))
    found["top_rho"] = max(block["top_rho"] for block in blocks.values())
    return {key: significant(value) for key, value in found.items()}


class Moved(NamedTuple):
    """A displacement D from the dual solution, seen from the sample space."""

    along: Tensor  # J D, (n,) float64
    squared: float  # ||D||^2_G


def certify_samples(
    kernel: Tensor, along: Tensor, c: Tensor, lambda_align: float, rank: int, moved: Moved | None = None
) -> dict[str, Any]:
    """Certificate of the dual solution, from the sample space alone (float64 tensors).

    Eigenvalues of K, L_align at the barycentre and at the solution, excess of L_geo, and the norm of
    the objective's gradient (without L_bud) in S_A relative to L_align's pull at the barycentre.
    ``moved``: where an AQI budget has put the merge.
    """
    left, excess = along - kernel @ c, float(c @ kernel @ c)
    if moved is not None:
        left, excess = left + moved.along, excess - 2 * float(c @ moved.along) + moved.squared
    values, vectors = sample_eigenpairs(kernel, rank)
    rho = values / values.mean()
    before = (vectors.T @ along) / values.sqrt()
    after = (vectors.T @ left) / values.sqrt()
    gradient = _gradient(rho, lambda_align, after, after - before)
    scale = float((_pull(rho, lambda_align) * before).norm())
    return {
        "eigenvalues": [round(float(v), 9) for v in values[:32]],
        "l_align_before": float((rho * before.square()).sum()),
        "l_align": float((rho * after.square()).sum()),
        "l_geo_excess": excess,
        "relative_gradient": _ratio(float(gradient.norm()), scale),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
