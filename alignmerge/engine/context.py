"""What a method or a scorer may ask for while it works: exactly what it declares, and statistics made once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example
from alignmerge.engine.keys import Source, computed_here, merge_recipe, significant
from alignmerge.engine.language import load_model
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Inputs, Merger, Models, Probes, Rule, Undeclared, average
from alignmerge.engine.store import Artifact, Make
from alignmerge.engine.views import VERSION as VIEWS


@dataclass
class Context:
    """The ``MergeContext`` of one method (or scorer) on one family."""

    source: Source
    models: Models
    reader: str
    """Name of the method or scorer, for messages."""
    inputs: Inputs
    """What it declares."""
    given_seed: int
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of all that is drawn; raises Undeclared if it is not declared, as every other input does."""
        self._require(self.inputs.seed, "the seed", "seed=True")
        return self.given_seed

    @property
    def precision(self) -> str:
        """The family's dtype, which is that of its forward passes everywhere; half precision is bf16 here."""
        if self.source.family.dtype == "float32":
            return "float32"
        return "bfloat16"

    def examples(self, name: str) -> Sequence[Example]:
        """Return a tokenised example set."""
        self._require_examples(name)
        return self.source.examples(name)

    def examples_digest(self, name: str) -> str:
        """Return what stands for the content of an example set."""
        self._require_examples(name)
        return self.source.examples_digest(name)

    def probes(self) -> Probes:
        """Return the selection probes."""
        self._require(self.inputs.probes, "the selection probes", "probes=True")
        return self.source.probes()

    def cached(self, stage: str, recipe: Mapping[str, Any], make: Make) -> Artifact:
        """Return the artifact of a statistic; threads, versions and the machine's class are part of its key."""
        full = {**recipe, **computed_here(self.source.family), "views": VIEWS}
        facts = {"family": self.source.family.name}
        return self.source.store.obtain(stage, full, lambda folder: {**(make(folder) or {}), **facts})

    def loaded(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """Return the fp32 model of a checkpoint, for gradients."""
        model: torch.nn.Module = load_model(checkpoint.folder, gradients=True)
        return model

    def barycentre(self, weights: Sequence[float] | None = None) -> Checkpoint:
        """Return the average of the pool as a folder that gradients can be taken at."""
        pool = [model.digest for model in self.models.pool]
        if weights is None:
            recipe: dict[str, Any] = {"average of": sorted(pool)}
        else:
            recipe = {"weighted average of": pool, "weights": list(weights)}

        def rule() -> Rule:
            return lambda block: average(block.pool, weights)

        return self._checkpoint(recipe, rule, elementwise=True)

    def merged(self, merger: Merger) -> Checkpoint:
        """Return what another method makes of the same pool, as a folder that gradients can be taken at."""
        declared = merger in self.inputs.merges
        self._require(declared, f"what '{merger.name}' makes", f"merges=({type(merger).__name__}(...),)")
        apart = Context(self.source, self.models, merger.name, merger.inputs, self.given_seed)
        recipe = {"merge": merge_recipe(merger, self.source, self.models, self.given_seed)}
        return self._checkpoint(recipe, lambda: merger.fit(apart), elementwise=merger.elementwise)

    def record(self, **facts: Any) -> None:
        """Put facts into the manifest of the merge."""
        self.facts |= facts

    def record_block(self, name: str, **facts: float) -> None:
        """Put facts of one tensor into the manifest of the merge."""
        self.blocks[name] = {key: significant(value) for key, value in facts.items()}

    def _require(self, declared: bool, what: str, declaration: str) -> None:
        if not declared:
            raise Undeclared(self.reader, what, declaration)

    def _require_examples(self, name: str) -> None:
        self._require(self.inputs.includes(name), f"the example set '{name}'", f"examples=({name!r},)")

    def _checkpoint(
        self, recipe: Mapping[str, Any], rule: Callable[[], Rule], *, elementwise: bool
    ) -> Checkpoint:
        full = {**recipe, "base": self.models.base.identity, "companions": self.models.base.companions}

        def make(folder: Path) -> dict[str, Any]:
            digest = merge(rule(), self.models, folder, elementwise=elementwise)
            self.models.base.furnish(folder)
            return {"digest": digest}

        artifact = self.source.store.obtain("models", full, make)
        return Checkpoint.open(artifact.path, "a merge within a merge").known_as(artifact.digest)
