"""Controls: walk from the plain average, or another merge, straight to the anchor, or to the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from alignmerge.engine.configuration import TARGET, nested
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Block, Inputs, MergeContext, Rule, block_of, check_choice, check_range
from alignmerge.fisher import fisher
from alignmerge.method import AlignMerge
from alignmerge.pool import fisher_length
from alignmerge.start import Started, begin_at


@dataclass(frozen=True, kw_only=True)
class Interpolate(Started):
    """delta = (1 - t) Delta_start + t Delta_goal: the start (the plain average) at t = 0, the goal at t = 1."""

    name = "interpolate"
    version = 2
    t: float | None = 0.5  # how far; null where ``like`` says it
    towards: str = "anchor"  # the goal: ``anchor``, or ``base``, where Delta is 0: a uniform shrink
    like: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Instead of ``t``: fields of the AlignMerge that is matched in Fisher length (diagonal Fisher at
    theta_IT on the metric set, over linear weights). Towards the anchor the walk is as long as that merge
    lies from this start; towards the base it ends where ||d||_G is the same (t < 0 if longer than the
    start's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method.towards", self.towards, ("anchor", "base"))
        if (self.t is None) != bool(self.like):
            given = f"t {self.t} and like {dict(self.like)}"
            allowed = "a number and {}, or null and fields of AlignMerge"
            raise BadRequest.of("method.t, method.like", given, allowed)
        if self.t is not None:
            check_range("method.t", self.t, 0, 1)
        else:
            _matched(self.like)

    @property
    def inputs(self) -> Inputs:
        """The start, and what the matched AlignMerge reads."""
        if not self.like:
            return super().inputs
        matched = _matched(self.like).inputs
        merges = tuple(dict.fromkeys((*self.starts, *matched.merges)))
        return replace(matched, merges=merges, seed=matched.seed or self.draws)

    def fit(self, ctx: MergeContext) -> Rule:
        """Return the rule, having measured how far the matched AlignMerge goes where ``like`` is given.

        Raises:
            ArithmeticError: if the start lies at the goal: no walk has any length.
        """
        start = begin_at(self.started(ctx))
        t = self._matching(ctx, start) if self.t is None else self.t

        def rule(block: Block) -> Tensor:
            # theta_IT cancels, since the weights sum to 1; without it both ends are exact.
            return (1 - t) * start(block) + t * self._goal(block)

        return rule

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Name an end of the walk: the start itself, or the goal."""
        return f"t {self.t:g}: an end of the walk" if self.t in (0, 1) else ""

    def _goal(self, block: Block) -> Tensor:
        return block.pool[0] if self.towards == "anchor" else block.base

    def _matching(self, ctx: MergeContext, start: Rule) -> float:
        rule = replace(_matched(self.like), certificate=False).fit(ctx)
        diagonal = fisher(ctx, ctx.models.base, "metric")

        def length(of: Callable[[Block], Tensor]) -> float:
            return fisher_length(diagonal, lambda name: of(block_of(ctx.models, name)))

        whole = length(lambda block: self._goal(block) - start(block))
        if whole == 0:
            fault = f"the {self.start} does not differ from the {self.towards}: there is nowhere to walk"
            raise ArithmeticError(fault)
        if self.towards == "anchor":
            t = length(lambda block: rule(block) - start(block)) / whole
        else:
            t = 1 - length(lambda block: rule(block) - block.base) / whole
        ctx.record(t=t)
        return t


def _matched(fields: Mapping[str, Any]) -> AlignMerge:
    """Build the AlignMerge that ``like`` describes; faults name the keys of ``method.like``."""
    node = {TARGET: "alignmerge.method.AlignMerge", **fields}
    method: AlignMerge = nested(node, "method.like", AlignMerge)
    return method
