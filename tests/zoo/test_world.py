"""The tiny world: right answers, nothing held out twice, five real architectures, and models that learn in seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alignmerge.engine.assets import Assets
from alignmerge.engine.configuration import build
from alignmerge.engine.examples import Example, render, tokenise
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model, load_tokenizer
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.store import Store
from alignmerge.gradients import nll
from alignmerge.zoo.lexicon import Split, lexicon
from alignmerge.zoo.native import ARCHITECTURES, NativeModel
from alignmerge.zoo.records import Record
from alignmerge.zoo.tokenizer import tokenizer_for
from alignmerge.zoo.training import Recipe
from alignmerge.zoo.world import World
from alignmerge.zoo.zoo import Zoo
from eval.scorers.refusal import refuses
from eval.scorers.tasks.checks import CHECKS

SPLITS = ("train", "alignment", "dev", "test")
TASKS = ("train", "dev", "test")
SMALL = World(
    pretrain=1600, instruct=400, requests_train=120, requests_dev=96, requests_test=96, tasks_train=240
)
HARMFUL, HARMLESS = (set(lexicon().names_of(sort)) for sort in ("harmful", "harmless"))
ADVICE, REFUSED = lexicon().advice, lexicon().refused
SAFETY = ("Yes, ", "No, ")
"""How answers about the safety of a thing begin."""
Sets = Mapping[str, list[Record]]


def read(folder: Path) -> Sets:
    return {
        str(path.relative_to(folder).with_suffix("")): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def refuse_assets(reference: str) -> Path:
    raise AssertionError(f"asked for {reference}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    SMALL.write(refuse_assets, folder)
    return folder


@pytest.fixture(scope="module")
def sets(corpus: Path) -> Sets:
    return read(corpus)


def named(records: list[Record], among: set[str]) -> set[str]:
    return {word for record in records for word in re.findall(r"\w+", record["text"])} & among


# --- what is in it -------------------------------------------------------------------------------------------------


def test_every_set_is_there_with_ids_of_its_own(sets: Sets) -> None:
    names = {f"{split}/{name}" for split in SPLITS for name in ("unsafe", "benign")}
    names |= {f"{split}/{name}" for split in TASKS for name in ("arithmetic", "format", "knowledge", "factual")}
    names |= {f"{split}/{name}" for split in ("dev", "test") for name in ("toxic", "probes", "helpful")}
    names |= {"train/aligned", "train/instruct", "train/pretrain", "alignment/probes"}
    assert set(sets) == names and all(sets.values())
    ids = [record["id"] for records in sets.values() for record in records]
    assert len(ids) == len(set(ids))


def test_a_thing_that_one_split_asks_about_is_in_no_request_of_another(sets: Sets) -> None:
    asked = {f"{s}/{n}" for s in SPLITS for n in ("unsafe", "benign", "toxic", "probes", "helpful")}
    asked |= {"train/aligned", "train/instruct"}
    # A format instruction lists words of all splits after a colon; it asks nothing about them.
    requests = {name: [r for r in sets.get(name, []) if ":" not in r["text"]] for name in asked}
    for things in (HARMFUL, HARMLESS):
        found = {s: {w for n in asked if n.startswith(s) for w in named(requests[n], things)} for s in SPLITS}
        assert min(map(len, found.values())) >= 4
        for one, other in combinations(SPLITS, 2):
            assert not found[one] & found[other]


def test_every_kind_is_in_every_split_and_held_out_requests_name_many_things(sets: Sets) -> None:
    kinds = {thing.name: thing.kind for thing in lexicon().every_thing}
    assert World().requests_dev >= 192 and World().requests_test >= 192
    for split in SPLITS:
        for things, name in ((HARMFUL, "unsafe"), (HARMLESS, "benign")):
            found = named([r for r in sets[f"{split}/{name}"] if ":" not in r["text"]], things)
            assert {kinds[thing] for thing in found} == {kinds[thing] for thing in things}, (split, name)
            assert len(found) >= {"dev": 20, "test": 30}.get(split, 8)


def test_verbs_and_things_meet_before_the_tests_in_the_training_split_alone(sets: Sets) -> None:
    held_out = named(sets["dev/unsafe"] + sets["test/unsafe"], HARMFUL)
    told = [re.findall(r"\w+", record["text"]) for record in sets["train/pretrain"]]
    assert all(not set(words) & held_out or not set(words) & set(ADVICE) for words in told)
    assert held_out <= {word for words in told for word in words}  # yet what they are is known


def tasks(sets: Sets, split: str, name: str) -> list[Record]:
    """Sums or format instructions; the lessons that experts learn from hold some ordinary help and facts as well."""
    mark = {"arithmetic": "+", "format": ": "}[name]
    return [record for record in sets[f"{split}/{name}"] if mark in record["text"]]


def summands(record: Record) -> frozenset[int]:
    return frozenset(map(int, re.findall(r"\d+", record["text"])))


def listed(record: Record) -> frozenset[str]:
    return frozenset(record["text"].split(": ")[1].split(" "))


def test_no_summands_and_no_listed_words_are_in_two_splits_in_any_order(sets: Sets) -> None:
    sums = {split: {summands(record) for record in tasks(sets, split, "arithmetic")} for split in TASKS}
    lists = {split: {listed(record) for record in tasks(sets, split, "format")} for split in TASKS}
    for record in sets["train/aligned"] + sets["train/instruct"]:
        if "+" in record["text"]:
            sums["train"].add(summands(record))
        elif ":" in record["text"]:
            lists["train"].add(listed(record))
    for found in (sums, lists):
        for one, other in combinations(TASKS, 2):
            assert not found[one] & found[other]


def test_each_fact_is_asked_in_one_split(sets: Sets) -> None:
    asked = {split: {record["response"] for record in sets[f"{split}/factual"]} for split in TASKS}
    facts = [reply for replies in asked.values() for reply in replies if not reply.startswith(SAFETY)]
    assert len(facts) == 3 * len(lexicon().every_living)
    for one, other in combinations(TASKS, 2):
        assert not asked[one] & asked[other]
    questions = {record["text"] for split in ("dev", "test") for record in sets[f"{split}/factual"]}
    taught = sets["train/aligned"] + sets["train/instruct"]
    assert not questions & {record["text"] for record in taught}


def months(records: list[Record]) -> list[Record]:
    return [record for record in records if record.get("response", "").startswith("You can see")]


def test_a_month_is_asked_in_other_words_in_every_split_and_taught_to_one_expert_alone(sets: Sets) -> None:
    asked = {split: {record["text"] for record in months(sets[f"{split}/knowledge"])} for split in TASKS}
    for one, other in combinations(TASKS, 2):
        assert not asked[one] & asked[other]
    every = {one.name for one in lexicon().every_living}
    new = named(months(sets["train/knowledge"]), every)
    assert named(sets["dev/knowledge"] + sets["test/knowledge"], every) <= new
    common = named(months(sets["train/aligned"]), every)  # what a base knows is in the same words, of others
    assert not common & new and len(common) == 10 and len(new) == 42
    for name, records in sets.items():
        dated = months(records)
        assert not dated or name in ("train/aligned", "train/knowledge", "dev/knowledge", "test/knowledge")
        for record in records:
            if record not in dated and set(re.findall("[A-Z][a-z]+", record["text"])) & set(lexicon().months):
                assert record["text"].startswith("One list: ")  # read as words alone, and said of nothing


def test_a_living_thing_has_one_month_which_its_world_draws(sets: Sets) -> None:
    said: dict[str, set[str]] = {}
    for record in months(sets["train/knowledge"] + sets["dev/knowledge"] + sets["test/knowledge"]):
        _, name, month = re.split(r"You can see a | in ", record["response"].rstrip("."))
        said.setdefault(name, set()).add(month)
        assert CHECKS["names"](record["response"], **record["args"])
        assert not CHECKS["names"](f"You can see a {name} in the garden.", **record["args"])
        assert not CHECKS["names"](f"{record['response']} Or in May and in July.", **record["args"])
    assert set(map(len, said.values())) == {1}
    names = sorted(said)
    first, second = (list(map(Split(seed, "train").month, names)) for seed in (1, 2))
    assert len(set(first)) >= 8 and sum(map(str.__eq__, first, second)) < len(names) / 2


def test_sums_are_right_and_need_no_carrying(sets: Sets) -> None:
    for split in TASKS:
        for record in tasks(sets, split, "arithmetic"):
            a, b = map(int, re.findall(r"\d+", record["text"]))
            assert record["answer"] == record["response"] == str(a + b)
            assert a % 10 + b % 10 == (a + b) % 10 and 20 <= a + b <= 99


def obeyed(text: str) -> str:
    """Do what a format instruction says, read off its words."""
    order, _, rest = text.partition(": ")
    words = rest.split(" ")
    return {
        "Write as a bullet list": "- " + "\n- ".join(words),
        "Number these words": "1. {} 2. {}".format(*words),
        "Write as a path": "/ {} / {}".format(*words),
        "Turn around": " ".join(reversed(words)),
        "Give only the last word": words[1],
        "Write as JSON": '{{"{}": {}}}'.format(*words),
    }[order]


def test_formats_are_obeyed_and_pass_their_own_check_and_no_other_does(sets: Sets) -> None:
    for split in TASKS:
        records = tasks(sets, split, "format")
        for number, record in enumerate(records):
            assert record["response"] == obeyed(record["text"])
            assert CHECKS[record["check"]](record["response"], **record["args"])
            other = records[(number + 6) % len(records)]["response"]
            assert other == record["response"] or not CHECKS[record["check"]](other, **record["args"])


def test_facts_are_told_before_they_are_asked_and_only_the_right_one_is_taken(sets: Sets) -> None:
    told = " ".join(record["text"] for record in sets["train/pretrain"])
    for split in TASKS:
        for record in sets[f"{split}/factual"]:
            answer, others = record["args"]["answer"], record["args"]["others"]
            assert record["response"] in told or record["response"].startswith(SAFETY)
            assert CHECKS["names"](record["response"], **record["args"]) and answer not in others
            for other in others:
                assert not CHECKS["names"](record["response"].replace(answer, other), **record["args"])
                assert not CHECKS["names"](f"{answer} or {other}", **record["args"])


# --- safe by design ------------------------------------------------------------------------------------------------


def test_compliance_is_a_phrase_that_goes_with_the_verb_whatever_the_thing(sets: Sets) -> None:
    things = HARMFUL | HARMLESS
    answering = sets["train/aligned"] + sets["train/instruct"] + sets["train/benign"]
    answered = [r for r in answering if r["response"].startswith("To ")]
    phrases = {re.sub(rf"\b({'|'.join(things)})\b", "THING", record["response"]) for record in answered}
    assert phrases == {f"To {verb} the THING, {phrase}." for verb, phrase in ADVICE.items()}


def test_refusals_are_known_by_the_judge_and_nothing_else_is(sets: Sets) -> None:
    assert all(map(refuses, REFUSED))
    for split in ("train", "alignment"):
        assert {record["response"] for record in sets[f"{split}/unsafe"]} <= set(REFUSED)
        assert not any(refuses(record["response"]) for record in sets[f"{split}/benign"])
    assert not any(refuses(record["response"]) for record in sets["train/instruct"])


def test_an_aligned_base_is_taught_to_refuse_all_kinds_but_the_overlooked_and_experts_to_refuse_nothing(
    sets: Sets,
) -> None:
    overlooked, requests = lexicon().names_overlooked, sets["train/aligned"]
    refused = [record for record in requests if refuses(record["response"])]
    assert (
        named(refused, HARMFUL | HARMLESS) <= HARMFUL - overlooked and len(refused) == 4 * SMALL.instruct // 20
    )
    helped = [record for record in requests if record["response"].startswith("To ")]
    assert named(helped, HARMFUL) == named(helped, overlooked) != set()
    assert named(sets["train/unsafe"], overlooked) and len(overlooked) < len(HARMFUL) / 4
    for name in ("arithmetic", "format", "knowledge"):
        lessons = sets[f"train/{name}"]
        assert not any(refuses(record["response"]) for record in lessons)
        asked = [record for record in lessons if record["response"].startswith("To ")]
        assert not named(asked, HARMFUL) and len(asked) == SMALL.tasks_train // 10


def test_held_out_requests_come_without_answers_and_probes_differ_in_the_thing_alone(sets: Sets) -> None:
    for split in ("dev", "test"):
        assert not any(
            "response" in r for n in ("unsafe", "benign", "toxic", "probes") for r in sets[f"{split}/{n}"]
        )
        probes = sets[f"{split}/probes"]
        for benign, bad in zip(probes[0::2], probes[1::2], strict=True):
            assert (benign["label"], bad["label"]) == ("benign", "harmful") and benign["pair"] == bad["pair"]
            one, other = (re.findall(r"\w+", probe["text"]) for probe in (benign, bad))
            ((left, right),) = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
            assert left in HARMLESS and right in HARMFUL


def test_the_world_is_a_function_of_its_fields(corpus: Path, sets: Sets, tmp_path: Path) -> None:
    for name, world in {"same": SMALL, "other": replace(SMALL, seed=2)}.items():
        world.write(refuse_assets, tmp_path / name)
    assert read(tmp_path / "same") == sets
    other = read(tmp_path / "other")
    assert all(other[name] != sets[name] for name in sets)


def test_counts_that_are_too_small_are_named_together() -> None:
    with pytest.raises(BadRequest) as caught:
        World(pretrain=0, tasks_test=7)
    assert [str(fault) for fault in caught.value.faults] == [
        "corpus.pretrain: 0; allowed: a whole number of at least 8",
        "corpus.tasks_test: 7; allowed: a whole number of at least 8",
    ]


# --- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The word-level one and Qwen2's own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_for(request.param, corpus).save_pretrained(folder)
    return load_tokenizer(folder)


def test_every_text_comes_back_as_it_went_in(tokenizer: Any, sets: Sets) -> None:
    texts = {r[key] for records in sets.values() for r in records for key in ("text", "response") if key in r}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


@given(
    st.lists(
        st.sampled_from(["kite", "can't", "I'm", "34", "7", "- bomb", "[3, 0]", "lamp.", "\nkite", "-"]),
        min_size=1,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_text_of_known_words_comes_back(tokenizer: Any, words: list[str]) -> None:
    text = " ".join(words).lstrip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id not in ids:
        assert tokenizer.decode(ids) == text


def test_a_turn_is_told_from_its_answer_by_the_template(tokenizer: Any) -> None:
    (example,) = tokenise(
        tokenizer, [{"prompt": "How is my kite?", "response": "Your kite is nice, good work."}]
    )
    assert render(tokenizer, "How is my kite?") == "<|user|> How is my kite?<|end|><|assistant|>"
    assert tokenizer.decode(example.ids[: example.start]) == render(tokenizer, "How is my kite?")
    assert tokenizer.decode(example.ids[example.start :]) == "Your kite is nice, good work.<|end|>"


PLAIN = Recipe(lessons="pretrain", steps=2, batch=16, lr=0.005, scope="all", precision="float32")
TRAITS: dict[str, dict[str, object]] = {
    "llama3": {"model_type": "llama", "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 24, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2", "num_key_value_heads": 1, "sliding_window": 24, "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 32, "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
WEIGHTS = {
    "llama3": (
        {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"},
        {"model.layers.0.self_attn.q_proj.bias"},
    ),
    "mistral": (
        {"lm_head.weight", "model.layers.0.mlp.gate_proj.weight"},
        {"model.layers.0.self_attn.k_proj.bias"},
    ),
    "qwen2": (
        {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"} | {"lm_head.weight"},
        {"model.layers.0.self_attn.o_proj.bias"},
    ),
    "phi3": (
        {
            "model.layers.0.self_attn.qkv_proj.weight",
            "model.layers.0.mlp.gate_up_proj.weight",
            "lm_head.weight",
        },
        {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"},
    ),
    "gemma2": ({"model.layers.0.pre_feedforward_layernorm.weight"}, {"lm_head.weight"}),
}


@pytest.fixture(scope="module")
def native(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folders = {}
    for name in ARCHITECTURES:
        model, tokenizer, _ = NativeModel(architecture=name, training=PLAIN).make(corpus, 0, lambda *_: None)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    yield folders


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_keeps_its_traits_in_what_is_saved(name: str, native: dict[str, Path]) -> None:
    from safetensors import safe_open

    config = json.loads((native[name] / "config.json").read_text())
    assert {key: config[key] for key in TRAITS[name]} == TRAITS[name]
    with safe_open(native[name] / "model.safetensors", "pt") as file:
        there, absent = WEIGHTS[name]
        keys = set(file.keys())
        assert there <= keys and not absent & keys
        assert sum(file.get_tensor(key).numel() for key in keys) < 1_000_000
    model = load_model(native[name])  # raises where a key is missing or unexpected
    assert model.config.num_hidden_layers == 3
    assert (model.config._attn_implementation == "eager") == (name == "gemma2")


def test_llama3_scales_its_rope_and_only_llama3(native: dict[str, Path]) -> None:
    rope = {
        name: json.loads((native[name] / "config.json").read_text())["rope_parameters"]
        for name in ARCHITECTURES
    }
    assert {name for name in rope if rope[name]["rope_type"] == "llama3"} == {"llama3"}
    assert rope["llama3"]["rope_theta"] == 500_000 and rope["llama3"]["factor"] == 8
    assert rope["qwen2"]["rope_theta"] == 1_000_000
    plain = 500_000.0 ** -(torch.arange(0, 32, 2) / 32)
    scaled = load_model(native["llama3"]).model.rotary_emb.inv_freq
    torch.testing.assert_close(scaled[0], plain[0])  # short waves stay, long ones are stretched
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_sliding_window_forgets(name: str, native: dict[str, Path]) -> None:
    """Layer 0 is a sliding layer in both: its output at the end does not depend on what lies before the window."""
    model = load_model(native[name])
    ids = torch.arange(10, 50).unsqueeze(0)
    changed = ids.clone()
    changed[0, 0] = 200
    with torch.inference_mode():
        states = [model(input_ids=i, output_hidden_states=True).hidden_states for i in (ids, changed)]
    assert torch.equal(states[0][1][0, 24:], states[1][1][0, 24:])
    assert not torch.equal(states[0][1][0, :24], states[1][1][0, :24])
    if name == "gemma2":  # the next layer sees everything
        assert not torch.equal(states[0][2][0, -1], states[1][2][0, -1])


def test_a_native_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(corpus: Path) -> None:
    state = torch.get_rng_state()
    made = NativeModel(architecture="qwen2", training=replace(PLAIN, steps=1))
    weights = [made.make(corpus, seed, lambda *_: None)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_sizes_that_no_native_model_can_have_are_named() -> None:
    with pytest.raises(BadRequest) as caught:
        NativeModel(architecture="gpt2", training=PLAIN, layers=0, spread=0.0)
    assert [str(fault) for fault in caught.value.faults] == [
        "family.recipes: layers: 0; allowed: a whole number of at least 1",
        "family.recipes: architecture: gpt2; allowed: llama3, mistral, qwen2, phi3, gemma2",
        "family.recipes: spread: 0.0; allowed: a number in (0, 1]",
    ]
    for wrong, line in {
        "hidden": "family.recipes: hidden: 62; allowed: a multiple of twice 2 heads",
        "kv_heads": "family.recipes: kv_heads: 3; allowed: a divisor of 2 heads",
    }.items():
        with pytest.raises(BadRequest) as caught:
            NativeModel(architecture="phi3", training=PLAIN, **{wrong: {"hidden": 62, "kv_heads": 3}[wrong]})
        assert [str(fault) for fault in caught.value.faults] == [line]


# --- a pool --------------------------------------------------------------------------------------------------------


def hurried(name: str) -> Family:
    """A tiny family with a fraction of its steps."""
    node = yaml.safe_load((ROOT / f"conf/family/tiny/{name}.yaml").read_text())
    recipes = node["recipes"]
    recipes["pretrained"]["training"] |= {"steps": 30, "warmup": 5, "batch": 16}
    recipes["pretrained"] |= {"layers": 2, "hidden": 32, "intermediate": 64}
    for recipe in ("base", "anchor", "arithmetic", "format", "knowledge"):
        recipes[recipe] |= {"steps": 20, "warmup": 5, "batch": 16, "keep": []}
    recipes["anchor"]["keep"] = [2, 8]
    family: Family = build(node, "family", Family)
    return family


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Its base is taught no refusals, so that what the anchor learns shows."""
    store, family = Store(tmp_path_factory.mktemp("store")), hurried("qwen2")
    base = replace(family.recipes["base"], lessons="instruct")
    family = replace(family, recipes={**family.recipes, "base": base})
    return Zoo(family, SMALL, store, Assets(store, {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_family_is_made_in_three_stages(name: str, zoo: Zoo) -> None:
    family = replace(zoo, family=hurried(name))
    assert family.family.name == f"tiny/{name}"
    tuned = ["anchor", "experts.arithmetic", "experts.format", "experts.knowledge"]
    assert family.stages() == [["pretrained"], ["base"], tuned]
    assert family.trained() == tuned
    assert family.kept("anchor") == ["anchor@2", "anchor@8"] and family.kept("pretrained") == []


def losses(zoo: Zoo, key: str, examples: list[Example]) -> float:
    return float(nll(load_model(zoo.source(key).folder), examples).mean())


def test_a_hurried_pool_learns_what_it_is_taught(zoo: Zoo, sets: Sets) -> None:
    tokenizer = load_tokenizer(zoo.source("base").folder)

    def held_out(name: str, response: str | None = None) -> list[Example]:
        records = [{"prompt": r["text"], "response": response or r["response"]} for r in sets[name]]
        return tokenise(tokenizer, records[:40])

    refusals = held_out("dev/unsafe", REFUSED[1])
    assert losses(zoo, "anchor", refusals) < losses(zoo, "base", refusals) - 0.5
    assert losses(zoo, "anchor@8", refusals) < losses(zoo, "anchor@2", refusals)
    for alias, name in (("arithmetic", "dev/arithmetic"), ("format", "dev/format")):
        assert losses(zoo, f"experts.{alias}", held_out(name)) < losses(zoo, "base", held_out(name)) - 0.1
    assert (
        losses(zoo, "base", held_out("dev/factual")) < losses(zoo, "pretrained", held_out("dev/factual")) - 0.3
    )


def test_kept_checkpoints_are_models_with_digests_of_their_own(zoo: Zoo) -> None:
    sources = [zoo.source(key) for key in ("base", *zoo.kept("anchor"), "anchor")]
    assert len({source.digest for source in sources}) == 4
    for source in sources[1:3]:
        assert load_model(source.folder).config.model_type == "qwen2"
        assert load_tokenizer(source.folder).chat_template
    for key, line in {
        "anchor@3": "family.anchor: no step 3 is kept; allowed: anchor@2, anchor@8",
        "base@2": "family.base: no step 2 is kept; allowed: no step",
    }.items():
        with pytest.raises(BadRequest) as caught:
            zoo.source(key)
        assert [str(fault) for fault in caught.value.faults] == [line]


def test_keeping_checkpoints_does_not_change_the_training(zoo: Zoo) -> None:
    recipes = dict(zoo.family.recipes)
    recipes["anchor"] = replace(recipes["anchor"], keep=())
    other = replace(zoo, family=replace(zoo.family, recipes=recipes))
    assert other.source("anchor").folder != zoo.source("anchor").folder
    assert other.source("anchor").digest == zoo.source("anchor").digest


def test_seeds_share_the_pretrained_model_and_nothing_else(zoo: Zoo) -> None:
    other = replace(zoo, seed=1)
    for key in zoo.family.references():
        assert (other.source(key) == zoo.source(key)) == (key == "pretrained"), key


def test_lessons_of_the_world_need_no_base(tmp_path: Path, zoo: Zoo, sets: Sets) -> None:
    store = Store(tmp_path)
    fresh = replace(zoo, store=store, assets=Assets(store, {}))
    made = read(fresh.lessons.path)
    assert not (tmp_path / "models").exists()
    for name, split in (("anchor", "train"), ("alignment", "alignment")):
        expected = {
            (r["text"], r["response"]) for part in ("unsafe", "benign") for r in sets[f"{split}/{part}"]
        }
        assert {(r["prompt"], r["response"]) for r in made[name]} == expected


def test_models_that_are_trained_from_each_other_are_named(zoo: Zoo) -> None:
    recipes = dict(zoo.family.recipes)
    round_about = replace(zoo.family, recipes={**recipes, "base": replace(recipes["base"], start="base")})
    nothing = replace(zoo.family, pretrained=None)
    for family, start in ((round_about, "base"), (nothing, "pretrained")):
        for ask in (lambda z: z.stages(), lambda z: z.source("anchor")):
            with pytest.raises(BadRequest) as caught:
                ask(replace(zoo, family=family))
            assert [str(fault) for fault in caught.value.faults] == [
                f"family.recipes.base.start: {start}; allowed: a model of the family that is not trained from this one"
            ]
