"""One merge as an artifact: its key, its record, its weights, its model card."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from alignmerge.engine.context import Context
from alignmerge.engine.family import public
from alignmerge.engine.keys import Source, merge_recipe
from alignmerge.engine.language import Progress, threads
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.progress import silent
from alignmerge.engine.store import Artifact
from alignmerge.engine.validation import FLOATS


@dataclass(frozen=True)
class Merge:
    """A method on the models of a family under a seed."""

    merger: Merger
    source: Source
    models: Models
    seed: int

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """What the merged weights are a function of."""
        return merge_recipe(self.merger, self.source, self.models, self.seed)

    @property
    def folder(self) -> Path:
        """Where the merged weights lie, or will lie."""
        return self.source.store.path("weights", self._folder_recipe)

    @property
    def bytes(self) -> int:
        """How many bytes the merged weights take."""
        return sum(spec.numel * FLOATS[spec.dtype].itemsize for spec in self.models.base.values())

    def record(self, progress: Progress = silent) -> Artifact:
        """Return digest and certificate, merging if nobody has; the weights may be dropped later."""

        def make(folder: Path) -> dict[str, Any]:
            facts = {"family": self.source.family.name, "parameters": self.models.base.parameters}
            return {**self.weights(progress).manifest["facts"], **facts}

        return self.source.store.obtain("merges", self.recipe, make)

    def weights(self, progress: Progress = silent) -> Artifact:
        """Return the folder of the merged model, writing it again if its weights were dropped."""
        write = partial(self.write, progress=progress)
        return self.source.store.obtain("weights", self._folder_recipe, write)

    @contextmanager
    def held(self) -> Iterator[Artifact]:
        """Yield the folder of the merged model, which nobody deletes meanwhile; the last holder drops it."""
        store = self.source.store
        with store.held("weights", self._folder_recipe):
            artifact, recorded = self.weights(), self.record().digest
            if artifact.digest != recorded:
                given = f"{artifact.digest} is not {recorded}"
                raise ArithmeticError(f"the merge was built again and differs: {given}")
            yield artifact
        store.drop("weights", self._folder_recipe)

    def write(self, folder: Path, progress: Progress = silent) -> dict[str, Any]:
        """Merge into ``folder``, an ordinary Hugging Face folder with a card, and return the facts."""
        merger, models = self.merger, self.models
        ctx = Context(self.source, models, merger.name, merger.inputs, self.seed)
        with threads(self.source.family.threads):
            rule = merger.fit(ctx)
            digest = merge(rule, models, folder, elementwise=merger.elementwise, progress=progress)
        models.base.furnish(folder)
        facts = {"digest": digest, **merger.concluded(ctx.facts, ctx.blocks)}
        (folder / "README.md").write_text(self._card(facts))
        return facts

    @cached_property
    def _folder_recipe(self) -> dict[str, Any]:
        """The recipe of the folder: that of the weights, and the base's files that are copied beside them."""
        return {**self.recipe, "companions": self.models.base.companions}

    def _card(self, facts: Mapping[str, Any]) -> str:
        family = self.source.family
        fields = "\n".join(f"    {key}: {value}" for key, value in asdict(self.merger).items())
        references = family.references().items()
        inputs = "\n".join(f"- {key}: `{public(reference)}`" for key, reference in references)
        notes = "".join(f"\nNote: {note}\n" for note in (family.note, self.merger.warning(facts)) if note)
        return (
            "---\nlibrary_name: transformers\ntags: [merge, alignmerge]\n---\n"
            f"# {family.name}: {self.merger.name}\n\nMade by the AlignMerge harness.\n{notes}\n"
            f"Inputs:\n\n{inputs}\n\nMethod `{self.merger.name}`:\n\n{fields}\n\n"
            f"Weights BLAKE3: `{facts['digest']}`\n"
        )
