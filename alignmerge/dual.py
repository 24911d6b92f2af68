"""Rows of J in the dual: what the sample-space solution asks of per-example gradients, and a random stand-in.

Both answer two questions without any (examples x weights) matrix in memory for more than one weight matrix:
J x for given x, and J^T c for given c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from alignmerge.engine.examples import Example
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import Visit, visit_gradients, weighted_sum

Directions = Callable[[str], Mapping[int, Tensor]]
"""Weight name -> column -> the part of that column's x in this weight, (d_out, d_in)."""


class Rows(Protocol):
    """The n rows of J."""

    def along(self, directions: Directions, columns: int) -> Tensor:
        """J [x_1 ... x_columns], (n, columns) float64."""
        ...

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c for c (n,): weight name -> (d_out, d_in) fp32."""
        ...


class ExampleRows:
    """Per-example gradients of the response NLL, taken anew by one backward pass for each question."""

    def __init__(self, load: Callable[[], Any], examples: Sequence[Example], precision: str) -> None:
        self._load, self._examples, self._precision = load, examples, precision

    def along(self, directions: Directions, columns: int) -> Tensor:
        """J [x_1 ... x_columns]: <G_i, x> = sum_t g_t^T x a_t for each example and weight."""
        found = torch.zeros(len(self._examples), columns, dtype=torch.float64)

        def add(visit: Visit) -> None:
            inputs, grads = visit.inputs.float(), visit.grads.float()
            for column, x in directions(visit.name).items():
                products = (grads * (inputs @ x.T)).sum((1, 2), dtype=torch.float64)
                found[visit.examples, column] += products

        visit_gradients(self._load(), self._examples, add, precision=self._precision)
        return found

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c by one weighted backward pass."""
        return weighted_sum(self._load(), self._examples, c.float(), precision=self._precision)


class RandomRows:
    """Random rows with a given Gram matrix in the metric: J = T W G^(1/2), W white noise, J G^-1 J^T = K.

    The control for S_A: the eigenvalues of the real gradients along directions that know nothing of them. W is drawn
    again for each question, weight by weight, from the seed and the weight's name.
    """

    def __init__(
        self, inverse_metric: Callable[[str], Tensor], names: Sequence[str], seed: int, kernel: Tensor
    ) -> None:
        """Take the diagonal of G^-1 by weight name, and K (n, n) float64; draws all of W once, for T."""
        self._inverse, self._names, self._seed = inverse_metric, names, seed
        self._count = len(kernel)
        white = sum((noise @ noise.T for noise in map(self._noise, names)), torch.zeros(()))
        values, vectors = torch.linalg.eigh(kernel)
        noise_values, noise_vectors = torch.linalg.eigh(white)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._turn = root @ (noise_vectors * noise_values.rsqrt()) @ noise_vectors.T

    def along(self, directions: Directions, columns: int) -> Tensor:
        """J [x_1 ... x_columns]."""
        found = torch.zeros(self._count, columns, dtype=torch.float64)
        for name in self._names:
            noise = self._noise(name)
            for column, x in directions(name).items():
                found[:, column] += noise @ (x / self._inverse(name).sqrt()).flatten().double()
        rows: Tensor = self._turn @ found
        return rows

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c."""
        weights = self._turn.T @ c
        return {
            name: (weights @ self._noise(name)).float().view_as(inverse) / inverse.sqrt()
            for name in self._names
            for inverse in [self._inverse(name)]
        }

    def _noise(self, name: str) -> Tensor:
        generator = torch_stream(self._seed, "random rows", name)
        size = self._inverse(name).numel()
        return torch.randn(self._count, size, generator=generator).double()
