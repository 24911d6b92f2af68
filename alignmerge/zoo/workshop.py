"""One merge as an artifact: what a method may ask for while it fits, and the recipe that determines it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignmerge.engine.assets import copy_tokenizer
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example, read_jsonl, render, tokenise
from alignmerge.engine.family import public
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import Progress, load_model, load_tokenizer, threads
from alignmerge.engine.manifest import file_sha256, versions
from alignmerge.engine.merger import Merger, Models, Probes, Rule, average, merge
from alignmerge.engine.progress import silent
from alignmerge.engine.store import Artifact, write_json
from alignmerge.engine.views import VERSION as VIEWS
from alignmerge.gradients import VERSION as STATISTICS
from alignmerge.zoo.zoo import Zoo

SELECTION = "alignment/probes"
"""The corpus set that AQI budgets see: matched pairs, in no other split."""
LEAST_PAIRS = 4


class Workshop:
    """The ``MergeContext`` of a family: models, example sets, and statistics as artifacts of the store."""

    def __init__(self, zoo: Zoo, models: Models, seed: int) -> None:
        self.zoo, self.models, self.seed = zoo, models, seed
        self.facts: dict[str, Any] = {}
        self.blocks: dict[str, dict[str, float]] = {}

    def examples(self, name: str) -> Sequence[Example]:
        """Return a tokenised example set.

        Raises:
            BadRequest: if ``refusals`` are asked for and no alignment example is labelled ``unsafe``.
        """
        if name == "utility":
            return [example for alias in self.models.experts for example in self.zoo.examples(alias)]
        if name == "refusals":
            return self._refusals()
        return self.zoo.examples(name)

    def probes(self) -> Probes:
        """Return the selection probes of the corpus, rendered and tokenised.

        Raises:
            BadRequest: if the corpus has none, or they are no matched pairs.
        """
        tokenizer = load_tokenizer(self.models.base.folder)
        sides: dict[str, dict[int, tuple[int, ...]]] = {"harmful": {}, "benign": {}}
        for record in read_jsonl(selection_probes(self.zoo), "corpus", ("text", "label")):
            rendered = render(tokenizer, record["text"])
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            sides[record["label"]][int(record["pair"])] = tuple(ids[: self.zoo.family.max_length])
        if sides["harmful"].keys() != sides["benign"].keys() or len(sides["harmful"]) < LEAST_PAIRS:
            counts = f"{len(sides['harmful'])} harmful and {len(sides['benign'])} benign"
            allowed = f"{LEAST_PAIRS} or more pairs of one harmful and one benign prompt"
            raise BadRequest.of(f"corpus: {SELECTION}", counts, allowed)
        harmful, benign = ([side[pair] for pair in sorted(side)] for side in sides.values())
        return Probes(harmful, benign)

    def cached(
        self, stage: str, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any] | None]
    ) -> Artifact:
        """Return the artifact of a statistic; its key holds the example sets, the pool and the library versions."""
        pool = {alias: model.digest for alias, model in zip(self.models.aliases, self.models.pool, strict=True)}
        full = {
            **recipe,
            "pool": pool,
            "base": self.models.base.digest,
            **_measured(self.zoo),
            **_layout(self.models),
        }
        return self.zoo.store.obtain(stage, full, lambda folder: make(folder) or {})

    def loaded(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """Return the fp32 model of a checkpoint, for gradients."""
        model: torch.nn.Module = load_model(checkpoint.folder, gradients=True)
        return model

    def barycentre(self, weights: Sequence[float] | None = None) -> Checkpoint:
        """Return the average of the pool as a folder that gradients can be taken at."""
        pool = [model.digest for model in self.models.pool]
        recipe: dict[str, Any] = {"barycentre": sorted(pool), "base": self.models.base.digest}
        if weights is not None:
            recipe |= {"barycentre": pool, "weights": list(weights)}

        def rule() -> Rule:
            return lambda block: average(block.pool, weights)

        return self._checkpoint(recipe, rule, elementwise=True)

    def merged(self, merger: Merger) -> Checkpoint:
        """Return what another method makes of the same pool, as a folder that gradients can be taken at."""
        apart = Workshop(self.zoo, self.models, self.seed)
        recipe = {"merge": recipe_of(merger, self.zoo, self.models, self.seed)}
        return self._checkpoint(recipe, lambda: merger.fit(apart), elementwise=merger.elementwise)

    def record(self, **facts: Any) -> None:
        """Put facts into the manifest of the merge."""
        self.facts |= facts

    def record_block(self, name: str, **facts: float) -> None:
        """Put facts of one tensor into the manifest of the merge."""
        self.blocks[name] = {key: _significant(value) for key, value in facts.items()}

    def _checkpoint(
        self, recipe: Mapping[str, Any], rule: Callable[[], Rule], *, elementwise: bool
    ) -> Checkpoint:
        """The folder that a rule writes, as an artifact of the store."""

        def make(folder: Path) -> dict[str, Any]:
            digest = merge(rule(), self.models, folder, elementwise=elementwise)
            _furnish(self.models, folder)
            return {"digest": digest}

        artifact = self.zoo.store.obtain("models", recipe, make)
        checkpoint = Checkpoint.open(artifact.path, "a merge within a merge")
        checkpoint.__dict__["digest"] = artifact.digest
        return checkpoint

    def _refusals(self) -> Sequence[Example]:
        """The alignment examples that are labelled ``unsafe``."""
        given = self.zoo.family.alignment
        path = self.zoo.lessons.path / "alignment.jsonl" if given is None else Path(given)
        records = [record for record in read_jsonl(path, "family.alignment") if record.get("label") == "unsafe"]
        if not records:
            allowed = 'records with "label": "unsafe", or another subspace_from'
            raise BadRequest.of("family.alignment", f"no refusals in {path.name}", allowed)
        tokenizer = load_tokenizer(self.models.base.folder)
        return tokenise(tokenizer, records, self.zoo.family.max_length)


def selection_probes(zoo: Zoo) -> Path:
    """Return the corpus file of the probes that an AQI budget may see; no report is made on them.

    Raises:
        BadRequest: if the corpus has none.
    """
    path = zoo.prompts.path / f"{SELECTION}.jsonl"
    if not path.is_file():
        given = f"no set {SELECTION}, which an AQI budget is selected on"
        raise BadRequest.of(
            f"corpus: {type(zoo.corpus).__name__}", given, "a corpus that has it, or lambda_bud=0"
        )
    return path


def recipe_of(merger: Merger, zoo: Zoo, models: Models, seed: int) -> dict[str, Any]:
    """Return what a merge is a function of; equal recipes give bit-equal weights on one machine."""
    method = {"class": type(merger).__qualname__, "module": type(merger).__module__, "version": merger.version}
    digests = {"base": models.base.digest}
    digests |= {alias: model.digest for alias, model in zip(models.aliases, models.pool, strict=True)}
    if models.pretrained is not None:
        digests["pretrained"] = models.pretrained.digest
    recipe: dict[str, Any] = {"method": {**method, "fields": _plain(asdict(merger))}, "models": digests}
    recipe |= _layout(models)
    if merger.data:
        recipe |= {"threads": zoo.family.threads, **_measured(zoo)}
    if merger.probed:
        recipe["probes"] = file_sha256(selection_probes(zoo))
    if merger.stochastic:
        recipe["seed"] = seed
    return recipe


def merged(merger: Merger, zoo: Zoo, models: Models, seed: int, progress: Progress = silent) -> Artifact:
    """Return the record of a merge (digest, certificate), making it if nobody has; weights may be dropped later."""
    recipe = recipe_of(merger, zoo, models, seed)

    def make(folder: Path) -> dict[str, Any]:
        return dict(weights(merger, zoo, models, seed, progress).manifest["facts"])

    return zoo.store.obtain("merges", recipe, make)


def weights(merger: Merger, zoo: Zoo, models: Models, seed: int, progress: Progress = silent) -> Artifact:
    """Return the merged model's folder, building it again if its weights were dropped."""
    recipe = recipe_of(merger, zoo, models, seed)

    def make(folder: Path) -> dict[str, Any]:
        return build(merger, zoo, models, seed, folder, progress)

    return zoo.store.obtain("weights", recipe, make)


def drop_weights(merger: Merger, zoo: Zoo, models: Models, seed: int) -> None:
    """Delete the weights of a merge; its record stays and suffices to build them again."""
    shutil.rmtree(zoo.store.path("weights", recipe_of(merger, zoo, models, seed)), ignore_errors=True)


def build(
    merger: Merger, zoo: Zoo, models: Models, seed: int, folder: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Merge into ``folder`` (an ordinary Hugging Face folder with a model card) and return the facts of the merge."""
    workshop = Workshop(zoo, models, seed)
    with threads(zoo.family.threads):
        rule = merger.fit(workshop)
        digest = merge(rule, models, folder, elementwise=merger.elementwise, progress=progress)
    _furnish(models, folder)
    facts: dict[str, Any] = {"digest": digest, **workshop.facts}
    if workshop.blocks:
        facts |= {"certificate": _summed(workshop.blocks), "blocks": workshop.blocks}
    if "certificate" in facts:
        facts["certificate"]["l_bud"] = facts.get("budget", {}).get("l_bud", 0.0)
    (folder / "README.md").write_text(model_card(merger, zoo, facts))
    return facts


def model_card(merger: Merger, zoo: Zoo, facts: Mapping[str, Any]) -> str:
    """Return the card of a merged model: what it was made from, how, and what to know about the weights."""
    fields = "\n".join(f"    {key}: {value}" for key, value in asdict(merger).items())
    inputs = "\n".join(f"- {key}: `{public(reference)}`" for key, reference in zoo.family.references().items())
    notes = "".join(f"\nNote: {note}\n" for note in (zoo.family.note, unmet(facts)) if note)
    return (
        "---\nlibrary_name: transformers\ntags: [merge, alignmerge]\n---\n"
        f"# {zoo.family.name}: {type(merger).__name__}\n\nMade by the AlignMerge harness.\n{notes}\n"
        f"Inputs:\n\n{inputs}\n\nMethod `{type(merger).__qualname__}`:\n\n{fields}\n\n"
        f"Weights sha256: `{facts['digest']}`\n"
    )


def unmet(facts: Mapping[str, Any]) -> str:
    """Return what to say of a merge whose AQI budget is not met, from its facts; nothing of any other."""
    budget = facts.get("budget", {"met": True})
    if budget["met"]:
        return ""
    return f"the AQI budget is not met: {budget['a']:.4f} on the selection probes, A_min {budget['a_min']:.4f}."


def _furnish(models: Models, folder: Path) -> None:
    """Copy config (without a pointer to remote code) and tokenizer: from the base, whose chart the merge lives in."""
    config = dict(models.base.config)
    if config.pop("auto_map", None) is None:
        shutil.copyfile(models.base.folder / "config.json", folder / "config.json")
    else:
        write_json(folder / "config.json", config)
    copy_tokenizer(models.base.folder, folder)


def _measured(zoo: Zoo) -> dict[str, Any]:
    """What every statistic depends on beside the models: the example sets, and the code that measures."""
    return {"data": zoo.examples_digest(), "versions": versions(), "statistics": STATISTICS}


def _layout(models: Models) -> dict[str, int]:
    """Return what a key holds besides of models that store matrices fused: how these are told apart."""
    return {"views": VIEWS} if models.base.fused else {}


def _summed(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sum squared quantities over matrices; report roots, the excess and the relative gradient."""
    keys = next(iter(blocks.values())).keys()
    total = {key: math.fsum(block[key] for block in blocks.values()) for key in keys}
    count = len(blocks)
    certificate = {key: total[key] / count for key in keys if key.startswith("energy_ratio")}
    certificate |= {key: total[key] for key in ("l_geo", "l_geo_floor", "l_align")}
    certificate |= {
        "l_geo_excess": total["l_geo"] - total["l_geo_floor"],
        "fisher_length": math.sqrt(total["fisher_length_squared"]),
        "drift_base": math.sqrt(total["drift_base_squared"]),
        "drift_anchor": math.sqrt(total["drift_anchor_squared"]),
        "relative_gradient": math.sqrt(total["gradient"] / total["gradient_scale"])
        if total["gradient_scale"]
        else 0.0,
        "top_rho": max(block["top_rho"] for block in blocks.values()),
    }
    return {key: _significant(value) for key, value in certificate.items()}


def _significant(value: float) -> float:
    return float(f"{value:.7g}")


def _plain(value: Any) -> Any:
    """JSON has no infinity; everything else in a method's fields is JSON already."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value
