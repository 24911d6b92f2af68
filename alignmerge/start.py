"""Where a method begins: at the plain average of the pool, or at what another method makes of it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.configuration import chosen
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Block, Inputs, MergeContext, Merger, Rule, average, check_choice

STARTS = ("average", "fisher_soup", "task_arithmetic", "ties")
"""``start``: files of conf/method whose methods know no AlignMerge."""


@dataclass(frozen=True, kw_only=True)
class Started(Merger, ABC):
    """A method that moves on from another method's merge."""

    start: str = "average"
    """The merge that it begins at: one of ``STARTS``."""
    start_with: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of that method which differ from its file in conf/method, e.g. ``{scale: 0.5}``."""

    def __post_init__(self) -> None:
        check_choice("method.start", self.start, STARTS)
        if self.start == "average" and self.start_with:
            given = f"average and {dict(self.start_with)}"
            allowed = "{}, or another start: the average has no fields"
            raise BadRequest.of("method.start, method.start_with", given, allowed)
        _ = self.origin

    @cached_property
    def origin(self) -> Merger | None:
        """The method that makes the start; None for the average, which needs no model of its own.

        Raises:
            BadRequest: naming the field of ``start_with`` that is wrong.
        """
        if self.start == "average":
            return None
        found: Merger = chosen("method", self.start, self.start_fields, "method.start_with", Merger)
        return found

    @property
    def start_fields(self) -> Mapping[str, Any]:
        """The fields that the start is built with."""
        return self.start_with

    @property
    def starts(self) -> tuple[Merger, ...]:
        """What ``Inputs.merges`` has to hold for the start."""
        return () if self.origin is None else (self.origin,)

    @property
    def draws(self) -> bool:
        """Whether anything in the start is drawn at random."""
        return any(one.inputs.seed for one in self.starts)

    @property
    def inputs(self) -> Inputs:
        """The start, where it is a model of its own."""
        return Inputs(merges=self.starts, seed=self.draws)

    def started(self, ctx: MergeContext) -> Checkpoint | None:
        """Return the start as a checkpoint, made once for all that begin there; None for the average."""
        return None if self.origin is None else ctx.merged(self.origin)


def begin_at(checkpoint: Checkpoint | None) -> Rule:
    """Return the rule of the start alone; None: the average of the pool."""

    def mean(block: Block) -> Any:
        return average(block.pool)

    def stored(block: Block) -> Any:
        assert checkpoint is not None
        return checkpoint.read(block.name, block.rows)

    return mean if checkpoint is None else stored
