"""The plan: every conflict of a family at once, from headers alone, and what the merge will cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakesModel, Perturbs, save_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignmerge.engine.checkpoint import SINGLE, Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Block, Models, average
from eval.grid import costs

Copies = Callable[[Path], Path]
PARAMETERS = 2 * 97 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32
"""Embeddings and head; per layer q and o, k and v (two of four heads), the MLP, two norms; the last norm."""


def refused(folders: dict[str, Path]) -> list[str]:
    with pytest.raises(BadRequest) as caught:
        open_models(folders)
    lines = [str(fault) for fault in caught.value.faults]
    assert all("\n" not in line and line.startswith("family.") for line in lines)
    return lines


def against(base: Path, other: Path) -> list[str]:
    """Return what is said of ``other`` as an expert, without the prefix that each line must have."""
    lines = refused({"base": base, "anchor": base, "experts.x": other})
    prefix = f"family.experts.x: {other}"
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix).lstrip("/") for line in lines]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def test_good_family_opens_in_order_without_reading_a_weight(
    tiny_model: MakesModel, perturbed: Perturbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: object, **options: object) -> Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", unread)
    base, other = tiny_model("llama"), perturbed(tiny_model("llama"), 1)
    folders = {"pretrained": base, "experts.z": other, "base": base, "experts.a": base, "anchor": other}
    models = open_models(folders)
    assert models.aliases == ["anchor", "z", "a"]
    assert [c.folder for c in models.pool] == [other, other, base]
    assert models.base.folder == base
    assert models.pretrained is not None and models.pretrained.where == "family.pretrained"
    assert open_models({"base": base, "anchor": other, "experts.a": base}).pretrained is None


def test_other_architecture_of_equal_shapes(tiny_model: MakesModel) -> None:
    assert against(tiny_model("llama"), tiny_model("mistral")) == [
        "config.json: model_type is mistral; allowed: llama, as in the base",
        "config.json: architectures is MistralForCausalLM; allowed: LlamaForCausalLM, as in the base",
    ]


def test_other_heads_of_equal_shapes(tiny_model: MakesModel, copied: Copies) -> None:
    other = copied(tiny_model("llama"))
    edit_json(other / "config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    assert against(tiny_model("llama"), other) == [
        "config.json: head_dim is 16; allowed: 8, as in the base, or family.allow_config_differences=[head_dim]",
        "config.json: num_attention_heads is 2; allowed: 4, as in the base, "
        "or family.allow_config_differences=[num_attention_heads]",
        "config.json: num_key_value_heads is 1; allowed: 2, as in the base, "
        "or family.allow_config_differences=[num_key_value_heads]",
    ]


def test_other_vocabulary_size(tiny_model: MakesModel) -> None:
    assert against(tiny_model("llama"), tiny_model("llama", vocab_size=101)) == [
        "config.json: vocab_size is 101; allowed: 97, as in the base",
        *(
            f"{SINGLE}: tensor '{name}.weight' has shape [101, 32]; allowed: [97, 32], as in the base"
            for name in ("lm_head", "model.embed_tokens")
        ),
    ]


def test_tied_against_untied(tiny_model: MakesModel) -> None:
    free, tied = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=True)
    assert against(free, tied) == [
        "config.json: the output matrix is tied to the embeddings; allowed: a matrix of its own, as in the base"
    ]
    assert against(tied, free) == [
        "config.json: the output matrix is a matrix of its own; allowed: tied to the embeddings, as in the base"
    ]


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["kite"], vocabulary["string"] = vocabulary["string"], vocabulary["kite"]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (swap, "2 tokens differ"),
        (lambda v: v.pop("kite"), "1 token differs"),
        (lambda v: v.update(bomb=60), "1 token differs"),
    ],
)
def test_other_tokens(
    change: Callable[[dict[str, int]], object], count: str, tiny_model: MakesModel, copied: Copies
) -> None:
    other = copied(tiny_model("llama"))
    content = json.loads((other / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(content))
    (line,) = against(tiny_model("llama"), other)
    assert line.startswith(f"tokenizer.json: another vocabulary ({count} from the base's, such as '")
    assert line.endswith("allowed: the vocabulary of the base")


def tokens(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def with_added(folder: Path, token: str, row: int) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = {**content["added_tokens"][0], "content": token, "id": row}
    edit_json(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], entry])


def test_token_added_in_a_free_row_is_no_conflict_but_in_a_used_one_it_is(
    tiny_model: MakesModel, copied: Copies
) -> None:
    free, used, row = copied(tiny_model("llama")), copied(tiny_model("llama")), len(tokens(tiny_model("llama")))
    with_added(free, "<turn>", row)  # the next one: transformers gives it no other, whatever the file says
    assert open_models({"base": tiny_model("llama"), "anchor": free, "experts.x": free}).aliases
    save_tokenizer(used, extra=("bomb",))
    assert tokens(used)["bomb"] == row
    for one, another in ((used, free), (free, used)):
        (line,) = against(one, another)
        assert "2 tokens differ from the base's, such as '<turn>'" in line
    moved = copied(tiny_model("llama"))
    with_added(moved, "<image>", row)
    with_added(moved, "<turn>", row + 1)
    (line,) = against(free, moved)
    assert "2 tokens differ" in line


def test_tokenizers_are_compared_only_where_both_have_one(tiny_model: MakesModel, copied: Copies) -> None:
    other, unlike = copied(tiny_model("llama")), copied(tiny_model("llama"))
    (other / "tokenizer.json").unlink()
    save_tokenizer(unlike, extra=("bomb", "gun"))
    assert open_models({"base": other, "anchor": unlike, "experts.x": tiny_model("llama")}).aliases
    (line,) = against(tiny_model("llama"), unlike)
    assert "2 tokens differ from the base's, such as 'bomb'" in line


def test_unigram_vocabularies_are_lists(tiny_model: MakesModel, copied: Copies) -> None:
    base, other = copied(tiny_model("llama")), copied(tiny_model("llama"))
    for folder, words in ((base, "abcd"), (other, "abdc")):
        model = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -1.0] for word in words]}
        edit_json(folder / "tokenizer.json", model=model, added_tokens=[])
    (line,) = against(base, other)
    assert "2 tokens differ from the base's, such as 'c'" in line


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("{", "not JSON"),
        ('{"model": {}}', "the tokenizer cannot"),
        ('{"model": {"vocab": 3}}', "the tokenizer cannot"),
    ],
)
def test_broken_tokenizer(text: str, given: str, tiny_model: MakesModel, copied: Copies) -> None:
    broken = copied(tiny_model("llama"))
    (broken / "tokenizer.json").write_text(text)
    (line,) = against(tiny_model("llama"), broken)
    assert line.startswith(f"tokenizer.json: {given}")
    good = tiny_model("llama")
    (line,) = refused({"base": broken, "anchor": good, "experts.x": good})  # said once, not once per model
    assert line.startswith(f"family.base: {broken / 'tokenizer.json'}: {given}")


def test_missing_extra_and_misshapen_tensors(tiny_model: MakesModel, copied: Copies) -> None:
    base, other = tiny_model("llama"), copied(tiny_model("llama"))

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(97, 31)

    edit_tensors(other, change)
    described = "LlamaForCausalLM as config.json describes it"
    assert against(base, other) == [
        f"{SINGLE}: tensor 'model.extra.weight' has no place in the model; allowed: only weights of {described}",
        f"{SINGLE}: tensor 'lm_head.weight' has shape [97, 31]; allowed: [97, 32], as config.json describes it",
        f": tensor 'model.norm.weight' is missing; allowed: every weight of {described}",
    ]


def test_no_more_than_three_tensors_are_named(tiny_model: MakesModel) -> None:
    lines = against(tiny_model("llama", num_hidden_layers=3), tiny_model("llama"))
    assert len(lines) == 4
    assert all("'model.layers.2." in line and "is missing" in line for line in lines[:3])
    assert ": and 6 more like it" in lines[3]


def test_all_faults_of_all_models_at_once(tiny_model: MakesModel, copied: Copies, tmp_path: Path) -> None:
    base, cut = tiny_model("llama"), copied(tiny_model("llama"))
    edit_json(cut / "config.json", auto_map={}, model_type="exotic")
    (cut / SINGLE).write_bytes((cut / SINGLE).read_bytes()[:-1])
    folders = {
        "base": base,
        "anchor": tmp_path / "nowhere",
        "experts.cut": cut,
        "experts.other": tiny_model("mistral"),
        "experts.fine": base,
    }
    lines = refused(folders)
    keys = [line.split(":")[0] for line in lines]
    expected = ["family.anchor", *["family.experts.cut"] * 2, *["family.experts.other"] * 2]
    assert keys == expected
    shutil.rmtree(cut)
    broken_base = {**folders, "base": tmp_path / "neither"}
    assert [line.split(":")[0] for line in refused(broken_base)] == [
        "family.base",
        "family.anchor",
        "family.experts.cut",
    ]


def cost(models: Models) -> tuple[int, int, int, int]:
    """Parameters, bytes on disk, and what a merge holds in row blocks and with whole matrices."""
    inputs = 1 + len(models.pool) + (models.pretrained is not None)
    tensors = costs.tensors_of(models.base)
    return (tensors.parameters, tensors.disk_bytes, *costs.merge_bytes(tensors, inputs))


def test_cost_of_a_small_model_by_hand(tiny_model: MakesModel) -> None:
    base = tiny_model("llama")
    models = open_models({"base": base, "anchor": base, "experts.a": base, "experts.b": base})
    largest = 97 * 32
    held = 4 * (3 + 2) * largest  # fp32: base, anchor, two experts, the result
    streamed = 4 * held + 10 * 4 * largest  # four threads, and ten results on their way to the disk
    assert cost(models) == (PARAMETERS, 4 * PARAMETERS, streamed, held)
    half = tiny_model("llama", dtype="bfloat16")
    with_origin = {"base": half, "anchor": half, "experts.a": half, "experts.b": half, "pretrained": half}
    held = 4 * (4 + 2) * largest
    streamed = 4 * held + 10 * 2 * largest
    assert cost(open_models(with_origin)) == (PARAMETERS, 2 * PARAMETERS, streamed, held)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(base).num_parameters() == PARAMETERS
    assert sum(f.stat().st_size for f in base.glob("*.safetensors")) == pytest.approx(4 * PARAMETERS, rel=0.05)


@pytest.mark.parametrize("elements", [1, 100, 1000, 10**6])
def test_cost_is_what_the_loop_holds(
    elements: int, tiny_model: MakesModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("gemma2")
    models = open_models({"base": base, "anchor": base, "experts.a": base, "pretrained": base})
    seen: list[int] = []

    def rule(block: Block) -> Tensor:
        merged = average(block.pool)
        held: list[Any] = [block.base, *block.pool, block.pretrained, merged]
        seen.append(sum(tensor.numel() * tensor.itemsize for tensor in held))
        return merged

    monkeypatch.setattr(costs, "BLOCK_ELEMENTS", elements)
    merge(rule, models, tmp_path, block_elements=elements)
    results = 10 * 4 * max(spec.numel for spec in models.base.values())
    assert 4 * max(seen) + results == cost(models)[2]
    seen.clear()
    merge(rule, models, tmp_path, elementwise=False, block_elements=elements)
    assert max(seen) == cost(models)[3]
