"""LoRA adapters: what is attached, what is trained, and what the folded weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAITS, MakesModel
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model, load_tokenizer, save_model
from alignmerge.gradients import linear_layers, nll
from alignmerge.zoo.adapters import Adapter, adapted
from alignmerge.zoo.training import Recipe, train

IDS = torch.arange(5, 25).view(2, 10)
FAMILIES = sorted(TRAITS)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def fill(matrices: dict[str, Tensor], seed: int = 3, scale: float = 0.05) -> dict[str, Tensor]:
    """Give B values, as training would; return what all matrices then are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, matrix in matrices.items():
            if ".lora_B." in name:
                matrix.copy_(scale * torch.randn(matrix.shape, generator=generator))
    return {name: matrix.detach().clone() for name, matrix in matrices.items()}


@pytest.mark.parametrize("arch", FAMILIES)
def test_folded_weights_are_the_formula_and_everything_else_is_untouched(
    arch: str, tiny_model: MakesModel
) -> None:
    model = load_model(tiny_model(arch))
    before, layers = weights(model), set(linear_layers(model))
    start = logits(model)
    with adapted(model, Adapter(rank=4, alpha=12), seed=0) as matrices:
        assert torch.equal(logits(model), start)  # B is zero
        ab = fill(matrices)
        inside = logits(model)
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == layers and len(ab) == 2 * len(layers)
    for name in layers:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (ab[f"{stem}.lora_{side}.default.weight"].double() for side in "AB")
        torch.testing.assert_close(
            after[name].double(), before[name].double() + 12 / 4 * (b @ a), atol=1e-6, rtol=0
        )
    assert not torch.allclose(inside, start, atol=1e-3)
    torch.testing.assert_close(logits(model), inside, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_only_the_adapter_is_trained_and_the_loss_goes_down(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("llama"))
    examples = [Example(tuple(range(i, i + 12)), 4) for i in (5, 20, 35)]
    start = float(nll(model, examples).mean())
    before = weights(model)
    with adapted(model, Adapter(rank=8, alpha=16), seed=1) as matrices:
        assert {id(m) for m in matrices.values()} == {id(p) for p in model.parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(matrices.values(), lr=0.02, weight_decay=0.0)
        for _ in range(30):
            ids = torch.tensor([e.ids for e in examples])
            loss = model(input_ids=ids, labels=ids).loss
            torch.autograd.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
    assert float(nll(model, examples).mean()) < start - 0.5
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not model.training


def test_recipe_with_an_adapter_trains_updates_of_its_rank(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("llama"))
    examples = [Example(tuple(range(i, i + 12)), 4) for i in range(5, 45, 5)]
    before, start = weights(model), float(nll(model, examples).mean())
    fields: dict[str, Any] = {"lessons": "anchor", "steps": 20, "batch": 4, "lr": 0.02, "precision": "float32"}
    losses = train(
        model, examples, Recipe(**fields, adapter=Adapter(rank=2, alpha=8)), lambda done, total: None
    )
    assert len(losses) == 20 and float(nll(model, examples).mean()) < start - 0.1
    for name, value in weights(model).items():
        change = value - before[name]
        if name in linear_layers(model):
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == 2, name
        else:
            assert not change.any(), name
    with pytest.raises(BadRequest, match="adapter: Example; allowed: null or an Adapter"):
        Recipe(**fields, adapter=examples[0])  # type: ignore[arg-type]


def test_update_has_the_rank_of_the_adapter(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("qwen2"))
    before = weights(model)
    with adapted(model, Adapter(rank=3), seed=0) as matrices:
        fill(matrices, scale=1.0)
    for name in linear_layers(model):
        singular = torch.linalg.svdvals((weights(model)[name] - before[name]).double())
        assert singular[2] > 1e-3 * singular[0] and singular[3] < 1e-5 * singular[0], name


def test_chosen_targets_alone_are_adapted(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("mistral"))
    before = weights(model)
    with adapted(model, Adapter(targets=("q_proj", "down_proj")), seed=0) as matrices:
        fill(matrices)
    changed = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert (
        changed == {n for n in before if n.endswith(("q_proj.weight", "down_proj.weight"))}
        and len(changed) == 4
    )


def test_start_depends_on_the_seed_alone_and_leaves_the_global_generator_alone(tiny_model: MakesModel) -> None:
    def start(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        with adapted(load_model(tiny_model("llama")), Adapter(rank=2), seed) as matrices:
            found = {name: matrix.detach().clone() for name, matrix in matrices.items()}
        assert torch.equal(torch.random.get_rng_state(), state)
        return found

    one, same, other = start(0, 1), start(0, 2), start(1, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    a = [name for name in one if ".lora_A." in name]
    assert a and not any(torch.equal(one[name], other[name]) for name in a)
    assert len({one[name].flatten()[0].item() for name in a}) == len(a)  # every matrix has a stream of its own
    bound = 1 / 32**0.5  # Kaiming uniform with a = sqrt 5: within 1 / sqrt(d_in)
    q = one["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert 0.8 * bound < float(q.abs().max()) <= bound


@pytest.mark.parametrize("arch", ["phi3", "gemma2"])
def test_folded_model_is_saved_as_the_plain_model(arch: str, tiny_model: MakesModel, tmp_path: Path) -> None:
    base = tiny_model(arch)
    model = load_model(base)
    with adapted(model, Adapter(rank=2), seed=0) as matrices:
        fill(matrices)
    digest = save_model(model, load_tokenizer(base), tmp_path)
    saved = Checkpoint.open(tmp_path, "saved")
    assert saved.keys() == Checkpoint.open(base, "base").keys() and saved.digest == digest
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    facts = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path)]
    for one in facts:
        one.pop("transformers_version")
        one.pop("dtype", None)
    assert facts[0] == facts[1]


def test_failed_training_leaves_the_plain_model_with_its_own_weights(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("llama"))
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), adapted(model, Adapter(), seed=0) as matrices:
        fill(matrices)
        raise KeyboardInterrupt
    with pytest.raises(ArithmeticError, match="not finite"), adapted(model, Adapter(), seed=0) as matrices:
        fill(matrices, scale=float("inf"))
    after = weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_unknown_targets_are_each_named(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("phi3"))
    with (
        pytest.raises(BadRequest) as caught,
        adapted(model, Adapter(targets=("qkv_proj", "q_proj", "lm_head")), seed=0),
    ):
        raise AssertionError("entered")
    known = "down_proj, gate_up_proj, o_proj, qkv_proj"
    assert [str(fault) for fault in caught.value.faults] == [
        f"family.recipes: adapter.targets: q_proj; allowed: qkv_proj? {known}",
        f"family.recipes: adapter.targets: lm_head; allowed: {known}",
    ]
    assert not any("lora" in name for name, _ in model.named_modules())


def test_wrong_fields_are_all_named() -> None:
    with pytest.raises(BadRequest) as caught:
        Adapter(rank=0, alpha=-1)
    places = [fault.where for fault in caught.value.faults]
    assert places == ["family.recipes: adapter.rank", "family.recipes: adapter.alpha"]
