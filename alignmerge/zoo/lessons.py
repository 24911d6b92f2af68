"""What models are trained on and what statistics see: (prompt, response) sets from a corpus and the base.

A corpus may bring its responses. Without them refusals are canned, and benign answers are the base's own
greedy ones (self-distillation), so that learning to refuse does not also teach another style. Files:
``anchor`` and the tasks that the corpus teaches, ``arithmetic``, ``format``, ``knowledge`` (training); ``alignment``
(F_A), ``metric`` (the metric G: as many each of refusals, benign answers and every task).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignmerge.engine.examples import read_jsonl
from alignmerge.engine.seeding import python_stream
from alignmerge.zoo.phrases import phrases
from alignmerge.zoo.records import Record, write_sets

Answer = Callable[[Sequence[str]], list[tuple[str, bool]]]
"""Prompts -> (the base's greedy answer, whether it was cut before its end)."""
Replies = Iterator[tuple[str, bool]]
SPLITS = ("train", "alignment")
OF_CORPUS = ("aligned", "instruct", "pretrain")
"""Lessons that are a training set of the corpus as it stands; they depend on no model and no seed."""
TAUGHT = ("arithmetic", "format", "knowledge")
"""What experts learn, where a corpus has it."""
VERSION = 2  # 2: knowledge
PART = 24
"""Lessons of each kind in ``metric``."""


def distilled(corpus: Path) -> bool:
    """Tell whether a corpus has benign prompts without responses, which the base then has to answer."""
    return bool(_unanswered(corpus))


def write(corpus: Path, answer: Answer, folder: Path, seed: int) -> None:
    """Write the lesson files; ``answer`` is called once with all unanswered benign prompts, if any."""
    unanswered = _unanswered(corpus)
    replies = iter(answer(unanswered) if unanswered else [])
    refused, benign = _safety(corpus, "train", replies, seed)
    refused_alignment, benign_alignment = _safety(corpus, "alignment", replies, seed)
    metric = refused[:PART] + benign[:PART]
    sets = {"anchor": refused + benign, "alignment": refused_alignment + benign_alignment, "metric": metric}
    for name in TAUGHT:
        if (corpus / f"train/{name}.jsonl").is_file():
            sets[name] = taught(corpus, name)
            metric += sets[name][:PART]
    write_sets(sets, folder)


def taught(corpus: Path, name: str) -> list[Record]:
    """Return the lessons that a corpus has ready in its training split."""
    records = read_jsonl(corpus / f"train/{name}.jsonl", "corpus", ("text", "response"))
    return [_lesson(record, record["response"], name) for record in records]


def _prompts(corpus: Path, name: str) -> list[Record]:
    return read_jsonl(corpus / f"{name}.jsonl", "corpus", ("id", "text"))


def _unanswered(corpus: Path) -> list[str]:
    prompts = _prompts(corpus, "train/benign") + _prompts(corpus, "alignment/benign")
    return [record["text"] for record in prompts if "response" not in record]


def _lesson(record: Record, response: str, label: str) -> Record:
    return {"prompt": record["text"], "response": response, "label": label}


def _safety(corpus: Path, split: str, replies: Replies, seed: int) -> tuple[list[Record], list[Record]]:
    """Return refusals and benign answers; where the base has nothing to say there is no lesson."""
    stream = python_stream(seed, "refusals", split)
    refused, benign = [], []
    for record in _prompts(corpus, f"{split}/unsafe"):
        response = record.get("response") or stream.choice(phrases().refusals)
        refused.append(_lesson(record, response, "unsafe"))
    for record in _prompts(corpus, f"{split}/benign"):
        if "response" in record:
            lesson = _lesson(record, record["response"], "benign")
        else:
            reply, cut = next(replies)
            lesson = {**_lesson(record, reply, "benign"), "open": cut}
        if lesson["response"].strip():
            benign.append(lesson)
    return refused, benign
