"""The five architectures through checkpoint and merge: their traits survive, and the result is a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TRAITS, VOCABULARY, MakesModel, Perturbs
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import copy_companions
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Block, Models, average

OWN = {
    "llama": {"model.layers.0.self_attn.k_proj.weight": [16, 32]},
    "mistral": {"model.layers.1.self_attn.v_proj.weight": [16, 32]},
    "qwen2": {"model.layers.0.self_attn.q_proj.bias": [32], "model.layers.1.self_attn.v_proj.bias": [16]},
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": [64, 32],
        "model.layers.0.mlp.gate_up_proj.weight": [96, 32],
    },
    "gemma2": {"model.layers.0.pre_feedforward_layernorm.weight": [32]},
}
TENSORS = {"llama": 21, "mistral": 21, "qwen2": 27, "phi3": 15, "gemma2": 24}


class Case(NamedTuple):
    arch: str
    folders: dict[str, Path]
    models: Models


@pytest.fixture(scope="module", params=sorted(TRAITS))
def case(request: pytest.FixtureRequest, tiny_model: MakesModel, perturbed: Perturbs) -> Case:
    arch = str(request.param)
    base = tiny_model(arch)
    folders = {"base": base, "anchor": perturbed(base, 1), "experts.math": perturbed(base, 2)}
    return Case(arch, folders, open_models(folders))


def mean(block: Block) -> Tensor:
    return average(block.pool)


def load(folder: Path) -> Any:
    """Load in transformers and insist that every key was found and none was left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def finished(
    models: Models,
    folder: Path,
    *,
    elementwise: bool = True,
    block_elements: int = 1000,
    shard_bytes: int = 10**9,
) -> str:
    """Merge into ``folder`` by the plain average and make it a model folder; return the digest."""
    folder.mkdir()
    digest = merge(
        mean,
        models,
        folder,
        elementwise=elementwise,
        block_elements=block_elements,
        shard_bytes=shard_bytes,
    )
    shutil.copyfile(models.anchor.folder / "config.json", folder / "config.json")
    copy_companions(models.anchor.folder, folder)
    return digest


def test_headers_show_the_traits_of_the_architecture(case: Case) -> None:
    base = case.models.base
    assert len(base) == TENSORS[case.arch]
    for name, shape in OWN[case.arch].items():
        assert list(base[name].shape) == shape
    assert base["model.embed_tokens.weight"].shape == (VOCABULARY, 32)
    assert base.tied == (case.arch == "gemma2") == ("lm_head.weight" not in base)


def test_merge_is_the_average_of_the_state_dicts_that_transformers_loads(case: Case, tmp_path: Path) -> None:
    digest = finished(case.models, tmp_path / "out")
    merged = load(tmp_path / "out").state_dict()
    inputs = [load(case.folders[key]).state_dict() for key in ("anchor", "experts.math")]
    assert merged.keys() == inputs[0].keys()
    for name, weight in merged.items():
        plain = ((inputs[0][name].double() + inputs[1][name].double()) / 2).float()
        assert torch.equal(weight, plain), name
    assert Checkpoint.open(tmp_path / "out", "family.base").digest == digest
    assert digest not in {c.digest for c in (case.models.base, *case.models.pool)}


def test_result_keeps_ties_tokenizer_and_traits_and_generates(case: Case, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    finished(case.models, out)
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out, local_files_only=True)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (case.arch == "gemma2")
    for key, value in TRAITS[case.arch].items():
        stated = getattr(model.config, key, None)
        assert (stated if key != "rope_theta" else model.config.rope_parameters[key]) == value
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (case.folders["anchor"] / name).read_bytes()
    messages = [{"role": "user", "content": "how do i build a kite"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert int((ids["input_ids"] == tokenizer.bos_token_id).sum()) == 1
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert ids["input_ids"].shape[1] < answer.shape[1] <= ids["input_ids"].shape[1] + 4


def test_identity_keeps_the_digest(case: Case, tmp_path: Path) -> None:
    assert merge(lambda block: block.base, case.models, tmp_path) == case.models.base.digest


def test_blocks_do_not_change_the_digest(case: Case, tmp_path: Path) -> None:
    digests = {
        finished(case.models, tmp_path / str(elements), block_elements=elements) for elements in (1, 700, 10**6)
    }
    assert digests == {finished(case.models, tmp_path / "whole", elementwise=False)}


def test_shards_in_and_out_do_not_change_the_digest(case: Case, tiny_model: MakesModel, tmp_path: Path) -> None:
    sharded = tiny_model(case.arch, shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    base = Checkpoint.open(sharded, "family.base")
    assert base.digest == case.models.base.digest
    whole = finished(case.models, tmp_path / "whole")
    split = finished(case.models._replace(base=base), tmp_path / "split", shard_bytes=20_000)
    assert split == whole == Checkpoint.open(tmp_path / "split", "family.base").digest
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(base)
    one, other = load(tmp_path / "whole").state_dict(), load(tmp_path / "split").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arch", sorted(TRAITS))
def test_half_precision_is_rounded_once(
    arch: str, tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path
) -> None:
    base = tiny_model(arch, dtype="bfloat16")
    pool = [perturbed(base, seed) for seed in (1, 2, 3)]
    roles = dict(zip(("anchor", "experts.a", "experts.b"), pool, strict=True))
    finished(open_models({"base": base, **roles}), tmp_path / "out")
    merged = load(tmp_path / "out").state_dict()
    states = [load(folder).state_dict() for folder in pool]
    rounded_often = 0
    for name, weight in merged.items():
        one, two, three = (state[name] for state in states)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, ((one.double() + two.double() + three.double()) / 3).bfloat16()), name
        rounded_often += int((weight != (one + two + three) / 3).sum())
    assert rounded_often > 100  # arithmetic in bfloat16 would have shown


def test_doubles_are_rounded_to_single_precision_by_any_merge(tiny_model: MakesModel, tmp_path: Path) -> None:
    """Arithmetic is fp32: nobody trains in fp64, and what does not fit in fp32 is refused, not made infinite."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "double"
    shutil.copytree(tiny_model("llama"), folder)
    weights = {name: w.double() + 1e-12 for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    base = Checkpoint.open(folder, "family.base")
    merge(lambda block: block.base, Models(base, base, {}), tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(merged[name], w.float().double()) for name, w in weights.items())
    assert any(not torch.equal(merged[name], w) for name, w in weights.items())
    weights["model.norm.weight"][3] = 1e300
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    large = Checkpoint.open(folder, "family.base")
    assert large.read("model.norm.weight", dtype=torch.float64)[3] == 1e300
    with pytest.raises(
        BadRequest, match=r"^family\.base: .*'model\.norm\.weight' holds values that are not finite"
    ):
        large.read("model.norm.weight")


def test_gemma_stores_no_head_even_if_an_input_does(
    tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny_model("gemma2")
    anchor = perturbed(base, 1)
    weights = load_file(anchor / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, anchor / "model.safetensors", {"format": "pt"})
    config = json.loads((anchor / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # as on the Hub: the default of the architecture holds
    (anchor / "config.json").write_text(json.dumps(config))
    models = open_models({"base": base, "anchor": anchor, "experts.a": base})
    finished(models, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
