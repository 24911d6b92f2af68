"""Is the alignment subspace special: how much of a delta lies in it, and how far it is from the utility subspace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import MergeContext, check_range
from alignmerge.engine.views import layer_of
from eval.columns import Direction
from eval.scorers.interface import Sample, Scorer, Subject

if TYPE_CHECKING:
    from alignmerge.method import KroneckerBases

SIDES = ("alignment", "utility")


class _Part(NamedTuple):
    """A quantity and what a random subspace of the same rank is expected to have of it."""

    found: float
    by_chance: float


@dataclass(frozen=True, kw_only=True)
class Subspaces(Scorer):
    """Energy ratios and principal angles (the counter-evidence of arXiv 2505.14185 asks for both).

    ``energy_alignment`` = ||P_A d||^2_G / ||d||^2_G of d = theta - theta_IT, in units of what a random subspace of
    equal rank is expected to hold; ``energy_utility`` likewise for the experts' own data. ``overlap``: mean
    squared cosine of the principal angles between both subspaces in the metric, in the same units: 1 says that they
    meet as random ones do. Subspaces are the ``rank`` leading input directions of each matrix, as in ``geometry``.
    """

    relative = True
    columns: ClassVar[Mapping[str, Direction]] = {
        "energy_alignment": "info", "energy_utility": "info", "overlap": "info",
        "energy_alignment_by_layer": "info", "energy_utility_by_layer": "info", "overlap_by_layer": "info",
    }  # fmt: skip
    rank: int = 16
    """Directions of each subspace in each weight matrix."""
    damping: float = 0.1
    """eps of the metric, in units of its mean diagonal."""

    def __post_init__(self) -> None:
        check_range("scorer.subspaces.rank", self.rank, 1, 1e6)
        check_range("scorer.subspaces.damping", self.damping, 0, 1e6, open_low=True)

    def score(self, subject: Subject) -> Iterable[Sample]:
        """Yield totals and values by layer; a model that is theta_IT itself has no energy to divide."""
        from alignmerge.method import KroneckerBases

        ctx = subject.context()
        base = ctx.models.base
        bases = {side: KroneckerBases.of(ctx, base, "input", self.damping, examples=side) for side in SIDES}
        scored = Checkpoint.open(subject.folder, "scored model")
        for side in SIDES:
            yield from _samples(f"energy_{side}", self._energies(ctx, scored, bases[side]))
        yield from _samples("overlap", self._overlaps(bases))

    def _energies(
        self, ctx: MergeContext, scored: Checkpoint, bases: KroneckerBases
    ) -> Iterator[tuple[str, _Part]]:
        from alignmerge.subspace import Shield, energies

        for name in sorted(bases.owners):
            delta = scored.read(name) - ctx.models.base.read(name)
            energy = energies(Shield(None, bases.read(name), self.rank), delta)
            yield name, _Part(energy.inside, energy.total * min(1.0, self.rank / delta.shape[1]))

    def _overlaps(self, bases: Mapping[str, KroneckerBases]) -> Iterator[tuple[str, _Part]]:
        from alignmerge.subspace import principal_cosines

        for name in sorted(set(bases["alignment"].owners.values())):
            one, other = (bases[side].read(name) for side in SIDES)
            cosines = principal_cosines(one, other, self.rank)
            yield name, _Part(float(cosines.square().mean()), min(1.0, self.rank / len(one.values)))


def _samples(column: str, parts: Iterable[tuple[str, _Part]]) -> Iterator[Sample]:
    """Divide sums over matrices, in all and by layer, by what is expected of chance."""
    by_layer: dict[int, list[_Part]] = defaultdict(list)
    for name, part in parts:
        by_layer[layer_of(name) or 0].append(part)
    everything = [part for layer in by_layer.values() for part in layer]
    if not sum(part.by_chance for part in everything) > 0:
        return
    yield Sample("all", column, _ratio(everything))
    for layer, of_layer in sorted(by_layer.items()):
        yield Sample(f"layer/{layer:02d}", f"{column}_by_layer", _ratio(of_layer))


def _ratio(parts: Iterable[_Part]) -> float:
    found, by_chance = (sum(values) for values in zip(*parts, strict=True))
    return found / by_chance if by_chance > 0 else float("nan")
