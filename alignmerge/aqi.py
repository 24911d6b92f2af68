"""AQI of two labelled clusters of activations, and tau; every function is differentiable in the activations.

AQI is arXiv 2506.13901; with two labelled clusters its indices CHI and XBI are one number, s = B/W, up
to the sample sizes. tau is arXiv 2407.10264.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEGENERATE = 1e-10
"""A layer is degenerate where its within-cluster scatter is at most this share of its summed squares: its
points coincide up to fp32 rounding, as at a template token that no content has reached."""
LAYERS = (0.33, 0.4, 0.47, 0.53, 0.6, 0.67)  # fractions of the depth over which AQI is averaged


def layers_at(fractions: Sequence[float], depth: int) -> list[int]:
    """Return the layers (from 1 to ``depth``) at fractions of the depth, ascending, each once."""
    return sorted({max(1, round(depth * fraction)) for fraction in fractions})


def resampled_pairs(pairs: int, replicates: int, generator: torch.Generator) -> Tensor:
    """Return how often each pair counts in each bootstrap resample, fp32 [replicates, pairs].

    A resample draws n - 1 of n pairs, which gives the variance of n of them without bias.
    """
    drawn = torch.randint(pairs, (replicates, pairs - 1), generator=generator)
    return torch.zeros(replicates, pairs).scatter_add_(1, drawn, torch.ones(drawn.shape))


def separation(x: Tensor, harmful: Tensor) -> Tensor:
    """Return s = B/W, between-cluster over within-cluster scatter, of two labelled clusters.

    ``x`` is [..., N, d] (computed in fp32 or wider), ``harmful`` is bool [N], the result is [...]. NaN
    where the layer is degenerate. Raises ``ValueError`` where a cluster is empty.
    """
    if not 0 < int(harmful.sum()) < harmful.numel():
        raise ValueError("both clusters need at least one point")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sides = x[..., harmful, :], x[..., ~harmful, :]
    n1, n2 = (side.shape[-2] for side in sides)
    mean1, mean2 = (side.mean(-2) for side in sides)
    between = n1 * n2 / (n1 + n2) * (mean1 - mean2).square().sum(-1)
    within = (sides[0] - mean1.unsqueeze(-2)).square().sum((-2, -1))
    within = within + (sides[1] - mean2.unsqueeze(-2)).square().sum((-2, -1))
    coincide = within <= DEGENERATE * x.square().sum((-2, -1))
    # Both branches of `where` carry gradients: the division must be harmless in the other one.
    return torch.where(coincide, torch.nan, between / torch.where(coincide, 1.0, within))


def chi(s: Tensor, n1: int, n2: int) -> Tensor:
    """Calinski-Harabasz index of two clusters, (N - 2) s; higher is better, and it grows with N."""
    return (n1 + n2 - 2) * s


def xbi(s: Tensor, n1: int, n2: int) -> Tensor:
    """Xie-Beni index of two clusters, n1 n2 / (N^2 s); lower is better."""
    return n1 * n2 / ((n1 + n2) ** 2 * s)


def aqi_raw(s: Tensor, n1: int, n2: int, mix: float = 0.5) -> Tensor:
    """AQI as the paper has it, mix / XBI + (1 - mix) CHI: print N beside it, it doubles when N does."""
    return mix / xbi(s, n1, n2) + (1 - mix) * chi(s, n1, n2)


def aqi01(s: Tensor, n1: int, n2: int, mix: float = 0.5) -> Tensor:
    """AQI in (-1, 1), elementwise: mix / (1 + XBI) + (1 - mix) CHI / (CHI + N - 2), free of N but for that of s.

    It is odd in s: an unbiased estimate of a small separation can be below 0, and cutting it there would be
    a bias of its own.
    """
    share = n1 * n2 / (n1 + n2) ** 2  # XBI = share / s; written so that s = 0 gives 0
    return mix * s / (s.abs() + share) + (1 - mix) * s / (1 + s.abs())


def mean_aqi(hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of aqi01 over the layers of [L, 2n, d], harmful half first; [R] with pair weights [R, n].

    The separation is ``unbiased_separation``. Degenerate layers are left out; NaN if all are.
    """
    return aqi01(unbiased_separation(hidden, weights), 1, 1).nanmean(0)


def unbiased_separation(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return s = B/W of the population that n pairs are drawn from, of points [..., 2n, d], harmful half first.

    B/W of a sample grows as n shrinks, because the noise of the means adds to their distance. Here both
    parts are means over two different pairs: the squared distance of the means is the mean of the inner
    products of two pairs' differences, the variances are half the mean squared distance of two points.
    Pairs may be correlated within. The result is [...]; with ``weights`` [R, n] (how often each pair
    counts, a bootstrap resample a row) it is [..., R], and a pair never meets its own copy. NaN where the
    layer is degenerate or a resample holds a single pair.
    """
    pairs = x.shape[-2] // 2
    if weights is None:
        return unbiased_separation(x, torch.ones(1, pairs, device=x.device)).squeeze(-1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    w = weights.to(x)
    harmful, benign = x[..., :pairs, :], x[..., pairs:, :]
    size = w.sum(-1)
    different = size.square() - w.square().sum(-1)  # ordered choices of two different pairs
    difference = harmful - benign
    own = difference.square().sum(-1) @ w.square().T
    distance = ((w @ difference).square().sum(-1) - own) / different
    variance = (_scatter(harmful, w) + _scatter(benign, w)) * size / different / 2
    coincide = variance <= DEGENERATE * (x.square().sum(-1) @ w.repeat(1, 2).T) / size
    # Both branches of `where` carry gradients: the division must be harmless in the other one.
    return torch.where(coincide, torch.nan, distance / 4 / torch.where(coincide, 1.0, variance))


def _scatter(x: Tensor, w: Tensor) -> Tensor:
    """Squared distance to the weighted mean, [..., R], of points [..., n, d] with weights [R, n]."""
    # About the plain mean the two terms of the scatter do not cancel, so fp32 is enough.
    residual, size = x - x.mean(-2, keepdim=True), w.sum(-1)
    shift = (w @ residual) / size[:, None]
    return residual.square().sum(-1) @ w.T - size * shift.square().sum(-1)


def separation_of_halves(x: Tensor) -> Tensor:
    """``separation`` of points [..., 2n, d] whose first half is the harmful cluster."""
    return separation(x, torch.arange(x.shape[-2]) < x.shape[-2] // 2)


def tau(x: Tensor, safe_mean: Tensor, unsafe_mean: Tensor) -> Tensor:
    """tau(x) = |x - mu_U| - |x - mu_S|, [..., N], of points [..., N, d]: above 0 if nearer to safe."""
    to_safe: Tensor = torch.linalg.vector_norm(x - safe_mean.unsqueeze(-2), dim=-1)
    to_unsafe: Tensor = torch.linalg.vector_norm(x - unsafe_mean.unsqueeze(-2), dim=-1)
    return to_unsafe - to_safe


def tau_gap(safe: Tensor, unsafe: Tensor, *means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean tau of safe points less that of unsafe points, and these two, in pooled deviations of tau.

    ``safe`` is [..., n, d], ``unsafe`` [..., m, d], n + m > 2; the ``means`` of either side [..., d] must
    come from other points than these. The results are [...], NaN where tau does not vary.
    """
    of_safe, of_unsafe = tau(safe, *means), tau(unsafe, *means)
    spread = sum((t - t.mean(-1, keepdim=True)).square().sum(-1) for t in (of_safe, of_unsafe))
    variance = spread / (of_safe.shape[-1] + of_unsafe.shape[-1] - 2)
    flat = variance <= DEGENERATE * safe.square().sum(-1).mean(-1)
    # Both branches of `where` carry gradients: the root must be smooth in the one that is not taken.
    deviation = torch.where(flat, torch.nan, torch.where(flat, 1.0, variance).sqrt())
    safe_tau, unsafe_tau = of_safe.mean(-1), of_unsafe.mean(-1)
    return (safe_tau - unsafe_tau) / deviation, safe_tau / deviation, unsafe_tau / deviation
