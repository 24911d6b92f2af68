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
from alignmerge.engine.merger import EVERY_OWN, Inputs, MergeContext, Merger, Rule, check_choice, check_range
from alignmerge.gradients import Side
from alignmerge.kronecker import Kronecker
from alignmerge.pool import RULES, pool_weights
from alignmerge.quadratic import SUBSPACES
from alignmerge.samples import Samples

SIDES: dict[str, tuple[Side, ...]] = {"input": ("input",), "output": ("output",), "both": ("input", "output")}
ESTIMATORS = {"kronecker": Kronecker, "samples": Samples}


@dataclass(frozen=True, kw_only=True)
class AlignMerge(Merger):
    """The three-term merge; linear weights of decoder layers are solved, everything else is averaged."""

    name = "alignmerge"
    version = 3
    elementwise = False
    estimator: str = "kronecker"
    """``kronecker`` (factors per matrix) or ``samples`` (the dual, one Gram matrix over all layers)."""
    reference: str = "anchor"
    """d_ref: in S_A ``anchor`` pulls towards theta_SAFE, ``base`` (the caption) towards theta_IT."""
    at: str = "base"
    """Where gradients are taken: ``base`` (the paper); repair: ``barycentre``, ``iterate`` (base's merge)."""
    metric: str = "shared"
    """``shared``: one G (the paper); ``per_expert``: the shield stands on the Fisher soup."""
    chart: str = "fisher"  # G: ``fisher`` (of the metric data) or ``identity`` (Euclidean, a control)
    subspace_from: str = "alignment"
    """What F_A is taken on: ``alignment`` (refusals and benign answers), ``refusals`` (of these),
    ``utility`` (the experts' data, a control) or ``random`` (a control: alignment's eigenvalues on a
    basis drawn from the seed)."""
    factors: str = "input"
    """Kronecker only: shrink along ``input`` directions, ``output`` directions, or ``both``."""
    subspace: str | None = None
    """S_A and mean rho of each matrix (``per_block``, kronecker's default) or of all (``global``)."""
    rank: int | None = None
    """Dimension of S_A, for each matrix (kronecker) or in all (samples); None: all."""
    lambda_k: str = "uniform"  # weights of the pool in L_geo: one of ``alignmerge.pool.RULES``
    pool_weights: Sequence[float] = ()
    """lambda_k: given only: one number for the anchor and each expert; divided by their sum."""
    lambda_align: float = 1.0
    """Weight of L_align; ``inf`` projects. rho has mean 1, so 1 halves an average direction."""
    lambda_bud: float = 0.0  # weight of the AQI budget, in units of L_geo's floor V; 0: no budget
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
            allowed = "a finite lambda_align, or lambda_bud=0"
            raise BadRequest.of("method.lambda_align, method.lambda_bud", given, allowed)
        if self.space == "subspace" and self.estimator == "kronecker" and self.rank is None:
            given = "subspace and null: S_A is the whole space, so that would be fine-tuning on the AQI"
            raise BadRequest.of("method.space, method.rank", given, "a rank, or space=coefficients")

    @property
    def inputs(self) -> Inputs:
        """F_A and the metric see a set each; Fishers of experts see each model's own; a budget sees probes."""
        examples = [SUBSPACES[self.subspace_from], "metric"]
        if self.metric == "per_expert":
            examples.append(EVERY_OWN)
        merges = (self.first_iterate(),) if self.at == "iterate" else ()
        drawn = self.subspace_from == "random"
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
        shares = pool_weights(ctx, self.lambda_k, self.pool_weights)
        weights: list[float] | None = None
        if shares is not None:
            ctx.record(lambda_k=shares)
            weights = list(shares.values())
        quadratic = ESTIMATORS[self.estimator](self, ctx, weights)
        return quadratic.rule(budgeted(quadratic) if self.lambda_bud > 0 else {})

    def concluded(self, facts: Mapping[str, Any], blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the facts of a merge with the certificate: sums over matrices, and what the budget left over."""
        found = dict(facts)
        if blocks:
            found |= {"certificate": summed(blocks), "blocks": dict(blocks)}
        if "certificate" in found:
            left = found.get("budget", {}).get("l_bud", 0.0)
            found["certificate"] = {**found["certificate"], "l_bud": left}
        return found

    def warning(self, facts: Mapping[str, Any]) -> str:
        """Return what to say of a merge whose AQI budget is not met."""
        budget = facts.get("budget", {"met": True})
        if budget["met"]:
            return ""
        reached, wanted = budget["a"], budget["a_min"]
        return f"the AQI budget is not met: {reached:.4f} on the selection probes, A_min {wanted:.4f}."
