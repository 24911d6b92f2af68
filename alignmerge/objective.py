"""The quadratic terms of L = L_geo + lambda_align L_align (+ lambda_bud L_bud), as pure functions.

arXiv 2512.16245, the objective of section 3, over d = theta - theta_IT:
L_geo = sum_k lambda_k ||d - Delta_k||^2_G and L_align = (d - d_ref)^T P_A^T F_A P_A (d - d_ref).
Every function takes and returns fp32 or fp64 tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SquaredNorm = Callable[[Tensor], float]
"""d -> ||d||^2_G of one block, in float64."""


def l_geo(delta: Tensor, pool: Sequence[Tensor], squared_norm: SquaredNorm) -> float:
    """L_geo with uniform lambda_k: the mean over the pool of ||d - Delta_k||^2_G."""
    return sum(squared_norm(delta - other) for other in pool) / len(pool)


def l_geo_floor(pool: Sequence[Tensor], squared_norm: SquaredNorm) -> float:
    """V = sum_k lambda_k ||Delta_k - mean||^2_G: no merge has a smaller L_geo (paper.md 2.4, item 1)."""
    return l_geo(torch.stack(list(pool)).mean(dim=0), pool, squared_norm)


def fisher_barycentre(values: Sequence[Tensor], fishers: Sequence[Tensor], floor: float) -> Tensor:
    """Minimiser of sum_k (d - Delta_k)^T F_k (d - Delta_k) for diagonal F_k >= floor (fp32 in, fp32 out).

    (sum_k F_k)^-1 sum_k F_k theta_k: Fisher-weighted averaging, Matena and Raffel (arXiv 2111.09832), eq. 3,
    summed in float64. The same floor for every model makes coordinates without any Fisher fall back to the
    plain average.
    """
    above = torch.zeros_like(values[0], dtype=torch.float64)
    below = torch.zeros_like(above)
    for value, fisher in zip(values, fishers, strict=True):
        weight = fisher.double().clamp(min=floor)
        above += weight * value
        below += weight
    return (above / below).float()


def shrinkage(rho: Tensor, lambda_align: float) -> Tensor:
    """1 / (1 + lambda rho), the factor by which L_align shrinks each direction towards the reference.

    lambda_align may be inf: directions with rho > 0 are then removed altogether.
    """
    if lambda_align == float("inf"):
        return (rho <= 0).to(rho.dtype)
    return 1 / (1 + lambda_align * rho)
