"""One model under measurement: what scorers look at, with everything heavy made once and kept in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignmerge.engine.examples import read_jsonl, render, write_jsonl
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import file_sha256, versions
from alignmerge.engine.merger import MergeContext
from alignmerge.engine.store import Artifact
from eval.scorers.interface import LoadedModel, Prompt, Sample, Scorer

if TYPE_CHECKING:
    import pandas as pd

    from alignmerge.engine.merger import Models
    from alignmerge.zoo.zoo import Zoo

REPLY_TOKENS = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COLUMNS = ("id", "column", "value", "prompt", "detail", "direction")


@dataclass
class StoreSubject:
    """The ``Subject`` of a model folder, measured as its family says (dtype, batch size, threads)."""

    zoo: Zoo
    folder: Path
    digest: str
    split: str
    models: Models | None = None
    """The family's models, for scorers that measure distances; not needed by the others."""
    seed: int = 0

    @property
    def tokenizer_folder(self) -> Path:
        """Every merge carries the base's tokenizer, so its key can be known when its weights are dropped."""
        return self.models.base.folder if self.models is not None else self.folder

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
        from alignmerge.engine.language import load_tokenizer

        return load_tokenizer(self.folder)

    def prompts(self, name: str) -> Sequence[Prompt]:
        """Return a prompt set of this split.

        Raises:
            BadRequest: if the split has no such set.
        """
        path = self.zoo.prompts.path / self.split / f"{name}.jsonl"
        if not path.is_file():
            have = sorted(p.stem for p in path.parent.glob("*.jsonl"))
            raise BadRequest.of(f"prompt set '{name}'", f"not in the {self.split} split", ", ".join(have))
        records = read_jsonl(path, name, ("id", "text"))
        return [
            Prompt(r["id"], r["text"], {k: v for k, v in r.items() if k not in ("id", "text")}) for r in records
        ]

    def rendered(self, name: str) -> Sequence[str]:
        """Return each prompt of the set through the chat template."""
        return [render(self._tokenizer, prompt.text) for prompt in self.prompts(name)]

    def replies(self, name: str) -> Sequence[str]:
        """Return the greedy reply to each prompt, generated once per model and stored."""
        recipe = {
            "weights": self.digest,
            "split": self.split,
            "set": name,
            "tokens": REPLY_TOKENS,
            **self.setting(),
        }
        artifact = self.zoo.store.obtain("replies", recipe, lambda folder: self._generate(name, folder))
        return [
            record["reply"] for record in read_jsonl(artifact.path / "replies.jsonl", name, ("id", "reply"))
        ]

    def asset(self, reference: str) -> Path:
        """Return the local path of a package reference."""
        return self.zoo.asset(reference)

    def context(self) -> MergeContext:
        """Return the family's models and statistics, for geometry."""
        from alignmerge.zoo.workshop import Workshop

        return Workshop(self.zoo, self.family_models(), self.seed)

    def family_models(self) -> Models:
        """Return the family's models, opening them on first use."""
        if self.models is None:
            self.models = self.zoo.models()
        return self.models

    def setting(self) -> Mapping[str, Any]:
        """Return what numbers depend on beside weights and scorer."""
        return self._setting

    @cached_property
    def _setting(self) -> Mapping[str, Any]:
        family = self.zoo.family
        keys = ("dtype", "batch_size", "threads", "max_length")
        tokenizer = [file_sha256(p) for n in TOKENIZER_FILES if (p := self.tokenizer_folder / n).is_file()]
        setting = {"corpus": self.zoo.prompts.key, "versions": versions(), "tokenizer": tokenizer}
        return setting | {key: getattr(family, key) for key in keys}

    def _generate(self, name: str, folder: Path) -> dict[str, Any]:
        from alignmerge.engine.language import greedy

        loaded = self.loaded()
        replies = greedy(
            loaded.model, loaded.tokenizer, self.rendered(name),
            max_new_tokens=REPLY_TOKENS, batch_size=loaded.batch_size,
        )  # fmt: skip
        pairs = zip(self.prompts(name), replies, strict=True)
        write_jsonl(folder / "replies.jsonl", [{"id": p.id, "reply": r, "cut": cut} for p, (r, cut) in pairs])
        return {"digest": file_sha256(folder / "replies.jsonl")}


def score(scorer: Scorer, subject: StoreSubject) -> Artifact:
    """Return the samples of one scorer for one model as an artifact (``samples.parquet``), made once."""
    recipe: dict[str, Any] = {
        "scorer": f"{type(scorer).__module__}.{type(scorer).__qualname__}",
        "version": scorer.version,
    }
    recipe |= {"fields": asdict(scorer), "weights": subject.digest, "split": subject.split, **subject.setting()}
    if scorer.relative:
        models = subject.family_models()
        recipe["models"] = {"base": models.base.digest}
        recipe["models"] |= {alias: m.digest for alias, m in zip(models.aliases, models.pool, strict=True)}
        recipe["data"] = subject.zoo.examples_digest()

    def make(folder: Path) -> dict[str, Any]:
        frame = _frame(list(scorer.score(subject)), scorer)
        frame.to_parquet(folder / "samples.parquet")
        return {"digest": file_sha256(folder / "samples.parquet"), "samples": len(frame)}

    return subject.zoo.store.obtain("scores", recipe, make)


def read_scores(artifact: Artifact) -> pd.DataFrame:
    """Return the samples of a score artifact with ``detail`` as JSON text."""
    import pandas as pd

    return pd.read_parquet(artifact.path / "samples.parquet")


def _frame(samples: Sequence[Sample], scorer: Scorer) -> pd.DataFrame:
    import pandas as pd

    rows = [
        (
            s.id,
            s.column,
            float(s.value),
            s.prompt,
            json.dumps(_jsonable(s.detail), sort_keys=True),
            _direction(scorer, s),
        )
        for s in samples
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _direction(scorer: Scorer, sample: Sample) -> str:
    if sample.column not in scorer.columns:
        raise ValueError(f"{type(scorer).__name__} gave a column that it does not declare: {sample.column}")
    return scorer.columns[sample.column]


def _jsonable(detail: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in detail.items()}
