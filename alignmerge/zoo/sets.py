"""Example sets and selection probes by name: which records each one holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignmerge.engine.examples import read_jsonl, render
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import OWN, REPORTED, Probes, own

if TYPE_CHECKING:
    from alignmerge.zoo.zoo import Zoo

EXPERT_EXAMPLES = 64
SELECTION = "alignment/probes"
"""The corpus set that AQI budgets see: matched pairs, in no other split."""
LEAST_PAIRS = 4


def records(zoo: Zoo, name: str) -> list[dict[str, Any]]:
    """Return the records of an example set, {prompt, response, ...}, by the names of ``MergeContext.examples``.

    The anchor's own set is ``alignment``; an expert's is the start of its lessons where it was trained here,
    and ``metric`` otherwise. Raises BadRequest if a file is bad, or if ``refusals`` are asked for and no
    alignment record is labelled ``unsafe``.
    """
    if name.startswith(OWN):
        return _own_records(zoo, name.removeprefix(OWN))
    if name == "utility":
        found = []
        for alias in zoo.family.experts:
            found += _own_records(zoo, alias)
        return found
    if name == "refusals":
        return _refusals(zoo)
    if name == REPORTED:
        probes = read_jsonl(zoo.prompts.path / "test/probes.jsonl", "corpus", ("text", "label"))
        return [{"prompt": probe["text"], "response": ""} for probe in probes]
    return read_jsonl(_file(zoo, name), f"family.{name}")


def probes(zoo: Zoo, tokenizer: Any) -> Probes:
    """Return the selection probes, tokenised; raises BadRequest if there are none or no matched pairs."""
    sides: dict[str, dict[int, tuple[int, ...]]] = {"harmful": {}, "benign": {}}
    for record in probe_records(zoo):
        rendered = render(tokenizer, record["text"], zoo.family.date)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        sides[record["label"]][int(record["pair"])] = tuple(ids[: zoo.family.max_length])
    harmful, benign = sides["harmful"], sides["benign"]
    if harmful.keys() != benign.keys() or len(harmful) < LEAST_PAIRS:
        counts = f"{len(harmful)} harmful and {len(benign)} benign"
        allowed = f"{LEAST_PAIRS} or more pairs of one harmful and one benign prompt"
        raise BadRequest.of(f"corpus: {SELECTION}", counts, allowed)
    pairs = sorted(harmful)
    return Probes([harmful[pair] for pair in pairs], [benign[pair] for pair in pairs])


def probe_records(zoo: Zoo) -> Sequence[dict[str, Any]]:
    """Return the records of the probes that an AQI budget may see; raises BadRequest if there are none."""
    path = zoo.prompts.path / f"{SELECTION}.jsonl"
    if not path.is_file():
        given = f"no set {SELECTION}, which an AQI budget is selected on"
        raise BadRequest.of(f"corpus: {zoo.corpus.name}", given, "a corpus that has it, or lambda_bud=0")
    return read_jsonl(path, "corpus", ("text", "label"))


def _own_records(zoo: Zoo, alias: str) -> list[dict[str, Any]]:
    if alias == "anchor":
        return records(zoo, "alignment")
    recipe = zoo.family.recipe_of(f"experts.{alias}")
    if recipe is None:
        return records(zoo, "metric")
    return read_jsonl(zoo.lessons.path / f"{recipe.lessons}.jsonl", own(alias), most=EXPERT_EXAMPLES)


def _refusals(zoo: Zoo) -> list[dict[str, Any]]:
    refused = [record for record in records(zoo, "alignment") if record.get("label") == "unsafe"]
    if not refused:
        allowed = 'records with "label": "unsafe", or another subspace_from'
        given = f"no refusals in {_file(zoo, 'alignment').name}"
        raise BadRequest.of("family.alignment", given, allowed)
    return refused


def _file(zoo: Zoo, name: str) -> Path:
    """Return the file of ``alignment`` or ``metric``: the one that the family names, or the one made here."""
    given = {"alignment": zoo.family.alignment, "metric": zoo.family.metric}[name]
    return zoo.lessons.path / f"{name}.jsonl" if given is None else Path(given)
