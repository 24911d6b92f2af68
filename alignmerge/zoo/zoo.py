"""From a family's references to folders with weights: fetched, converted or trained once, and opened as one set."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.examples import Example, read_jsonl, render, tokenise
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import CONFIG, INDEX
from alignmerge.engine.keys import computed_here
from alignmerge.engine.language import (
    DECODING,
    Progress,
    greedy,
    load_model,
    load_tokenizer,
    save_model,
    threads,
)
from alignmerge.engine.manifest import file_sha256, versions
from alignmerge.engine.merger import Models, Probes
from alignmerge.engine.progress import silent
from alignmerge.engine.store import Artifact, Store
from alignmerge.zoo import lessons, sets
from alignmerge.zoo.native import NativeModel, plain_examples
from alignmerge.zoo.random_model import RandomModel
from alignmerge.zoo.training import Recipe, train

ANSWER_TOKENS = 40
ANSWER_THREADS = 2
CONVERSION = 1
READING = 1
"""Raise it when a folder's weights are read otherwise."""


class Location(NamedTuple):
    """A model's folder with the digest of its weights, which is known without reading them."""

    folder: Path
    digest: str

    def opened(self, where: str) -> Checkpoint:
        """Open the folder (headers only)."""
        return Checkpoint.open(self.folder, where).known_as(self.digest)


@dataclass(frozen=True)
class Zoo:
    """Everything that a family's models, prompts and example sets are made from: the ``Source`` of its merges."""

    family: Family
    corpus: Any
    """A corpus config, e.g. ``alignmerge.zoo.corpus.Packaged``."""
    store: Store
    assets: Assets
    seed: int = 0

    def frozen(self) -> Self:
        """Return the same zoo over a store that makes nothing: what is missing raises ``NotMade``."""
        store = Store(self.store.root, frozen=True)
        return replace(self, store=store, assets=Assets(store, self.assets.checksums))

    def asset(self, reference: str) -> Path:
        """Return the local path of a package reference."""
        return self.assets.path(reference, reference)

    def source(self, key: str, progress: Progress = silent) -> Location:
        """Return where the model ``base``, ``anchor``, ``pretrained`` or ``experts.<alias>`` lies.

        ``<key>@<step>`` is that model as it was after a step of its training that its recipe keeps (``kept``).
        """
        if not self.store.frozen:
            return self._source(key, progress)
        if key not in self._located:  # every cell of a grid asks again, and what is there stays as it is
            self._located[key] = self._source(key, progress)
        return self._located[key]

    @cached_property
    def _located(self) -> dict[str, Location]:
        return {}

    def _source(self, key: str, progress: Progress) -> Location:
        key, _, step = key.partition("@")
        reference = self.family.references()[key]
        if step:
            return self._kept(key, step, progress)
        if reference.startswith("zoo:"):
            self._ancestors(key)
            artifact = self._from_recipe(reference.removeprefix("zoo:"), progress)
            return Location(artifact.path, artifact.digest)
        if reference.endswith(".gguf"):
            artifact = self._converted(reference, f"family.{key}")
            return Location(artifact.path, artifact.digest)
        folder = self.assets.path(reference, f"family.{key}")
        return Location(folder, self.digest_of(folder, f"family.{key}"))

    def trained(self) -> list[str]:
        """Return the keys of models that are trained here from the base (they can be trained side by side)."""
        return [key for key in self.family.references() if "base" in self._ancestors(key)]

    def stages(self) -> list[list[str]]:
        """Return the keys of what has to be made: a stage needs those before it, its own models not each other.

        The base stands among them even where it is only fetched, since everything is measured against it.
        """
        stages: dict[int, list[str]] = {}
        for key, reference in self.family.references().items():
            if key == "base" or reference.startswith("zoo:"):
                stages.setdefault(len(self._ancestors(key)), []).append(key)
        return [stages[depth] for depth in sorted(stages)]

    def kept(self, key: str) -> list[str]:
        """Return the keys ``<key>@<step>`` of the training of a model, in the order of the steps."""
        recipe = self.family.recipe_of(key)
        return [f"{key}@{step}" for step in recipe.keep] if isinstance(recipe, Recipe) else []

    def models(self) -> Models:
        """Open every model (headers only), its digest known; raises BadRequest with every conflict found."""
        found = BadRequest.gathered({key: partial(self.source, key) for key in self.family.references()})
        folders = {key: location.folder for key, location in found.items()}
        models = open_models(folders, self.family.allow_config_differences)
        for model in filter(None, (models.base, models.pretrained, *models.pool)):
            model.known_as(found[model.where.removeprefix("family.")].digest)
            model.speaking(self.family.chat_template)
        return models

    def opened(self, key: str) -> Checkpoint:
        """Open one model (headers only) with its digest and the family's chat template."""
        return self.source(key).opened(f"family.{key}").speaking(self.family.chat_template)

    def tokenizer(self, folder: Path) -> Any:
        """Load the tokenizer of a folder, with the family's chat template where it has one."""
        return load_tokenizer(folder, self.family.chat_template)

    def digest_of(self, folder: Path, where: str) -> str:
        """Hash a folder outside the store once; size and time of its files tell whether it changed."""
        read = [*folder.glob("*.safetensors"), *folder.glob(INDEX), *folder.glob(CONFIG)]
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(read) if p.is_file()]
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()

        def make(_: Path) -> dict[str, Any]:
            return {"digest": Checkpoint.open(folder, where).digest}

        Checkpoint.open(folder, where)
        return self.store.obtain("digests", {"place": place, "files": stats, "version": READING}, make).digest

    @cached_property
    def prompts(self) -> Artifact:
        """The corpus folder; its digest stands for its content."""
        recipe = {"corpus": self.corpus.name, "version": self.corpus.version, **asdict(self.corpus)}
        recipe["packages"] = dict(self.assets.checksums)
        return self.store.obtain("corpus", recipe, self._write_corpus)

    @cached_property
    def lessons(self) -> Artifact:
        """The lesson folder: training sets, the alignment set and the metric set."""
        recipe: dict[str, Any] = {"version": lessons.VERSION, "seed": self.seed}
        if lessons.distilled(self.prompts.path):
            answering = self._identity(self._answering())
            recipe |= {"answered by": answering, "tokens": ANSWER_TOKENS, "decoding": DECODING}
            recipe |= {"dtype": self.family.dtype, "batch_size": self.family.batch_size}
            recipe |= computed_here(self.family)
        recipe["prompts"] = {}
        for split in lessons.SPLITS:
            recipe["prompts"][split] = folder_digest(self.prompts.path / split, without="probes.jsonl")
        return self.store.obtain("lessons", recipe, self._write_lessons)

    def examples(self, name: str) -> list[Example]:
        """Return an example set by the names of ``MergeContext.examples``, tokenised by the base's tokenizer."""
        records = sets.records(self, name)
        tokenizer = self.tokenizer(self.source("base").folder)
        return tokenise(tokenizer, records, self.family.max_length, self.family.date)

    def examples_digest(self, name: str) -> str:
        """Return what stands for an example set in keys: its records and all that makes token ids of them."""
        if name not in self._digests:
            self._digests[name] = content_digest(sets.records(self, name), self._reading("base"))
        return self._digests[name]

    def probes(self) -> Probes:
        """Return the selection probes of the corpus, rendered and tokenised."""
        return sets.probes(self, self.tokenizer(self.source("base").folder))

    def probes_digest(self) -> str:
        """Return what stands for the selection probes in keys."""
        return content_digest(sets.probe_records(self), self._reading("base"))

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def _reading(self, key: str) -> dict[str, Any]:
        """Return what token ids depend on beside the texts: a model's tokenizer, the date, the length."""
        family, facts = self.family, {"tokenizer": self.opened(key).companions["tokenizer"]}
        return {**facts, "date": family.date, "max_length": family.max_length}

    def _identity(self, key: str) -> dict[str, Any]:
        """Return what a model and the ids that it reads depend on."""
        return {**self.opened(key).identity, **self._reading(key)}

    def _write_corpus(self, folder: Path) -> dict[str, Any]:
        self.corpus.write(self.asset, folder)
        return {"digest": folder_digest(folder)}

    def _write_lessons(self, folder: Path) -> dict[str, Any]:
        lessons.write(self.prompts.path, self._answer, folder, self.seed)
        return {"digest": folder_digest(folder)}

    def _answer(self, prompts: Sequence[str]) -> list[tuple[str, bool]]:
        folder = self.source(self._answering()).folder
        tokenizer, model = self.tokenizer(folder), load_model(folder, self.family.dtype)
        rendered = [render(tokenizer, prompt, self.family.date) for prompt in prompts]
        size = self.family.batch_size
        with threads(ANSWER_THREADS):
            return greedy(model, tokenizer, rendered, max_new_tokens=ANSWER_TOKENS, batch_size=size)

    def _answering(self) -> str:
        """Return the model that answers benign prompts: the base, or the model that it is trained from here."""
        return ["base", *self._ancestors("base")][-1]

    def _from_recipe(self, name: str, progress: Progress) -> Artifact:
        recipe = self.family.recipes[name]
        if isinstance(recipe, RandomModel):
            return self._random(recipe)
        if isinstance(recipe, NativeModel):
            return self._native(recipe, progress)
        return self._trained(name, recipe, progress)

    def _random(self, recipe: RandomModel) -> Artifact:
        facts = {"random": asdict(recipe), "version": recipe.version, "seed": self.seed}
        facts |= {"corpus": self.prompts.digest, **computed_here(self.family)}
        return self.store.obtain("models", facts, lambda f: recipe.make(self.prompts.path, f, self.seed))

    def _native(self, recipe: NativeModel, progress: Progress) -> Artifact:
        seed = self.seed if recipe.seeded else 0
        facts = {"native": asdict(recipe), "version": recipe.version, "training": recipe.training.version}
        facts |= {"seed": seed, "corpus": self.prompts.digest, **computed_here(self.family)}

        def make(folder: Path) -> dict[str, Any]:
            with threads(self.family.threads):
                model, tokenizer, losses = recipe.make(self.prompts.path, seed, progress)
            return self._made(losses, save_model(model, tokenizer, folder))

        return self.store.obtain("models", facts, make)

    def _trained(self, name: str, recipe: Recipe, progress: Progress) -> Artifact:
        seed = self.seed if recipe.seeded else 0
        facts = {"recipe": asdict(recipe), "version": recipe.version, "seed": seed}
        facts |= {"from": self._identity(recipe.start), "lessons": self._lesson_digest(recipe)}
        facts |= computed_here(self.family)

        def make(folder: Path) -> dict[str, Any]:
            start = self.source(recipe.start).folder
            tokenizer, model = self.tokenizer(start), load_model(start, gradients=True)
            examples, steps = self._lesson_examples(recipe, tokenizer, name), {}

            def keep(step: int) -> None:
                steps[str(step)] = save_model(model, tokenizer, folder / "steps" / str(step))

            with threads(self.family.threads):
                losses = train(model, examples, replace(recipe, seed=recipe.seed + seed), progress, keep)
            return {**self._made(losses, save_model(model, tokenizer, folder)), "steps": steps}

        return self.store.obtain("models", facts, make)

    def _made(self, losses: Sequence[float], digest: str) -> dict[str, Any]:
        """Return the facts of a model that was trained here."""
        thinned = [round(loss, 4) for loss in losses[:: max(1, len(losses) // 50)]]
        return {"digest": digest, "loss": thinned, "family": self.family.name}

    def _lesson_digest(self, recipe: Recipe) -> str:
        """Return what stands for a recipe's lessons; those of the corpus itself need no base to have been made."""
        if recipe.lessons in lessons.OF_CORPUS:
            return file_sha256(self.prompts.path / f"train/{recipe.lessons}.jsonl")
        return file_sha256(self.lessons.path / f"{recipe.lessons}.jsonl")

    def _lesson_examples(self, recipe: Recipe, tokenizer: Any, name: str) -> list[Example]:
        if recipe.lessons == "pretrain":
            return plain_examples(tokenizer, self.prompts.path)
        if recipe.lessons in lessons.OF_CORPUS:
            records = lessons.taught(self.prompts.path, recipe.lessons)
        else:
            records = read_jsonl(self.lessons.path / f"{recipe.lessons}.jsonl", f"family.recipes.{name}")
        return tokenise(tokenizer, records, self.family.max_length, self.family.date)

    def _ancestors(self, key: str) -> list[str]:
        """Return the models that a model is trained from, the nearest first.

        Raises BadRequest, naming the recipe, if there is no such model or the models go round in a circle.
        """
        found: list[str] = []
        while isinstance(recipe := self.family.recipe_of(key), Recipe):
            name = self.family.references()[key].removeprefix("zoo:")
            if recipe.start not in self.family.references() or recipe.start in found:
                allowed = "a model of the family that is not trained from this one"
                raise BadRequest.of(f"family.recipes.{name}.start", recipe.start, allowed)
            key = recipe.start
            found.append(key)
        return found

    def _kept(self, key: str, step: str, progress: Progress) -> Location:
        if f"{key}@{step}" not in self.kept(key):
            allowed = ", ".join(self.kept(key)) or "no step"
            raise BadRequest.of(f"family.{key}", f"no step {step} is kept", allowed)
        artifact = self._from_recipe(self.family.references()[key].removeprefix("zoo:"), progress)
        return Location(artifact.path / "steps" / step, str(artifact.manifest["facts"]["steps"][step]))

    def _converted(self, reference: str, where: str) -> Artifact:
        template = self.family.chat_template
        recipe: dict[str, Any] = {"gguf": self.assets.identity(reference, where), "template": template}
        recipe |= {"conversion": CONVERSION, "versions": versions()}

        def make(folder: Path) -> dict[str, Any]:
            return {"digest": convert_gguf(self.assets.path(reference, where), template, folder)}

        return self.store.obtain("models", recipe, make)


def convert_gguf(path: Path, chat_template: str | None, folder: Path) -> str:
    """Dequantise GGUF weights once into an fp32 safetensors folder and return the digest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return save_model(model, tokenizer, folder)


def content_digest(records: Sequence[Any], reading: Any) -> str:
    """Return the sha256 of records and of all that makes token ids of them."""
    text = json.dumps([list(records), reading], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_digest(folder: Path, without: str = "") -> str:
    """Return the sha256 over the paths and contents of a folder's files, those called ``without`` left out."""
    parts = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != without:
            parts[str(path.relative_to(folder))] = file_sha256(path)
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
