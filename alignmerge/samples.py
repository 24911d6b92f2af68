"""The sample estimator: the exact dual over examples, from one Gram matrix for each decoder layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignmerge.certificate import Moved, certify_samples
from alignmerge.engine.checkpoint import load_tensors, save_tensors
from alignmerge.engine.examples import Example
from alignmerge.engine.merger import Block, MergeContext, Rule, block_of
from alignmerge.engine.seeding import torch_stream
from alignmerge.engine.store import Artifact
from alignmerge.fisher import damped, fisher, mean_value
from alignmerge.gradients import VERSION, Gram, Part, Visit, exact_root, gram, visit_gradients, weighted_sum
from alignmerge.quadratic import Quadratic
from alignmerge.spaces import Coefficients, Directions, Displacement, Space, Tensors, block_metric, blocks_of
from alignmerge.subspace import dual_coefficients, sample_eigenpairs

if TYPE_CHECKING:
    from alignmerge.method import AlignMerge

Columns = Callable[[str], Mapping[int, Tensor]]  # weight name -> column -> its part of x, (d_out, d_in)


class Samples(Quadratic):
    """The solution theta_soup - G^-1 J^T c, with J over all linear weights at once."""

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        super().__init__(method, ctx, weights)
        self.inverse = self._inverse_metric()
        examples = ctx.examples(self.examples)
        self.rows: Rows = ExampleRows(partial(ctx.loaded, self.point), examples, ctx.precision)
        found = self._gram(self.rows, {})
        if method.subspace_from == "random":
            random = RandomRows(self.inverse, found.names, ctx.seed, self._turn(found))
            self.rows, found = random, self._gram(random, {"random": ctx.seed})
        self.names, self.blocks = found.names, blocks_of(found.names)
        self.kernels, self.pool_along = found.kernel, found.along
        self.soup_along = self._soup_along(found)
        away = self.soup_along
        if method.reference == "anchor":
            away = away - self.pool_along[:, :, 0]
        self.kernel, self.along = self.kernels.sum(0), away.sum(0)
        self.rank = min(method.rank or len(self.kernel), len(self.kernel))
        self.c = dual_coefficients(self.kernel, self.along, method.lambda_align, self.rank)
        self.correction = self.rows.combine(self.c)

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        merged = self.soup(block)
        if block.name not in self.correction:
            return merged
        return merged - (self.inverse(block.name) * self.correction[block.name])[block.rows]

    def rule(self, moved: Displacement) -> Rule:
        """Return the rule of the merge."""
        if self.method.certificate:
            seen = self._seen(moved) if moved.tensors else None
            lambda_align = self.method.lambda_align
            facts = certify_samples(self.kernel, self.along, self.c, lambda_align, self.rank, seen)
            self.ctx.record(certificate=facts)

        def rule(block: Block) -> Tensor:
            merged = self.solution(block)
            return merged + moved.tensors[block.name] if block.name in moved.tensors else merged

        return rule

    def space(self, directions: Directions) -> Space:
        """Return merge coefficients by decoder layer, or the coordinates in S_A."""
        values, basis = self._inside
        unit, lambda_align = self.unit(), self.method.lambda_align
        rho = values / values.mean()
        if self.method.space == "subspace":
            return SampleSpace(self.rows, self.inverse, basis, (1 + lambda_align * rho) / unit)

        def whitened(name: str) -> Tensor:
            return torch.stack(list(map(self.coordinates(name), directions(name)))).flatten(1)

        metric = block_metric(self.blocks, whitened) / unit
        seen = basis.T @ self._columns()
        if math.isinf(lambda_align):
            return Coefficients(self.blocks, directions, metric, seen.T @ seen / unit)
        metric = metric + seen.T @ ((lambda_align * rho).unsqueeze(1) * seen) / unit
        return Coefficients(self.blocks, directions, metric)

    def coordinates(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what multiplies a difference by the root of the diagonal metric."""
        return partial(mul, 1 / exact_root(self.inverse(name)))

    @cached_property
    def _inside(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of K that S_A has, (r,), and E (n, r): X = G^-1 J^T E is orthonormal in G."""
        values, vectors = sample_eigenpairs(self.kernel, self.rank)
        return values, vectors / values.sqrt()

    def _columns(self) -> Tensor:
        """J (theta_k - theta*) of each block and model, (n, blocks x models): no pass over the examples."""
        solved = self.soup_along - self.kernels @ self.c
        columns: Tensor = self.pool_along - solved.unsqueeze(2)
        return columns.movedim(0, 1).flatten(1)

    def _inverse_metric(self) -> Part:
        if self.method.chart == "identity":
            views = self.ctx.models.base.views
            return lambda name: torch.ones(views[name].shape)
        diagonal, damping = fisher(self.ctx, self.point, "metric"), self.method.damping
        mean = mean_value(diagonal)
        return lambda name: 1 / damped(diagonal.read(name), mean, damping)

    def _gram(self, rows: Rows, drawn: Mapping[str, Any]) -> Seen:
        """K and J Delta_k by decoder layer: what all settings on one metric share."""
        ctx, method, models = self.ctx, self.method, self.ctx.models
        recipe: dict[str, Any] = {
            "of": self.point.identity,
            "precision": ctx.precision,
            "version": VERSION,
            **drawn,
        }
        recipe |= {"base": models.base.identity, "pool": [one.identity for one in models.pool]}
        recipe |= {"chart": method.chart, "damping": method.damping}
        recipe |= {"examples": ctx.examples_digest(self.examples), "metric": ctx.examples_digest("metric")}

        def deltas(name: str) -> Tensor:
            return torch.stack(list(block_of(models, name).deltas))

        def make(folder: Path) -> dict[str, Any]:
            names, found = rows.gram(self.inverse, deltas)
            save_tensors(folder, found._asdict())
            return {"names": names}

        return Seen(ctx.cached("gram", recipe, make))

    def _turn(self, real: Seen) -> Tensor:
        """T of random rows with the Gram matrix of the real ones."""
        names, seed = real.names, self.ctx.seed

        def make(folder: Path) -> None:
            save_tensors(folder, {"turn": turn(self.inverse, names, seed, real.kernel.sum(0))})

        stored = load_tensors(self.ctx.cached("along", {"rows": real.artifact.key, "turn": seed}, make).path)
        return stored.read("turn", dtype=torch.float64)

    def _soup_along(self, seen: Seen) -> Tensor:
        """J (soup - theta_IT) by block, (blocks, n)."""
        if self.plain:
            return self.pool_along @ torch.tensor(self.shares(), dtype=torch.float64)
        blocks = list(self.blocks.values())
        place = {name: number for number, names in enumerate(blocks) for name in names}

        def columns(name: str) -> dict[int, Tensor]:
            block = block_of(self.ctx.models, name)
            return {place[name]: self.soup(block) - block.base}

        def make(folder: Path) -> None:
            save_tensors(folder, {"along": self.rows.along(columns, len(blocks)).T.contiguous()})

        recipe = {"rows": seen.artifact.key, "base": self.ctx.models.base.identity, **self.soup_recipe()}
        stored = load_tensors(self.ctx.cached("along", recipe, make).path)
        return stored.read("along", dtype=torch.float64)

    def _seen(self, moved: Displacement) -> Moved:
        squared = 0.0
        for name, x in moved.tensors.items():
            squared += float((x.square() / self.inverse(name)).sum(dtype=torch.float64))
        if self.method.space == "subspace":
            _, basis = self._inside
            return Moved(self.kernel @ basis @ moved.z, squared)
        return Moved(self._columns() @ moved.z, squared)


class Seen:
    """K and J Delta_k by decoder layer, as an artifact of the store."""

    def __init__(self, artifact: Artifact) -> None:
        """Read a Gram matrix: K_b (blocks, n, n) and J_b Delta_k (blocks, n, models), float64."""
        stored = load_tensors(artifact.path)
        self.artifact = artifact
        self.names: list[str] = artifact.manifest["facts"]["names"]
        self.kernel = stored.read("kernel", dtype=torch.float64)
        self.along = stored.read("along", dtype=torch.float64)


class Rows(ABC):
    """The n rows of J; only the part of one weight matrix is ever in memory."""

    @abstractmethod
    def gram(self, inverse_metric: Part, columns: Part) -> tuple[list[str], Gram]:
        """The weights' names, K and J x_m by block; ``columns``: weight name -> (m, d_out, d_in)."""

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

    def gram(self, inverse_metric: Part, columns: Part) -> tuple[list[str], Gram]:
        """The weights' names, K and J x_m by block."""
        names: set[str] = set()

        def noted(name: str) -> Tensor:
            names.add(name)
            return columns(name)

        found = gram(self._load(), self._examples, inverse_metric, noted, precision=self._precision)
        return sorted(names), found

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

    def __init__(self, inverse_metric: Part, names: Sequence[str], seed: int, turned: Tensor) -> None:
        """Take the diagonal of G^-1 by weight name, and T (n, n) float64, what ``turn`` returns."""
        self._inverse, self._names, self._seed, self._turn = inverse_metric, names, seed, turned

    def gram(self, inverse_metric: Part, columns: Part) -> tuple[list[str], Gram]:
        """The weights' names, K and J x_m by block; ``inverse_metric`` is the one that the rows are made for."""
        kernels, alongs = [], []
        for names in blocks_of(self._names).values():
            kernel, along = torch.zeros(()), torch.zeros(())
            for name in names:
                noise, x = self._noise(name), columns(name) / exact_root(inverse_metric(name))
                kernel = kernel + noise @ noise.T
                along = along + noise @ x.flatten(1).double().T
            kernels.append(self._turn @ kernel @ self._turn.T)
            alongs.append(self._turn @ along)
        return list(self._names), Gram(torch.stack(kernels), torch.stack(alongs))

    def along(self, columns: Columns, count: int) -> Tensor:
        """J [x_1 ... x_count]."""
        found = torch.zeros(len(self._turn), count, dtype=torch.float64)
        for name in self._names:
            noise = self._noise(name)
            for column, x in columns(name).items():
                found[:, column] += noise @ (x / exact_root(self._inverse(name))).flatten().double()
        rows: Tensor = self._turn @ found
        return rows

    def combine(self, c: Tensor) -> dict[str, Tensor]:
        """J^T c."""
        weights, found = self._turn.T @ c, {}
        for name in self._names:
            inverse = self._inverse(name)
            found[name] = (weights @ self._noise(name)).float().view_as(inverse) / exact_root(inverse)
        return found

    def _noise(self, name: str) -> Tensor:
        return _white(self._seed, name, len(self._turn), self._inverse(name).numel())


def turn(inverse_metric: Part, names: Sequence[str], seed: int, kernel: Tensor) -> Tensor:
    """T with T W W^T T^T = K, (n, n) float64; draws all of W once."""
    noise = (_white(seed, name, len(kernel), inverse_metric(name).numel()) for name in names)
    white = sum((one @ one.T for one in noise), torch.zeros(()))
    values, vectors = torch.linalg.eigh(kernel)
    noise_values, noise_vectors = torch.linalg.eigh(white)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    found: Tensor = root @ (noise_vectors * noise_values.rsqrt()) @ noise_vectors.T
    return found


def _white(seed: int, name: str, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch_stream(seed, "random rows", name)).double()


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
