"""Decoding against the plain loop of argmax, and folders whose tokenizer or template cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignmerge.engine.examples import render
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import GENERATION
from alignmerge.engine.language import end_tokens, greedy, load_model, load_tokenizer
from tests.conftest import MakesModel

Copies = Callable[[Path], Path]
PROMPTS = ["user : how do i build a kite", "user : two", "please write a short list of three words"]
NOISE = {
    "do_sample": True, "temperature": 9.0, "top_k": 50, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
    "min_new_tokens": 9, "suppress_tokens": [5, 6, 7, 8, 9, 10], "num_beams": 3, "forced_eos_token_id": 11,
}  # fmt: skip


def by_hand(model: Any, tokenizer: Any, text: str, ends: set[int], count: int) -> tuple[str, bool]:
    """The plain loop: the likeliest token until one ends the turn."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token in ends:
            return tokenizer.decode(said, skip_special_tokens=True).strip(), False
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip(), True


def set_generation(folder: Path, **changes: object) -> None:
    path = folder / GENERATION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replies(folder: Path, batch_size: int) -> list[tuple[str, bool]]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_of_the_generation_config_acts(tiny_model: MakesModel, copied: Copies, batch_size: int) -> None:
    folder = copied(tiny_model("llama"))
    set_generation(folder, **NOISE)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert replies(folder, batch_size) == [by_hand(model, tokenizer, text, {2}, 12) for text in PROMPTS]
    assert model.generation_config.top_k == NOISE["top_k"]  # what is saved of it is as it was


def test_any_of_the_end_tokens_ends_a_turn(tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]])
    third = int(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, -1])
    set_generation(folder, eos_token_id=[7, third])
    ends = {2, 7, third}
    assert set(end_tokens(load_model(folder), tokenizer)) == ends
    expected = [by_hand(model, tokenizer, text, ends, 12) for text in PROMPTS]
    assert replies(folder, 2) == expected
    assert expected[0][1] is False and replies(tiny_model("llama"), 2)[0][0] != expected[0][0]


def test_a_folder_without_a_tokenizer_is_named(tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadRequest, match=rf"^tokenizer of {folder}: no tokenizer; allowed: "):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_be_read_is_named(tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadRequest, match=r"transformers cannot read it .*; allowed: "):
        load_tokenizer(folder)


def test_a_tokenizer_without_an_end_token_is_named(tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    del said["eos_token"]
    path.write_text(json.dumps(said))
    with pytest.raises(BadRequest, match="no end token; allowed: an eos_token in"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has none of its own"),
        ("{{ raise_exception('A system turn is needed.') }}", "says: A system turn is needed."),
        ("{% if %}", "says: "),
        ("{{ messages[1]['content'].strip() }}", "says: .*no element 1"),
    ],
)
def test_a_template_that_refuses_is_named_with_its_own_words(
    tiny_model: MakesModel, template: str | None, words: str
) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    tokenizer.chat_template = template
    with pytest.raises(BadRequest, match=rf"^family\.chat_template: .*{words}"):
        render(tokenizer, "hello")
