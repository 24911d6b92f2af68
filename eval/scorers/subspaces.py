"""Is the alignment subspace special: how much of a delta is in it, how far is the utility subspace?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.merger import Inputs, MergeContext, check_range
from alignmerge.engine.views import layer_of
from alignmerge.kronecker import KroneckerBases
from alignmerge.subspace import Shield, energies, principal_cosines
from eval.columns import Column
from eval.scorers.interface import Sample, Scorer, Subject


class _Part(NamedTuple):
    """A quantity and what a random subspace of the same rank is expected to have of it."""

    found: float
    by_chance: float


@dataclass(frozen=True, kw_only=True)
class Subspaces(Scorer):
    """Energy ratios and principal angles (the counter-evidence of arXiv 2505.14185 asks for both).

    ``energy_alignment`` = ||P_A d||^2_G / ||d||^2_G of d = theta - theta_IT, in units of what a random
    subspace of equal rank is expected to hold; ``energy_utility`` likewise for the experts' own data.
    ``overlap``: mean squared cosine of the principal angles between both subspaces in the metric, in
    the same units: 1 says that they meet as random ones do. Subspaces are the ``rank`` leading input
    directions of each matrix, as in ``geometry``.
    """

    name = "subspaces"
    relative = True
    inputs = Inputs(examples=("alignment", "utility", "metric"))
    kept_sides = ("input",)
    columns: ClassVar[Mapping[str, Column]] = {
        "energy_alignment": Column("energy in S_A", "Geometry", "info", None, rank=8, tex=r"energy in $S_A$"),
        "energy_utility": Column("energy in S_U", "Geometry", "info", None, rank=9, tex=r"energy in $S_U$"),
        "overlap": Column(
            "overlap of S_A and S_U", "Geometry", "info", None, rank=10, tex=r"overlap of $S_A$ and $S_U$"
        ),
        "energy_alignment_by_layer": Column("energy in S_A", "Geometry", "info", by_layer=True),
        "energy_utility_by_layer": Column("energy in S_U", "Geometry", "info", by_layer=True),
        "overlap_by_layer": Column("overlap of S_A and S_U", "Geometry", "info", by_layer=True),
    }
    rank: int = 16  # directions of each subspace in each weight matrix
    damping: float = 0.1  # eps of the metric, in units of its mean diagonal

    def __post_init__(self) -> None:
        check_range("scorer.subspaces.rank", self.rank, 1, 1e6)
        check_range("scorer.subspaces.damping", self.damping, 0, 1e6, open_low=True)

    def score(self, subject: Subject) -> Iterable[Sample]:
        """Yield totals and values by layer; a model that is theta_IT itself has no energy to divide."""
        ctx = subject.context()
        scored = Checkpoint.open(subject.folder, "scored model")
        base = ctx.models.base
        alignment = KroneckerBases.of(ctx, base, "input", self.damping, examples="alignment")
        utility = KroneckerBases.of(ctx, base, "input", self.damping, examples="utility")
        yield from _samples("energy_alignment", self._energies(ctx, scored, alignment))
        yield from _samples("energy_utility", self._energies(ctx, scored, utility))
        yield from _samples("overlap", self._overlaps(alignment, utility))

    def _energies(
        self, ctx: MergeContext, scored: Checkpoint, bases: KroneckerBases
    ) -> Iterator[tuple[str, _Part]]:
        for name in sorted(bases.owners):
            delta = scored.read(name) - ctx.models.base.read(name)
            shield = Shield(None, bases.read(name), self.rank)
            energy = energies(shield.coefficients(delta), shield.rho)
            yield name, _Part(energy.inside, energy.total * min(1.0, self.rank / delta.shape[1]))

    def _overlaps(self, alignment: KroneckerBases, utility: KroneckerBases) -> Iterator[tuple[str, _Part]]:
        for name in sorted(set(alignment.owners.values())):
            one = alignment.read(name)
            cosines = principal_cosines(one, utility.read(name), self.rank)
            yield name, _Part(float(cosines.square().mean()), min(1.0, self.rank / len(one.values)))


def _samples(column: str, parts: Iterable[tuple[str, _Part]]) -> Iterator[Sample]:
    """Divide sums over matrices, in all and by layer, by what is expected of chance."""
    by_layer: dict[int, list[_Part]] = defaultdict(list)
    for name, part in parts:
        by_layer[layer_of(name) or 0].append(part)
    everything = list(chain.from_iterable(by_layer.values()))
    if not sum(part.by_chance for part in everything) > 0:
        return
    yield Sample("all", column, _ratio(everything))
    for layer, of_layer in sorted(by_layer.items()):
        yield Sample(f"layer/{layer:02d}", f"{column}_by_layer", _ratio(of_layer))


def _ratio(parts: Iterable[_Part]) -> float:
    found, by_chance = map(sum, zip(*parts, strict=True))
    if not by_chance > 0:
        return math.nan
    return found / by_chance
