"""From a family's references to folders with weights: fetched, converted or trained once, and opened as one set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.examples import Example, read_jsonl, render, tokenise
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.language import Progress, greedy, load_model, load_tokenizer, threads
from alignmerge.engine.manifest import file_sha256, versions
from alignmerge.engine.merger import Models
from alignmerge.engine.progress import silent
from alignmerge.engine.store import Artifact, Store
from alignmerge.zoo import lessons
from alignmerge.zoo.native import NativeModel, plain_examples
from alignmerge.zoo.random_model import RandomModel
from alignmerge.zoo.training import Recipe, train

ANSWER_TOKENS = 40
CONVERSION = 1


class Source(NamedTuple):
    """A model's folder with what stands for its content in recipes."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Zoo:
    """Everything that a family's models, prompts and example sets are made from."""

    family: Family
    corpus: Any
    """A corpus config, e.g. ``alignmerge.zoo.corpus.Packaged``."""
    store: Store
    assets: Assets
    seed: int = 0

    def frozen(self) -> Zoo:
        """Return the same zoo over a store that makes nothing: what is missing raises ``NotMade``."""
        store = Store(self.store.root, frozen=True)
        return replace(self, store=store, assets=Assets(store, self.assets.checksums))

    def asset(self, reference: str) -> Path:
        """Return the local path of a package reference."""
        return self.assets.path(reference, reference)

    @cached_property
    def prompts(self) -> Artifact:
        """The corpus folder."""
        recipe = {"corpus": type(self.corpus).__name__, "version": self.corpus.version, **asdict(self.corpus)}
        recipe["packages"] = dict(self.assets.checksums)
        return self.store.obtain("corpus", recipe, self._write_corpus)

    def source(self, key: str, progress: Progress = silent) -> Source:
        """Return folder and digest of the model ``base``, ``anchor``, ``pretrained`` or ``experts.<alias>``.

        ``<key>@<step>`` is that model as it was after a step of its training that its recipe keeps (``kept``).
        """
        key, _, step = key.partition("@")
        reference = self.family.references()[key]
        if step:
            return self._kept(key, step, progress)
        if reference.startswith("zoo:"):
            self._ancestors(key)
            artifact = self._from_recipe(reference.removeprefix("zoo:"), progress)
            return Source(artifact.path, artifact.digest)
        if reference.endswith(".gguf"):
            artifact = self._converted(reference, f"family.{key}")
            return Source(artifact.path, artifact.digest)
        folder = self.assets.path(reference, f"family.{key}")
        return Source(folder, self.digest_of(folder, f"family.{key}"))

    def trained(self) -> list[str]:
        """Return the keys of models that are trained here from the base (they can be trained side by side)."""
        return [key for key in self.family.references() if "base" in self._ancestors(key)]

    def stages(self) -> list[list[str]]:
        """Return the keys of what has to be made: a stage needs those before it, its own models not each other.

        The base stands among them even where it is only fetched, since everything is measured against it.
        """
        made = [key for key, ref in self.family.references().items() if key == "base" or ref.startswith("zoo:")]
        depths = {key: len(self._ancestors(key)) for key in made}
        return [[key for key in made if depths[key] == depth] for depth in sorted(set(depths.values()))]

    def kept(self, key: str) -> list[str]:
        """Return the keys ``<key>@<step>`` of the training of a model, in the order of the steps."""
        recipe = self._recipe(key)
        return [f"{key}@{step}" for step in recipe.keep] if isinstance(recipe, Recipe) else []

    def models(self) -> Models:
        """Open every model (headers only) and check that they agree; digests are known without reading weights.

        Raises:
            BadRequest: with every conflict found.
        """
        sources: dict[str, Source] = {}
        faults: list[Fault] = []
        for key in self.family.references():
            try:
                sources[key] = self.source(key)
            except BadRequest as error:
                faults += error.faults
        if faults:
            raise BadRequest(faults)
        models = open_models({key: source.folder for key, source in sources.items()})
        opened = {"base": models.base, "anchor": models.anchor, "pretrained": models.pretrained}
        opened |= {f"experts.{alias}": checkpoint for alias, checkpoint in models.experts.items()}
        for key, source in sources.items():
            checkpoint = opened[key]
            assert checkpoint is not None
            checkpoint.__dict__["digest"] = source.digest
        return models

    @cached_property
    def lessons(self) -> Artifact:
        """The lesson folder: training sets, the alignment set and the metric set."""
        recipe: dict[str, Any] = {"version": lessons.VERSION, "seed": self.seed}
        if lessons.distilled(self.prompts.path):
            recipe["base"] = self.source("base").digest
        splits = {split: self.prompts.path / split for split in lessons.SPLITS}
        recipe["prompts"] = {
            split: _folder_digest(folder, without="probes.jsonl") for split, folder in splits.items()
        }
        return self.store.obtain("lessons", recipe, self._write_lessons)

    def examples_digest(self) -> dict[str, str]:
        """Return what stands for the example sets in the key of a method that reads them."""
        given = {"alignment": self.family.alignment, "metric": self.family.metric}
        digests = {
            name: file_sha256(_existing(path, f"family.{name}"))
            for name, path in given.items()
            if path is not None
        }
        return digests if len(digests) == len(given) else {**digests, "lessons": self.lessons.key}

    def examples(self, name: str) -> list[Example]:
        """Return the tokenised set ``alignment``, ``metric`` or that of a pool alias.

        The anchor's own set is ``alignment``; an expert's is the start of its lessons where it was trained here, and
        ``metric`` otherwise.
        """
        where = f"family.{name}"
        given = {"alignment": self.family.alignment, "metric": self.family.metric}.get(name)
        if given is not None:
            records = read_jsonl(Path(given), where)
        elif name == "anchor":
            return self.examples("alignment")
        elif name in self.family.experts:
            reference = self.family.experts[name]
            recipe = self.family.recipes.get(reference.removeprefix("zoo:"))
            if recipe is None or not reference.startswith("zoo:"):
                return self.examples("metric")
            records = read_jsonl(self.lessons.path / f"{recipe.lessons}.jsonl", where)[:EXPERT_EXAMPLES]
        else:
            records = read_jsonl(self.lessons.path / f"{name}.jsonl", where)
        return tokenise(load_tokenizer(self.source("base").folder), records, self.family.max_length)

    def _write_corpus(self, folder: Path) -> dict[str, Any]:
        self.corpus.build(self.asset, folder)
        return {"digest": _folder_digest(folder)}

    def _write_lessons(self, folder: Path) -> dict[str, Any]:
        lessons.build(self.prompts.path, self._answer, folder, self.seed)
        return {"digest": _folder_digest(folder)}

    def _answer(self, prompts: Sequence[str]) -> list[tuple[str, bool]]:
        """Return the base's own replies."""
        base = self.source("base").folder
        tokenizer, model = load_tokenizer(base), load_model(base, self.family.dtype)
        rendered = [render(tokenizer, prompt) for prompt in prompts]
        size = self.family.batch_size
        with threads(2):
            return greedy(model, tokenizer, rendered, max_new_tokens=ANSWER_TOKENS, batch_size=size)

    def _from_recipe(self, name: str, progress: Progress) -> Artifact:
        recipe = self.family.recipes[name]
        if isinstance(recipe, RandomModel):
            facts = {"random": recipe.version, **asdict(recipe), "seed": self.seed + recipe.seed}
            facts |= {"corpus": self.prompts.key, "versions": versions()}
            return self.store.obtain("models", facts, lambda f: recipe.build(self.prompts.path, f, self.seed))
        if isinstance(recipe, NativeModel):
            return self._native(recipe, progress)
        return self._trained(name, recipe, progress)

    def _native(self, recipe: NativeModel, progress: Progress) -> Artifact:
        seed = self.seed if recipe.seeded else 0
        facts = {"native": recipe.facts(), "version": recipe.version, "training": recipe.training.version}
        facts |= {
            "seed": seed,
            "corpus": self.prompts.digest,
            "threads": self.family.threads,
            "versions": versions(),
        }

        def make(folder: Path) -> dict[str, Any]:
            with threads(self.family.threads):
                model, tokenizer, losses = recipe.build(self.prompts.path, seed, progress)
            return {"digest": save_model(model, tokenizer, folder), "loss": _thinned(losses)}

        return self.store.obtain("models", facts, make)

    def _trained(self, name: str, recipe: Recipe, progress: Progress) -> Artifact:
        start, seed = self.source(recipe.start), self.seed if recipe.seeded else 0
        facts = {"recipe": recipe.facts(), "version": recipe.version, "seed": seed, recipe.start: start.digest}
        facts |= {"threads": self.family.threads, "versions": versions(), **self._lesson_facts(recipe)}
        if seed:  # the first seed had the recipe's own order before there were others
            facts["order"] = recipe.seed + seed

        def make(folder: Path) -> dict[str, Any]:
            tokenizer, model = load_tokenizer(start.folder), load_model(start.folder, gradients=True)
            examples, steps = self._lesson_examples(recipe, tokenizer, name), {}

            def keep(step: int) -> None:
                steps[str(step)] = save_model(model, tokenizer, folder / "steps" / str(step))

            with threads(self.family.threads):
                losses = train(model, examples, replace(recipe, seed=recipe.seed + seed), progress, keep)
            made = {"digest": save_model(model, tokenizer, folder), "loss": _thinned(losses)}
            return {**made, "steps": steps} if steps else made

        return self.store.obtain("models", facts, make)

    def _lesson_facts(self, recipe: Recipe) -> dict[str, str]:
        """Return what stands for a recipe's lessons; those of the corpus itself need no base to have been made."""
        if recipe.lessons in lessons.OF_CORPUS:
            return {"corpus": file_sha256(self.prompts.path / f"train/{recipe.lessons}.jsonl")}
        return {"lessons": self.lessons.key}

    def _lesson_examples(self, recipe: Recipe, tokenizer: Any, name: str) -> list[Example]:
        if recipe.lessons == "pretrain":
            return plain_examples(tokenizer, self.prompts.path)
        if recipe.lessons in lessons.OF_CORPUS:
            records = lessons.taught(self.prompts.path, recipe.lessons)
        else:
            records = read_jsonl(self.lessons.path / f"{recipe.lessons}.jsonl", f"family.recipes.{name}")
        return tokenise(tokenizer, records, self.family.max_length)

    def _recipe(self, key: str) -> Any:
        """Return how a model is made here, or None where it comes from elsewhere."""
        reference = self.family.references()[key]
        return self.family.recipes[reference.removeprefix("zoo:")] if reference.startswith("zoo:") else None

    def _ancestors(self, key: str) -> list[str]:
        """Return the models that a model is trained from, the nearest first.

        Raises:
            BadRequest: naming the recipe, if there is no such model or the models go round in a circle.
        """
        found: list[str] = []
        while isinstance(recipe := self._recipe(key), Recipe):
            name = self.family.references()[key].removeprefix("zoo:")
            if recipe.start not in self.family.references() or recipe.start in found:
                allowed = "a model of the family that is not trained from this one"
                raise BadRequest.of(f"family.recipes.{name}.start", recipe.start, allowed)
            key = recipe.start
            found.append(key)
        return found

    def _kept(self, key: str, step: str, progress: Progress) -> Source:
        if f"{key}@{step}" not in self.kept(key):
            raise BadRequest.of(
                f"family.{key}", f"no step {step} is kept", ", ".join(self.kept(key)) or "no step"
            )
        artifact = self._from_recipe(self.family.references()[key].removeprefix("zoo:"), progress)
        return Source(artifact.path / "steps" / step, str(artifact.manifest["facts"]["steps"][step]))

    def _converted(self, reference: str, where: str) -> Artifact:
        recipe: dict[str, Any] = {
            "gguf": self.assets.identity(reference, where),
            "template": self.family.chat_template,
        }
        recipe |= {"conversion": CONVERSION, "versions": versions()}

        def make(folder: Path) -> dict[str, Any]:
            return {
                "digest": convert_gguf(self.assets.path(reference, where), self.family.chat_template, folder)
            }

        return self.store.obtain("models", recipe, make)

    def digest_of(self, folder: Path, where: str) -> str:
        """Hash a folder outside the store once; size and time of its files tell whether it changed."""
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()

        def make(_: Path) -> dict[str, Any]:
            return {"digest": Checkpoint.open(folder, where).digest}

        Checkpoint.open(folder, where)
        return self.store.obtain("digests", {"place": place, "files": stats}, make).digest


EXPERT_EXAMPLES = 64


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save weights, config and tokenizer as a Hugging Face folder and return the weights' digest."""
    vars(model.config).pop("auto_map", None)  # of a native class: it would point to code that is not there
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder, str(folder)).digest


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


def _thinned(losses: Sequence[float]) -> list[float]:
    return [round(loss, 4) for loss in losses[:: max(1, len(losses) // 50)]]


def _folder_digest(folder: Path, without: str = "") -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != without]
    parts = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def _existing(path: str, where: str) -> Path:
    if not Path(path).is_file():
        raise BadRequest.of(where, f"no such file: {path}", "a JSONL file with prompt and response")
    return Path(path)
