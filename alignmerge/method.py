"""AlignMerge (arXiv 2512.16245), a documented reconstruction: L_geo and L_align solved exactly, certified.

theta = theta_IT + d,
d = argmin sum_k lambda_k ||d - Delta_k||^2_G + lambda_align (d - d_ref)^T P_A^T F_A P_A (d - d_ref)
           + lambda_bud max(0, A_min - A(theta_IT + d))^2.
The paper prints only the first term; what is ours is listed in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alignmerge.budget import (
    MET,
    Alignment,
    Coefficients,
    Meter,
    Movable,
    SampleSpace,
    ShieldSpace,
    Space,
    Spent,
    block_metric,
    blocks_of,
    spend,
)
from alignmerge.certificate import Moved, certify, certify_samples
from alignmerge.dual import ExampleRows, RandomRows, Rows
from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import (
    Block,
    MergeContext,
    Merger,
    Probes,
    Rule,
    average,
    block_of,
    check_choice,
    check_range,
)
from alignmerge.engine.seeding import torch_stream
from alignmerge.engine.store import Artifact
from alignmerge.fisher import PRECISION, NormalisedFishers, damped, fisher, mean_value
from alignmerge.gradients import Side, gram, kronecker_factors
from alignmerge.objective import l_bud
from alignmerge.pool import RULES, pool_weights
from alignmerge.subspace import (
    Basis,
    Scale,
    Shield,
    common_scale,
    dual_coefficients,
    generalised_basis,
    sample_eigenpairs,
    turned,
)

SIDES: dict[str, tuple[Side, ...]] = {"input": ("input",), "output": ("output",), "both": ("input", "output")}
SUBSPACES = {"alignment": "alignment", "refusals": "refusals", "utility": "utility", "random": "alignment"}
"""``subspace_from`` -> the example set whose gradients (or, for ``random``, eigenvalues) S_A has."""


@dataclass(frozen=True, kw_only=True)
class AlignMerge(Merger):
    """The three-term merge; linear weights of the decoder layers are solved, everything else is averaged."""

    elementwise = False
    estimator: str = "kronecker"
    """``kronecker`` (factors per matrix) or ``samples`` (the dual, one Gram matrix over all layers)."""
    reference: str = "anchor"
    """d_ref: inside S_A ``anchor`` pulls towards theta_SAFE, ``base`` (the paper's caption) towards theta_IT."""
    at: str = "base"
    """Where gradients are taken: ``base`` (the paper); ``barycentre``, which is post-merge repair; or ``iterate``,
    likewise repair: at the merge that ``base`` gives."""
    metric: str = "shared"
    """``shared``: one G (the paper); ``per_expert``: each model's own Fisher: the shield stands on their soup."""
    chart: str = "fisher"
    """G: ``fisher`` (of the metric data, in the estimator's own form) or ``identity`` (Euclidean, a control)."""
    subspace_from: str = "alignment"
    """What F_A is taken on: ``alignment`` (refusals and benign answers, contrastive), ``refusals`` (of these, only),
    ``utility`` (the experts' own data, a control) or ``random`` (a control: the eigenvalues of ``alignment`` on a
    random basis of the metric, drawn from the seed)."""
    factors: str = "input"
    """Kronecker only: shrink along ``input`` directions, ``output`` directions, or ``both``."""
    subspace: str | None = None
    """``per_block``: every matrix has its own S_A and its own mean rho (kronecker, its default); ``global``: one S_A
    and one mean rho for all (the only one of samples)."""
    rank: int | None = None
    """Dimension of S_A: directions of each matrix (kronecker; on average over the matrices where S_A is global), or
    in all (samples); None: all."""
    lambda_k: str = "uniform"
    """Weights of the pool in L_geo: ``uniform``, ``inverse_fisher`` (1 / ||Delta_k||_G), ``validation`` (the mean
    probability of a response token of the metric set) or ``given``."""
    pool_weights: Sequence[float] = ()
    """lambda_k: given only: one number for the anchor and each expert, in order; divided by their sum."""
    lambda_align: float = 1.0
    """Weight of L_align; ``inf`` projects. rho is normalised to mean 1, so 1 halves an average direction."""
    lambda_bud: float = 0.0
    """Weight of the AQI budget, in units of L_geo's floor V; 0: no budget."""
    a_min: float | None = None
    """A_min of the budget, an aqi01; None: the anchor's own less ``kappa`` bootstrap deviations."""
    kappa: float = 1.0
    """How many deviations."""
    space: str = "coefficients"
    """Where the budget may move the merge: ``coefficients`` (one for each decoder layer and model: still a merge) or
    ``subspace`` (the coordinates in S_A: nearer to fine-tuning on the metric)."""
    damping: float = 0.1
    """eps of the metric, in units of its mean diagonal."""
    floor: float = 1e-3
    """metric: per_expert only: floor of the Fishers in units of their mean."""
    certificate: bool = True
    """Whether to compute and store L_geo, L_align, gradient norm, eigenvalues and energy ratios."""

    def __post_init__(self) -> None:
        check_choice("method.estimator", self.estimator, ("kronecker", "samples"))
        check_choice("method.reference", self.reference, ("anchor", "base"))
        check_choice("method.at", self.at, ("base", "barycentre", "iterate"))
        check_choice("method.metric", self.metric, ("shared", "per_expert"))
        check_choice("method.chart", self.chart, ("fisher", "identity"))
        check_choice("method.subspace_from", self.subspace_from, tuple(SUBSPACES))
        check_choice("method.factors", self.factors, ("input", "output", "both"))
        check_choice("method.subspace", self.subspace, (None, "per_block", "global"))
        check_choice("method.lambda_k", self.lambda_k, RULES)
        check_choice("method.space", self.space, ("coefficients", "subspace"))
        check_range("method.lambda_align", self.lambda_align, 0, math.inf)
        check_range("method.lambda_bud", self.lambda_bud, 0, 1e12)
        check_range("method.kappa", self.kappa, 0, 100)
        check_range("method.damping", self.damping, 0, 1e6, open_low=True)
        check_range("method.floor", self.floor, 0, 1, open_low=True)
        if self.a_min is not None:
            check_range("method.a_min", self.a_min, 0, 1)
        if self.rank is not None:
            check_range("method.rank", self.rank, 1, 1e9)
        if (self.estimator, self.subspace) == ("samples", "per_block"):
            given = "samples and per_block: one Gram matrix holds all layers"
            raise BadRequest.of("method.estimator, method.subspace", given, "kronecker, or subspace=global")
        self._check_weights()
        self._check_budget()

    def _check_weights(self) -> None:
        for number, weight in enumerate(self.pool_weights):
            check_range(f"method.pool_weights[{number}]", weight, 0, 1e9)
        if (self.lambda_k == "given") != bool(self.pool_weights):
            allowed = "both lambda_k=given and its pool_weights, or neither"
            given = f"{self.lambda_k} and {list(self.pool_weights)}"
            raise BadRequest.of("method.lambda_k, method.pool_weights", given, allowed)
        if self.pool_weights and not any(self.pool_weights):
            raise BadRequest.of("method.pool_weights", str(list(self.pool_weights)), "a sum above 0")

    def _check_budget(self) -> None:
        if self.lambda_bud == 0:
            return
        if math.isinf(self.lambda_align):
            given = f"inf and {self.lambda_bud:g}: a projection leaves the budget no move in S_A"
            raise BadRequest.of(
                "method.lambda_align, method.lambda_bud", given, "a finite lambda_align, or lambda_bud=0"
            )
        if self.space == "subspace" and self.estimator == "kronecker" and self.rank is None:
            given = "subspace and null: S_A is the whole space, so that would be fine-tuning on the AQI"
            raise BadRequest.of("method.space, method.rank", given, "a rank, or space=coefficients")

    @property
    def data(self) -> tuple[str, ...]:
        """F_A sees ``alignment``, the metric sees ``metric``; per-expert Fishers see each model's own set."""
        return ("alignment", "metric", "*") if self.metric == "per_expert" else ("alignment", "metric")

    @property
    def probed(self) -> bool:
        """Whether there is a budget."""
        return self.lambda_bud > 0

    @property
    def stochastic(self) -> bool:
        """Whether a basis is drawn."""
        return self.subspace_from == "random"

    def fit(self, ctx: MergeContext) -> Rule:
        """Collect the statistics at the chosen point and return the exact solution as a rule.

        Raises:
            BadRequest: if ``pool_weights`` does not fit the family, or a budget finds no selection probes.
        """
        shares = pool_weights(ctx, self.lambda_k, self.pool_weights)
        if shares is not None:
            ctx.record(lambda_k=shares)
        weights = None if shares is None else list(shares.values())
        quadratic = (Kronecker if self.estimator == "kronecker" else Samples)(self, ctx, weights)
        return quadratic.rule(self._budgeted(ctx, quadratic) if self.lambda_bud > 0 else {})

    def _budgeted(self, ctx: MergeContext, quadratic: Quadratic) -> dict[str, Tensor]:
        """Return how far the budget moves each matrix from theta*, and record how it went."""
        probes = ctx.probes()
        a_min, anchor = self._least(ctx, probes)
        model = ctx.loaded(ctx.models.base)

        def solution(name: str) -> Tensor:
            return quadratic.solution(block_of(ctx.models, name))

        movable = Movable(model, ctx.models.base, solution, quadratic.names)

        def directions(name: str) -> list[Tensor]:
            return [theta.read(name) - movable.start[name] for theta in ctx.models.pool]

        space = quadratic.space(directions)
        spent = spend(Alignment(Meter(model, probes), movable), space, a_min, self.lambda_bud)
        self._record(ctx, spent, space, a_min, anchor)
        return {} if spent.z is None else space.displacement(spent.z)

    def _least(self, ctx: MergeContext, probes: Probes) -> tuple[float, dict[str, float]]:
        """Return A_min, and the anchor's own A with its bootstrap deviation (nothing where A_min is given)."""
        if self.a_min is not None:
            return self.a_min, {}
        meter = Meter(ctx.loaded(ctx.models.anchor), probes)
        found = {"a_anchor": meter.value(), "deviation": meter.deviation()}
        return found["a_anchor"] - self.kappa * found["deviation"], found

    def _record(
        self, ctx: MergeContext, spent: Spent, space: Space, a_min: float, anchor: Mapping[str, float]
    ) -> None:
        gap = max(0.0, a_min - spent.value)
        facts: dict[str, Any] = {
            "a_min": a_min,
            **anchor,
            "a_start": spent.trace[0]["a"],
            "a": spent.value,
            "gap": gap,
            "met": gap <= MET,
            "l_bud": l_bud(spent.value, a_min),
            "multiplier": self.lambda_bud * gap,
            "cost": spent.cost,
            "residual": spent.residual,
            "trace": spent.trace,
        }
        if isinstance(space, Coefficients) and spent.z is not None:
            facts["coefficients"] = space.table(spent.z, ctx.models.aliases)
        ctx.record(budget=facts)


class Quadratic(Protocol):
    """The minimiser theta* of L_geo + lambda_align L_align, and the metric about it."""

    names: Sequence[str]
    """The matrices that are solved; everything else is averaged."""

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        ...

    def rule(self, moved: Mapping[str, Tensor]) -> Rule:
        """Return the rule of the merge, displaced from theta* by ``moved``; it records the certificate."""
        ...

    def space(self, directions: Callable[[str], Sequence[Tensor]]) -> Space:
        """Return where a budget may move the merge; ``directions``: name -> theta_k - theta* of each model."""
        ...


class Kronecker:
    """One generalised eigenproblem for each side of each matrix; the solution streams."""

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        self.method, self.ctx, self.weights = method, ctx, weights
        self.soup = _soup(method, ctx, weights)
        point = _point(method, ctx, weights)
        seed = ctx.seed if method.subspace_from == "random" else None
        data, chart = SUBSPACES[method.subspace_from], method.chart
        self.bases = {
            side: KroneckerBases.of(ctx, point, side, method.damping, chart=chart, examples=data, turn=seed)
            for side in SIDES[method.factors]
        }
        self.names: Sequence[str] = sorted(next(iter(self.bases.values())).owners)
        self.scale: Scale | None = None
        if method.subspace == "global":
            products = [self.shield(name).products for name in self.names]
            sizes = [math.prod(ctx.models.base.views[name].shape) for name in self.names]
            copies = [size // product.numel() for size, product in zip(sizes, products, strict=True)]
            self.scale = common_scale(products, copies, method.rank)

    def shield(self, name: str) -> Shield:
        """Return the shield of a matrix."""
        inputs, outputs = (self.bases[s].read(name) if s in self.bases else None for s in SIDES["both"])
        return Shield(outputs, inputs, self.method.rank, self.scale)

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        merged = self.soup(block)
        if block.name not in self.names:
            return merged
        return block.base + self._delta(self.shield(block.name), merged - block.base, self._reference(block))

    def rule(self, moved: Mapping[str, Tensor]) -> Rule:
        """Return the rule of the merge."""

        def rule(block: Block) -> Tensor:
            merged = self.soup(block)
            if block.name not in self.names:
                return merged
            shield, centre, reference = self.shield(block.name), merged - block.base, self._reference(block)
            delta = self._delta(shield, centre, reference)
            if block.name in moved:
                delta = delta + moved[block.name]
            if self.method.certificate:
                facts = certify(
                    shield,
                    block,
                    delta,
                    self.method.reference,
                    lambda_align=self.method.lambda_align,
                    weights=self.weights,
                    centre=None if self.method.metric == "shared" else centre,
                )
                self.ctx.record_block(block.name, **facts)
            return block.base + delta

        return rule

    def space(self, directions: Callable[[str], Sequence[Tensor]]) -> Space:
        """Return merge coefficients by decoder layer, or the coordinates in each S_A."""
        if self.method.space == "subspace":
            shapes = {name: self.ctx.models.base.views[name].shape for name in self.names}
            return ShieldSpace(self.shield, shapes, self.method.lambda_align, self._floor())
        blocks = blocks_of(self.names)

        def stiff(name: str) -> Tensor:
            shield = self.shield(name)
            root = (1 + self.method.lambda_align * shield.rho).sqrt()
            return torch.stack([(shield.coefficients(x) * root).flatten() for x in directions(name)])

        return Coefficients(blocks, directions, block_metric(blocks, stiff) / self._floor())

    def _delta(self, shield: Shield, centre: Tensor, reference: Tensor) -> Tensor:
        return reference + shield.shrink(centre - reference, self.method.lambda_align)

    def _reference(self, block: Block) -> Tensor:
        return _reference(self.method, block)

    def _floor(self) -> float:
        """V in the metric of the shields."""
        total = 0.0
        for name in self.names:
            shield, block = self.shield(name), block_of(self.ctx.models, name)
            centre = self.soup(block)
            total += _spread([shield.coefficients(theta - centre) for theta in block.pool], self.weights)
        return _positive(total)


class Samples:
    """The dual over examples: one Gram matrix, one weighted backward pass."""

    def __init__(self, method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> None:
        self.method, self.ctx, self.weights = method, ctx, weights
        self.soup = _soup(method, ctx, weights)
        point = _point(method, ctx, weights)
        self.inverse = _inverse_metric(method, ctx, point)
        self.rows: Rows = ExampleRows(lambda: ctx.loaded(point), self._examples, PRECISION)
        stored = load_tensors(self._gram(point).path)
        self.kernel, self.along = (stored.read(name, dtype=torch.float64) for name in ("kernel", "along"))
        if method.subspace_from == "random":
            names = sorted(fisher(ctx, point, "metric"))
            self.rows = RandomRows(self.inverse, names, ctx.seed, self.kernel)
            self.along = self.rows.along(lambda name: {0: self._excursion(name)}, 1)[:, 0]
        self.rank = len(self.kernel) if method.rank is None else min(method.rank, len(self.kernel))
        self.c = dual_coefficients(self.kernel, self.along, method.lambda_align, self.rank)
        self.correction = self.rows.combine(self.c)
        self.names: Sequence[str] = sorted(self.correction)

    def solution(self, block: Block) -> Tensor:
        """Return theta* of one view."""
        merged = self.soup(block)
        if block.name not in self.correction:
            return merged
        return merged - (self.inverse(block.name) * self.correction[block.name])[block.rows]

    def rule(self, moved: Mapping[str, Tensor]) -> Rule:
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

    def space(self, directions: Callable[[str], Sequence[Tensor]]) -> Space:
        """Return merge coefficients by decoder layer, or the coordinates in S_A."""
        values, vectors = sample_eigenpairs(self.kernel, self.rank)
        floor = self._floor()
        stiffness = self.method.lambda_align * values / values.mean()
        if self.method.space == "subspace":
            return SampleSpace(self.rows, self.inverse, vectors / values.sqrt(), (1 + stiffness) / floor)
        blocks = blocks_of(self.names)
        columns = {
            name: row * len(self.ctx.models.pool) for row, names in enumerate(blocks.values()) for name in names
        }
        count = len(blocks) * len(self.ctx.models.pool)

        def placed(name: str) -> dict[int, Tensor]:
            return {columns[name] + k: x for k, x in enumerate(directions(name))}

        def whitened(name: str) -> Tensor:
            root = self.inverse(name).rsqrt()
            return torch.stack([(root * x).flatten() for x in directions(name)])

        inside = (vectors / values.sqrt()).T @ self.rows.along(placed, count)
        metric = block_metric(blocks, whitened) + inside.T @ (stiffness.unsqueeze(1) * inside)
        return Coefficients(blocks, directions, metric / floor)

    @property
    def _examples(self) -> Sequence[Example]:
        return self.ctx.examples(SUBSPACES[self.method.subspace_from])

    def _excursion(self, name: str) -> Tensor:
        """The part of mean delta - d_ref in one matrix."""
        block = block_of(self.ctx.models, name)
        return self.soup(block) - block.base - _reference(self.method, block)

    def _gram(self, point: Checkpoint) -> Artifact:
        """K and J (mean delta - d_ref) of the examples."""
        method, name = self.method, SUBSPACES[self.method.subspace_from]
        floor = method.floor if method.metric == "per_expert" else None
        recipe: dict[str, Any] = {
            "weights": point.digest,
            "reference": method.reference,
            "metric": method.metric,
        }
        recipe |= {"damping": method.damping, "floor": floor, "precision": PRECISION}
        recipe |= {"lambda_k": self.weights} if self.weights is not None else {}
        recipe |= {"chart": method.chart} if method.chart != "fisher" else {}
        recipe |= {"examples": name} if name != "alignment" else {}

        def make(folder: Path) -> None:
            found = gram(
                self.ctx.loaded(point), self._examples, self.inverse, self._excursion, precision=PRECISION
            )
            save_tensors(folder, found._asdict())

        return self.ctx.cached("gram", recipe, make)

    def _seen(self, moved: Mapping[str, Tensor]) -> Moved:
        squared = sum(
            float((x.square() / self.inverse(name)).sum(dtype=torch.float64)) for name, x in moved.items()
        )
        return Moved(self.rows.along(lambda name: {0: moved[name]}, 1)[:, 0], squared)

    def _floor(self) -> float:
        """V in the diagonal metric."""
        total = 0.0
        for name in self.names:
            block, root = block_of(self.ctx.models, name), self.inverse(name).rsqrt()
            centre = self.soup(block)
            total += _spread([root * (theta - centre) for theta in block.pool], self.weights)
        return _positive(total)


class KroneckerBases:
    """Generalised eigenbases of every weight matrix on one side, as an artifact of the store."""

    def __init__(self, tensors: Checkpoint, owners: Mapping[str, str]) -> None:
        self.tensors, self.owners = tensors, owners

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
        """Take both second moments (of ``examples``, and of metric data) at ``point`` and solve the eigenproblems.

        Args:
            chart: ``identity`` puts the identity in the place of the metric data's moment.
            turn: seed of a random rotation of each basis within the metric (the control); None: none.
        """
        recipe: dict[str, Any] = {
            "weights": point.digest,
            "side": side,
            "damping": damping,
            "precision": PRECISION,
        }
        recipe |= {"chart": chart} if chart != "fisher" else {}
        recipe |= {"examples": examples} if examples != "alignment" else {}

        def make(folder: Path) -> dict[str, Any]:
            model = ctx.loaded(point)
            alignment = kronecker_factors(model, ctx.examples(examples), side, precision=PRECISION)
            metric = None
            if chart == "fisher":
                metric = kronecker_factors(model, ctx.examples("metric"), side, precision=PRECISION).moments
            del model  # it and the moments are as large as the bases: nothing is held longer than it is needed
            tensors: dict[str, Tensor] = {}
            for owner in list(alignment.moments):
                moment = alignment.moments.pop(owner)
                whole = torch.eye(len(moment)) if metric is None else metric.pop(owner)
                basis = generalised_basis(moment, whole, 0.0 if metric is None else damping)
                tensors |= {f"{owner}|{field}": value for field, value in basis._asdict().items()}
            save_tensors(folder, tensors)
            return {"owners": alignment.owners}

        artifact = ctx.cached("bases", recipe, make)
        bases = cls(load_tensors(artifact.path), artifact.manifest["facts"]["owners"])
        return bases if turn is None else bases._turned(ctx, {**recipe, "turn": turn}, side)

    def read(self, name: str) -> Basis:
        """Return the basis that the weight ``name`` uses."""
        return Basis(*(self.tensors.read(f"{self.owners[name]}|{field}") for field in Basis._fields))

    def _turned(self, ctx: MergeContext, recipe: Mapping[str, Any], side: Side) -> KroneckerBases:
        def make(folder: Path) -> None:
            tensors: dict[str, Tensor] = {}
            for owner in sorted(set(self.owners.values())):
                basis = turned(self.read(owner), torch_stream(recipe["turn"], "random basis", side, owner))
                tensors |= {f"{owner}|{field}": value for field, value in basis._asdict().items()}
            save_tensors(folder, tensors)

        return KroneckerBases(load_tensors(ctx.cached("bases", recipe, make).path), self.owners)


def _soup(method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> Rule:
    """Return the minimiser of L_geo: the average, or with per-expert Fishers the Fisher soup."""
    if method.metric == "shared":
        return lambda block: average(block.pool, weights)
    models = zip(ctx.models.aliases, ctx.models.pool, strict=True)
    fishers = {alias: fisher(ctx, model, alias) for alias, model in models}
    normalised = NormalisedFishers.of(fishers, method.floor)
    return lambda block: normalised.barycentre(block, weights)


def _point(method: AlignMerge, ctx: MergeContext, weights: Sequence[float] | None) -> Checkpoint:
    """Return the checkpoint at which gradients are taken."""
    if method.at == "base":
        return ctx.models.base
    if method.at == "barycentre":
        return ctx.barycentre(weights)
    return ctx.merged(replace(method, at="base", lambda_bud=0.0, certificate=False))


def _inverse_metric(method: AlignMerge, ctx: MergeContext, point: Checkpoint) -> Callable[[str], Tensor]:
    """Return weight name -> diagonal of G^-1, (d_out, d_in)."""
    if method.chart == "identity":
        views = ctx.models.base.views
        return lambda name: torch.ones(views[name].shape)
    diagonal = fisher(ctx, point, "metric")
    mean = mean_value(diagonal, diagonal)
    return lambda name: 1 / damped(diagonal.read(name), mean, method.damping)


def _reference(method: AlignMerge, block: Block) -> Tensor:
    return block.deltas[0] if method.reference == "anchor" else torch.zeros_like(block.base)


def _spread(pool: Sequence[Tensor], weights: Sequence[float] | None) -> float:
    """sum_k lambda_k ||x_k||^2 of one matrix, from Euclidean coordinates about the barycentre."""
    shares = [1 / len(pool)] * len(pool) if weights is None else weights
    return sum(
        share * float(x.square().sum(dtype=torch.float64)) for share, x in zip(shares, pool, strict=True)
    )


def _positive(floor: float) -> float:
    """V, or 1 where all models are equal: then there is nowhere to move, at any price."""
    return floor if floor > 0 else 1.0
