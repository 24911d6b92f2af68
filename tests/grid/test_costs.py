"""Costs: shapes against real headers and published sizes, bytes against real artifacts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TRAITS, MakesModel

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model
from alignmerge.engine.manifest import ROOT
from alignmerge.fisher import squares
from alignmerge.gradients import kronecker_factors, linear_layers
from alignmerge.subspace import generalised_basis
from alignmerge.zoo.adapters import Adapter, adapted
from eval.grid import costs
from eval.grid.costs import Tensors, tensors_from, tensors_of

ARCHITECTURES = ROOT / "conf" / "architectures"
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, 131_072),
    "mistralai/Mistral-7B-Instruct-v0.3": (7_248_023_552, 131_072),
    "Qwen/Qwen2-7B-Instruct": (7_615_616_512, 57_344),
    "microsoft/Phi-3.5-mini-instruct": (3_821_079_552, 393_216),
    "google/gemma-2-9b-it": (9_241_705_984, 344_064),
}
"""Parameters as the models' pages give them, and bytes of keys and values a token (2 x layers x heads x size x 2)."""
EXAMPLES = [Example(tuple(range(i, i + 12)), 4) for i in (5, 20, 35)]
SMALL = Tensors(
    {"a.q_proj.weight": (6, 4), "a.down_proj.weight": (4, 10), "lm_head.weight": (97, 4), "norm": (4,)}, 2
)


def test_every_architecture_file_is_one_of_the_published_models() -> None:
    files = {str(path.relative_to(ARCHITECTURES).with_suffix("")) for path in ARCHITECTURES.rglob("*.json")}
    assert files == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_caches_are_the_published_ones(name: str) -> None:
    tensors = tensors_from(ARCHITECTURES / f"{name}.json")
    parameters, cache = PUBLISHED[name]
    assert tensors.parameters == parameters and tensors.disk_bytes == 2 * parameters
    assert tensors.cache_bytes == cache


def test_input_factors_of_llama_and_of_fused_phi_by_hand() -> None:
    llama = tensors_from(ARCHITECTURES / "meta-llama/Llama-3.1-8B-Instruct.json")
    assert Counter(llama.factors("input")) == {4096: 3 * 32, 14336: 32}  # q, o and gate; down
    assert Counter(llama.factors("output")) == {4096: 3 * 32, 1024: 2 * 32, 14336: 2 * 32}
    phi = tensors_from(ARCHITECTURES / "microsoft/Phi-3.5-mini-instruct.json")
    assert Counter(phi.factors("input")) == {3072: 3 * 32, 8192: 32}
    assert Counter(phi.factors("output")) == {3072: 5 * 32, 8192: 2 * 32}


@pytest.mark.parametrize("arch", sorted(TRAITS))
def test_config_alone_says_what_headers_say(arch: str, tiny_model: MakesModel) -> None:
    for dtype in ("float32", "bfloat16"):
        folder = tiny_model(arch, dtype=dtype)
        headers, config = tensors_of(Checkpoint.open(folder, "x")), tensors_from(folder / "config.json")
        assert dict(config.views) == dict(headers.views) and config.item_bytes == headers.item_bytes
        weights = (
            sum(torch.tensor(shape).prod().item() for shape in headers.views.values()) * headers.item_bytes
        )
        assert headers.disk_bytes == weights


@pytest.mark.parametrize("arch", sorted(TRAITS))
def test_bytes_of_statistics_are_those_of_real_ones(arch: str, tiny_model: MakesModel) -> None:
    folder = tiny_model(arch)
    model, tensors = load_model(folder), tensors_of(Checkpoint.open(folder, "x"))
    diagonal = squares(model, EXAMPLES)
    assert costs.diagonal_bytes(tensors) == sum(value.numel() * value.itemsize for value in diagonal.values())
    for side in ("input", "output"):
        moments = kronecker_factors(model, EXAMPLES, side).moments
        assert sorted(map(len, moments.values())) == sorted(tensors.factors(side))
        bases = [generalised_basis(moment, moment, 0.1) for moment in moments.values()]
        kept = sum(x.numel() * x.itemsize for basis in bases for x in (basis.vectors, basis.dual))
        assert costs.basis_bytes(tensors, side) == kept
        moment_bytes = 2 * sum(moment.numel() * moment.itemsize for moment in moments.values())
        whole = 4 * tensors.parameters + max(costs.diagonal_bytes(tensors), moment_bytes + kept)
        assert costs.statistics_bytes(tensors, [side]) == whole
    assert costs.statistics_bytes(tensors, []) == 4 * tensors.parameters + costs.diagonal_bytes(tensors)


def test_adapter_has_the_size_of_a_real_one(tiny_model: MakesModel) -> None:
    folder = tiny_model("gemma2")
    with adapted(load_model(folder), Adapter(rank=3), seed=0) as matrices:
        real = sum(matrix.numel() for matrix in matrices.values())
    tensors = tensors_of(Checkpoint.open(folder, "x"))
    assert costs.adapter_size(tensors, 3) == real
    assert costs.training_bytes(tensors, real) == 4 * tensors.parameters + 4 * 3 * real
    matrices_only = sum(layer.weight.numel() for layer in linear_layers(load_model(folder)).values())
    assert costs.diagonal_bytes(tensors) == 4 * matrices_only


def test_bytes_by_hand() -> None:
    parameters = 6 * 4 + 4 * 10 + 97 * 4 + 4
    assert SMALL.parameters == parameters and SMALL.disk_bytes == 2 * parameters
    assert SMALL.matrices == {"a.q_proj.weight": (6, 4), "a.down_proj.weight": (4, 10)}
    assert SMALL.factors("input") == [4, 10] and SMALL.factors("output") == [6, 4]
    assert costs.basis_bytes(SMALL, "input") == 4 * 2 * (4**2 + 10**2)
    assert costs.basis_bytes(SMALL, "output") == 4 * 2 * (6**2 + 4**2)
    assert costs.statistics_bytes(SMALL, ["output", "input"]) == 4 * parameters + 4 * 4 * (4**2 + 10**2)
    assert costs.adapter_size(SMALL, 3) == 3 * (6 + 4 + 4 + 10)
    assert costs.merge_bytes(SMALL, 4) == (4 * (4 * 5 * 97 * 4) + 10 * (2 * 97 * 4), 4 * 5 * 97 * 4)


def test_no_tensors_cost_nothing() -> None:
    assert costs.merge_bytes(Tensors({}, 4), 4) == (0, 0) and Tensors({}, 4).parameters == 0
    assert costs.merge_bytes(Tensors({"scale": ()}, 4), 1) == (4 * 8 + 10 * 4, 8)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such file"), ("{", "not JSON"), ("[]", "not a JSON mapping")]
)
def test_config_that_cannot_be_read(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadRequest, match=said):
        tensors_from(path)


def test_architecture_files_state_no_more_than_they_need() -> None:
    for path in ARCHITECTURES.rglob("*.json"):
        facts = json.loads(path.read_text())
        assert not {"auto_map", "transformers_version", "_name_or_path"} & facts.keys()
        assert facts["dtype"] == "bfloat16" and len(facts["architectures"]) == 1
