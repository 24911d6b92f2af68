"""Tokenizers of the small models: transformers, lm-eval and we read every text alike, in each architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from alignmerge.engine.examples import render
from alignmerge.engine.language import load_model, load_tokenizer, save_model
from alignmerge.engine.vocabulary import read_otherwise
from alignmerge.zoo.native import ARCHITECTURES, NativeModel
from alignmerge.zoo.random_model import RandomModel, corpus_texts
from alignmerge.zoo.tokenizer import tokenizer_for
from alignmerge.zoo.training import Recipe
from alignmerge.zoo.world import World
from eval.scorers.interface import LoadedModel, Prompt
from eval.scorers.utility import language_model, run_tasks, write_tasks

SMALL = World(pretrain=200, instruct=100, requests_train=60, tasks_train=60)
PLAIN = Recipe(lessons="pretrain", steps=1, batch=4, lr=0.005, scope="all", precision="float32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    SMALL.write(Path, folder)
    return folder


@pytest.fixture(scope="module")
def native(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ARCHITECTURES:
        model, tokenizer, _ = NativeModel(architecture=name, training=PLAIN).make(corpus, 0, lambda *_: None)
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(model, tokenizer, folders[name])
    folders["smoke"] = tmp_path_factory.mktemp("smoke")
    RandomModel().make(corpus, folders["smoke"], 0)
    return folders


def test_each_word_of_the_corpus_is_one_token_of_qwen2(corpus: Path) -> None:
    words = set(re.findall(r"[A-Za-z]+", " ".join(corpus_texts(corpus)))) - {"m", "t"}  # of I'm and can't
    tokenizer = tokenizer_for("qwen2", corpus)
    assert [word for word in sorted(words) if len(tokenizer.tokenize(f"a {word}")) != 2] == []
    assert tokenizer.tokenize("I can't: 42") == ["I", "Ġcan", "'t", ":", " 4", "2"]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "smoke"])
def test_auto_tokenizer_reads_every_text_as_we_do(name: str, native: dict[str, Path], corpus: Path) -> None:
    """lm-eval's own command line loads by AutoTokenizer, which has a mind of its own for some families."""
    ours, theirs = load_tokenizer(native[name]), AutoTokenizer.from_pretrained(native[name])
    texts = corpus_texts(corpus)
    texts += [render(ours, text) for text in texts]
    ids = ours(texts, add_special_tokens=False)["input_ids"]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ids
    assert theirs.batch_decode(ids[:200]) == ours.batch_decode(ids[:200]) == texts[:200]
    for told in ("chat_template", "eos_token_id", "pad_token_id", "all_special_tokens"):
        assert getattr(theirs, told) == getattr(ours, told)
    assert read_otherwise(native[name]) == ""


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_lm_evals_own_model_answers_as_ours_does(name: str, native: dict[str, Path], tmp_path: Path) -> None:
    """The wrapper that lm-eval makes of a folder, and the one that it gets from us, token by token."""
    from lm_eval.models.huggingface import HFLM

    prompts = [
        Prompt(f"p/{i}", text, {"answer": "7"}) for i, text in enumerate(("What is 3 + 4?", "I want a kite."))
    ]
    write_tasks(tmp_path, {"arithmetic": prompts})
    loaded = LoadedModel(load_model(native[name]), load_tokenizer(native[name]), batch_size=2)
    theirs = HFLM(pretrained=str(native[name]), dtype="float32", batch_size=2, max_length=128, device="cpu")
    answered = []
    for lm in (language_model(loaded, 128), theirs):
        rows = run_tasks(lm, tmp_path, ["arithmetic"], None)["arithmetic"]
        answered.append([(row["arguments"][0][0], row["resps"]) for row in rows])
    assert answered[0] == answered[1] and any(said for _, ((said,),) in answered[0])
    unknown = loaded.tokenizer.unk_token_id
    assert unknown not in theirs.tokenizer(prompts[0].text, add_special_tokens=False)["input_ids"]
