"""Controls: walk from the plain average straight to the anchor, or to the base. What does a cleverer method add?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from alignmerge.engine.configuration import TARGET, build
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.merger import (
    Block,
    MergeContext,
    Merger,
    Rule,
    average,
    block_of,
    check_choice,
    check_range,
)
from alignmerge.fisher import fisher
from alignmerge.method import AlignMerge
from alignmerge.pool import fisher_length

OWN = "alignmerge.method.AlignMerge"


@dataclass(frozen=True, kw_only=True)
class Interpolate(Merger):
    """delta = (1 - t) * mean_k Delta_k + t * Delta_goal: the plain average at t = 0, the goal at t = 1."""

    t: float | None = 0.5
    """How far; null where ``like`` says it."""
    towards: str = "anchor"
    """The goal: ``anchor``, or ``base``, where Delta is 0: a uniform shrink."""
    like: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Instead of ``t``: fields of the AlignMerge that is matched, in Fisher length (diagonal Fisher at theta_IT on the
    metric set, over the linear weights). Towards the anchor the walk is as long as AlignMerge's correction
    ||d - mean||_G; towards the base it ends where ||d||_G is AlignMerge's (t < 0 where that is above the mean's)."""

    def __post_init__(self) -> None:
        check_choice("method.towards", self.towards, ("anchor", "base"))
        if (self.t is None) != bool(self.like):
            given = f"t {self.t} and like {dict(self.like)}"
            raise BadRequest.of(
                "method.t, method.like", given, "a number and {}, or null and fields of AlignMerge"
            )
        if self.t is not None:
            check_range("method.t", self.t, 0, 1)
        else:
            _matched(self.like)

    @property
    def data(self) -> tuple[str, ...]:
        """What the matched AlignMerge reads."""
        return _matched(self.like).data if self.like else ()

    @property
    def probed(self) -> bool:
        """Whether the matched AlignMerge has a budget."""
        return bool(self.like) and _matched(self.like).probed

    @property
    def stochastic(self) -> bool:
        """Whether the matched AlignMerge draws a basis."""
        return bool(self.like) and _matched(self.like).stochastic

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule at once, or measure how far the matched AlignMerge goes."""
        t = self._matching(ctx) if self.t is None else self.t

        def rule(block: Block) -> Tensor:
            # theta_IT cancels, since the weights sum to 1; without it both ends are exact.
            goal = block.pool[0] if self.towards == "anchor" else block.base
            return (1 - t) * average(block.pool) + t * goal

        return rule

    def _matching(self, ctx: MergeContext) -> float:
        """Return the t of equal Fisher length, and record it.

        Raises:
            ArithmeticError: if the average lies at the goal: no walk has any length.
        """
        models = ctx.models
        rule = replace(_matched(self.like), certificate=False).fit(ctx)
        diagonal = fisher(ctx, models.base, "metric")

        def length(of: Callable[[Block], Tensor]) -> float:
            return fisher_length(diagonal, lambda name: of(block_of(models, name)))

        if self.towards == "anchor":
            whole = length(lambda block: block.pool[0] - average(block.pool))
            wanted = length(lambda block: rule(block) - average(block.pool))
        else:
            whole = length(lambda block: average(block.pool) - block.base)
            wanted = length(lambda block: rule(block) - block.base)
        if whole == 0:
            raise ArithmeticError(
                f"the average does not differ from the {self.towards}: there is nowhere to walk"
            )
        t = wanted / whole if self.towards == "anchor" else 1 - wanted / whole
        ctx.record(t=t)
        return t


def _matched(fields: Mapping[str, Any]) -> AlignMerge:
    """Build the AlignMerge that ``like`` describes; what is wrong with it is said of ``method.like``."""
    try:
        method: AlignMerge = build({TARGET: OWN, **fields}, "method", AlignMerge)
    except BadRequest as error:
        faults = [_beneath(fault) for fault in error.faults]
        raise BadRequest(faults) from None
    return method


def _beneath(fault: Fault) -> Fault:
    """Return the fault under the key that it was given by."""
    return Fault(fault.where.replace("method.", "method.like."), fault.given, fault.allowed)
