"""What beside the weights makes a model: digests that change with content alone, and copies byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakesModel

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import config_digest, copy_companions, generation_digest, tokenizer_digest
from alignmerge.engine.language import load_model, load_tokenizer

Digest = Callable[[Path], str]
DIGESTS = (config_digest, generation_digest, tokenizer_digest)
TEMPLATE = "additional_chat_templates/tool_use.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", TEMPLATE,
)  # fmt: skip
JSON_FILES = (
    ("config.json", config_digest),
    ("generation_config.json", generation_digest),
    ("tokenizer_config.json", tokenizer_digest),
)


@pytest.fixture
def model(tiny_model: MakesModel, copied: Callable[[Path], Path]) -> Path:
    return copied(tiny_model("llama"))


def digests(folder: Path) -> dict[Digest, str]:
    return {digest: digest(folder) for digest in DIGESTS}


def changed(before: dict[Digest, str], folder: Path) -> set[Digest]:
    after = digests(folder)
    return {digest for digest in DIGESTS if before[digest] != after[digest]}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "changes", "digest"),
    [
        ("config.json", {"rope_parameters": {"rope_theta": 10_000.0}}, config_digest),
        ("config.json", {"rms_norm_eps": 1e-5}, config_digest),
        ("config.json", {"use_cache": False}, config_digest),
        ("config.json", {"vision_config": {"rope_theta": 1.0}}, config_digest),
        ("generation_config.json", {"eos_token_id": [2, 5]}, generation_digest),
        ("generation_config.json", {"repetition_penalty": 1.1}, generation_digest),
        ("tokenizer_config.json", {"add_prefix_space": True}, tokenizer_digest),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, tokenizer_digest),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, tokenizer_digest),
    ],
)
def test_a_changed_value_changes_its_digest_alone(
    name: str, changes: dict[str, Any], digest: Digest, model: Path
) -> None:
    before = digests(model)
    edit(model / name, **changes)
    assert changed(before, model) == {digest}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"transformers_version": "4.40.0", "_name_or_path": "/home/somebody/model"}),
        ("config.json", {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        ("generation_config.json", {"transformers_version": "4.40.0", "_from_model_config": True}),
        ("tokenizer_config.json", {"name_or_path": "/home/x", "is_local": True, "local_files_only": True}),
        ("tokenizer_config.json", {"processor_class": "P", "tokenizer_file": "/home/x/tokenizer.json"}),
    ],
)
def test_who_wrote_a_file_where_and_when_does_not_count(
    name: str, changes: dict[str, Any], model: Path
) -> None:
    before = digests(model)
    edit(model / name, **changes)
    assert changed(before, model) == set()


def test_who_wrote_a_nested_config_does_not_count_either(model: Path) -> None:
    nested = {"hidden_size": 8, "deeper": {"x": 1}}
    edit(model / "config.json", text_config=nested)
    before = digests(model)
    written = {"transformers_version": "4.40.0", "torch_dtype": "float16", "dtype": None, "_name_or_path": "p"}
    edit(model / "config.json", text_config={**nested, **written, "deeper": {"x": 1, **written}})
    assert changed(before, model) == set()
    edit(model / "config.json", text_config={**nested, "deeper": {"x": 2}})
    assert changed(before, model) == {config_digest}


@pytest.mark.parametrize(("name", "digest"), JSON_FILES)
def test_layout_of_a_file_does_not_count(name: str, digest: Digest, model: Path) -> None:
    before = digests(model)
    content = json.loads((model / name).read_text())
    (model / name).write_text(
        json.dumps(dict(reversed(content.items())), indent=7, ensure_ascii=False) + "\n\n"
    )
    assert changed(before, model) == set()
    (model / name).unlink()
    assert changed(before, model) == {digest}


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_each_tokenizer_file_counts_with_its_name_and_bytes(name: str, model: Path) -> None:
    put(model / name, b"one")
    before = digests(model)
    put(model / name, b"one")
    assert changed(before, model) == set()
    put(model / name, b"one\n")
    assert changed(before, model) == {tokenizer_digest}
    (model / name).unlink()
    assert changed(before, model) == {tokenizer_digest}


def test_a_renamed_file_and_a_moved_border_change_the_digest(tmp_path: Path) -> None:
    found = set()
    for i, files in enumerate(
        [{"vocab.txt": b"ab"}, {"merges.txt": b"ab"}, {"merges.txt": b"a", "vocab.txt": b"b"}]
    ):
        for name, content in files.items():
            put(tmp_path / str(i) / name, content)
        found.add(tokenizer_digest(tmp_path / str(i)))
    assert len(found) == 3


def test_saving_again_what_was_loaded_keeps_the_digests(model: Path, tmp_path: Path) -> None:
    load_model(model).save_pretrained(tmp_path / "again")
    load_tokenizer(model).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer_config.json").read_bytes() != (
        model / "tokenizer_config.json"
    ).read_bytes()
    assert changed(digests(model), tmp_path / "again") == set()


def test_weights_and_other_files_do_not_count(model: Path) -> None:
    before = digests(model)
    for name in ("model.safetensors", "README.md", "modeling.py", "additional_chat_templates/notes.txt"):
        put(model / name, b"other")
    (model / "spiece.model").mkdir()
    assert changed(before, model) == set()


def test_what_is_not_there_has_no_digest(tmp_path: Path) -> None:
    assert set(digests(tmp_path).values()) == set(digests(tmp_path / "no").values()) == {""}
    (tmp_path / "generation_config.json").write_text("{}")  # an empty one is not none: transformers reads it
    assert generation_digest(tmp_path) != ""


@pytest.mark.parametrize(("name", "digest"), JSON_FILES)
@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_file_that_is_not_json_is_one_plain_line(
    name: str, digest: Digest, content: str, model: Path
) -> None:
    (model / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(BadRequest) as caught:
        digest(model)
    (fault,) = caught.value.faults
    assert str(model / name) in fault.where and fault.allowed == f"the {name} of a transformers model"


def test_companions_are_copied_byte_for_byte_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    companions = {*TOKENIZER_FILES, "tokenizer_config.json", "generation_config.json"}
    others = {"config.json", "model.safetensors", "modeling.py", "additional_chat_templates/run.py"}
    for name in companions | others:
        put(source / name, f"{name}\r\n".encode())
    copy_companions(source, target)
    copied = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert copied == {name: f"{name}\r\n".encode() for name in companions}


def test_copy_has_the_digests_of_its_source(model: Path, tmp_path: Path) -> None:
    put(model / TEMPLATE, b"{{ tools }}")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(model, target)
    assert changed(digests(model), target) == {config_digest}


def test_module_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, alignmerge.engine.folder; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
