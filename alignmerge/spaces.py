"""Where an AQI budget may move a merge: theta* + X z, at a cost of z^T M z in units of V."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alignmerge.engine.views import layer_of

Tensors = Mapping[str, Tensor]
Directions = Callable[[str], Sequence[Tensor]]  # matrix -> theta_k - theta* of each model, (d_out, d_in)


INSIDE = 1e-6
"""Share of ||x||^2_G up to which x counts as outside of S_A: a projection lets only such moves pass."""
NEGLIGIBLE = 1e-9
"""A direction shorter than this share of the longest is rounding."""


class Displacement(NamedTuple):
    """A move from theta*: X z."""

    z: Tensor  # float64 (coordinates,); empty: no move
    tensors: Tensors  # view name -> (d_out, d_in) fp32


STAYS = Displacement(torch.zeros(0, dtype=torch.float64), {})


class Space(Protocol):
    """The span of X, with M = X^T (G + lambda_align H) X / V."""

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient, float64 (coordinates,)."""

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull (the pseudo-inverse where M is singular), float64 (coordinates,)."""

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z: view name -> (d_out, d_in) fp32."""


class Coefficients:
    """One coefficient for each block and model: X z = sum_k z_bk (theta_k - theta*) in block b."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[str]],
        directions: Directions,
        metric: Tensor,
        inside: Tensor | None = None,
    ) -> None:
        """Take block -> names of its matrices, the directions, and M (float64, square).

        ``inside``: X^T P_A^T G P_A X in the unit of M, of a projection: moves that it sees are forbidden.
        """
        self._blocks, self._directions = blocks, directions
        self._models = len(metric) // len(blocks)
        squares = metric.diagonal()
        scale = torch.where(squares > NEGLIGIBLE * squares.max(), squares, torch.inf).rsqrt()
        values, vectors = torch.linalg.eigh(metric * scale * scale.unsqueeze(1))
        kept = values > 1e-9 * len(values)  # at the average the directions of a block sum to 0
        root = scale.unsqueeze(1) * vectors[:, kept] * values[kept].rsqrt()
        if inside is not None:
            shares, turn = torch.linalg.eigh(root.T @ inside @ root)
            root = root @ turn[:, shares < INSIDE]
        self._root = root  # R, R R^T = M^+

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient."""
        found = torch.zeros(len(self._blocks), self._models, dtype=torch.float64)
        for block, names in enumerate(self._blocks.values()):
            for name in names:
                for model, x in enumerate(self._directions(name)):
                    found[block, model] += (gradient[name] * x).sum(dtype=torch.float64)
        return found.flatten()

    def solve(self, pull: Tensor) -> Tensor:
        """M^+ pull; what rounding leaves along null directions of M is dropped."""
        solution: Tensor = self._root @ (self._root.T @ pull)
        return solution

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z."""
        found = {}
        for row, names in zip(z.view(-1, self._models), self._blocks.values(), strict=True):
            shares = row.float().view(-1, 1, 1)
            for name in names:
                found[name] = (shares * torch.stack(list(self._directions(name)))).sum(0)
        return found

    def table(self, z: Tensor, aliases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return block -> model -> coefficient."""
        found = {}
        for block, row in zip(self._blocks, z.view(-1, self._models).tolist(), strict=True):
            found[block] = dict(zip(aliases, row, strict=True))
        return found


def block_metric(blocks: Mapping[str, Sequence[str]], coordinates: Callable[[str], Tensor]) -> Tensor:
    """X^T G X of merge coefficients, float64: a square for each block, 0 between blocks.

    ``coordinates``: name -> (models, coordinates) of each theta_k - theta* in an orthonormal basis of
    the metric.
    """
    squares = []
    for names in blocks.values():
        products = []
        for name in names:
            rows = coordinates(name).double()
            products.append(rows @ rows.T)
        squares.append(torch.stack(products).sum(0))
    joined: Tensor = torch.block_diag(*squares)  # type: ignore[no-untyped-call]
    return joined


def blocks_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Group matrices by decoder layer; what belongs to none is a block of its own."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        block = name if layer is None else f"layer {layer}"
        blocks.setdefault(block, []).append(name)
    return blocks
