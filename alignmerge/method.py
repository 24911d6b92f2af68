"""AlignMerge (arXiv 2512.16245), a documented reconstruction: its configuration and its fit.

theta = theta_IT + d,
d = argmin sum_k lambda_k ||d - Delta_k||^2_G + lambda_align (d - d_ref)^T P_A^T F_A P_A (d - d_ref)
           + lambda_bud max(0, A_min - A(theta_IT + d))^2.
The paper prints only the first term; what is ours is listed in docs/method.md. Two terms are solved
exactly (``kronecker.py``, ``samples.py``), the third by sequential quadratic steps (``budget.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignmerge.budget import budgeted
from alignmerge.certificate import summed
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import EVERY_OWN, Inputs, MergeContext, Rule, check_choice, check_range
from alignmerge.gradients import Side
from alignmerge.kronecker import Kronecker
from alignmerge.pool import POOLS, RULES, pool_weights
from alignmerge.quadratic import SUBSPACES
from alignmerge.samples import Samples
from alignmerge.spaces import STAYS
from alignmerge.start import Started

SIDES: dict[str, tuple[Side, ...]] = {"input": ("input",), "output": ("output",), "both": ("input", "output")}
ESTIMATORS = {"samples": Samples, "kronecker": Kronecker}
ANCHOR_SHARE = "anchor_share"
"""The field of the methods that a merge can start at which gives the anchor its share."""
METRICS = {
    "input": "second moments of layer inputs on one side of each matrix, no gradient: not a Fisher",
    "output": "second moments of output gradients on one side of each matrix: half of a Kronecker Fisher",
    "both": "Kronecker factors of a Fisher, both sides of each matrix",
}
"""``factors`` -> what G and F_A are."""


@dataclass(frozen=True, kw_only=True)
class AlignMerge(Started):
    """The three-term merge; linear weights of decoder layers are solved, everything else stays at the start."""

    name = "alignmerge"
    version = 4
    elementwise = False
    estimator: str = "samples"
    """``samples`` (gradients of examples: the dual, one Gram matrix over all layers) or ``kronecker`` (factors
    of each matrix)."""
    reference: str = "anchor"
    """d_ref: in S_A ``anchor`` pulls towards theta_SAFE, ``base`` (the caption) towards theta_IT."""
    pool: str = "all"
    """What L_geo runs over: ``all`` (anchor and experts), or ``experts``: then the anchor enters through the
    shield's reference and the budget alone."""
    at: str = "base"
    """Where gradients are taken: ``base`` (the paper); repair: ``barycentre`` (the start), ``iterate`` (base's
    merge)."""
    metric: str = "shared"
    """``shared``: one G (the paper); ``per_expert``: L_geo has each model's own Fisher, and its minimiser is
    their soup."""
    chart: str = "fisher"  # G: ``fisher`` (of the metric data) or ``identity`` (Euclidean, a control)
    subspace_from: str = "alignment"
    """What F_A is taken on: ``alignment`` (refusals and benign answers), ``refusals`` (of these),
    ``utility`` (the experts' data, a control) or ``random`` (a control: alignment's eigenvalues on a
    basis drawn from the seed)."""
    factors: str = "both"
    """Kronecker only: ``both`` sides make a Fisher; one-sided approximations: ``output`` (gradients alone),
    ``input`` (second moments of activations, no gradient: not a Fisher)."""
    subspace: str | None = None
    """S_A and mean rho of each matrix (``per_block``, kronecker's default) or of all (``global``)."""
    rank: int | None = None
    """Dimension of S_A, for each matrix (kronecker) or in all (samples); None: all."""
    lambda_k: str = "uniform"  # weights of the pool in L_geo: one of ``alignmerge.pool.RULES``
    pool_weights: Sequence[float] = ()
    """lambda_k: given only: one number for each model of the pool, in order; divided by their sum."""
    lambda_align: float = 10.0
    """Weight of L_align; ``inf`` projects. rho has mean 1, so 1 halves an average direction."""
    lambda_bud: float = 100.0
    """Weight of the AQI budget, in units of V, the models' mean distance from the start; 0: no budget."""
    a_min: float | None = None
    """A_min of the budget, an aqi01; None: the anchor's own less ``kappa`` bootstrap deviations."""
    kappa: float = 1.0  # how many deviations
    space: str = "coefficients"
    """Where the budget may move the merge: ``coefficients`` (one a decoder layer and model: still a
    merge) or ``subspace`` (the coordinates in S_A: nearer to fine-tuning on the metric)."""
    damping: float = 0.1  # eps of the metric, in units of its mean diagonal
    floor: float = 1e-3  # metric: per_expert only: floor of the Fishers in units of their mean
    certificate: bool = True
    """Whether to store L_geo, L_align, gradient norm, eigenvalues and energy ratios."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method.pool", self.pool, tuple(POOLS))
        check_choice("method.estimator", self.estimator, tuple(ESTIMATORS))
        check_choice("method.reference", self.reference, ("anchor", "base"))
        check_choice("method.at", self.at, ("base", "barycentre", "iterate"))
        check_choice("method.metric", self.metric, ("shared", "per_expert"))
        check_choice("method.chart", self.chart, ("fisher", "identity"))
        check_choice("method.subspace_from", self.subspace_from, tuple(SUBSPACES))
        check_choice("method.factors", self.factors, tuple(SIDES))
        check_choice("method.subspace", self.subspace, (None, "per_block", "global"))
        check_choice("method.lambda_k", self.lambda_k, RULES)
        check_choice("method.space", self.space, ("coefficients", "subspace"))
        check_range("method.lambda_align", self.lambda_align, 0, math.inf)
        check_range("method.lambda_bud", self.lambda_bud, 0, 1e12)
        check_range("method.kappa", self.kappa, 0, 100)
        check_range("method.damping", self.damping, 0, 1e6, open_low=True)
        check_range("method.floor", self.floor, 0, 1, open_low=True)
        if self.a_min is not None:
            check_range("method.a_min", self.a_min, -1, 1)
        if self.rank is not None:
            check_range("method.rank", self.rank, 1, 1e9)
        if (self.estimator, self.subspace) == ("samples", "per_block"):
            given = "samples and per_block: one Gram matrix holds all layers"
            raise BadRequest.of("method.estimator, method.subspace", given, "kronecker, or subspace=global")
        self._check_weights()
        self._check_budget()
        self._check_start()

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
        if self.space == "subspace" and math.isinf(self.lambda_align):
            given = f"subspace, inf and {self.lambda_bud:g}: a projection leaves the budget no move in S_A"
            where, allowed = "method.space, method.lambda_align, method.lambda_bud", "space=coefficients"
            raise BadRequest.of(where, given, f"{allowed}, a finite lambda_align, or lambda_bud=0")
        if self.space == "subspace" and self.estimator == "kronecker" and self.rank is None:
            given = "subspace and null: S_A is the whole space, so that would be fine-tuning on the AQI"
            raise BadRequest.of("method.space, method.rank", given, "a rank, or space=coefficients")

    def _check_start(self) -> None:
        if self.start == "average":
            return
        if self.metric != "shared":
            given = f"{self.start} and {self.metric}: both say where L_geo is least"
            raise BadRequest.of("method.start, method.metric", given, "start=average, or metric=shared")
        if self.lambda_k != "uniform":
            given = f"{self.start} and {self.lambda_k}: L_geo is the distance to the start alone"
            raise BadRequest.of("method.start, method.lambda_k", given, "start=average, or lambda_k=uniform")

    @property
    def start_fields(self) -> Mapping[str, Any]:
        """The fields that the start is built with; ``pool: experts`` leaves the anchor out of it."""
        if self.pool == "all":
            return self.start_with
        if ANCHOR_SHARE in self.start_with:
            given = f"experts and {self.start_with[ANCHOR_SHARE]}: a pool of experts gives the anchor 0"
            where = f"method.pool, method.start_with.{ANCHOR_SHARE}"
            raise BadRequest.of(where, given, "one of the two")
        return {**self.start_with, ANCHOR_SHARE: 0.0}

    @property
    def inputs(self) -> Inputs:
        """F_A and the metric see a set each; Fishers of experts see each model's own; a budget sees probes."""
        examples = [SUBSPACES[self.subspace_from], "metric"]
        if self.metric == "per_expert":
            examples.append(EVERY_OWN)
        merges = self.starts
        if self.at == "iterate":
            merges += (self.first_iterate(),)
        drawn = self.subspace_from == "random" or self.draws
        return Inputs(examples=tuple(examples), seed=drawn, probes=self.lambda_bud > 0, merges=merges)

    def first_iterate(self) -> AlignMerge:
        """Return the merge at which ``at: iterate`` takes its gradients."""
        return replace(self, at="base", lambda_bud=0.0, certificate=False)

    @property
    def kept_sides(self) -> tuple[Side, ...]:
        """The sides of the Kronecker factors whose eigenbases ``fit`` keeps in the store."""
        return SIDES[self.factors] if self.estimator == "kronecker" else ()

    def fit(self, ctx: MergeContext) -> Rule:
        """Collect the statistics at the chosen point and return the exact solution as a rule.

        Raises:
            BadRequest: if ``pool_weights`` does not fit the family, or a budget finds no probes.
        """
        shares = pool_weights(ctx, self.lambda_k, self.pool_weights, self.pool)
        weights: list[float] | None = None
        if shares is not None:
            ctx.record(lambda_k=shares)
            weights = list(shares.values())
        quadratic = ESTIMATORS[self.estimator](self, ctx, weights)
        return quadratic.rule(budgeted(quadratic) if self.lambda_bud > 0 else STAYS)

    def concluded(self, facts: Mapping[str, Any], blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the facts of a merge with the certificate: sums over matrices, and what the budget left over."""
        found = dict(facts)
        if blocks:
            found |= {"certificate": summed(blocks), "blocks": dict(blocks)}
        if "certificate" in found:
            left = found.get("budget", {}).get("l_bud", 0.0)
            found["certificate"] = {**found["certificate"], "l_bud": left, "of": self.terms()}
        return found

    def terms(self) -> dict[str, str]:
        """Say in words what stands for L_geo and for its metric."""
        who = {"all": "anchor and experts", "experts": "the experts"}[self.pool]
        l_geo = f"sum of lambda_k ||d - Delta_k||^2_G over {who}"
        if self.metric == "per_expert":
            l_geo += ", each with its own diagonal Fisher G_k"
        if self.start != "average":
            l_geo = f"||d - d_start||^2_G, d_start the delta of {self.start} over {who}"
        metric = METRICS[self.factors]
        if self.estimator == "samples":
            metric = "diagonal Fisher of the metric examples; F_A of the examples' gradients"
        if self.chart == "identity":
            metric += "; G is the identity"
        return {"l_geo": l_geo, "metric": metric}

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Name a shield without weight: what is left is the start, or the budget alone."""
        return "lambda_align 0: there is no shield" if self.lambda_align == 0 else ""

    def warning(self, facts: Mapping[str, Any]) -> str:
        """Return what to say of a merge whose AQI budget is not met."""
        budget = facts.get("budget", {"met": True})
        if budget["met"]:
            return ""
        reached, wanted = budget["a"], budget["a_min"]
        return f"the AQI budget is not met: {reached:.4f} on the selection probes, A_min {wanted:.4f}."
