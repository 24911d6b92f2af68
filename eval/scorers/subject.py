"""One model under measurement: what scorers look at, with everything heavy made once and kept in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignmerge.engine.context import Context
from alignmerge.engine.examples import read_jsonl, render, write_jsonl
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.keys import computed_here, declared_recipe
from alignmerge.engine.language import DECODING
from alignmerge.engine.manifest import file_sha256
from alignmerge.engine.merger import MergeContext
from alignmerge.engine.store import Artifact
from eval.scorers.interface import LoadedModel, Prompt, Sample, Scorer
from eval.scorers.tasks.checks import without_thought

if TYPE_CHECKING:
    import pandas as pd

    from alignmerge.engine.checkpoint import Checkpoint
    from alignmerge.engine.merger import Models
    from alignmerge.zoo.zoo import Zoo

COLUMNS = ("id", "column", "value", "prompt", "detail", "direction")
GENERIC = ("dtype", "batch_size", "max_length", "reply_tokens", "date")
"""Settings of a family that every number of its models depends on."""


@dataclass
class StoreSubject:
    """The ``Subject`` of a model folder, measured as its family says (dtype, batch size, threads)."""

    zoo: Zoo
    folder: Path
    identity: Mapping[str, str]
    """Digests of weights, config.json, generation config and tokenizer files: those that the folder has, or, where
    its merge was dropped, will have when it is made again."""
    split: str
    models: Models | None = None
    """The family's models, for scorers that measure distances; not needed by the others."""
    seed: int = 0
    _at_work: list[Scorer] = field(default_factory=list)
    """The scorer whose inputs ``context`` hands out, last."""

    def loaded(self) -> LoadedModel:
        """Return the model, loading it on first use."""
        return self._loaded

    @cached_property
    def _loaded(self) -> LoadedModel:
        from alignmerge.engine.language import load_model

        family = self.zoo.family
        return LoadedModel(load_model(self.folder, family.dtype), self._tokenizer, family.batch_size)

    @cached_property
    def _tokenizer(self) -> Any:
        return self.zoo.tokenizer(self.folder)

    def prompts(self, name: str) -> Sequence[Prompt]:
        """Return a prompt set of this split.

        Raises:
            BadRequest: if the split has no such set.
        """
        prompts = []
        for record in read_jsonl(self._prompt_file(name), name, ("id", "text")):
            facts = {key: value for key, value in record.items() if key not in ("id", "text")}
            prompts.append(Prompt(record["id"], record["text"], facts))
        return prompts

    def rendered(self, name: str) -> Sequence[str]:
        """Return each prompt of the set through the chat template."""
        date = self.zoo.family.date
        return [render(self._tokenizer, prompt.text, date) for prompt in self.prompts(name)]

    def replies(self, name: str) -> Sequence[str]:
        """Return the greedy reply to each prompt, generated once per model and stored.

        A thought that a reply begins with is left out of it, and marked in the record.
        """
        recipe = {"prompts": file_sha256(self._prompt_file(name)), **self.setting()}
        artifact = self.zoo.store.obtain("replies", recipe, lambda folder: self._generate(name, folder))
        records = read_jsonl(artifact.path / "replies.jsonl", name, ("id", "reply"))
        return [record["reply"] for record in records]

    def asset(self, reference: str) -> Path:
        """Return the local path of a package reference."""
        return self.zoo.asset(reference)

    def context(self) -> MergeContext:
        """Return the family's models and statistics, for the inputs that the scorer at work declares."""
        scorer = self._at_work[-1]
        return Context(self.zoo, self.family_models(), scorer.name, scorer.inputs, self.seed)

    def family_models(self) -> Models:
        """Return the family's models, opening them on first use."""
        if self.models is None:
            self.models = self.zoo.models()
        return self.models

    def setting(self) -> Mapping[str, Any]:
        """Return what every number depends on beside the prompts and the scorer."""
        family = self.zoo.family
        chosen = {key: getattr(family, key) for key in GENERIC}
        return {"model": dict(self.identity), "decoding": DECODING, **chosen, **computed_here(family)}

    def samples(self, scorer: Scorer) -> list[Sample]:
        """Let a scorer look at this model, with what it declares and nothing else."""
        self._at_work.append(scorer)
        try:
            return list(scorer.score(self))
        finally:
            self._at_work.pop()

    def _prompt_file(self, name: str) -> Path:
        path = self.zoo.prompts.path / self.split / f"{name}.jsonl"
        if not path.is_file():
            have = sorted(p.stem for p in path.parent.glob("*.jsonl"))
            raise BadRequest.of(f"prompt set '{name}'", f"not in the {self.split} split", ", ".join(have))
        return path

    def _generate(self, name: str, folder: Path) -> dict[str, Any]:
        from alignmerge.engine.language import greedy

        loaded = self.loaded()
        replies = greedy(
            loaded.model, loaded.tokenizer, self.rendered(name),
            max_new_tokens=self.zoo.family.reply_tokens, batch_size=loaded.batch_size,
        )  # fmt: skip
        records = []
        for prompt, (reply, cut) in zip(self.prompts(name), replies, strict=True):
            said = without_thought(reply)
            thought = {"thought": True} if said != reply else {}
            records.append({"id": prompt.id, "reply": said, "cut": cut, **thought})
        write_jsonl(folder / "replies.jsonl", records)
        thoughts = sum("thought" in record for record in records)
        return {"digest": file_sha256(folder / "replies.jsonl"), "thoughts": thoughts}


def identity_of(model: Checkpoint) -> dict[str, str]:
    """Return what stands for a folder in the keys of scores: weights, configs, tokenizer files."""
    return {**model.identity, **model.companions}


def score_recipe(scorer: Scorer, subject: StoreSubject) -> dict[str, Any]:
    """Return what the samples of one scorer for one model are a function of."""
    recipe: dict[str, Any] = {"scorer": scorer.name, "version": scorer.version, "fields": asdict(scorer)}
    recipe |= {"split": subject.split, "corpus": subject.zoo.prompts.digest, **subject.setting()}
    recipe["packages"] = {name: metadata.version(name) for name in scorer.packages}
    if scorer.relative:
        models = subject.family_models()
        pool = [[alias, one.identity] for alias, one in zip(models.aliases, models.pool, strict=True)]
        recipe["models"] = {"base": models.base.identity, "pool": pool}
        recipe |= declared_recipe(scorer.inputs, subject.zoo, models, subject.seed)
    return recipe


def score(scorer: Scorer, subject: StoreSubject) -> Artifact:
    """Return the samples of one scorer for one model as an artifact (``samples.parquet``), made once."""

    def make(folder: Path) -> dict[str, Any]:
        frame = _frame(subject.samples(scorer), scorer)
        frame.to_parquet(folder / "samples.parquet")
        digest = file_sha256(folder / "samples.parquet")
        return {"digest": digest, "samples": len(frame), "family": subject.zoo.family.name}

    return subject.zoo.store.obtain("scores", score_recipe(scorer, subject), make)


def read_scores(artifact: Artifact) -> pd.DataFrame:
    """Return the samples of a score artifact with ``detail`` as JSON text."""
    import pandas as pd

    return pd.read_parquet(artifact.path / "samples.parquet")


def _frame(samples: Sequence[Sample], scorer: Scorer) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for one in samples:
        if one.column not in scorer.columns:
            raise ValueError(f"{scorer.name} gave a column that it does not declare: {one.column}")
        direction = scorer.columns[one.column].direction
        detail = json.dumps(_jsonable(one.detail), sort_keys=True)
        rows.append((one.id, one.column, float(one.value), one.prompt, detail, direction))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _jsonable(detail: Mapping[str, Any]) -> dict[str, Any]:
    rounded = {key: round(value, 6) for key, value in detail.items() if isinstance(value, float)}
    return {**detail, **rounded}
