"""The alignment subspace S_A and the exact minimiser of L_geo + lambda_align L_align, in two forms.

*Kronecker.* Per weight matrix, with input second moments A_A (alignment data) and A_G (the chart's
data, damped by eps times the mean diagonal), and output-gradient moments S_A and S_G likewise, the
metric is S_G (x) A_G and the alignment Fisher S_A (x) A_A. The generalised eigenproblems A_A u = alpha
A_G u and S_A v = sigma S_G v give bases in which both are diagonal, so the minimiser shrinks each
coefficient of X = d_start - d_ref by 1 / (1 + lambda rho_ij), rho_ij = sigma_i alpha_j normalised to
mean 1. (d_start: the minimiser of L_geo, by default the mean delta.)

*Samples.* With per-example alignment gradients J (n x d), K = J G^-1 J^T = U diag(n rho) U^T and
x = d_start - d_ref: d* = d_start - G^-1 J^T c, c = sum_{j<=r} a_j U_j (U_j^T J x) / (n rho_j),
a_j = lambda rho_j / (1 + lambda rho_j).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alignmerge.objective import removal


class Basis(NamedTuple):
    """Generalised eigenvectors of (F, G): U^T G U = I and U^T F U = diag(values), (m,), descending."""

    values: Tensor
    vectors: Tensor  # U, (m, m), one vector a column
    dual: Tensor  # G U = U^-T, (m, m): coefficients of x in the basis are x @ dual


def generalised_basis(alignment: Tensor, metric: Tensor, damping: float) -> Basis:
    """Solve F u = rho (G + damping * mean diagonal) u for symmetric (m, m) fp32 matrices.

    Raises:
        torch.linalg.LinAlgError: if the damped metric is not positive definite.
    """
    damped = metric + damping * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
    lower = torch.linalg.cholesky(damped)
    half = torch.linalg.solve_triangular(lower, alignment, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
    values, rotation = torch.linalg.eigh((whitened + whitened.T) / 2)
    values, rotation = values.flip(0).clamp(min=0), rotation.flip(1)
    vectors = torch.linalg.solve_triangular(lower.T.contiguous(), rotation, upper=True)
    return Basis(values, vectors, lower @ rotation)


def turned(basis: Basis, generator: torch.Generator) -> Basis:
    """Return a random basis of the same metric with the same eigenvalues: U Q, Q Haar-distributed."""
    noise = torch.randn(basis.vectors.shape, generator=generator, dtype=torch.float64)
    rotation, upper = torch.linalg.qr(noise)
    rotation = (rotation * upper.diagonal().sign()).to(basis.vectors.dtype)
    return Basis(basis.values, basis.vectors @ rotation, basis.dual @ rotation)


def principal_cosines(one: Basis, other: Basis, rank: int) -> Tensor:
    """Cosines of the principal angles between the leading directions of two bases, (rank,).

    They are the singular values of U_1^T G U_2 (Bjorck and Golub 1973), descending.
    """
    cosines: Tensor = torch.linalg.svdvals(one.dual[:, :rank].T @ other.vectors[:, :rank])
    return cosines.clamp(max=1)


class Scale(NamedTuple):
    """Where all matrices share one S_A: the least sigma_i alpha_j in it, and their mean in it."""

    least: float
    mean: float


class Shield(NamedTuple):
    """The shield of one weight matrix: a basis for its inputs, outputs, or both (None: the identity)."""

    outputs: Basis | None
    inputs: Basis | None
    rank: int | None = None  # how many of the largest rho make up S_A; None: all
    scale: Scale | None = None  # what decides instead where all matrices share one S_A

    @property
    def products(self) -> Tensor:
        """sigma_i alpha_j, (d_out or 1, d_in or 1)."""
        products = torch.ones(1, 1)
        if self.outputs is not None:
            products = products * self.outputs.values.unsqueeze(1)
        if self.inputs is not None:
            products = products * self.inputs.values
        return products

    @property
    def rho(self) -> Tensor:
        """rho_ij, mean 1 over S_A and 0 outside, broadcastable to (d_out, d_in)."""
        rho = self.products
        if self.scale is not None:
            return torch.where(rho >= self.scale.least, rho, 0.0) / self.scale.mean
        if self.rank is not None and self.rank < rho.numel():
            threshold = rho.flatten().topk(self.rank).values[-1]
            rho = torch.where(rho >= threshold, rho, 0.0)
        kept = rho > 0
        return rho / rho[kept].mean() if kept.any() else rho

    def coefficients(self, x: Tensor) -> Tensor:
        """V^T S_G X A_G U: the coordinates of X (d_out, d_in); their squares sum to ||X||^2_G."""
        if self.inputs is not None:
            x = x @ self.inputs.dual
        if self.outputs is not None:
            x = self.outputs.dual.T @ x
        return x

    def combine(self, coefficients: Tensor) -> Tensor:
        """V C U^T: the matrix with these coordinates."""
        if self.inputs is not None:
            coefficients = coefficients @ self.inputs.vectors.T
        if self.outputs is not None:
            coefficients = self.outputs.vectors @ coefficients
        return coefficients

    def pull(self, gradient: Tensor) -> Tensor:
        """V^T dA/dX U: the gradient with respect to the coordinates, (d_out, d_in)."""
        if self.inputs is not None:
            gradient = gradient @ self.inputs.vectors
        if self.outputs is not None:
            gradient = self.outputs.vectors.T @ gradient
        return gradient

    def removed(self, x: Tensor, lambda_align: float) -> Tensor:
        """X - D for the minimiser D of ||D - X||^2_G + lambda ||D||^2_H, H the alignment Fisher on S_A.

        Exactly 0 where lambda_align is.
        """
        return self.combine(self.coefficients(x) * removal(self.rho, lambda_align))


def common_scale(products: Sequence[Tensor], copies: Sequence[int], rank: int | None) -> Scale:
    """Put the rho of all matrices on one scale, from sigma_i alpha_j of each.

    Each product stands for ``copies`` coordinates of its matrix. S_A holds ``rank`` products a matrix on
    average, the largest; None: all above 0.
    """
    together = torch.cat(list(map(torch.flatten, products)))
    wanted = min((rank or len(together)) * len(products), len(together))
    least = max(float(together.kthvalue(len(together) - wanted + 1).values), torch.finfo(together.dtype).tiny)
    total = count = 0.0
    for product, copy in zip(products, copies, strict=True):
        inside = product[product >= least]
        total += copy * float(inside.sum(dtype=torch.float64))
        count += copy * inside.numel()
    return Scale(least, total / count if count else 1.0)


class Energies(NamedTuple):
    """||X||^2_G, ||P_A X||^2_G and ||X||^2_H = sum rho_ij c_ij^2 (L_align for X = d - d_ref)."""

    total: float
    inside: float
    weighted: float


def energies(coefficients: Tensor, rho: Tensor) -> Energies:
    """Split ||X||^2_G by the coordinates of X into what lies in S_A, and weight it by rho.

    Coordinates of one rho are summed first, then in float64.
    """
    square = coefficients.square().sum_to_size(rho.shape).double()
    inside, weighted = torch.where(rho > 0, square, 0.0), rho * square
    return Energies(*(float(part.sum()) for part in (square, inside, weighted)))


def dual_coefficients(kernel: Tensor, along: Tensor, lambda_align: float, rank: int) -> Tensor:
    """c of the sample-space solution, (n,) float64; K (n, n) and ``along`` = J x (n,) in float64.

    rho is normalised so that the mean of its top ``rank`` values is 1; lambda_align may be inf.
    """
    values, vectors = sample_eigenpairs(kernel, rank)
    removed: Tensor = removal(values / values.mean(), lambda_align)
    return vectors.mv(removed * vectors.T.mv(along) / values)


def sample_eigenpairs(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of K (n, n): values (m,) descending, vectors (n, m), m <= rank.

    K is a sum of fp32 products: eigenvalues that are zero in exact arithmetic (examples given twice)
    are left out as far as that precision tells them.
    """
    values, vectors = torch.linalg.eigh(kernel)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = values > values[0] * len(kernel) * torch.finfo(torch.float32).eps
    return values[kept], vectors[:, kept]
