"""The terms of L = L_geo + lambda_align L_align + lambda_bud L_bud, as pure functions.

arXiv 2512.16245, the objective of section 3, over d = theta - theta_IT:
L_geo = sum_k lambda_k ||d - Delta_k||^2_G, L_align = (d - d_ref)^T P_A^T F_A P_A (d - d_ref) and
L_bud = max(0, A_min - A(theta))^2. Functions of tensors take and return fp32 or fp64 of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SquaredNorm = Callable[[Tensor], float]  # d -> ||d||^2_G of one block, in float64


def l_geo(
    delta: Tensor, pool: Sequence[Tensor], squared_norm: SquaredNorm, weights: Sequence[float] | None = None
) -> float:
    """L_geo: the mean over the pool of ||d - Delta_k||^2_G, lambda_k of sum 1 (None: uniform)."""
    if weights is None:
        return sum(squared_norm(delta - other) for other in pool) / len(pool)
    return sum(weight * squared_norm(delta - other) for weight, other in zip(weights, pool, strict=True))


def l_geo_floor(pool: Sequence[Tensor], squared_norm: SquaredNorm) -> float:
    """V, the mean over the pool of ||Delta_k - mean||^2_G: no merge has a smaller uniform L_geo."""
    return l_geo(torch.stack(list(pool)).mean(dim=0), pool, squared_norm)


def l_bud(value: float, least: float) -> float:
    """L_bud = max(0, A_min - A)^2 of A = ``value``, A_min = ``least`` (its form is inferred)."""
    return max(0.0, least - value) ** 2


def hinge_multiplier(gap: float, sensitivity: float, lambda_bud: float) -> float:
    """mu of the minimiser z = mu M^-1 g of z^T M z + lambda_bud max(0, gap - g^T z)^2, s = g^T M^-1 g.

    Stationarity, M z = lambda_bud (gap - g^T z) g, gives mu = lambda_bud gap / (1 + lambda_bud s) where
    gap > 0; where the budget is met at z = 0 nothing has to move.
    """
    return lambda_bud * max(0.0, gap) / (1 + lambda_bud * sensitivity)


def fisher_barycentre(
    values: Sequence[Tensor], fishers: Sequence[Tensor], floor: float, weights: Sequence[float] | None = None
) -> Tensor:
    """Minimiser of sum_k lambda_k (d - Delta_k)^T F_k (d - Delta_k) for diagonal F_k >= floor.

    (sum_k lambda_k F_k)^-1 sum_k lambda_k F_k theta_k: Fisher-weighted averaging, Matena and Raffel
    (arXiv 2111.09832), eq. 3 (lambda_k uniform: None). Takes and returns fp32, summed in float64. The
    same floor for every model makes coordinates without any Fisher fall back to the plain average.
    """
    above = torch.zeros_like(values[0], dtype=torch.float64)
    below = torch.zeros_like(above)
    shares = weights or [1.0] * len(values)
    for value, fisher, share in zip(values, fishers, shares, strict=True):
        weight = share * fisher.double().clamp(min=floor)
        above += weight * value
        below += weight
    return (above / below).float()


def removal(rho: Tensor, lambda_align: float) -> Tensor:
    """lambda rho / (1 + lambda rho): the share of each direction's way to the reference that L_align takes.

    lambda_align may be inf: directions with rho > 0 then go all the way.
    """
    if lambda_align == float("inf"):
        return (rho > 0).to(rho.dtype)
    pulled = lambda_align * rho
    return pulled / (1 + pulled)
