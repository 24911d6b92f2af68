"""What a merge method is: what it may read, what it declares, and the rule that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from threading import local
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, row_blocks
from alignmerge.engine.faults import BadRequest

if TYPE_CHECKING:
    from alignmerge.engine.examples import Example
    from alignmerge.engine.store import Artifact, Make


@dataclass(frozen=True)
class Block:
    """Rows of one view (a stored tensor, or one of the matrices fused in it) of every model, in fp32.

    Do not write to them: they may be the file itself.
    """

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
    def deltas(self) -> Sequence[Tensor]:
        """Delta_k = theta_k - theta_IT, in pool order."""
        return [theta - self.base for theta in self.pool]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        return tuple(self.base.shape)

    def part(self, rows: slice) -> Block:
        """Return some of these rows."""
        origin = None if self.pretrained is None else self.pretrained[rows]
        return Block(
            self.name, self._inside(rows), self.base[rows], [theta[rows] for theta in self.pool], origin
        )

    def _inside(self, rows: slice) -> slice:
        """Return which rows of the view some of these rows are."""
        first = self.rows.start or 0
        return slice(first + rows.start, first + rows.stop)


class Each(Sequence[Tensor]):
    """Tensors that are made when they are asked for, each time anew: one need not wait in memory for another."""

    def __init__(self, make: Callable[[int], Tensor], numbers: Sequence[int]) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Each: ...

    def __getitem__(self, place: int | slice) -> Tensor | Each:
        if isinstance(place, slice):
            return Each(self._make, self._numbers[place])
        return self._make(self._numbers[place])


class Buffers(local):
    """fp32 memory of each thread, used again for every block, by the place of the model."""

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self._made: dict[int, Tensor] = {}

    def __getitem__(self, place: int) -> Tensor:
        if place not in self._made:
            self._made[place] = torch.empty(self.numbers)
        return self._made[place]


class MappedBlock(Block):
    """A block of checkpoints: a model is read when a rule first asks for it, and never if none does.

    With ``buffers`` its tensors hold until the same thread reads its next block. Without, the models of the pool
    are not kept: each is read when it is asked for.
    """

    _models: Models
    _buffers: Buffers | None

    def __init__(self, models: Models, name: str, rows: slice, buffers: Buffers | None = None) -> None:
        self.__dict__ |= {"name": name, "rows": rows, "_models": models, "_buffers": buffers}

    @cached_property
    def base(self) -> Tensor:
        """theta_IT."""
        return self._read(self._models.base, 0)

    @cached_property
    def pool(self) -> Sequence[Tensor]:
        """The anchor and the experts, in that order."""
        each = Each(self._theta, range(len(self._models.pool)))
        return each if self._buffers is None else list(each)

    @property
    def deltas(self) -> Sequence[Tensor]:
        """Delta_k = theta_k - theta_IT, in pool order."""
        return Each(lambda number: self.pool[number] - self.base, range(len(self._models.pool)))

    @cached_property
    def pretrained(self) -> Tensor | None:
        """theta_0, where the family has one."""
        origin = self._models.pretrained
        return None if origin is None else self._read(origin, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        whole = self._models.base.views[self.name].shape
        return (len(range(*self.rows.indices(whole[0]))), *whole[1:]) if whole else ()

    def part(self, rows: slice) -> Block:
        """Return some of these rows."""
        return MappedBlock(self._models, self.name, self._inside(rows), self._buffers)

    def _theta(self, number: int) -> Tensor:
        return self._read(self._models.pool[number], number + 2)

    def _read(self, model: Checkpoint, place: int) -> Tensor:
        into = None if self._buffers is None else self._buffers[place]
        return model.read(self.name, self.rows, into=into)


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


OWN = "own:"
"""Begins the name of a model's own example set (``own:math``): no alias and no other set has a colon."""
EVERY_OWN = OWN + "*"
"""Declares the own set of every model of the pool."""

REPORTED = "reported"
"""The example set of the AQI probes that reports are made on: for scorers alone, no method may declare it."""


def own(alias: str) -> str:
    """Return the name of the own example set of a model of the pool."""
    return OWN + alias


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a method or a scorer reads beside the family's models: all of it, and nothing else, is in its key."""

    examples: tuple[str, ...] = ()
    """Example sets: ``alignment``, ``refusals`` (of it), ``metric``, ``utility``, or ``EVERY_OWN``."""
    seed: bool = False
    """Whether anything is drawn at random."""
    probes: bool = False
    """Whether the selection probes are read."""
    merges: tuple[Merger, ...] = ()
    """Methods whose merged model is read."""

    def includes(self, examples: str) -> bool:
        """Whether an example set is declared."""
        return examples in self.examples or (examples.startswith(OWN) and EVERY_OWN in self.examples)


class Undeclared(RuntimeError):
    """A method or a scorer asked for an input that it does not declare: a fault of its code, not of the request."""

    def __init__(self, reader: str, what: str, declaration: str) -> None:
        super().__init__(f"'{reader}' reads {what} without declaring it: add {declaration} to its inputs")


class MergeContext(Protocol):
    """What ``Merger.fit`` may ask for, as far as ``Merger.inputs`` declares it; otherwise ``Undeclared`` is raised.

    Heavy results are artifacts of the store, made once.
    """

    models: Models

    @property
    def seed(self) -> int:
        """The seed of all that is drawn."""

    @property
    def precision(self) -> str:
        """Dtype of the passes that statistics are taken on: ``float32`` or ``bfloat16`` (autocast); sums are fp32."""

    def examples(self, name: str) -> Sequence[Example]:
        """Return an example set, tokenised: ``alignment``, ``refusals`` (of it), ``metric``, ``utility`` (all
        experts' own), or ``own(alias)``."""

    def examples_digest(self, name: str) -> str:
        """Return what stands for the content of an example set in the recipe of a statistic."""

    def probes(self) -> Probes:
        """Return the selection probes, which no report is made on."""

    def cached(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Return the artifact of a statistic.

        ``recipe`` says all that the statistic is a function of: models by ``Checkpoint.identity``, example sets by
        digest, the seed if anything is drawn. Threads, package versions and the machine's class are added.
        """

    def loaded(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """Return a causal language model with these weights in fp32 for gradients (no dropout)."""

    def barycentre(self, weights: Sequence[float] | None = None) -> Checkpoint:
        """Return the average of the pool (uniform, or with weights that sum to 1) as a checkpoint."""

    def merged(self, merger: Merger) -> Checkpoint:
        """Return what another method makes of the same pool as a checkpoint; its facts are not recorded."""

    def record(self, **facts: Any) -> None:
        """Put facts into the manifest of the merge (certificate, fractions, weights)."""

    def record_block(self, name: str, **facts: float) -> None:
        """Put per-tensor facts, gathered while the rule runs, into the manifest of the merge."""


@dataclass(frozen=True, kw_only=True)
class Merger(ABC):
    """How to merge. Fields are the config (one YAML each); ``__post_init__`` checks them, naming the key."""

    name: ClassVar[str]
    """A stable word for keys and tables."""
    version: ClassVar[int] = 1
    """Part of the key: raise it when the mathematics changes."""
    elementwise: ClassVar[bool] = True
    """Whether the rule may be fed row blocks in any order, by several threads. Otherwise one thread feeds it: the
    matrices of decoder layers whole, row blocks of everything else in order."""

    @property
    def inputs(self) -> Inputs:
        """What ``fit`` reads beside the models: nothing, unless a method says otherwise."""
        return Inputs()

    @property
    def kept_sides(self) -> tuple[str, ...]:
        """Sides (``input``, ``output``) of the Kronecker factors whose eigenbases ``fit`` keeps in the store."""
        return ()

    @abstractmethod
    def fit(self, ctx: MergeContext) -> Rule:
        """Do the whole-model work (statistics, thresholds) and return the rule."""

    def concluded(self, facts: Mapping[str, Any], blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the facts of a finished merge: what ``fit`` recorded, and what the rule recorded by tensor."""
        return {**facts, "blocks": dict(blocks)} if blocks else dict(facts)

    def switched_off(self, facts: Mapping[str, Any]) -> str:
        """Return why a setting switches off what defines the method; empty where it does not.

        ``facts`` are those of its merge; without any, what the fields alone tell. Such a setting is not selected.
        """
        return ""

    def warning(self, facts: Mapping[str, Any]) -> str:
        """Return what the card of a merge must warn of, given its facts; usually nothing."""
        return ""


def block_of(models: Models, name: str, rows: slice = slice(None)) -> Block:
    """Return rows of one view of every model; they are read when they are asked for."""
    return MappedBlock(models, name, rows)


def by_rows(rule: Rule, block: Block) -> Tensor:
    """Return what an elementwise rule makes of a block, cut into cache-sized ones: no model is in memory whole."""
    if not block.shape:
        return rule(block)
    merged = torch.empty(block.shape)
    for rows in row_blocks(block.shape):
        merged[rows] = rule(block.part(rows))
    return merged


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the fp32 mean of equally shaped tensors (uniform, or with weights that sum to 1).

    It is summed, and divided where the weights are uniform, in float64. A uniform sum of fp32 values is exact, and
    their order drops out, wherever the largest magnitude that meets at a coordinate is at most 2^25 times the
    least one that is not zero (up to 16 models; bf16 values: 2^41 times).
    """
    tensors = list(tensors)
    if weights is None and (fused := compiled(tensors)):
        merged = torch.empty_like(tensors[0])
        fused.mean_into(flat(merged), tuple(map(flat, tensors)))
        return merged
    return (total(tensors, weights) / (len(tensors) if weights is None else 1)).float()


def step(base: Tensor, pool: Sequence[Tensor], scale: float) -> Tensor:
    """Return base + scale * sum_k (pool_k - base): differences in fp32, the rest in float64, rounded once to fp32."""
    pool = list(pool)
    if fused := compiled([base, *pool]):
        merged = torch.empty_like(base)
        fused.step_into(flat(merged), flat(base), tuple(map(flat, pool)), scale)
        return merged
    return (base + scale * total([theta - base for theta in pool])).float()


def total(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the (weighted) sum of equally shaped tensors in float64: new memory."""
    doubles = (tensor.to(torch.float64, copy=True) for tensor in tensors)
    if weights is not None:
        doubles = (one.mul_(weight) for one, weight in zip(doubles, weights, strict=True))
    summed = next(doubles)
    for one in doubles:
        summed += one
    return summed


def flat(tensor: Tensor) -> Any:
    """Return the numbers of a contiguous tensor as a flat numpy array that shares its memory."""
    return tensor.detach().view(-1).numpy()


def compiled(tensors: Sequence[Tensor]) -> Any:
    """Return the module ``fused`` if its loops can take these tensors, else None: torch's operations do the same."""
    plain = all(one.dtype == torch.float32 and one.is_cpu and one.is_contiguous() for one in tensors)
    return _compiled() if plain else None


@cache
def _compiled() -> Any:
    try:
        from alignmerge.engine import fused
    except (ImportError, RuntimeError):  # no numba for this Python or CPU, or no place for what it compiles
        return None
    return fused


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
