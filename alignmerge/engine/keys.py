"""What numbers are functions of: recipes, from which the store's keys are made. No paths, no module names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from alignmerge.engine.device import machine_class
from alignmerge.engine.examples import Example
from alignmerge.engine.family import Family
from alignmerge.engine.manifest import versions
from alignmerge.engine.merger import EVERY_OWN, Inputs, Merger, Models, Probes, own
from alignmerge.engine.store import Store
from alignmerge.engine.views import VERSION as VIEWS


class Source(Protocol):
    """Where a family's data come from (``alignmerge.zoo``): models apart, all that a merge reads."""

    @property
    def family(self) -> Family:
        """The family's declaration."""

    @property
    def store(self) -> Store:
        """Where artifacts are kept."""

    def examples(self, name: str) -> Sequence[Example]:
        """Return a tokenised example set by the names of ``MergeContext.examples``."""

    def examples_digest(self, name: str) -> str:
        """Return the digest of an example set: records, tokenizer, chat template, date and length."""

    def probes(self) -> Probes:
        """Return the selection probes, rendered and tokenised."""

    def probes_digest(self) -> str:
        """Return the digest of the selection probes, made of the same parts as ``examples_digest``."""


def merge_recipe(merger: Merger, source: Source, models: Models, seed: int) -> dict[str, Any]:
    """Return what a merge is a function of; equal recipes give bit-equal weights.

    The machine's class is left out where nothing but elementwise arithmetic happens: that is equal everywhere.
    """
    pool = [[alias, model.identity] for alias, model in zip(models.aliases, models.pool, strict=True)]
    identities: dict[str, Any] = {"base": models.base.identity, "pool": pool}
    if models.pretrained is not None:
        identities["pretrained"] = models.pretrained.identity
    method = {"name": merger.name, "version": merger.version, "fields": plain_fields(merger)}
    recipe: dict[str, Any] = {"method": method, "models": identities, "views": VIEWS}
    declared = merger.inputs
    if not merger.elementwise or declared != Inputs():
        recipe |= computed_here(source.family)
    recipe |= declared_recipe(declared, source, models, seed)
    return recipe


def declared_recipe(inputs: Inputs, source: Source, models: Models, seed: int) -> dict[str, Any]:
    """Return what declared inputs add to a key: digests of example sets and probes, the seed, other merges."""
    recipe: dict[str, Any] = {}
    names = example_sets(inputs, models)
    if names:
        recipe["examples"] = {name: source.examples_digest(name) for name in names}
    if inputs.probes:
        recipe["probes"] = source.probes_digest()
    if inputs.seed:
        recipe["seed"] = seed
    if inputs.merges:
        recipe["merges"] = [merge_recipe(one, source, models, seed) for one in inputs.merges]
    return recipe


def example_sets(inputs: Inputs, models: Models) -> list[str]:
    """Return the names of the declared example sets, the own sets of the pool one by one."""
    names = [name for name in inputs.examples if name != EVERY_OWN]
    if EVERY_OWN in inputs.examples:
        names += map(own, models.aliases)
    return names


def computed_here(family: Family) -> dict[str, Any]:
    """Return what a computed number depends on beside its inputs: threads, package versions, machine class."""
    return {"threads": family.threads, "versions": versions(), "machine": machine_class()}


def plain_fields(of: Any) -> Any:
    """Return the fields of a frozen dataclass as JSON has them: infinity, which it lacks, becomes a word."""
    return _plain(asdict(of))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def significant(value: float) -> float:
    """Round to seven significant digits, all that fp32 has."""
    return float(f"{value:.7g}")
