"""What models are trained on and what statistics see: (prompt, response) sets made from a corpus and the base.

Refusals are canned. Benign answers are the base's own greedy ones (self-distillation), so that learning to refuse
does not also teach another style. Files: ``anchor``, ``arithmetic``, ``format`` (training); ``alignment`` (F_A),
``metric`` (the metric G: a quarter each of refusals, benign answers, arithmetic and format).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
VERSION = 1
QUARTER = 24


def build(corpus: Path, answer: Answer, folder: Path, seed: int) -> None:
    """Write the lesson files; ``answer`` is called once with all benign prompts."""
    prompts = {name: _texts(corpus, name) for name in ("train/benign", "alignment/benign")}
    answers = answer([text for texts in prompts.values() for text in texts])
    train = len(prompts["train/benign"])
    benign = {
        "train": _answered(prompts["train/benign"], answers[:train]),
        "alignment": _answered(prompts["alignment/benign"], answers[train:]),
    }
    refused = {split: _refused(_texts(corpus, f"{split}/unsafe"), split, seed) for split in ("train", "alignment")}
    tasks = {name: _task(corpus, name) for name in ("arithmetic", "format")}
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


def _texts(corpus: Path, name: str) -> list[str]:
    return [record["text"] for record in read_jsonl(corpus / f"{name}.jsonl", "corpus", ("id", "text"))]


def _refused(prompts: Sequence[str], split: str, seed: int) -> list[Record]:
    stream = python_stream(seed, "refusals", split)
    return [{"prompt": text, "response": stream.choice(REFUSALS), "label": "unsafe"} for text in prompts]


def _answered(prompts: Sequence[str], answers: Sequence[tuple[str, bool]]) -> list[Record]:
    return [
        {"prompt": text, "response": reply, "open": cut, "label": "benign"}
        for text, (reply, cut) in zip(prompts, answers, strict=True)
        if reply.strip()
    ]


def _task(corpus: Path, name: str) -> list[Record]:
    records = read_jsonl(corpus / f"train/{name}.jsonl", "corpus", ("text", "response"))
    return [{"prompt": record["text"], "response": record["response"], "label": name} for record in records]
