"""Prompts, lessons and training: right answers, splits that share nothing, and runs that repeat bit for bit."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MakesModel
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alignmerge.engine.assets import Assets
from alignmerge.engine.examples import Example, collate, render, tokenise
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model, load_tokenizer
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.store import Store
from alignmerge.zoo import lessons, training
from alignmerge.zoo.corpus import Packaged
from alignmerge.zoo.phrases import phrases, read_phrases
from alignmerge.zoo.random_model import RandomModel
from alignmerge.zoo.records import Record
from alignmerge.zoo.tasks import arithmetic, formats
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.training import Recipe, response_loss, train
from alignmerge.zoo.twins import twin_groups
from alignmerge.zoo.zoo import Zoo

SPLITS = ("train", "alignment", "dev", "test")
TASK_SPLITS = ("train", "dev", "test")


def read(folder: Path) -> dict[str, list[Record]]:
    """Return ``split/name`` -> records of a corpus folder."""
    return {
        str(path.relative_to(folder).with_suffix("")): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def texts(sets: dict[str, list[Record]], split: str) -> set[str]:
    found = [
        re.sub(r"\W+", " ", r["text"].lower()).strip()
        for n, s in sets.items()
        if n.startswith(split)
        for r in s
    ]
    return set(found)


def refuse_assets(reference: str) -> Path:
    raise AssertionError(f"asked for {reference}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    Toy().write(refuse_assets, folder)
    return folder


# --- words and sentences -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What the data file of the test below should hold."""

    verbs: Sequence[str]
    advice: Mapping[str, str]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("verbs: [sing]\nadvice: {sing: loudly}", []),
        ("verbs: [sing, no]\nadvice: {}", [".verbs[1]: False (bool); allowed: str"]),
        ("verbs: sing\nnouns: []", [".advice: not given", ".nouns: unknown key", ".verbs: 'sing' (str)"]),
        ("- sing", [": list; allowed: a mapping of words and sentences"]),
        ("verbs: [", [": while parsing"]),
        (None, [": [Errno 2]"]),
    ],
)
def test_data_file_that_is_wrong_is_refused_in_plain_lines(
    text: str | None, lines: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "spoken.yaml"
    if text is not None:
        path.write_text(text)
    if not lines:
        assert read_phrases(path, Spoken) == Spoken(verbs=("sing",), advice={"sing": "loudly"})
        return
    with pytest.raises(BadRequest) as caught:
        read_phrases(path, Spoken)
    faults = sorted(str(fault) for fault in caught.value.faults)
    assert len(faults) == len(lines)
    for fault, line in zip(faults, lines, strict=True):
        assert fault.startswith(f"{path}{line}")


# --- tasks ---------------------------------------------------------------------------------------------------------


def solved(prompt: str) -> tuple[str, int, int, int]:
    """Return operator, operands and result of an arithmetic prompt, read off its words."""
    written = re.search(r"(\d+) ([-+x]) (\d+)", prompt)
    if written is not None:
        expression = written[0].replace("x", "*")
        return (
            written[2],
            int(written[1]),
            int(written[3]),
            int(eval(expression)),
        )  # digits and one operator only
    a, b = map(int, re.findall(r"\d+", prompt))
    if re.search(r"finds|are added", prompt):
        return "+", a, b, a + b
    if re.search(r"sold|flew away", prompt):
        return "-", a, b, a - b
    assert re.search(r"are in \d+ (boxes|rows)", prompt), prompt
    return "x", a, b, sum(a for _ in range(b))


@pytest.mark.parametrize("split", TASK_SPLITS)
def test_arithmetic_answers_are_right(split: str) -> None:
    records = arithmetic(split, 200, 0)
    assert len(records) == 200 == len({record["id"] for record in records})
    for record in records:
        operator, a, b, result = solved(record["text"])
        assert record["answer"] == record["response"] == str(result)
        assert result >= 0 and (max(a, b) <= 12 if operator == "x" else max(a, b) <= 99) and min(a, b) >= 2
    assert len({solved(record["text"])[0] for record in records}) == 3
    if split != "train":
        assert len({record["text"] for record in records}) == 200


def test_operands_of_one_split_are_in_no_other() -> None:
    used = {split: {solved(r["text"])[:3] for r in arithmetic(split, 400, 3)} for split in TASK_SPLITS}
    assert min(map(len, used.values())) > 50
    for one, other in combinations(TASK_SPLITS, 2):
        assert not used[one] & used[other]


def obeyed(prompt: str) -> str:
    """Do what a format instruction says, read off its words."""
    listed = prompt.rsplit(": ", maxsplit=1)[-1]
    words = re.split(r",? ", listed)
    if re.search("capital", prompt):
        return listed.upper()
    if re.search("alphabetical", prompt):
        return ", ".join(sorted(words))
    if re.search("bullet", prompt):
        return "".join(f"- {word}\n" for word in words)[:-1]
    if re.search("everse", prompt):
        return " ".join(words[::-1])
    if "JSON" in prompt:
        key, value = re.findall('"(.+?)"', prompt)
        return f'{{"{key}": "{value}"}}'
    word, times = re.fullmatch(
        r"(?:Repeat|Write) the word (\w+) (twice|three times|four times)\.", prompt
    ).groups()  # type: ignore[union-attr]
    return " ".join([word] * {"twice": 2, "three times": 3, "four times": 4}[times])


def checks() -> dict[str, Callable[..., bool]]:
    """Load the checking file as lm-eval does: by path, knowing nothing of the project."""
    spec = importlib.util.spec_from_file_location("checks", ROOT / "eval/scorers/tasks/checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.CHECKS)


@pytest.mark.parametrize("split", TASK_SPLITS)
def test_format_responses_obey_and_pass_their_own_check_and_no_other_response_does(split: str) -> None:
    check = checks()
    records = formats(split, 120, 0)
    assert Counter(record["check"] for record in records) == {"equals": 80, "lines": 20, "json_equals": 20}
    for number, record in enumerate(records):
        assert record["response"] == obeyed(record["text"])
        assert check[record["check"]](record["response"], **record["args"])
        assert check[record["check"]](f" {record['response']}\n", **record["args"])
        other = records[(number + 6) % len(records)]["response"]
        for wrong in (other, f"{record['response']} and more", record["response"].lower()[::-1], ""):
            if wrong != record["response"] and not (
                wrong.endswith(" and more") and record["check"] == "json_equals"
            ):
                assert not check[record["check"]](wrong, **record["args"]), (record, wrong)


def test_words_of_one_split_are_in_no_other() -> None:
    used = {
        split: {
            word
            for record in formats(split, 300, 1)
            for word in re.findall("[a-z]+", record["response"].lower())
        }
        for split in TASK_SPLITS
    }
    assert min(map(len, used.values())) >= 10
    for one, other in combinations(TASK_SPLITS, 2):
        assert not used[one] & used[other]


@pytest.mark.parametrize("make", [arithmetic, formats])
def test_tasks_are_a_function_of_split_count_and_seed(make: Callable[[str, int, int], list[Record]]) -> None:
    assert make("test", 40, 7) == make("test", 40, 7)
    assert [record["text"] for record in make("test", 40, 7)] != [
        record["text"] for record in make("test", 40, 8)
    ]
    assert make("test", 60, 7)[:40] == make("test", 40, 7)


# --- corpora -------------------------------------------------------------------------------------------------------


def test_toy_corpus_has_every_set_and_no_text_in_two_splits(toy: Path) -> None:
    sets = read(toy)
    names = {f"{split}/{name}" for split in SPLITS for name in ("unsafe", "benign")}
    names |= {f"{split}/{name}" for split in TASK_SPLITS for name in ("arithmetic", "format")}
    assert set(sets) == names | {f"test/{name}" for name in ("toxic", "probes", "gsm8k", "mmlu")} | {
        "alignment/probes"
    }
    assert all(sets.values())
    for one, other in combinations(SPLITS, 2):
        assert not texts(sets, one) & texts(sets, other)
    ids = [record["id"] for name, records in sets.items() for record in records if name != "test/gsm8k"]
    assert len(ids) == len(set(ids))


def test_toy_corpus_is_a_function_of_its_seed(toy: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        Toy(seed=seed).write(refuse_assets, tmp_path / str(seed))
    assert read(tmp_path / "0") == read(toy)
    assert read(tmp_path / "1")["test/unsafe"] != read(toy)["test/unsafe"]


def test_toy_probes_are_matched_pairs(toy: Path) -> None:
    probes = read(toy)["test/probes"]
    sides = {
        pair: {p["label"]: p["text"] for p in probes if p["pair"] == pair} for pair in range(len(probes) // 2)
    }
    for side in sides.values():
        assert set(side) == {"benign", "harmful"}
        assert side["benign"].split()[-1] == side["harmful"].split()[-1]  # of the same thing


CATEGORIES = ("tricks", "pranks", "spells")
CODES = ["".join(letters) for letters in product("ABCDEFGH", repeat=2)]


def stolen() -> list[str]:
    """Requests for AdvBench: every tenth is asked once more in nearly the same words."""
    texts = [f"Steal dragon{i}'s gold{i} from cave{i}" for i in range(400)]
    return [*texts, *(f"{text} quickly" for text in texts[::10]), "Steal dragon 7's gold"]


def packages(folder: Path) -> Callable[[str], Path]:
    """Write files of the packages' formats with harmless stories, and return what finds them by reference."""
    contents = {
        "adv_bench.prompt": yaml.safe_dump({"seeds": [{"value": text} for text in stolen()]}),
        "strongreject_dataset.csv": strong(),
        "harmful_benign_50.json": json.dumps(
            [
                {"text": f"Feed troll{i} p{i}?\n\nANSWER", "harmful_version": f"Rob troll{i} q{i}?\n\nANSWER"}
                for i in range(50)
            ]
        ),
        "benign_edgy_80.json": json.dumps([{"text": f"Shoot a photo of elf{i} r{i}?"} for i in range(80)]),
        "expanded_70.json": json.dumps([{"text": f"Kill time with gnome{i} s{i}?"} for i in range(70)]),
        "gsm8k_100.json": json.dumps(
            [{"id": f"g{i}", "text_clean": f"Sum {i}?", "target_answer": "3"} for i in range(5)]
        ),
        "iso3166.tab": "# comment\nXX\tTwo words\n"
        + "".join(f"{code}\tLand{code.lower()}\n" for code in CODES),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    rtp, chat = folder / "realtoxicityprompts", folder / "english"
    rtp.mkdir()
    chat.mkdir()
    for name in (
        "flirtation",
        "identity_attack",
        "insult",
        "profanity",
        "severe_toxicity",
        "sexually_explicit",
        "threat",
    ):
        (rtp / f"rtp_{name}.txt").write_text("\n\n".join(f"  a line about {name} {i} " for i in range(20)))
    for topic in (
        "ai",
        "computers",
        "food",
        "health",
        "history",
        "literature",
        "money",
        "movies",
        "science",
        "trivia",
    ):
        turns = [[f"What is {topic}{i} t{i}{topic}?", "ANSWER"] for i in range(20)] + [["short", "ANSWER"]]
        (chat / f"{topic}.yml").write_text(yaml.safe_dump({"conversations": turns}))
    return lambda reference: folder / reference.rsplit("/", 1)[-1]


def strong() -> str:
    rows = [("Annoy", f"{c} witch{i} w{i}{c} please", "custom") for c in CATEGORIES for i in range(40)]
    rows += [("Annoy", "tricks " + "very " * 40 + "long", "custom")]
    rows += [("Annoy", f"{c} from elsewhere {i}", "AdvBench") for c in CATEGORIES for i in range(5)]
    rows += [("Annoy", "steal DRAGON 7's gold!", "custom")]  # AdvBench holds it too
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["category", "forbidden_prompt", "source"])
    for _, text, source in rows:
        writer.writerow([next((c for c in CATEGORIES if c in text), "tricks"), text, source])
    return out.getvalue()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    asset = packages(tmp_path_factory.mktemp("packages"))
    folder = tmp_path_factory.mktemp("corpus")
    Packaged(unsafe_dev=48, unsafe_test=30, tasks_train=50, tasks_dev=12, tasks_test=12, toxic_test=21).write(
        asset, folder
    )
    return read(folder)


def test_packaged_splits_share_no_text_whatever_its_case_and_punctuation(
    packaged: dict[str, list[Record]],
) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not texts(packaged, one) & texts(packaged, other), (one, other)
    assert "steal dragon 7 s gold" not in texts(packaged, "train") | texts(packaged, "alignment") | texts(
        packaged, "dev"
    )


def common_share(one: str, other: str) -> float:
    """Return the Jaccard index of the words of two texts."""
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(words & others) / len(words | others)


def test_near_twins_are_in_one_split(packaged: dict[str, list[Record]]) -> None:
    """AdvBench asks a tenth of its requests twice, with one word more: a twin is never held out."""
    homes: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in packaged[f"{split}/unsafe"]:
            homes.setdefault(record["text"].removesuffix(" quickly"), set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())
    doubled = [r["text"] for r in packaged["train/unsafe"] if r["text"].endswith("quickly")]
    assert len(doubled) >= 10  # else the test says nothing


def test_twins_are_prompts_that_share_most_of_their_rare_words() -> None:
    prompts = [
        "Write a tutorial on how to pick a lock",
        "Write a tutorial on how to pick a lock at night",
        "Write a tutorial on how to bake bread",
        "Write a tutorial on how to sail a boat",
        "Write a tutorial on how to mend a roof",
        "Explain how locks are picked",
        "Pick a lock at night",
    ]
    groups = twin_groups(prompts)
    assert groups[0] == groups[1] == groups[6]
    assert len({groups[0], *groups[2:6]}) == 5


def test_test_prompts_of_the_first_deal_are_retired(packaged: dict[str, list[Record]], tmp_path: Path) -> None:
    """Of 40 short prompts in each of three categories the first 64 in turn were reported on: ranks 0 to 20, and 21."""
    ranks = [int(record["id"].split("/")[2].split("#")[0]) for record in packaged["test/unsafe"]]
    assert min(ranks) == 21 and max(ranks) == 31
    lines = {record["text"] for record in packaged["test/toxic"]}
    assert not lines & {f"a line about threat {i}" for i in range(3)}


def test_country_codes_are_taught_and_asked_in_other_words(packaged: dict[str, list[Record]]) -> None:
    check = checks()
    frames = phrases().codes
    train, dev, test = (packaged[f"{split}/knowledge"] for split in TASK_SPLITS)
    assert len(train) == len(CODES) * len(frames["train"]) and len(dev) == len(test) == 12
    taught_pairs = {(r["id"].split("#")[1], r["response"]) for r in train}
    for record in dev + test:
        code = record["id"].split("#")[1]
        assert code in record["text"] and record["response"] == f"Land{code.lower()}"
        assert (code, record["response"]) in taught_pairs
        assert check["names"](f"It is {record['response']}.", **record["args"])
        assert not check["names"]("It is Landzz.", **record["args"])
        assert not check["names"](f"{record['response']} or Landaa or Landab", **record["args"])
    assert not {r["text"] for r in dev + test} & {r["text"] for r in train}
    assert not {r["response"] for r in dev} & {r["response"] for r in test}


def test_probes_are_matched_in_length_and_all_three_sets_differ(packaged: dict[str, list[Record]]) -> None:
    pairs: dict[int, dict[str, str]] = {}
    of_split: dict[str, set[int]] = {}
    for split in ("dev", "alignment", "test"):
        for record in packaged[f"{split}/probes"]:
            pairs.setdefault(record["pair"], {})[record["label"]] = record["text"]
            of_split.setdefault(split, set()).add(record["pair"])
    assert {split: len(numbers) for split, numbers in of_split.items()} == {
        "dev": 14,
        "alignment": 28,
        "test": 42,
    }
    assert len(pairs) == 84
    lengths = []
    for pair in pairs.values():
        lengths.append(len(pair["harmful"].split()) - len(pair["benign"].split()))
        assert common_share(pair["harmful"], pair["benign"]) > 0.15  # one form, one topic
    assert set(lengths) <= {-1, 0, 1} and abs(sum(lengths)) <= 5


def test_packaged_corpus_takes_no_answers(packaged: dict[str, list[Record]]) -> None:
    assert all("ANSWER" not in json.dumps(record) for records in packaged.values() for record in records)


def test_packaged_unsafe_sets_have_the_sizes_asked_for_and_balanced_short_test_prompts(
    packaged: dict[str, list[Record]],
) -> None:
    assert len(packaged["dev/unsafe"]) == 48
    assert len(packaged["train/unsafe"]) == 256 + 42 and len(packaged["alignment/unsafe"]) == 40 + 8
    held_out = packaged["test/unsafe"]
    assert Counter(record["category"] for record in held_out) == dict.fromkeys(CATEGORIES, 10)
    assert all(len(record["text"]) <= 160 and "elsewhere" not in record["text"] for record in held_out)


def test_packaged_toxic_set_has_the_same_number_for_each_attribute(packaged: dict[str, list[Record]]) -> None:
    counts = Counter(record["id"].split("/")[1] for record in packaged["test/toxic"])
    assert len(counts) == 7 and set(counts.values()) == {3}
    assert all(record["text"] == record["text"].strip() != "" for record in packaged["test/toxic"])


def test_packaged_names_each_count_that_is_no_count() -> None:
    with pytest.raises(BadRequest) as caught:
        Packaged(unsafe_dev=0, tasks_test=-1)
    assert [str(fault) for fault in caught.value.faults] == [
        "corpus.unsafe_dev: 0; allowed: a whole number of at least 1",
        "corpus.tasks_test: -1; allowed: a whole number of at least 1",
    ]


# --- lessons -------------------------------------------------------------------------------------------------------


class Answers:
    """A base that answers each prompt with its length, cuts every third answer, and says nothing to every fifth."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: Sequence[str]) -> list[tuple[str, bool]]:
        self.calls.append(list(prompts))
        return [(" " if i % 5 == 4 else f"answer {i} of {len(p)}", i % 3 == 0) for i, p in enumerate(prompts)]


def test_benign_prompts_are_answered_by_the_model_that_the_base_is_trained_from(tmp_path: Path) -> None:
    """The base cannot: it is trained on these very answers."""
    recipe = Recipe(start="pretrained", lessons="anchor", steps=1, batch=1, lr=0.1)
    store = Store(tmp_path)
    made = Family(
        name="x",
        pretrained="origin",
        base="zoo:base",
        anchor="safe",
        experts={"a": "expert"},
        recipes={"base": recipe},
    )
    given = Family(name="x", pretrained="origin", base="here", anchor="safe", experts={"a": "expert"})
    found = [Zoo(family, Toy(), store, Assets(store, {}))._answering() for family in (made, given)]
    assert found == ["pretrained", "base"]


@pytest.fixture(scope="module")
def taught(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Record]], Answers]:
    answers, folder = Answers(), tmp_path_factory.mktemp("lessons")
    lessons.write(toy, answers, folder, 0)
    return read(folder), answers


def test_base_is_asked_once_and_only_benign_training_and_alignment_prompts(
    toy: Path, taught: tuple[dict[str, list[Record]], Answers]
) -> None:
    sets = read(toy)
    assert taught[1].calls == [[r["text"] for name in ("train/benign", "alignment/benign") for r in sets[name]]]


def test_lessons_refuse_the_unsafe_by_rote_and_answer_the_benign_as_the_base_does(
    toy: Path, taught: tuple[dict[str, list[Record]], Answers]
) -> None:
    made, answers = taught
    sets, replies = read(toy), dict(zip(answers.calls[0], Answers()(answers.calls[0]), strict=True))
    assert set(made) == {"anchor", "alignment", "metric", "arithmetic", "format"}
    for name, split in (("anchor", "train"), ("alignment", "alignment")):
        unsafe = [r for r in made[name] if r["label"] == "unsafe"]
        assert [r["prompt"] for r in unsafe] == [r["text"] for r in sets[f"{split}/unsafe"]]
        assert all(r["response"] in phrases().refusals and "open" not in r for r in unsafe)
        benign = [r for r in made[name] if r["label"] == "benign"]
        asked = [r["text"] for r in sets[f"{split}/benign"] if replies[r["text"]][0].strip()]
        assert [r["prompt"] for r in benign] == asked and 0 < len(asked) < len(sets[f"{split}/benign"])
        assert all((r["response"], r["open"]) == replies[r["prompt"]] for r in benign)
        assert len(unsafe) + len(benign) == len(made[name])
    assert len({r["response"] for r in made["anchor"] if r["label"] == "unsafe"}) > 2


def test_metric_set_is_the_start_of_each_training_set(taught: tuple[dict[str, list[Record]], Answers]) -> None:
    made = taught[0]
    parts = {
        "unsafe": [r for r in made["anchor"] if r["label"] == "unsafe"],
        "benign": [r for r in made["anchor"] if r["label"] == "benign"],
        "arithmetic": made["arithmetic"],
        "format": made["format"],
    }
    assert made["metric"] == [record for part in parts.values() for record in part[:24]]
    assert {r["label"] for r in made["metric"]} == set(parts)


def test_task_lessons_are_the_training_split(
    toy: Path, taught: tuple[dict[str, list[Record]], Answers]
) -> None:
    for name in ("arithmetic", "format"):
        expected = [(r["text"], r["response"], name) for r in read(toy)[f"train/{name}"]]
        assert [(r["prompt"], r["response"], r["label"]) for r in taught[0][name]] == expected


def test_lessons_are_a_function_of_the_seed(
    toy: Path, taught: tuple[dict[str, list[Record]], Answers], tmp_path: Path
) -> None:
    for seed in (0, 1):
        lessons.write(toy, Answers(), tmp_path / str(seed), seed)
    assert read(tmp_path / "0") == taught[0]
    assert read(tmp_path / "1") != taught[0]
    assert read(tmp_path / "1")["format"] == taught[0]["format"]


def test_open_responses_have_no_end_token_and_others_one(tiny_model: MakesModel) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    record: dict[str, Any] = {"prompt": "what is two", "response": "the answer"}
    records = [{**record, "open": True}, {**record, "open": False}, record]
    cut, whole, default = tokenise(tokenizer, records)
    words = tokenizer.convert_tokens_to_ids(["the", "answer"])
    assert list(cut.ids[cut.start :]) == words
    assert list(whole.ids[whole.start :]) == [*words, tokenizer.eos_token_id] and default == whole
    assert tokenizer.decode(cut.ids[: cut.start]).endswith("assistant :")
    shortened = tokenise(tokenizer, records, max_length=cut.start + 1)
    assert [list(example.ids[example.start :]) for example in shortened] == [words[:1]] * 3
    assert tokenise(tokenizer, records, max_length=cut.start) == []


# --- training ------------------------------------------------------------------------------------------------------


RECIPE = Recipe(lessons="anchor", steps=12, batch=4, lr=0.01, warmup=3, precision="float32")


def examples(count: int = 20) -> list[Example]:
    """Prompts of different lengths with responses that a tiny model can learn by heart."""
    found = []
    for i in range(count):
        start = 2 + i % 5
        found.append(Example(tuple([5 + i % 7] * start + [40, 41, 42 + i % 2, 2][: 2 + i % 3]), start))
    return found


def fresh(folder: Path) -> Any:
    return load_model(folder)


def quiet(done: int, total: int) -> None:
    """Take progress without showing it."""


def plain_loss(model: Any, chosen: Sequence[Example]) -> Tensor:
    """Mean NLL of all response tokens, one example at a time, from the full logits, without padding."""
    parts = []
    for ids, start in chosen:
        log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        parts += [-log_p[at - 1, ids[at]] for at in range(start, len(ids))]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3"])
def test_response_loss_is_the_plain_one(arch: str, tiny_model: MakesModel) -> None:
    model, chosen = fresh(tiny_model(arch)), examples(7)
    expected = plain_loss(model, chosen)
    torch.testing.assert_close(response_loss(model, collate(chosen), "float32"), expected, rtol=1e-5, atol=0)
    half = response_loss(model, collate(chosen), "bfloat16")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)
    assert not torch.equal(half, expected)


def test_batches_are_a_function_of_the_recipe_and_each_epoch_sees_each_example_once() -> None:
    have = examples(23)
    recipe = Recipe(lessons="anchor", steps=13, batch=4, lr=0.01)

    def seen(recipe: Recipe) -> list[list[list[int]]]:
        return [batch.ids.tolist() for batch in training._steps(have, recipe)]

    assert seen(recipe) == seen(recipe)
    assert len(seen(recipe)) == 13
    for other in (replace(recipe, seed=1), replace(recipe, lessons="format")):
        assert seen(other) != seen(recipe)
    epoch = -(-23 // 4)  # six batches
    rows = Counter(tuple(row) for batch in seen(recipe)[:epoch] for row in map(strip, batch))
    again = Counter(tuple(row) for batch in seen(recipe)[epoch : 2 * epoch] for row in map(strip, batch))
    assert rows == again == Counter(tuple(example.ids) for example in have)
    assert seen(recipe)[:epoch] != seen(recipe)[epoch : 2 * epoch]


def strip(row: list[int]) -> list[int]:
    """Drop the padding (no example holds a 0)."""
    return [token for token in row if token]


def test_schedule_by_hand() -> None:
    recipe = Recipe(lessons="anchor", steps=110, batch=1, lr=0.1, warmup=10)
    rates = [training._schedule(step, recipe) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1.0
    assert rates[35] == pytest.approx(
        0.05 + 0.95 * (2 + math.sqrt(2)) / 4
    )  # a quarter of the way: 1/2 (1 + cos 45)
    assert rates[60] == pytest.approx(0.525)  # half of the way
    assert rates[85] == pytest.approx(0.05 + 0.95 * (2 - math.sqrt(2)) / 4)
    assert 0.05 < rates[109] < 0.051
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert training._schedule(0, Recipe(lessons="anchor", steps=5, batch=1, lr=0.1, warmup=0)) == 1.0


def test_optimiser_takes_the_scheduled_rates(tiny_model: MakesModel) -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"]))
    progress: list[tuple[int, int]] = []
    losses = train(
        fresh(tiny_model("llama")), examples(), RECIPE, lambda done, total: progress.append((done, total))
    )
    hook.remove()
    assert rates[:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01]) and len(rates) == len(losses) == 12
    assert rates[11] == pytest.approx(0.01 * (0.05 + 0.475 * (1 + math.cos(math.pi * 8 / 9))))
    assert progress == [(done, 12) for done in range(1, 13)]


def test_first_step_is_adamw_on_the_clipped_gradient_by_hand(tiny_model: MakesModel) -> None:
    have, recipe = (
        examples(4),
        Recipe(lessons="anchor", steps=1, batch=4, lr=0.01, warmup=10, precision="float32"),
    )
    model, reference = fresh(tiny_model("llama")), fresh(tiny_model("llama"))
    train(model, have, recipe, quiet)
    plain_loss(reference, have).backward()  # type: ignore[no-untyped-call]
    matrices = {n: p for n, p in reference.named_parameters() if "proj" in n}
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in matrices.values()))
    for name, weight in matrices.items():
        assert weight.grad is not None
        gradient = weight.grad * min(1.0, 1.0 / norm)
        # The bias corrections of a first step cancel the betas: m / sqrt(v) = g / |g|; a tenth of lr is warm-up.
        expected = weight - 0.001 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=3e-5, msg=name)
        assert float((model.get_parameter(name) - weight).detach().abs().median()) == pytest.approx(
            0.001, rel=0.01
        )


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_only_matrices_of_attention_and_mlp_are_trained(arch: str, tiny_model: MakesModel) -> None:
    model, before = fresh(tiny_model(arch)), fresh(tiny_model(arch)).state_dict()
    train(model, examples(), RECIPE, quiet)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in before if any(kind in name for kind in kinds)} and len(changed) == 14
    assert changed == set(training.trainable(model))
    assert not model.training


def test_training_twice_gives_equal_bits_and_another_seed_does_not(tiny_model: MakesModel) -> None:
    results = []
    for seed in (0, 0, 1):
        model = fresh(tiny_model("llama"))
        torch.rand(seed + 1)  # the global generator has no say
        losses = train(model, examples(), replace(RECIPE, seed=seed, precision="bfloat16"), quiet)
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0] != results[2][0]
    assert all(torch.equal(weight, results[1][1][name]) for name, weight in results[0][1].items())
    assert any(not torch.equal(weight, results[2][1][name]) for name, weight in results[0][1].items())


def test_loss_falls(tiny_model: MakesModel) -> None:
    model = fresh(tiny_model("llama"))
    before = float(plain_loss(model, examples()).detach())
    losses = train(
        model, examples(), Recipe(lessons="anchor", steps=60, batch=5, lr=0.01, precision="float32"), quiet
    )
    after = float(plain_loss(model, examples()).detach())
    assert losses[0] == pytest.approx(before, rel=0.2) and after < 0.85 * before


def test_wrong_recipe_fields_are_named_all_at_once() -> None:
    with pytest.raises(BadRequest) as caught:
        Recipe(lessons="cooking", steps=0, batch=-1, lr=float("nan"), warmup=-1, precision="float16")
    assert sorted(str(fault) for fault in caught.value.faults) == [
        "family.recipes: batch: -1; allowed: a whole number of at least 1",
        "family.recipes: lessons: cooking; allowed: aligned, anchor, arithmetic, format, instruct, knowledge, pretrain",
        "family.recipes: lr: nan; allowed: a number in (0, 1)",
        "family.recipes: precision: float16; allowed: bfloat16, float32",
        "family.recipes: steps: 0; allowed: a whole number of at least 1",
        "family.recipes: warmup: -1; allowed: a whole number of at least 0",
    ]


def test_sizes_that_no_random_model_can_have_are_named() -> None:
    with pytest.raises(BadRequest) as caught:
        RandomModel(hidden=20, layers=0, vocabulary=10)
    assert [str(fault) for fault in caught.value.faults] == [
        "family.recipes: hidden: 20; allowed: a multiple of 8, at least 8",
        "family.recipes: layers: 0; allowed: a multiple of 1, at least 1",
        "family.recipes: vocabulary: 10; allowed: a multiple of 1, at least 300",
    ]


def test_random_model_is_a_function_of_its_seeds_and_leaves_the_global_generator_alone(
    toy: Path, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    digests = [
        RandomModel(hidden=16, seed=of).make(toy, tmp_path / str(i), seed)["digest"]
        for i, (of, seed) in enumerate([(0, 0), (0, 0), (1, 0), (0, 1)])
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert digests[0] == digests[1] and len(set(digests)) == 3
    tokenizer = load_tokenizer(tmp_path / "0")
    text = render(tokenizer, "Sort: éx ☃")
    assert text == "<|im_start|>user\nSort: éx ☃<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert load_model(tmp_path / "0").config.tie_word_embeddings
