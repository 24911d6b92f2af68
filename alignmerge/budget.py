"""The AQI budget: L_bud = max(0, A_min - A(theta))^2, met by a few sequential quadratic steps.

From theta*, the exact minimiser of Q = L_geo + lambda_align L_align, the merge moves to theta* + X z, where Q rises by
z^T M z, M = X^T (G + lambda_align H) X. Each step linearises A at the current z, A(z') = A + g^T (z' - z), and solves
z^T M z + lambda_bud max(0, A_min - A(z))^2 exactly: z' = mu M^-1 g. M is measured in units of V, L_geo's floor, so that
lambda_bud has none: V is the experts' own spread. arXiv 2512.16245 names the term; form and solver are ours
(docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from alignmerge.aqi import LAYERS, aqi01, layers_at, resampled_pairs, separation
from alignmerge.dual import Rows
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Batch, Example, batches
from alignmerge.engine.merger import Probes
from alignmerge.engine.seeding import torch_stream
from alignmerge.engine.views import layer_of
from alignmerge.gradients import linear_layers
from alignmerge.objective import hinge_multiplier, l_bud
from alignmerge.subspace import Shield

Tensors = Mapping[str, Tensor]
STEPS = 5
HALVINGS = 6
"""How often a step that does not lower the objective is halved before the loop gives up; each costs a forward pass."""
STATIONARY = 1e-3
"""Relative distance between z and the minimiser of its own linearisation at which the loop is done."""
MET = 0.005
"""Largest gap A_min - A at which a budget counts as met: a penalty that binds leaves one, lambda_bud says how large."""
REPLICATES = 200


class Meter:
    """A of a model in memory on matched probes, and its gradient with respect to the linear weights."""

    def __init__(self, model: Any, probes: Probes) -> None:
        self.model, self.layers = model, layers_at(LAYERS, int(model.config.num_hidden_layers))
        self.pairs = len(probes.harmful)
        self._batches = list(batches([Example(ids, len(ids)) for ids in (*probes.harmful, *probes.benign)]))
        self._hidden = torch.empty(0)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def value(self) -> float:
        """Run the probes and return A, the mean of aqi01 over the layers.

        Raises:
            ArithmeticError: if A is not finite: a broken model, or clusters that coincide in every layer.
        """
        hidden = torch.empty(0)
        for indices, batch in self._batches:
            states = self._states(batch)
            if not len(hidden):
                hidden = states.new_empty(len(states), 2 * self.pairs, states.shape[-1])
            hidden[:, indices] = states
        self._hidden = hidden
        found = float(mean_aqi(hidden))
        if not (math.isfinite(found) and bool(hidden.isfinite().all())):
            raise ArithmeticError(
                "the AQI of the selection probes is not finite: broken weights, or equal states"
            )
        return found

    def deviation(self) -> float:
        """Return the bootstrap deviation of A over pairs, for the states of the last ``value``."""
        counts = resampled_pairs(self.pairs, REPLICATES, torch_stream(0, "budget", "bootstrap"))
        return float(mean_aqi(self._hidden, counts.repeat(1, 2)).std())

    def gradient(self) -> dict[str, Tensor]:
        """Return dA/dW of the linear layers at the states of the last ``value``: stored name -> (d_out, d_in) fp32.

        The probes run a second time, batch by batch, so that no more than one batch of activations is held.
        """
        hidden = self._hidden.detach().requires_grad_()
        (pull,) = torch.autograd.grad(mean_aqi(hidden), hidden)
        weights = {name: layer.weight for name, layer in linear_layers(self.model).items()}
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(True)
        for indices, batch in self._batches:
            self._states(batch).backward(pull[:, indices])  # type: ignore[no-untyped-call]
        found = {}
        for name, weight in weights.items():
            weight.requires_grad_(False)
            found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = None
        return found

    def _states(self, batch: Batch) -> Tensor:
        """Return the states of the last tokens after the chosen layers, (layers, B, d) fp32."""
        out = self.model.base_model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, output_hidden_states=True
        )
        rows, last = torch.arange(len(batch.ids)), batch.mask.sum(1) - 1
        return torch.stack([out.hidden_states[layer][rows, last].float() for layer in self.layers])


def mean_aqi(hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of aqi01 over the layers of [L, 2n, d], harmful half first; a scalar, or [R] with weights [R, 2n].

    Differentiable; degenerate layers are left out (NaN if all are).
    """
    pairs = hidden.shape[1] // 2
    harmful = torch.arange(2 * pairs) < pairs
    return aqi01(separation(hidden, harmful, weights), pairs, pairs).nanmean(0)


class Movable:
    """A model in memory whose linear weights are put at theta* + a displacement."""

    def __init__(
        self, model: Any, layout: Checkpoint, solution: Callable[[str], Tensor], names: Sequence[str]
    ) -> None:
        """Fill ``model`` with ``solution`` (view name -> theta*), all that ``layout`` stores; ``names`` can move."""
        self.start: dict[str, Tensor] = {}
        """theta* of the matrices that can move, by view name."""
        self._views = layout.views
        self._parameters = dict(model.named_parameters())
        for name, view in layout.views.items():
            if view.stored in self._parameters:
                tensor = solution(name)
                self._put(name, tensor)
                if name in names:
                    self.start[name] = tensor

    def move(self, displacement: Tensors) -> None:
        """Put every matrix at theta* + ``displacement`` (view name -> tensor; none: theta*)."""
        for name, start in self.start.items():
            self._put(name, start + displacement[name] if name in displacement else start)

    def split(self, stored: Tensors) -> dict[str, Tensor]:
        """Cut tensors as they are stored into views, for the matrices that can move."""
        return {name: stored[self._views[name].stored][self._rows(name)] for name in self.start}

    @torch.no_grad()
    def _put(self, name: str, tensor: Tensor) -> None:
        self._parameters[self._views[name].stored][self._rows(name)] = tensor

    def _rows(self, name: str) -> slice:
        view = self._views[name]
        return slice(view.first, view.first + view.shape[0])


class Functional(Protocol):
    """What is budgeted, as a function of a displacement."""

    def value(self, displacement: Tensors) -> float:
        """Return A at theta* + displacement."""
        ...

    def gradient(self) -> Tensors:
        """Return dA/dtheta at the point of the last ``value``, by matrix."""
        ...


class Alignment:
    """A(theta) = AQI of a merge in memory."""

    def __init__(self, meter: Meter, movable: Movable) -> None:
        self._meter, self._movable = meter, movable

    def value(self, displacement: Tensors) -> float:
        """Return A at theta* + displacement."""
        self._movable.move(displacement)
        return self._meter.value()

    def gradient(self) -> Tensors:
        """Return dA/dtheta at the point of the last ``value``, view name -> (d_out, d_in)."""
        return self._movable.split(self._meter.gradient())


class Space(Protocol):
    """Where the merge may move: theta* + X z, at a cost of z^T M z in units of V."""

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient, float64 (coordinates,)."""
        ...

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull (the pseudo-inverse where M is singular), float64 (coordinates,)."""
        ...

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z: view name -> (d_out, d_in) fp32."""
        ...


class Coefficients:
    """z holds one merge coefficient for each block and model: X z = sum_k z_bk (theta_k - theta*) in block b."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[str]],
        directions: Callable[[str], Sequence[Tensor]],
        metric: Tensor,
    ) -> None:
        """Take block -> names of its matrices, name -> theta_k - theta* of each model, and M (float64, square)."""
        self._blocks, self._directions = blocks, directions
        self._models = len(metric) // len(blocks)
        scale = metric.diagonal().clamp(min=0).rsqrt()
        self._scale = torch.where(scale.isfinite(), scale, 0.0)
        values, self._vectors = torch.linalg.eigh(metric * self._scale * self._scale.unsqueeze(1))
        kept = values > 1e-9 * len(values)  # at the average the directions of a block sum to 0
        self._inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)

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
        coordinates = self._vectors.T @ (self._scale * pull)
        solution: Tensor = self._scale * (self._vectors @ (self._inverse * coordinates))
        return solution

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z."""
        found = {}
        for row, names in zip(z.view(-1, self._models), self._blocks.values(), strict=True):
            for name in names:
                parts = zip(row.tolist(), self._directions(name), strict=True)
                found[name] = torch.stack([share * x for share, x in parts]).sum(0)
        return found

    def table(self, z: Tensor, aliases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return block -> model -> coefficient."""
        rows = z.view(-1, self._models).tolist()
        return {
            block: dict(zip(aliases, row, strict=True)) for block, row in zip(self._blocks, rows, strict=True)
        }


class ShieldSpace:
    """z holds coordinates in S_A of each matrix (Kronecker): M = (1 + lambda rho) / V is diagonal."""

    def __init__(
        self,
        shields: Callable[[str], Shield],
        shapes: Mapping[str, tuple[int, ...]],
        lambda_align: float,
        floor: float,
    ) -> None:
        """Take name -> shield, name -> (d_out, d_in), and V."""
        self._shields, self._shapes = shields, shapes
        self._lambda, self._floor = lambda_align, floor

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient."""
        return torch.cat(
            [shield.pull(gradient[name])[inside].double() for name, shield, inside in self._parts()]
        )

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull."""
        stiffness = [
            1 + self._lambda * shield.rho.expand(inside.shape)[inside] for _, shield, inside in self._parts()
        ]
        return self._floor * pull / torch.cat(stiffness)

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
        """Yield (name, shield, which coordinates are in S_A)."""
        for name, shape in self._shapes.items():
            shield = self._shields(name)
            yield name, shield, (shield.rho > 0).expand(shape)


class SampleSpace:
    """z holds coordinates in the S_A of the dual: X = G^-1 J^T E with X^T G X = 1, M = (1 + lambda rho) / V."""

    def __init__(
        self, rows: Rows, inverse_metric: Callable[[str], Tensor], basis: Tensor, stiffness: Tensor
    ) -> None:
        """Take J, the diagonal of G^-1 by weight name, E (n, r) and M (r,)."""
        self._rows, self._inverse, self._basis, self._stiffness = rows, inverse_metric, basis, stiffness

    def pull(self, gradient: Tensors) -> Tensor:
        """X^T gradient."""
        along = self._rows.along(lambda name: {0: self._inverse(name) * gradient[name]}, 1)
        return self._basis.T @ along[:, 0]

    def solve(self, pull: Tensor) -> Tensor:
        """M^-1 pull."""
        return pull / self._stiffness

    def displacement(self, z: Tensor) -> dict[str, Tensor]:
        """X z."""
        return {name: self._inverse(name) * x for name, x in self._rows.combine(self._basis @ z).items()}


class Spent(NamedTuple):
    """How the loop ended."""

    z: Tensor | None
    """None: the budget was met without any move."""
    value: float
    """A at the end."""
    cost: float
    """z^T M z."""
    residual: float
    """Relative distance to the minimiser of the linearisation at the last point that was linearised."""
    trace: list[dict[str, float]]


def spend(functional: Functional, space: Space, a_min: float, lambda_bud: float) -> Spent:
    """Lower z^T M z + lambda_bud max(0, A_min - A)^2 from z = 0 by at most ``STEPS`` sequential quadratic steps.

    A step that does not lower the objective itself is halved, and the next one starts at no more than twice its share.
    Stops where z minimises its own linearisation.
    """
    value = functional.value({})
    trace = [{"a": value, "cost": 0.0, "l_bud": l_bud(value, a_min), "share": 0.0}]
    if value >= a_min:
        return Spent(None, value, 0.0, 0.0, trace)
    z = force = torch.zeros(0)  # force: M z
    cost, residual, share = 0.0, 1.0, 1.0
    for step in range(STEPS + 1):
        pull = space.pull(functional.gradient())
        natural = space.solve(pull)
        if not len(z):
            z = force = torch.zeros_like(pull)
        mu = hinge_multiplier(a_min - value + float(pull @ z), float(pull @ natural), lambda_bud)
        ahead, ahead_force = mu * natural - z, mu * pull - force
        length = mu**2 * float(pull @ natural)
        residual = math.sqrt(max(0.0, float(ahead @ ahead_force)) / length) if length > 0 else 0.0
        if residual <= STATIONARY or step == STEPS:
            break
        objective = cost + lambda_bud * l_bud(value, a_min)
        for share in (min(1.0, 2 * share) * 0.5**halving for halving in range(HALVINGS + 1)):
            there, there_force = z + share * ahead, force + share * ahead_force
            found, price = functional.value(space.displacement(there)), float(there @ there_force)
            if price + lambda_bud * l_bud(found, a_min) < objective:
                break
        else:
            break
        z, force, value, cost = there, there_force, found, price
        trace.append({"a": value, "cost": cost, "l_bud": l_bud(value, a_min), "share": share})
    return Spent(z, value, cost, residual, trace)


def block_metric(blocks: Mapping[str, Sequence[str]], coordinates: Callable[[str], Tensor]) -> Tensor:
    """X^T G X of merge coefficients, float64: a square for each block, 0 between blocks.

    ``coordinates``: name -> (models, coordinates) of each theta_k - theta* in an orthonormal basis of the metric.
    """
    squares = []
    for names in blocks.values():
        rows = (coordinates(name).double() for name in names)
        squares.append(torch.stack([x @ x.T for x in rows]).sum(0))
    joined: Tensor = torch.block_diag(*squares)  # type: ignore[no-untyped-call]
    return joined


def blocks_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Group matrices by decoder layer; what belongs to none is a block of its own."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        blocks.setdefault(name if layer is None else f"layer {layer}", []).append(name)
    return blocks
