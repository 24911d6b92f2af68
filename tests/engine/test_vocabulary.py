"""One vocabulary in whatever files: byte-level BPE as tokenizer.json, and as vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from alignmerge.engine.vocabulary import PROBES, read_otherwise, vocabulary_faults
from tests.conftest import SENTENCES

END = "<|endoftext|>"


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(tmp_path / "one file")
    return tmp_path / "one file"


def in_two_files(one_file: Path, change: Callable[[dict[str, int], list[str]], object] | None = None) -> Path:
    folder = one_file.parent / "two files"
    folder.mkdir()
    model = json.loads((one_file / "tokenizer.json").read_text())["model"]
    vocabulary, merges = model["vocab"], [" ".join(pair) for pair in model["merges"]]
    if change is not None:
        change(vocabulary, merges)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def said(base: Path, other: Path) -> list[str]:
    return [str(fault) for fault in vocabulary_faults(base, "family.base", other, "family.anchor")]


def swap(vocabulary: dict[str, int], merges: list[str]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_equal_vocabularies_in_different_files_are_accepted(one_file: Path) -> None:
    two_files = in_two_files(one_file)
    assert said(one_file, two_files) == said(two_files, one_file) == []


def test_another_vocabulary_is_named_in_whatever_files(one_file: Path) -> None:
    two_files = in_two_files(one_file, swap)
    (line,) = said(one_file, two_files)
    assert line.startswith(f"family.anchor: {two_files / 'vocab.json'}: another vocabulary (2 tokens differ")
    (line,) = said(two_files, one_file)
    assert line.startswith(f"family.anchor: {one_file / 'tokenizer.json'}: another vocabulary (2 tokens differ")


def copy_of(folder: Path) -> Path:
    copy = folder.parent / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"]["merges"].reverse(), "the merges of its pairs differ"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "other ids than the base's for 'How many legs"),
    ],
)
def test_other_rules_with_one_vocabulary_are_named(
    change: Callable[[dict[str, object]], object], words: str, one_file: Path
) -> None:
    other = copy_of(one_file)
    content = json.loads((other / "tokenizer.json").read_text())
    change(content)
    (other / "tokenizer.json").write_text(json.dumps(content))
    (line,) = said(one_file, other)
    assert words in line


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_tokens_added_beside_the_vocabulary_count(name: str, one_file: Path) -> None:
    """Each takes the next row: two models that add different tokens give it two meanings."""
    contents = {
        "added_tokens.json": lambda token: {token: 999},
        "special_tokens_map.json": lambda token: {"additional_special_tokens": [token]},
        "tokenizer_config.json": lambda token: {"extra_special_tokens": [token]},
    }
    base, other = one_file, copy_of(one_file)
    for folder, token in ((base, "<one>"), (other, "<two>")):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | contents[name](token)))
    (line,) = said(base, other)
    assert "2 tokens differ from the base's, such as '<one>'" in line


def test_what_does_not_decide_over_ids_is_silent(one_file: Path) -> None:
    other = copy_of(one_file)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings |= {"chat_template": "{{ messages }}", "model_max_length": 7, "padding_side": "left"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = [
        " ".join(pair) for pair in content["model"]["merges"]
    ]  # as older versions wrote
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert said(one_file, other) == []


def test_a_folder_that_auto_tokenizer_reads_otherwise_is_told(tmp_path: Path) -> None:
    """A word-level tokenizer: for Qwen2 transformers keeps its words and puts byte pairs in place of its rules."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "How": 2, "many": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    told = {}
    for kind in ("qwen2", "llama"):
        folder = tmp_path / kind
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, unk_token="<unk>").save_pretrained(folder)
        AutoConfig.for_model(kind).save_pretrained(folder)
        told[kind] = read_otherwise(folder)
    assert told["llama"] == ""
    assert told["qwen2"] == f"AutoTokenizer reads {PROBES[0]!r} as other ids than tokenizer.json says"
