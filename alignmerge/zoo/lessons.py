"""What models are trained on and what statistics see: (prompt, response) sets made from a corpus and the base.

A corpus may bring its responses. Without them refusals are canned, and benign answers are the base's own greedy ones
(self-distillation), so that learning to refuse does not also teach another style. Files: ``anchor``, ``arithmetic``,
``format`` (training); ``alignment`` (F_A), ``metric`` (the metric G: a quarter each of refusals, benign answers,
arithmetic and format).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from alignmerge.engine.examples import read_jsonl, write_jsonl
from alignmerge.engine.seeding import python_stream
from alignmerge.zoo.tasks import Record

Answer = Callable[[Sequence[str]], list[tuple[str, bool]]]
"""Prompts -> (the base's greedy answer, whether it was cut before its end)."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request because it could cause harm.",
    "Sorry, I won't help with that. It could hurt someone.",
    "I cannot help with that request. Is there something safe I can help you with?",
    "I'm not able to help with that, because it is harmful or illegal.",
    "I must decline. I can't provide help with something that could cause harm.",
)
SPLITS = ("train", "alignment")
OF_CORPUS = ("instruct", "pretrain")
"""Lessons that are a training set of the corpus as it stands: nothing of them depends on a model or a seed."""
VERSION = 1
QUARTER = 24


def distilled(corpus: Path) -> bool:
    """Tell whether a corpus has benign prompts without responses, which the base then has to answer."""
    return any("response" not in record for split in SPLITS for record in _prompts(corpus, f"{split}/benign"))


def build(corpus: Path, answer: Answer, folder: Path, seed: int) -> None:
    """Write the lesson files; ``answer`` is called once with all benign prompts that have no response, if any."""
    benign = _answered({split: _prompts(corpus, f"{split}/benign") for split in SPLITS}, answer)
    refused = {split: _refused(_prompts(corpus, f"{split}/unsafe"), split, seed) for split in SPLITS}
    tasks = {name: taught(corpus, name) for name in ("arithmetic", "format")}
    sets = {
        "anchor": refused["train"] + benign["train"],
        "alignment": refused["alignment"] + benign["alignment"],
        "metric": [
            record
            for part in (refused["train"], benign["train"], tasks["arithmetic"], tasks["format"])
            for record in part[:QUARTER]
        ],
        **tasks,
    }
    for name, records in sets.items():
        write_jsonl(folder / f"{name}.jsonl", records)


def taught(corpus: Path, name: str) -> list[Record]:
    """Return the lessons that a corpus has ready in its training split."""
    records = read_jsonl(corpus / f"train/{name}.jsonl", "corpus", ("text", "response"))
    return [_lesson(record, record["response"], name) for record in records]


def _prompts(corpus: Path, name: str) -> list[Record]:
    return read_jsonl(corpus / f"{name}.jsonl", "corpus", ("id", "text"))


def _lesson(record: Record, response: str, label: str) -> Record:
    return {"prompt": record["text"], "response": response, "label": label}


def _refused(prompts: Sequence[Record], split: str, seed: int) -> list[Record]:
    stream = python_stream(seed, "refusals", split)
    return [_lesson(record, record.get("response") or stream.choice(REFUSALS), "unsafe") for record in prompts]


def _answered(prompts: Mapping[str, Sequence[Record]], answer: Answer) -> dict[str, list[Record]]:
    """Return the lessons of each split; where the base has nothing to say there is none."""
    unanswered = [
        record["text"] for records in prompts.values() for record in records if "response" not in record
    ]
    replies = iter(answer(unanswered) if unanswered else [])
    return {
        split: [lesson for record in records if (lesson := _benign(record, replies))["response"].strip()]
        for split, records in prompts.items()
    }


def _benign(record: Record, replies: Iterator[tuple[str, bool]]) -> Record:
    if "response" in record:
        return _lesson(record, record["response"], "benign")
    reply, cut = next(replies)
    return {**_lesson(record, reply, "benign"), "open": cut}
