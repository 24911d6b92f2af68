"""Energy ratios and principal angles, against dense projectors and scipy's own angles."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model
from alignmerge.engine.merger import Models
from alignmerge.engine.store import Store
from alignmerge.gradients import kronecker_factors
from alignmerge.subspace import generalised_basis, principal_cosines
from eval.scorers.subspaces import Subspaces
from tests.conftest import MakesModel, Perturbs
from tests.oracles.test_alignmerge import Context
from tests.oracles.test_gradients import SMALL, examples_of

NAMES = ("alignment", "utility", "metric")


def moment(generator: torch.Generator, size: int, rows: int) -> Tensor:
    data = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return data.T @ data / rows


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_cosines_are_those_of_scipys_angles_in_the_metric(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    metric, *fishers = (moment(generator, 9, 30) for _ in range(3))
    bases = [generalised_basis(fisher, metric, 0.1) for fisher in fishers]
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    root = torch.from_numpy(scipy.linalg.sqrtm(damped.numpy()).real)
    angles = scipy.linalg.subspace_angles(*((root @ basis.vectors[:, :rank]).numpy() for basis in bases))
    wanted = torch.from_numpy(angles).cos().sort(descending=True).values
    torch.testing.assert_close(principal_cosines(*bases, rank), wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture
def ctx(tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path) -> Context:
    base = tiny_model("llama", **SMALL)
    anchor, expert = (Checkpoint.open(perturbed(base, seed, 0.05), str(seed)) for seed in (1, 2))
    sets = {name: examples_of(seed, 30, 14) for seed, name in enumerate(NAMES)}
    return Context(
        Models(Checkpoint.open(base, "base"), anchor, {"a": expert}), Store(tmp_path), tmp_path / "a", sets
    )


def found_for(ctx: Context, model: Checkpoint, **fields: Any) -> dict[tuple[str, str], float]:
    subject: Any = SimpleNamespace(folder=model.folder, context=lambda: ctx)
    return {(sample.column, sample.id): sample.value for sample in Subspaces(**fields).score(subject)}


def test_energies_and_overlap_are_those_of_dense_projectors(ctx: Context) -> None:
    rank, damping = 3, 0.2
    model = load_model(ctx.models.base.folder)
    moments = {
        name: kronecker_factors(model, ctx.sets[name], "input", precision=ctx.precision) for name in NAMES
    }
    inside = {"alignment": 0.0, "utility": 0.0}
    by_chance, cosines, ranks = 0.0, {}, {}
    for name, owner in moments["metric"].owners.items():
        metric = moments["metric"].moments[owner].double()
        size = len(metric)
        metric += damping * metric.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        projectors = {}
        for side in inside:
            values, vectors = scipy.linalg.eigh(moments[side].moments[owner].double().numpy(), metric.numpy())
            lead = torch.from_numpy(vectors[:, values.argsort()[::-1][:rank]].copy())
            projectors[side] = lead @ lead.T @ metric  # P, with P^2 = P and GP symmetric
            delta = (ctx.models.anchor.read(name) - ctx.models.base.read(name)).double().T
            projected = projectors[side] @ delta
            inside[side] += float((projected * (metric @ projected)).sum())
        by_chance += float((delta * (metric @ delta)).sum()) * rank / size
        cosines[owner] = float(
            (projectors["alignment"] @ projectors["utility"]).trace()
        )  # sum of squared cosines
        ranks[owner] = rank * rank / size
    found = found_for(ctx, ctx.models.anchor, rank=rank, damping=damping)
    for side, energy in inside.items():
        assert found[f"energy_{side}", "all"] == pytest.approx(energy / by_chance, rel=1e-4)
    assert found["overlap", "all"] == pytest.approx(sum(cosines.values()) / sum(ranks.values()), rel=1e-4)
    assert {at for column, at in found if column == "overlap_by_layer"} == {"layer/00", "layer/01"}


def test_a_subspace_that_is_everything_holds_everything(ctx: Context) -> None:
    found = found_for(ctx, ctx.models.experts["a"], rank=1000)
    assert all(value == pytest.approx(1, rel=1e-4) for value in found.values())


def test_the_base_has_no_energy_to_divide(ctx: Context) -> None:
    found = found_for(ctx, ctx.models.base, rank=2)
    assert {column for column, _ in found} == {"overlap", "overlap_by_layer"}


@pytest.mark.parametrize(("fields", "key"), [({"rank": 0}, "rank"), ({"damping": math.nan}, "damping")])
def test_wrong_fields_are_named(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(BadRequest, match=rf"scorer\.subspaces\.{key}"):
        Subspaces(**fields)
