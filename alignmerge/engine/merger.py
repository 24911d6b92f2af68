"""What a merge method is, and the one loop that reads and writes weights for every method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import BLOCK_ELEMENTS, Checkpoint, Writer, row_blocks
from alignmerge.engine.faults import BadRequest

if TYPE_CHECKING:
    from alignmerge.engine.examples import Example
    from alignmerge.engine.store import Artifact


class Block(NamedTuple):
    """Rows of one view (a stored tensor, or one of the matrices fused in it) of every model, in fp32."""

    name: str
    """The view's."""
    rows: slice
    """Which rows of the view."""
    base: Tensor
    """theta_IT."""
    pool: Sequence[Tensor]
    """What is merged: the anchor and the experts, in that order."""
    pretrained: Tensor | None = None
    """theta_0, where the family has one."""

    @property
    def deltas(self) -> list[Tensor]:
        """Delta_k = theta_k - theta_IT, in pool order."""
        return [theta - self.base for theta in self.pool]


Rule = Callable[[Block], Tensor]
"""Rows of all models in, rows of the merged model out (fp32, same shape). Pure."""


class Models(NamedTuple):
    """The checkpoints of a family, opened and found to agree."""

    base: Checkpoint
    anchor: Checkpoint
    experts: Mapping[str, Checkpoint]
    pretrained: Checkpoint | None = None

    @property
    def pool(self) -> list[Checkpoint]:
        """The anchor and the experts, in that order."""
        return [self.anchor, *self.experts.values()]

    @property
    def aliases(self) -> list[str]:
        """The names of the pool."""
        return ["anchor", *self.experts]


class Probes(NamedTuple):
    """Matched prompts for an AQI budget, rendered and tokenised: the i-th of each side make a pair."""

    harmful: Sequence[tuple[int, ...]]
    benign: Sequence[tuple[int, ...]]


class MergeContext(Protocol):
    """What ``Merger.fit`` may ask for; heavy results are artifacts of the store, made once."""

    models: Models
    seed: int

    def examples(self, name: str) -> Sequence[Example]:
        """Return an example set, tokenised: ``alignment``, ``refusals`` (of it), ``metric``, ``utility`` (all experts'
        own), or that of a pool alias."""
        ...

    def probes(self) -> Probes:
        """Return the selection probes, which no report is made on."""
        ...

    def cached(
        self, stage: str, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any] | None]
    ) -> Artifact:
        """Return the artifact of a statistic; the digest of the example sets is added to the recipe."""
        ...

    def loaded(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """Return a causal language model with these weights in fp32 for gradients (no dropout)."""
        ...

    def barycentre(self, weights: Sequence[float] | None = None) -> Checkpoint:
        """Return the average of the pool (uniform, or with weights that sum to 1) as a checkpoint."""
        ...

    def merged(self, merger: Merger) -> Checkpoint:
        """Return what another method makes of the same pool as a checkpoint; its facts are not recorded."""
        ...

    def record(self, **facts: Any) -> None:
        """Put facts into the manifest of the merge (certificate, fractions, weights)."""
        ...

    def record_block(self, name: str, **facts: float) -> None:
        """Put per-tensor facts, gathered while the rule runs, into the manifest of the merge."""
        ...


@dataclass(frozen=True, kw_only=True)
class Merger(ABC):
    """How to merge. Fields are the config (one YAML each); ``__post_init__`` checks them, naming the key."""

    version: ClassVar[int] = 1
    """Part of the key: raise it when the mathematics changes."""
    elementwise: ClassVar[bool] = True
    """Whether the rule may be fed row blocks; otherwise it gets whole tensors."""

    @property
    def stochastic(self) -> bool:
        """Whether the seed is part of the key."""
        return False

    @property
    def data(self) -> tuple[str, ...]:
        """The example sets that ``fit`` reads; ``*`` stands for one set per pool alias."""
        return ()

    @property
    def probed(self) -> bool:
        """Whether ``fit`` reads the selection probes."""
        return False

    @abstractmethod
    def fit(self, ctx: MergeContext) -> Rule:
        """Do the whole-model work (statistics, thresholds) and return the rule."""


def merge(
    rule: Rule,
    models: Models,
    folder: Path,
    *,
    elementwise: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream every tensor through ``rule`` into ``folder`` and return the digest (fp32, one rounding).

    The rule is handed views; what comes back is written as the base stores it.

    Raises:
        BadRequest: if an input holds values that are not finite.
        ArithmeticError: if the rule yields a value that is not finite or of another shape.
    """
    base = models.base
    specs = {name: (spec.dtype, spec.shape) for name, spec in base.items()}
    with closing(Writer(folder, specs, shard_bytes)) as writer:
        for done, name in enumerate(base):
            writer.start(name)
            for view in base.parts(name):
                shape = base.views[view].shape
                for rows in row_blocks(shape, block_elements) if elementwise else [slice(None)]:
                    writer.write(_merged(rule, models, view, rows), name)
            progress(done + 1, len(base))
        return writer.finish()


def block_of(models: Models, name: str, rows: slice = slice(None)) -> Block:
    """Read rows of one view of every model."""
    pool = [checkpoint.read(name, rows) for checkpoint in models.pool]
    pretrained = models.pretrained.read(name, rows) if models.pretrained is not None else None
    return Block(name, rows, models.base.read(name, rows), pool, pretrained)


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the weighted mean of equally shaped tensors (uniform, or with weights that sum to 1).

    Summed in float64, and divided last where the weights are uniform, so that the order of the tensors does
    not change the fp32 result.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    if weights is None:
        for tensor in tensors:
            total += tensor
        return (total / len(tensors)).float()
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor.double()
    return total.float()


def check_range(key: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number outside [low, high] (``open_low``: (low, high]), nan included, naming the key."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise BadRequest.of(key, str(value), f"a number in {'(' if open_low else '['}{low:g}, {high:g}]")


def check_choice(key: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not offered, naming the key."""
    if value not in allowed:
        raise BadRequest.of(key, str(value), ", ".join(map(str, allowed)))


def _merged(rule: Rule, models: Models, name: str, rows: slice) -> Tensor:
    block = block_of(models, name, rows)
    merged = rule(block)
    if merged.shape != block.base.shape:
        shapes = f"{tuple(merged.shape)}, not {tuple(block.base.shape)}"
        raise ArithmeticError(f"tensor '{name}': the rule returned shape {shapes}")
    return merged
