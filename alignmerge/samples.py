"""The sample estimator: the exact dual over examples, from one Gram matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignmerge.certificate import Moved, certify_samples
from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.examples import Example
from alignmerge.engine.merger import Block, MergeContext, Rule, block_of
from alignmerge.engine.seeding import torch_stream
from alignmerge.fisher import PRECISION, damped, fisher, mean_value
from alignmerge.gradients import VERSION, Part, Visit, gram, visit_gradients, weighted_sum
from alignmerge.quadratic import Quadratic
from alignmerge.spaces import Coefficients, Directions, Space, Tensors, block_metric, blocks_of
from alignmerge.subspace import dual_coefficients, sample_eigenpairs

if TYPE_CHECKING:
    from alignmerge.method import AlignMerge

Columns = Callable[[str], Mapping[int, Tensor]]  # weight name -> column -> its part of x, (d_out, d_in)


class Samples(Quadratic):
    """The solution theta_soup - G^-1 J^T c, with J over all linear weights at once."""

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        super().__init__(method, ctx, weights)
        self.inverse = self._inverse_metric()
        self.rows: Rows = ExampleRows(partial(ctx.loaded, self.point), ctx.examples(self.examples), PRECISION)
        stored = self._gram()
        self.kernel = stored.read("kernel", dtype=torch.float64)
        self.along = stored.read("along", dtype=torch.float64)
        if method.subspace_from == "random":
            names = sorted(fisher(ctx, self.point, "metric"))
            self.rows = RandomRows(self.inverse, names, ctx.seed, self.kernel)
            self.along = self.rows.times(self._excursion)
        self.rank = min(method.rank or len(self.kernel), len(self.kernel))
        self.c = dual_coefficients(self.kernel, self.along, method.lambda_align, self.rank)
        self.correction = self.rows.combine(self.c)
        self.names = sorted(self.correction)

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        merged = self.soup(block)
        if block.name not in self.correction:
            return merged
        return merged - (self.inverse(block.name) * self.correction[block.name])[block.rows]

    def rule(self, moved: Tensors) -> Rule:
        """Return the rule of the merge."""
        if self.method.certificate:
            seen = self._seen(moved) if moved else None
            lambda_align = self.method.lambda_align
            facts = certify_samples(self.kernel, self.along, self.c, lambda_align, self.rank, seen)
            self.ctx.record(certificate=facts)

        def rule(block: Block) -> Tensor:
            merged = self.solution(block)
            return merged + moved[block.name] if block.name in moved else merged

        return rule

    def space(self, directions: Directions) -> Space:
        """Return merge coefficients by decoder layer, or the coordinates in S_A."""
        values, vectors = sample_eigenpairs(self.kernel, self.rank)
        basis, floor = vectors / values.sqrt(), self.floor()
        stiffness = self.method.lambda_align * values / values.mean()
        if self.method.space == "subspace":
            return SampleSpace(self.rows, self.inverse, basis, (1 + stiffness) / floor)
        blocks, models = blocks_of(self.names), len(self.ctx.models.pool)
        first: dict[str, int] = {}  # the column of each matrix's first coefficient
        for row, names in enumerate(blocks.values()):
            first |= dict.fromkeys(names, row * models)

        def placed(name: str) -> dict[int, Tensor]:
            return dict(enumerate(directions(name), first[name]))

        def whitened(name: str) -> Tensor:
            return torch.stack(list(map(self.coordinates(name), directions(name)))).flatten(1)

        inside = basis.T @ self.rows.along(placed, len(blocks) * models)
        metric = block_metric(blocks, whitened) + inside.T @ (stiffness.unsqueeze(1) * inside)
        return Coefficients(blocks, directions, metric / floor)

    def coordinates(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what multiplies a difference by the root of the diagonal metric."""
        return partial(mul, self.inverse(name).rsqrt())

    def _inverse_metric(self) -> Part:
        if self.method.chart == "identity":
            views = self.ctx.models.base.views
            return lambda name: torch.ones(views[name].shape)
        diagonal, damping = fisher(self.ctx, self.point, "metric"), self.method.damping
        mean = mean_value(diagonal)
        return lambda name: 1 / damped(diagonal.read(name), mean, damping)

    def _gram(self) -> Checkpoint:
        """K and J (mean delta - d_ref) of the examples."""
        ctx, method, point = self.ctx, self.method, self.point
        recipe: dict[str, Any] = {"of": point.identity, "precision": PRECISION, "version": VERSION}
        recipe |= {"base": ctx.models.base.identity, "pool": [one.identity for one in ctx.models.pool]}
        recipe |= {"reference": method.reference, "metric": method.metric, "lambda_k": self.weights}
        recipe |= {"chart": method.chart, "damping": method.damping, "floor": method.floor}
        recipe |= {"examples": ctx.examples_digest(self.examples), "soup": self.soup_inputs()}
        recipe |= {"metric examples": ctx.examples_digest("metric")}

        def make(folder: Path) -> None:
            model, examples = ctx.loaded(point), ctx.examples(self.examples)
            found = gram(model, examples, self.inverse, self._excursion, precision=PRECISION)
            save_tensors(folder, found._asdict())

        return load_tensors(ctx.cached("gram", recipe, make).path)

    def _excursion(self, name: str) -> Tensor:
        block = block_of(self.ctx.models, name)
        return self.soup(block) - block.base - self.reference(block)

    def _seen(self, moved: Tensors) -> Moved:
        squared = 0.0
        for name, x in moved.items():
            squared += float((x.square() / self.inverse(name)).sum(dtype=torch.float64))
        return Moved(self.rows.times(moved.__getitem__), squared)


class Rows(ABC):
    """The n rows of J; only the part of one weight matrix is ever in memory."""

    @abstractmethod
    def along(self, columns: Columns, count: int) -> Tensor:
        """J [x_1 ... x_count], (n, count) float64."""

    @abstractmethod
    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c for c (n,): weight name -> (d_out, d_in) fp32."""

    def times(self, x: Part) -> Tensor:
        """J x, (n,) float64."""
        return self.along(lambda name: {0: x(name)}, 1)[:, 0]


class ExampleRows(Rows):
    """Per-example gradients of the response NLL, taken anew by one backward pass for each question."""

    def __init__(self, load: Callable[[], Any], examples: Sequence[Example], precision: str) -> None:
        self._load, self._examples, self._precision = load, examples, precision

    def along(self, columns: Columns, count: int) -> Tensor:
        """J [x_1 ... x_count]: <G_i, x> = sum_t g_t^T x a_t for each example and weight."""
        found = torch.zeros(len(self._examples), count, dtype=torch.float64)

        def add(visit: Visit) -> None:
            inputs, grads = visit.inputs.float(), visit.grads.float()
            for column, x in columns(visit.name).items():
                products = (grads * (inputs @ x.T)).sum((1, 2), dtype=torch.float64)
                found[visit.examples, column] += products

        visit_gradients(self._load(), self._examples, add, precision=self._precision)
        return found

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c by one weighted backward pass."""
        return weighted_sum(self._load(), self._examples, c.float(), precision=self._precision)


class RandomRows(Rows):
    """Random rows with a given Gram matrix K: J = T W G^(1/2), W white noise, J G^-1 J^T = K.

    The control for S_A: the eigenvalues of the real gradients along directions that know nothing of
    them. W is drawn again for each question, weight by weight, from the seed and the weight's name.
    """

    def __init__(self, inverse_metric: Part, names: Sequence[str], seed: int, kernel: Tensor) -> None:
        """Take the diagonal of G^-1 by weight name, and K (n, n) float64; draws all of W once, for T."""
        self._inverse, self._names, self._seed = inverse_metric, names, seed
        self._count = len(kernel)
        white = sum((noise @ noise.T for noise in map(self._noise, names)), torch.zeros(()))
        values, vectors = torch.linalg.eigh(kernel)
        noise_values, noise_vectors = torch.linalg.eigh(white)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._turn = root @ (noise_vectors * noise_values.rsqrt()) @ noise_vectors.T

    def along(self, columns: Columns, count: int) -> Tensor:
        """J [x_1 ... x_count]."""
        found = torch.zeros(self._count, count, dtype=torch.float64)
        for name in self._names:
            noise = self._noise(name)
            for column, x in columns(name).items():
                found[:, column] += noise @ (x / self._inverse(name).sqrt()).flatten().double()
        rows: Tensor = self._turn @ found
        return rows

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c."""
        weights, found = self._turn.T @ c, {}
        for name in self._names:
            inverse = self._inverse(name)
            found[name] = (weights @ self._noise(name)).float().view_as(inverse) / inverse.sqrt()
        return found

    def _noise(self, name: str) -> Tensor:
        generator = torch_stream(self._seed, "random rows", name)
        return torch.randn(self._count, self._inverse(name).numel(), generator=generator).double()


class SampleSpace:
    """Coordinates in the S_A of the dual: X = G^-1 J^T E with X^T G X = 1, M = (1 + lambda rho) / V."""

    def __init__(self, rows: Rows, inverse_metric: Part, basis: Tensor, stiffness: Tensor) -> None:
        """Take J, the diagonal of G^-1 by weight name, E (n, r) and M (r,)."""
        self._rows, self._inverse, self._basis, self._stiffness = rows, inverse_metric, basis, stiffness

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient."""
        return self._basis.T @ self._rows.times(lambda name: self._inverse(name) * gradient[name])

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull."""
        return pull / self._stiffness

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z."""
        found = self._rows.combine(self._basis @ z)
        return {name: self._inverse(name) * x for name, x in found.items()}
