"""The alignment subspace S_A and the exact minimiser of L_geo + lambda_align L_align, in two estimators.

*Kronecker.* Per weight matrix, with input second moments A_A (alignment data) and A_G (the chart's data, damped
by eps times the mean diagonal), and output-gradient second moments S_A and S_G likewise, the metric is S_G (x) A_G
and the alignment Fisher S_A (x) A_A. Generalised eigenproblems A_A u = alpha A_G u, S_A v = sigma S_G v give bases
in which both are diagonal, so the minimiser shrinks each coefficient of X = mean delta - d_ref by
1 / (1 + lambda rho_ij), rho_ij = sigma_i alpha_j normalised to mean 1 (design, section 5; the closed form of
paper.md 2.4, item 3).

*Samples.* With per-example alignment gradients J (n x d), K = J G^-1 J^T = U diag(n rho) U^T and
x = mean delta - d_ref: d* = mean delta - G^-1 J^T c, c = sum_{j<=r} a_j U_j (U_j^T J x) / (n rho_j),
a_j = lambda rho_j / (1 + lambda rho_j).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignmerge.objective import shrinkage


class Basis(NamedTuple):
    """Generalised eigenvectors of (F, G): U^T G U = I and U^T F U = diag(values), descending."""

    values: Tensor
    """(m,)"""
    vectors: Tensor
    """U, (m, m), one vector a column."""
    dual: Tensor
    """G U = U^-T, (m, m): coefficients of x in the basis are x @ dual."""


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


class Shield(NamedTuple):
    """The shield of one weight matrix: a basis for its inputs, its outputs, or both (None: the identity)."""

    outputs: Basis | None
    inputs: Basis | None
    rank: int | None = None
    """How many of the largest rho make up S_A; None: all."""

    @property
    def rho(self) -> Tensor:
        """rho_ij, mean 1 over S_A and 0 outside, broadcastable to (d_out, d_in)."""
        sigma = self.outputs.values.unsqueeze(1) if self.outputs is not None else torch.ones(1, 1)
        alpha = self.inputs.values.unsqueeze(0) if self.inputs is not None else torch.ones(1, 1)
        rho = sigma * alpha
        if self.rank is not None and self.rank < rho.numel():
            threshold = rho.flatten().topk(self.rank).values[-1]
            rho = torch.where(rho >= threshold, rho, 0.0)
        kept = rho > 0
        return rho / rho[kept].mean() if bool(kept.any()) else rho

    def coefficients(self, x: Tensor) -> Tensor:
        """V^T S_G X A_G U: the coordinates of X (d_out, d_in); their squares sum to ||X||^2_G."""
        if self.inputs is not None:
            x = x @ self.inputs.dual
        return self.outputs.dual.T @ x if self.outputs is not None else x

    def combine(self, coefficients: Tensor) -> Tensor:
        """V C U^T: the matrix with these coordinates."""
        if self.inputs is not None:
            coefficients = coefficients @ self.inputs.vectors.T
        return self.outputs.vectors @ coefficients if self.outputs is not None else coefficients

    def shrink(self, x: Tensor, lambda_align: float) -> Tensor:
        """The minimiser D of ||D - X||^2_G + lambda ||D||^2_H; H: the alignment Fisher on S_A, normalised."""
        return self.combine(self.coefficients(x) * shrinkage(self.rho, lambda_align))


class Energies(NamedTuple):
    """Squared lengths of one matrix in the metric, for certificates and drift."""

    total: float
    """||X||^2_G."""
    inside: float
    """||P_A X||^2_G."""
    weighted: float
    """||X||^2_H = sum rho_ij c_ij^2 (L_align for X = d - d_ref)."""


def energies(shield: Shield, x: Tensor) -> Energies:
    """Split ||X||^2_G of a (d_out, d_in) matrix into what lies in S_A, and weight it by rho."""
    square = shield.coefficients(x).double().square()
    rho = shield.rho.double().expand_as(square)
    return Energies(float(square.sum()), float(square[rho > 0].sum()), float((rho * square).sum()))


def dual_coefficients(kernel: Tensor, along: Tensor, lambda_align: float, rank: int) -> Tensor:
    """c of the sample-space solution, (n,) float64; ``kernel`` K (n, n) and ``along`` J x (n,) in float64.

    rho is normalised so that the mean of its top ``rank`` values is 1; lambda_align may be inf.
    """
    values, vectors = sample_eigenpairs(kernel, rank)
    removed: Tensor = 1 - shrinkage(values / values.mean(), lambda_align)
    return vectors.mv(removed * vectors.T.mv(along) / values)


def sample_eigenpairs(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` leading eigenpairs of K (n, n): values (m,) descending, vectors (n, m), m <= rank.

    K is a sum of fp32 products: eigenvalues that are zero in exact arithmetic (examples given twice) are left out
    as far as that precision tells them.
    """
    values, vectors = torch.linalg.eigh(kernel)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = values > values[0] * len(kernel) * torch.finfo(torch.float32).eps
    return values[kept], vectors[:, kept]
