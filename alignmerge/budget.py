"""The AQI budget: L_bud = max(0, A_min - A(theta))^2, met by a few sequential quadratic steps.

From theta*, the exact minimiser of Q = L_geo + lambda_align L_align, the merge moves to theta* + X z,
where Q rises by z^T M z, M = X^T (G + lambda_align H) X. Each step linearises A at the current z, A(z')
= A + g^T (z' - z), and solves z^T M z + lambda_bud max(0, A_min - A(z))^2 exactly: z' = mu M^-1 g. M is
measured in units of V, the mean ||theta_k - start||^2_G of anchor and experts, so that lambda_bud has none.
arXiv 2512.16245 names the term; form and solver are ours (docs/budget.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.merger import MergeContext, Probes, block_of
from alignmerge.engine.store import write_json
from alignmerge.meter import Alignment, Meter
from alignmerge.objective import hinge_multiplier, l_bud
from alignmerge.quadratic import Quadratic
from alignmerge.spaces import STAYS, Coefficients, Displacement, Space

VERSION = 1  # of the anchor's A: raised when its numbers change
STEPS = 5
HALVINGS = 6  # how often a step that does not lower the objective is halved, for a forward pass each
STATIONARY = 1e-2  # relative distance from z to the minimiser of its own linearisation at the end
SETTLED = 1e-3  # share of what the steps have gained that the last one has to gain for another
MET = 0.005  # largest gap A_min - A at which a budget counts as met: a finite lambda_bud leaves one


class Spent(NamedTuple):
    """How the loop ended."""

    z: Tensor | None  # None: the budget was met without any move
    value: float  # A at the end
    cost: float  # z^T M z
    residual: float  # relative distance to the minimiser of the last linearisation
    trace: list[dict[str, float]]


def budgeted(quadratic: Quadratic) -> Displacement:
    """Return how far the budget moves the merge from theta*; record how it went.

    Raises:
        BadRequest: if the corpus has no selection probes.
        ArithmeticError: if the AQI of a model is not finite.
    """
    ctx, method = quadratic.ctx, quadratic.method
    probes = ctx.probes()
    a_min, anchor = _least(quadratic, probes)
    meter = Meter(ctx.loaded(ctx.models.base), probes)

    def solution(name: str) -> Tensor:
        return quadratic.solution(block_of(ctx.models, name))

    functional = Alignment(meter, ctx.models.base, solution, quadratic.names)

    def directions(name: str) -> list[Tensor]:
        return [theta.read(name) - functional.start[name] for theta in ctx.models.pool]

    space = quadratic.space(directions)
    spent = spend(functional, space, a_min, method.lambda_bud)
    gap = max(0.0, a_min - spent.value)
    facts: dict[str, Any] = {"a_min": a_min, "a_start": spent.trace[0]["a"], "a": spent.value, **anchor}
    facts |= {"gap": gap, "met": gap <= MET, "multiplier": method.lambda_bud * gap}
    facts |= {"l_bud": l_bud(spent.value, a_min), "cost": spent.cost}
    facts |= {"residual": spent.residual, "trace": spent.trace}
    if isinstance(space, Coefficients) and spent.z is not None:
        facts["coefficients"] = space.table(spent.z, ctx.models.aliases)
    ctx.record(budget=facts)
    return STAYS if spent.z is None else Displacement(spent.z, space.displacement(spent.z))


def spend(functional: Alignment, space: Space, a_min: float, lambda_bud: float) -> Spent:
    """Lower z^T M z + lambda_bud max(0, A_min - A)^2 from z = 0 by at most ``STEPS`` quadratic steps.

    Stops where z minimises its own linearisation, and where a step gains next to nothing.
    """
    value = functional.value({})
    trace = [{"a": value, "cost": 0.0, "l_bud": l_bud(value, a_min), "share": 0.0}]
    if value >= a_min:
        return Spent(None, value, 0.0, 0.0, trace)
    at = Place(torch.zeros(0), torch.zeros(0), value, 0.0, lambda_bud * l_bud(value, a_min))
    residual, share, settled, highest = 1.0, 1.0, False, at.objective
    for step in range(STEPS + 1):
        pull = space.pull(functional.gradient())
        natural = space.solve(pull)
        if not len(at.z):
            at = at._replace(z=torch.zeros_like(pull), force=torch.zeros_like(pull))
        mu = hinge_multiplier(a_min - at.value + float(pull @ at.z), float(pull @ natural), lambda_bud)
        ahead, ahead_force = mu * natural - at.z, mu * pull - at.force
        length = mu**2 * float(pull @ natural)
        residual = math.sqrt(max(0.0, float(ahead @ ahead_force)) / length) if length > 0 else 0.0
        if residual <= STATIONARY or settled or step == STEPS:
            break
        before = at.objective
        at, share = _line(functional, space, at, (ahead, ahead_force), (a_min, lambda_bud), min(1.0, 2 * share))
        if at.objective >= before:
            break
        settled = before - at.objective <= SETTLED * (highest - at.objective)
        trace.append({"a": at.value, "cost": at.cost, "l_bud": l_bud(at.value, a_min), "share": share})
    return Spent(at.z, at.value, at.cost, residual, trace)


class Place(NamedTuple):
    """A point on the way."""

    z: Tensor
    force: Tensor  # M z
    value: float  # A
    cost: float  # z^T M z
    objective: float


def _line(
    functional: Alignment,
    space: Space,
    at: Place,
    ahead: tuple[Tensor, Tensor],
    budget: tuple[float, float],
    share: float,
) -> tuple[Place, float]:
    """Go ``share`` of the way ahead (z and M z), halved until the objective itself is lower; else stay."""
    a_min, lambda_bud = budget
    for _ in range(HALVINGS + 1):
        z, force = at.z + share * ahead[0], at.force + share * ahead[1]
        value, cost = functional.value(space.displacement(z)), float(z @ force)
        there = Place(z, force, value, cost, cost + lambda_bud * l_bud(value, a_min))
        if there.objective < at.objective:
            return there, share
        share /= 2
    return at, share


def _least(quadratic: Quadratic, probes: Probes) -> tuple[float, dict[str, float]]:
    """Return A_min, and the anchor's A with its bootstrap deviation (nothing where A_min is given)."""
    ctx, method = quadratic.ctx, quadratic.method
    if method.a_min is not None:
        return method.a_min, {}
    anchor = anchor_aqi(ctx, probes)
    return anchor["a_anchor"] - method.kappa * anchor["deviation"], anchor


def anchor_aqi(ctx: MergeContext, probes: Probes) -> dict[str, float]:
    """Return the anchor's A with its bootstrap deviation, an artifact that all budgets share."""
    anchor = ctx.models.anchor
    seen = hashlib.sha256(json.dumps(probes).encode()).hexdigest()

    def make(folder: Path) -> None:
        meter = Meter(ctx.loaded(anchor), probes)
        value = meter.value()
        write_json(folder / "aqi.json", {"a_anchor": value, "deviation": meter.deviation()})

    artifact = ctx.cached("probed", {"of": anchor.identity, "probes": seen, "version": VERSION}, make)
    found: dict[str, float] = json.loads((artifact.path / "aqi.json").read_text())
    return found
