"""The Kronecker estimator: a generalised eigenproblem for each side of each matrix.

With both sides the factors are those of a Fisher (K-FAC). One side alone is an approximation: the output side
has gradients; the input side has none, and is second moments of activations, not a Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.certificate import Geometry, certify
from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.merger import Block, MergeContext, Rule
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import VERSION, Side, exact_root, kronecker_factors
from alignmerge.quadratic import Quadratic
from alignmerge.spaces import (
    STAYS,
    Coefficients,
    Directions,
    Displacement,
    Space,
    Tensors,
    block_metric,
    blocks_of,
)
from alignmerge.subspace import Basis, Scale, Shield, common_scale, generalised_basis, turned

if TYPE_CHECKING:
    from alignmerge.method import AlignMerge


class Kronecker(Quadratic):
    """The solution in the eigenbases of each matrix, which are artifacts of the store."""

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        super().__init__(method, ctx, weights)
        seed = ctx.seed if method.subspace_from == "random" else None
        self.bases: dict[Side, KroneckerBases] = {}
        for side in method.kept_sides:
            self.bases[side] = KroneckerBases.of(
                ctx, self.point, side, method.damping, chart=method.chart, examples=self.examples, turn=seed
            )
        self.names = sorted(next(iter(self.bases.values())).owners)
        self.scale: Scale | None = None
        if method.subspace == "global":
            views, products, copies = ctx.models.base.views, [], []
            for name in self.names:
                products.append(self.shield(name).products)
                copies.append(math.prod(views[name].shape) // products[-1].numel())
            self.scale = common_scale(products, copies, method.rank)

    def shield(self, name: str) -> Shield:
        """Return the shield of a matrix."""
        bases = {side: bases.read(name) for side, bases in self.bases.items()}
        return Shield(bases.get("output"), bases.get("input"), self.method.rank, self.scale)

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        return self._merged(block, STAYS, certified=False)

    def rule(self, moved: Displacement) -> Rule:
        """Return the rule of the merge."""
        return lambda block: self._merged(block, moved, certified=self.method.certificate)

    def _merged(self, block: Block, moved: Displacement, *, certified: bool) -> Tensor:
        method, merged = self.method, self.soup(block)
        if block.name not in self.names:
            return merged
        shield, centre = self.shield(block.name), merged - block.base
        correction = shield.removed(centre - self.reference(block), method.lambda_align)
        if block.name in moved.tensors:
            correction = correction - moved.tensors[block.name]
        if certified:
            geometry, delta = self._geometry(centre), centre - correction
            facts = certify(shield, block, delta, method.reference, method.lambda_align, geometry)
            self.ctx.record_block(block.name, **facts)
        return merged - correction

    def space(self, directions: Directions) -> Space:
        """Return merge coefficients by decoder layer, or the coordinates in each S_A."""
        lambda_align, unit = self.method.lambda_align, self.unit()
        if self.method.space == "subspace":
            views = self.ctx.models.base.views
            shapes = {name: views[name].shape for name in self.names}
            return ShieldSpace(self.shield, shapes, lambda_align, unit)
        blocks = blocks_of(self.names)

        def weighted(name: str, weight: Callable[[Tensor], Tensor]) -> Tensor:
            shield = self.shield(name)
            root = exact_root(weight(shield.rho))
            return torch.stack([(shield.coefficients(x) * root).flatten() for x in directions(name)])

        def metric(weight: Callable[[Tensor], Tensor]) -> Tensor:
            return block_metric(blocks, partial(weighted, weight=weight)) / unit

        if math.isinf(lambda_align):
            return Coefficients(blocks, directions, metric(torch.ones_like), metric(_inside))
        return Coefficients(blocks, directions, metric(lambda rho: 1 + lambda_align * rho))

    def coordinates(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what maps a difference to its coefficients in the bases."""
        return self.shield(name).coefficients

    def _geometry(self, centre: Tensor) -> Geometry:
        """Say what L_geo is, given its minimiser in one matrix."""
        if self.start is not None:
            return Geometry((), centre)
        return Geometry(self.shares(), None if self.plain else centre)


def _inside(rho: Tensor) -> Tensor:
    return (rho > 0).to(rho.dtype)


class ShieldSpace(NamedTuple):
    """Coordinates in S_A of each matrix (Kronecker): M = (1 + lambda rho) / V is diagonal."""

    shield: Callable[[str], Shield]  # of a matrix, by its name
    shapes: Mapping[str, tuple[int, ...]]  # (d_out, d_in), by name
    lambda_align: float
    unit: float  # V

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient."""
        parts = (shield.pull(gradient[name])[inside].double() for name, shield, inside in self._parts())
        return torch.cat(list(parts))

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull."""
        rho = torch.cat([shield.rho.expand(inside.shape)[inside] for _, shield, inside in self._parts()])
        return self.unit * pull / (1 + self.lambda_align * rho)

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z."""
        found, start = {}, 0
        for name, shield, inside in self._parts():
            end = start + int(inside.sum())
            coefficients = torch.zeros(inside.shape)
            coefficients[inside] = z[start:end].float()
            found[name], start = shield.combine(coefficients), end
        return found

    def _parts(self) -> Iterator[tuple[str, Shield, Tensor]]:
        for name, shape in self.shapes.items():
            shield = self.shield(name)
            yield name, shield, (shield.rho > 0).expand(shape)


class KroneckerBases(NamedTuple):
    """Generalised eigenbases of every weight matrix on one side, as an artifact of the store."""

    tensors: Checkpoint  # ``OWNER|FIELD`` -> a field of ``Basis``
    owners: Mapping[str, str]  # weight name -> owner of its basis

    @classmethod
    def of(
        cls,
        ctx: MergeContext,
        point: Checkpoint,
        side: Side,
        damping: float,
        *,
        chart: str = "fisher",
        examples: str = "alignment",
        turn: int | None = None,
    ) -> KroneckerBases:
        """Solve the eigenproblems of the moments of ``examples`` and of metric data at ``point``.

        ``chart``: ``identity`` puts the identity in the place of the metric data's moment. ``turn``: seed of
        a random rotation of each basis within the metric (the control); None: none.
        """
        recipe: dict[str, Any] = {"of": point.identity, "precision": ctx.precision, "version": VERSION}
        recipe |= {"side": side, "chart": chart, "damping": damping}
        recipe |= {"examples": ctx.examples_digest(examples), "metric": ctx.examples_digest("metric")}

        def make(folder: Path) -> dict[str, Any]:
            model = ctx.loaded(point)
            alignment = kronecker_factors(model, ctx.examples(examples), side, precision=ctx.precision)
            metric: dict[str, Tensor] = {}
            if chart == "fisher":
                metric = kronecker_factors(model, ctx.examples("metric"), side, precision=ctx.precision).moments
            del model  # it and the moments are as large as the bases: hold nothing longer than needed
            save_tensors(folder, _eigenbases(alignment.moments, metric, damping))
            return {"owners": alignment.owners}

        artifact = ctx.cached("bases", recipe, make)
        bases = cls(load_tensors(artifact.path), artifact.manifest["facts"]["owners"])
        return bases if turn is None else bases._turned(ctx, {**recipe, "turn": turn})

    def read(self, name: str) -> Basis:
        """Return the basis that the weight ``name`` uses."""
        return Basis(*(self.tensors.read(f"{self.owners[name]}|{field}") for field in Basis._fields))

    def _turned(self, ctx: MergeContext, recipe: Mapping[str, Any]) -> KroneckerBases:
        def make(folder: Path) -> None:
            tensors: dict[str, Tensor] = {}
            for owner in sorted(set(self.owners.values())):
                generator = torch_stream(recipe["turn"], "random basis", recipe["side"], owner)
                tensors |= _named(owner, turned(self.read(owner), generator))
            save_tensors(folder, tensors)

        return KroneckerBases(load_tensors(ctx.cached("bases", recipe, make).path), self.owners)


def _eigenbases(moments: dict[str, Tensor], metric: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """Solve each eigenproblem (no ``metric``: the identity); both dictionaries are emptied on the way."""
    tensors: dict[str, Tensor] = {}
    for owner in list(moments):
        moment = moments.pop(owner)
        if owner in metric:
            basis = generalised_basis(moment, metric.pop(owner), damping)
        else:
            basis = generalised_basis(moment, torch.eye(len(moment)), 0.0)
        tensors |= _named(owner, basis)
    return tensors


def _named(owner: str, basis: Basis) -> dict[str, Tensor]:
    return {f"{owner}|{field}": value for field, value in basis._asdict().items()}
