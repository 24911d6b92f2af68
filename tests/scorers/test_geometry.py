"""Drift in a fixed S_A: against a dense projector, and out of reach of every method."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
import yaml

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.configuration import build
from alignmerge.engine.language import load_model
from alignmerge.engine.merger import REPORTED, Merger, Models
from alignmerge.engine.store import Store
from alignmerge.gradients import kronecker_factors
from eval.grid.request import CONF
from eval.scorers.geometry import Geometry
from tests.conftest import MakesModel, Perturbs
from tests.oracles.test_alignmerge import Context
from tests.oracles.test_gradients import SMALL, examples_of

RANK = 3


@pytest.fixture
def ctx(tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path) -> Context:
    base = tiny_model("llama", **SMALL)
    anchor, expert = (Checkpoint.open(perturbed(base, seed, 0.05), str(seed)) for seed in (1, 2))
    sets = {name: examples_of(seed, 30, 14) for seed, name in enumerate((REPORTED, "metric"))}
    models = Models(Checkpoint.open(base, "base"), anchor, {"a": expert})
    return Context(models, Store(tmp_path), tmp_path / "a", sets)


def test_drift_is_that_of_a_dense_projector_onto_the_reported_probes(ctx: Context) -> None:
    """There is no alignment set in this context: asking for it would fail."""
    scorer, scored = Geometry(rank=RANK), ctx.models.experts["a"]
    subject: Any = SimpleNamespace(folder=scored.folder, context=lambda: ctx)
    found = {sample.column: sample.value for sample in scorer.score(subject) if sample.id == "all"}
    model = load_model(ctx.models.base.folder)
    data, metric = (
        kronecker_factors(model, ctx.sets[name], "input", precision=ctx.precision)
        for name in (REPORTED, "metric")
    )
    origins = {"drift_anchor": ctx.models.anchor, "drift_base": ctx.models.base}
    wanted = dict.fromkeys(origins, 0.0)
    for name, owner in metric.owners.items():
        g = metric.moments[owner].double()
        g = g + scorer.damping * g.diagonal().mean() * torch.eye(len(g), dtype=torch.float64)
        values, vectors = scipy.linalg.eigh(data.moments[owner].double().numpy(), g.numpy())
        lead = torch.from_numpy(vectors[:, values.argsort()[::-1][:RANK]].copy())
        for column, origin in origins.items():
            away = (scored.read(name) - origin.read(name)).double().T
            inside = lead @ lead.T @ g @ away
            wanted[column] += float((inside * (g @ inside)).sum())
    for column, squared in wanted.items():
        assert found[column] == pytest.approx(math.sqrt(squared), rel=1e-3)


@pytest.mark.parametrize("path", sorted((CONF / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_method_reads_the_prompts_of_the_drift_or_has_its_damping(path: Path) -> None:
    method = build(yaml.safe_load(path.read_text()), "method", Merger)
    assert not method.inputs.includes(REPORTED)
    assert getattr(method, "damping", None) != Geometry().damping
