"""AlignMerge and the gradient-step control against dense linear algebra on models small enough to write it out.

Dense means float64 with explicit d x d matrices, by the formulas of paper.md 2.4. Merges run their whole path from
folders and examples; where they are compared with dense results their passes run in fp32 (elsewhere under autocast).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignmerge.certificate import CERTIFIED_RANK
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import EVERY_OWN, OWN, Block, Inputs, Merger, Models, Probes, average
from alignmerge.engine.store import Artifact, Store
from alignmerge.fisher import NormalisedFishers, damped, fisher, mean_value
from alignmerge.gradients import nll
from alignmerge.kronecker import KroneckerBases
from alignmerge.method import AlignMerge
from alignmerge.objective import fisher_barycentre, l_geo, l_geo_floor, removal
from alignmerge.pool import pool_weights
from alignmerge.subspace import Basis, Shield, dual_coefficients, energies, generalised_basis, turned
from baselines.average import Average
from baselines.fisher_soup import FisherSoup
from baselines.gradient_step import GradientStep
from baselines.interpolate import Interpolate
from tests.conftest import MakesModel, Perturbs
from tests.oracles.test_gradients import SMALL, examples_of, plain_pass

INF = math.inf
DAMPING = 0.1
Tensors = dict[str, Tensor]
seeds = st.integers(0, 2**32)
CHOICES = ("estimator", "reference", "at", "metric", "chart", "subspace_from", "factors", "lambda_k", "space")
each_factors = pytest.mark.parametrize("factors", ["input", "output", "both"])
each_reference = pytest.mark.parametrize("reference", ["anchor", "base"])


# --- dense formulas ---------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Generalised eigenpairs of (F, G), all of them, values descending, U^T G U = I."""

    G: Tensor
    values: Tensor
    U: Tensor

    @classmethod
    def of(cls, F: Tensor, G: Tensor) -> Dense:
        values, vectors = scipy.linalg.eigh(F.numpy(), G.numpy())
        return cls(G, torch.tensor(values).flip(0), torch.tensor(vectors).flip(1))

    def penalty(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """H = P^T F P of the ``rank`` leading directions (rho of mean 1), with those rho and U."""
        U, rho = self.U[:, :rank], self.values[:rank] / self.values[:rank].mean()
        return self.G @ U @ torch.diag(rho) @ U.T @ self.G, rho, U

    def solve(self, mean: Tensor, reference: Tensor, lambda_align: float, rank: int) -> Tensor:
        """Solve (G + lambda H) d = G mean + lambda H d_ref; lambda = inf: mean - P (mean - d_ref)."""
        H, _, U = self.penalty(rank)
        if lambda_align == INF:
            return mean - U @ U.T @ self.G @ (mean - reference)
        right = self.G @ mean + lambda_align * H @ reference
        return torch.linalg.solve(self.G + lambda_align * H, right)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def random_stream(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(vectors: Tensor) -> Tensor:
    return vectors.T @ vectors / len(vectors)


def with_damping(metric: Tensor, damping: float = DAMPING) -> Tensor:
    return metric + damping * metric.trace() / len(metric) * torch.eye(len(metric), dtype=metric.dtype)


def shield(**fields: Any) -> AlignMerge:
    """The Kronecker shield on inputs, without a budget: what most of these tests change one thing of."""
    usual = {"estimator": "kronecker", "factors": "input", "lambda_align": 1.0, "lambda_bud": 0.0}
    return AlignMerge(**{**usual, **fields})


# --- the two terms ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, k=st.integers(1, 5), d=st.integers(1, 8))
def test_l_geo_decomposes(seed: int, k: int, d: int) -> None:
    """Oracle 2: L_geo(d) = ||d - mean||^2_G + V; V is a minimum (the gradient there is 0)."""
    normal = random_stream(seed)
    G = moment(normal(2 * d, d)) + 0.01 * torch.eye(d)
    pool, delta = list(normal(k, d)), normal(d).requires_grad_()

    def squared(x: Tensor) -> Tensor:
        return x @ G @ x

    mean = torch.stack(pool).mean(0)
    floor = sum(squared(p - mean) for p in pool) / k
    assert l_geo_floor(pool, squared) == pytest.approx(float(floor), rel=1e-9, abs=1e-12)  # type: ignore[arg-type]
    wanted = squared(delta.detach() - mean) + floor
    assert float(l_geo(delta.detach(), pool, squared)) == pytest.approx(float(wanted), rel=1e-9)  # type: ignore[arg-type]
    at_mean = mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(l_geo(at_mean, pool, squared), at_mean)  # type: ignore[arg-type]
    assert float(gradient.abs().max()) < 1e-12 * float(1 + G.abs().max())


@settings(deadline=None)
@given(seed=seeds, k=st.integers(1, 5))
def test_fisher_barycentre_solves_its_normal_equation(seed: int, k: int) -> None:
    """(sum F_k) d = sum F_k d_k with dense diagonal matrices, F_k clamped from below."""
    normal = random_stream(seed)
    values, fishers = list(normal(k, 6).float()), list(normal(k, 6).clamp(min=0).float())
    floor = 1e-3
    matrices = [torch.diag(f.double().clamp(min=floor)) for f in fishers]
    right = sum((F @ v.double() for F, v in zip(matrices, values, strict=True)), torch.zeros(6))
    wanted = torch.linalg.solve(sum(matrices, torch.zeros(6, 6)), right)
    torch.testing.assert_close(fisher_barycentre(values, fishers, floor), wanted.float(), rtol=1e-5, atol=1e-6)


def test_fisher_barycentre_limits() -> None:
    """Oracle 18: equal Fishers give the soup; outside its support a model has no say, where none has all do."""
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, -2.0, 9.0])]
    same = torch.tensor([1e-9, 3.0, 0.0])
    assert fisher_barycentre(values, [same, same], 1e-6).tolist() == [3, 0, 6]
    apart = [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 7.0, 0.0])]
    torch.testing.assert_close(fisher_barycentre(values, apart, 1e-12), torch.tensor([1.0, -2.0, 6.0]))


def test_removal_by_hand() -> None:
    rho = torch.tensor([4.0, 1.0, 0.25, 0.0])
    assert removal(rho, 0).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(removal(rho, 1), torch.tensor([0.8, 0.5, 0.2, 0.0]))
    torch.testing.assert_close(removal(rho, 1e12), removal(rho, INF), rtol=0, atol=1e-11)
    assert removal(rho, INF).tolist() == [1, 1, 1, 0]


def shrunk(shield: Shield, x: Tensor, lambda_align: float) -> Tensor:
    """The minimiser D of ||D - X||^2_G + lambda ||D||^2_H."""
    return x - shield.removed(x, lambda_align)


# --- Kronecker shields ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, m=st.integers(1, 9), damping=st.floats(1e-3, 10))
def test_generalised_basis(seed: int, m: int, damping: float) -> None:
    normal = random_stream(seed)
    F, metric = moment(normal(3 * m, m)), moment(normal(3 * m, m))
    basis = generalised_basis(F, metric, damping)
    G, U = with_damping(metric, damping), basis.vectors
    close = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(U.T @ G @ U, torch.eye(m, dtype=torch.float64), **close)
    torch.testing.assert_close(U.T @ F @ U, torch.diag(basis.values), **close)
    torch.testing.assert_close(basis.dual, G @ U, **close)
    assert basis.values.tolist() == sorted(basis.values.tolist(), reverse=True)
    torch.testing.assert_close(basis.values, Dense.of(F, G).values, **close)


def test_damping_is_in_units_of_the_metric() -> None:
    """Scaling either matrix scales the eigenvalues, and nothing else: lambda has no unit."""
    normal = random_stream(0)
    F, metric = moment(normal(20, 5)), moment(normal(20, 5))
    plain, scaled = generalised_basis(F, metric, 0.3), generalised_basis(7 * F, 100 * metric, 0.3)
    torch.testing.assert_close(scaled.values, plain.values * 0.07)
    torch.testing.assert_close(scaled.vectors.abs(), plain.vectors.abs() / 10)


def test_a_metric_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        generalised_basis(torch.eye(2), torch.zeros(2, 2), 0.1)


class Bench(NamedTuple):
    """One random weight matrix with its shield and the dense problem on vec(D), rows first: G = S (x) A."""

    shield: Shield
    dense: Dense
    rank: int
    """Directions of vec(D) that S_A has."""
    mean: Tensor
    reference: Tensor


@cache
def bench(factors: str, rank: int | None, seed: int = 0, d_out: int = 4, d_in: int = 5) -> Bench:
    normal = random_stream(seed)
    S_A, S_G, A_A, A_G = (moment(normal(3 * d, d)) for d in (d_out, d_out, d_in, d_in))
    outputs = generalised_basis(S_A, S_G, DAMPING) if factors != "input" else None
    inputs = generalised_basis(A_A, A_G, DAMPING) if factors != "output" else None
    one_out, one_in = torch.eye(d_out, dtype=torch.float64), torch.eye(d_in, dtype=torch.float64)
    F = torch.kron(S_A if outputs else one_out, A_A if inputs else one_in)
    G = torch.kron(with_damping(S_G) if outputs else one_out, with_damping(A_G) if inputs else one_in)
    copies = {"input": d_out, "output": d_in, "both": 1}[factors]  # an input direction has d_out outputs
    directions = d_out * d_in if rank is None else rank * copies
    shield = Shield(outputs, inputs, rank)
    return Bench(shield, Dense.of(F, G), directions, normal(d_out, d_in), normal(d_out, d_in))


each_rank = pytest.mark.parametrize("rank", [None, 1, 3])


@each_factors
@each_rank
@pytest.mark.parametrize("lambda_align", [0.0, 0.1, 1.0, 30.0, INF])
def test_closed_form_against_a_dense_solve(factors: str, rank: int | None, lambda_align: float) -> None:
    """Oracles 1, 3 and 5 for matrices: kron(S, A) written out."""
    b = bench(factors, rank)
    found = b.reference + shrunk(b.shield, b.mean - b.reference, lambda_align)
    wanted = b.dense.solve(b.mean.flatten(), b.reference.flatten(), lambda_align, b.rank)
    assert relative(found.flatten(), wanted) < 1e-9
    if lambda_align == 0:
        torch.testing.assert_close(found, b.mean, rtol=1e-12, atol=1e-12)


@each_factors
@each_rank
@pytest.mark.parametrize("lambda_align", [0.3, 10.0, INF])
def test_each_direction_shrinks_by_its_own_factor(factors: str, rank: int | None, lambda_align: float) -> None:
    """Oracle 4: U^T G (d - d_ref) = (1 + lambda rho)^-1 U^T G x; what is G-orthogonal to U does not move."""
    b = bench(factors, rank)
    _, rho, U = b.dense.penalty(b.rank)
    x = (b.mean - b.reference).flatten()
    after = shrunk(b.shield, b.mean - b.reference, lambda_align).flatten()
    factor = 1 / (1 + lambda_align * rho)
    torch.testing.assert_close(U.T @ b.dense.G @ after, factor * (U.T @ b.dense.G @ x), rtol=1e-8, atol=1e-9)
    outside = b.dense.U[:, b.rank :]
    torch.testing.assert_close(outside.T @ b.dense.G @ after, outside.T @ b.dense.G @ x, rtol=1e-8, atol=1e-9)
    orthogonal = x - U @ (U.T @ b.dense.G @ x)
    kept = shrunk(b.shield, orthogonal.reshape(b.mean.shape), lambda_align)
    torch.testing.assert_close(kept.flatten(), orthogonal, rtol=1e-8, atol=1e-9)


@each_factors
@each_rank
def test_the_projector(factors: str, rank: int | None) -> None:
    """Oracle 6: P = 1 - (shrink at lambda = inf): P^2 = P, G P symmetric, rank r."""
    b = bench(factors, rank)
    n = b.mean.numel()
    units = torch.eye(n, dtype=torch.float64)
    columns = [u - shrunk(b.shield, u.reshape(b.mean.shape), INF).flatten() for u in units]
    P = torch.stack(columns, dim=1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(P @ P, P, **close)
    torch.testing.assert_close(b.dense.G @ P, (b.dense.G @ P).T, **close)
    assert torch.linalg.matrix_rank(P, rtol=1e-6) == b.rank
    U = b.dense.U[:, : b.rank]
    torch.testing.assert_close(P, U @ U.T @ b.dense.G, **close)


def test_signs_and_rotations_of_eigenvectors_do_not_show() -> None:
    normal = random_stream(2)
    G = with_damping(moment(normal(20, 5)))
    values = torch.tensor([3.0, 2.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    half = torch.linalg.cholesky(G)
    U = torch.linalg.solve(half.T, torch.linalg.qr(normal(5, 5))[0])
    turn = torch.eye(5, dtype=torch.float64)
    turn[1:3, 1:3] = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    turned = U @ turn * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    x = normal(4, 5)
    for rank, lambda_align in itertools.product([1, 3, None], [0.5, INF]):
        one, other = (Shield(None, Basis(values, V, G @ V), rank) for V in (U, turned))
        torch.testing.assert_close(shrunk(one, x, lambda_align), shrunk(other, x, lambda_align))
        first, second = (energies(shield.coefficients(x), shield.rho) for shield in (one, other))
        assert first == pytest.approx(second)


@each_factors
@each_rank
def test_energies_against_dense_norms(factors: str, rank: int | None) -> None:
    b = bench(factors, rank)
    x = b.mean.flatten()
    H, _, U = b.dense.penalty(b.rank)
    found = energies(b.shield.coefficients(b.mean), b.shield.rho)
    assert found.total == pytest.approx(float(x @ b.dense.G @ x))
    assert found.inside == pytest.approx(float((U.T @ b.dense.G @ x).square().sum()))
    assert found.weighted == pytest.approx(float(x @ H @ x))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, decades=st.floats(0, 5), size=st.sampled_from([16, 48]))
def test_without_penalty_any_metric_gives_the_soup(seed: int, decades: float, size: int) -> None:
    """Oracle 1 in fp32, with spectra as wide as those of hidden states: max abs difference 1e-6."""
    normal = random_stream(seed)
    spectrum = torch.logspace(0, -decades, size, dtype=torch.float64).sqrt()
    F, metric = (moment(normal(4 * size, size) * spectrum).float() for _ in range(2))
    shield = Shield(None, generalised_basis(F, metric, DAMPING))
    x = (0.02 * normal(8, size)).float()
    assert float((shrunk(shield, x, 0.0) - x).abs().max()) <= 1e-6


# --- samples: the dual ------------------------------------------------------------------------------------


class Dual(NamedTuple):
    """Random per-example gradients in a random diagonal metric."""

    J: Tensor
    G: Tensor
    dense: Dense
    mean: Tensor
    reference: Tensor

    @classmethod
    def of(cls, seed: int, n: int = 5, d: int = 30) -> Dual:
        normal = random_stream(seed)
        J = normal(n, d) * torch.linspace(1, 3, n, dtype=torch.float64).unsqueeze(1)
        G = 0.1 + normal(d).square()
        return cls(J, G, Dense.of(J.T @ J / n, torch.diag(G)), normal(d), normal(d))

    def solve(self, lambda_align: float, rank: int) -> Tensor:
        """d* = mean - G^-1 J^T c."""
        kernel, along = (self.J / self.G) @ self.J.T, self.J @ (self.mean - self.reference)
        return self.mean - self.J.T @ dual_coefficients(kernel, along, lambda_align, rank) / self.G


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("lambda_align", [0.0, 0.1, 1.0, 30.0, INF])
def test_dual_against_a_dense_solve(seed: int, rank: int, lambda_align: float) -> None:
    """Oracles 1, 3, 4 and 5 for samples; relative 1e-5."""
    dual = Dual.of(seed)
    found = dual.solve(lambda_align, rank)
    assert relative(found, dual.dense.solve(dual.mean, dual.reference, lambda_align, rank)) < 1e-5
    _, rho, U = dual.dense.penalty(rank)
    coordinates = U.T @ (dual.G * (found - dual.reference))
    x = dual.mean - dual.reference
    wanted = (U.T @ (dual.G * x)) / (1 + lambda_align * rho)
    torch.testing.assert_close(coordinates, wanted, rtol=1e-6, atol=1e-9)
    moved = dual.mean - found
    assert float((moved - U @ (U.T @ (dual.G * moved))).abs().max()) < 1e-9
    if lambda_align == 0:
        assert torch.equal(found, dual.mean)


@pytest.mark.parametrize("lambda_align", [0.3, INF])
def test_examples_given_twice_change_nothing(lambda_align: float) -> None:
    """Their kernel has null directions that fp32 sums blur: these neither count in the mean of rho nor act."""
    dual = Dual.of(0, n=12, d=400)
    twice = torch.cat([dual.J, dual.J])
    last_bits = 1 + 1e-7 * random_stream(1)(*twice.shape)  # two passes of one example differ in them
    half = (twice * last_bits / dual.G.sqrt()).float()
    kernel, along = (half @ half.T).double(), twice @ (dual.mean - dual.reference)
    values = torch.linalg.eigvalsh(kernel)
    assert float(values[11]) > 1e-9 * float(values[-1])  # blurred indeed
    c = dual_coefficients(kernel, along, lambda_align, 24)
    assert relative(dual.mean - twice.T @ c / dual.G, dual.solve(lambda_align, 12)) < 1e-4


# --- whole merges -----------------------------------------------------------------------------------------


@dataclass
class Context:
    """A merge context in memory: folders, example sets, a store of its own."""

    models: Models
    store: Store
    folder: Path
    sets: Mapping[str, Sequence[Example]]
    seed: int = 0
    precision: ClassVar[str] = "bfloat16"
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, dict[str, float]] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    selection: Probes | None = None

    def examples(self, name: str) -> Sequence[Example]:
        return self.sets[name.removeprefix(OWN)]

    def examples_digest(self, name: str) -> str:
        return name

    def cached(self, stage: str, recipe: Mapping[str, Any], make: Callable[[Path], Any]) -> Artifact:
        return self.store.obtain(stage, recipe, lambda folder: make(folder) or {})

    def loaded(self, checkpoint: Checkpoint) -> Any:
        self.loads.append(checkpoint.where)
        return load_model(checkpoint.folder)

    def barycentre(self, weights: Sequence[float] | None = None) -> Checkpoint:
        folder = self.folder if weights is None else self.folder.with_name(f"{self.folder.name}-{weights}")
        if not folder.exists():
            folder.mkdir(parents=True)
            merge(lambda block: average(block.pool, weights), self.models, folder)
            shutil.copyfile(self.models.base.folder / "config.json", folder / "config.json")
        return Checkpoint.open(folder, "average")

    def merged(self, merger: Merger) -> Checkpoint:
        folder = self.folder.with_name(
            f"{self.folder.name}-{hashlib.sha256(repr(merger).encode()).hexdigest()[:16]}"
        )
        if not folder.exists():
            folder.mkdir(parents=True)
            merge(merger.fit(self), self.models, folder, elementwise=merger.elementwise)
            shutil.copyfile(self.models.base.folder / "config.json", folder / "config.json")
        return Checkpoint.open(folder, "a merge")

    def probes(self) -> Probes:
        assert self.selection is not None
        return self.selection

    def record(self, **facts: Any) -> None:
        json.dumps(facts, allow_nan=False)
        self.facts |= facts

    def record_block(self, name: str, **facts: float) -> None:
        assert all(map(math.isfinite, facts.values()))
        self.blocks[name] = facts


def whole(models: Models, name: str) -> Block:
    return Block(name, slice(None), models.base.read(name), [model.read(name) for model in models.pool])


def merged(method: Merger, ctx: Context) -> Tensors:
    rule = method.fit(ctx)
    return {name: rule(whole(ctx.models, name)) for name in ctx.models.base}


def soup(models: Models) -> Tensors:
    """The plain average, in float64, rounded once."""
    return {
        name: torch.stack([model.read(name).double() for model in models.pool]).mean(0).float()
        for name in models.base
    }


def matrices(models: Models) -> list[str]:
    return [name for name in models.base if name.endswith("_proj.weight")]


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The linear weights as one float64 vector."""
    return torch.cat(
        [tensors[name].double().flatten() for name in sorted(tensors) if name.endswith("_proj.weight")]
    )


class Family(NamedTuple):
    """A tiny llama, its anchor and two experts, with example sets and two contexts on them."""

    models: Models
    sets: Mapping[str, Sequence[Example]]
    rounded: Context
    """Passes under autocast, as in production."""
    exact: Context
    """Passes in fp32: use it with ``precise``."""


@pytest.fixture(scope="module")
def family(tiny_model: MakesModel, perturbed: Perturbs, tmp_path_factory: pytest.TempPathFactory) -> Family:
    base = tiny_model("llama", **SMALL)
    anchor, a, b = (Checkpoint.open(perturbed(base, seed, 0.05), str(seed)) for seed in (1, 2, 3))
    models = Models(Checkpoint.open(base, "base"), anchor, {"a": a, "b": b})
    names = ("alignment", "metric", "anchor", "a", "b", "refusals", "utility")
    sets = {name: examples_of(seed, 40 if seed < 2 else 8, 14) for seed, name in enumerate(names)}
    folder = tmp_path_factory.mktemp("family")
    rounded, exact = (
        Context(models, Store(folder / name / "store"), folder / name / "average", sets)
        for name in ("rounded", "exact")
    )
    return Family(models, sets, rounded, exact)


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Context, "precision", "float32")
    return


def settings_of(estimator: str) -> list[dict[str, Any]]:
    factors = ["input", "output", "both"] if estimator == "kronecker" else ["input"]
    return [
        {"estimator": estimator, "reference": reference, "at": at, "metric": metric, "factors": factor}
        for reference, at, metric, factor in itertools.product(
            ["anchor", "base"], ["base", "barycentre"], ["shared", "per_expert"], factors
        )
    ]


def name_of(fields: dict[str, Any]) -> str:
    return "-".join(fields.values())


KRONECKER, SAMPLES = settings_of("kronecker"), settings_of("samples")


@pytest.mark.parametrize("fields", KRONECKER + SAMPLES, ids=name_of)
def test_every_combination_merges(family: Family, fields: dict[str, Any]) -> None:
    ctx, wanted = family.rounded, soup(family.models)
    found = merged(shield(**fields), ctx)
    centre = merged(FisherSoup(labels="data", floor=1e-3), ctx) if fields["metric"] == "per_expert" else wanted
    linear = set(matrices(family.models))
    assert len(linear) == 14
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
        if name in linear:
            assert relative(tensor, centre[name]) > 1e-4
        else:
            assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("fields", KRONECKER + SAMPLES, ids=name_of)
def test_without_penalty_every_combination_is_the_soup(family: Family, fields: dict[str, Any]) -> None:
    """Oracle 1 end to end; with per-expert Fishers the minimiser of L_geo is their soup."""
    found = merged(shield(lambda_align=0.0, **fields), family.rounded)
    wanted = soup(family.models)
    if fields["metric"] == "per_expert":
        wanted = merged(FisherSoup(labels="data", floor=1e-3), family.rounded)
        assert any(not torch.equal(wanted[n], soup(family.models)[n]) for n in matrices(family.models))
    for name in wanted:
        assert float((found[name] - wanted[name]).abs().max()) <= 1e-6


@pytest.mark.parametrize("fields", KRONECKER, ids=name_of)
def test_full_projection_gives_the_reference(family: Family, fields: dict[str, Any]) -> None:
    """lambda = inf with all directions leaves the anchor's matrices, or the base's (fp32, through the bases)."""
    found = merged(shield(lambda_align=INF, **fields), family.rounded)
    models = family.models
    reference = models.anchor if fields["reference"] == "anchor" else models.base
    for name in matrices(models):
        assert float((found[name] - reference.read(name)).abs().max()) <= 1e-6
        assert float((found[name] - soup(models)[name]).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def moments(family: Family) -> Callable[[str, str, str], Tensor]:
    """Second moments at the base by plain autograd, one example at a time: (set, side, weight name)."""
    model = load_model(family.models.base.folder)
    passes = {name: [plain_pass(model, one) for one in family.sets[name]] for name in ("alignment", "metric")}

    @cache
    def of(examples: str, side: str, name: str) -> Tensor:
        return moment(torch.cat([getattr(one, f"{side}s")[name] for one in passes[examples]]).double())

    return of


@pytest.fixture(scope="module")
def kronecker(
    family: Family, moments: Callable[[str, str, str], Tensor]
) -> Callable[[str, str], tuple[Dense, Tensor]]:
    """The dense problem of one weight matrix: kron(S, A) for F and G, at the base."""

    @cache
    def of(factors: str, name: str) -> tuple[Dense, Tensor]:
        d_out, d_in = family.models.base[name].shape
        one_out, one_in = torch.eye(d_out, dtype=torch.float64), torch.eye(d_in, dtype=torch.float64)
        S_A, S_G, A_A, A_G = (
            moments(data, side, name) for side in ("output", "input") for data in ("alignment", "metric")
        )
        outer = (S_A, with_damping(S_G)) if factors != "input" else (one_out, one_out)
        inner = (A_A, with_damping(A_G)) if factors != "output" else (one_in, one_in)
        F, G = (torch.kron(S, A) for S, A in zip(outer, inner, strict=True))
        return Dense.of(F, G), G

    return of


def directions(factors: str, rank: int | None, shape: tuple[int, ...]) -> int:
    """How many directions of vec(D) the ``rank`` leading ones of the factors are."""
    d_out, d_in = shape
    if factors == "both":
        return d_out * d_in if rank is None else min(rank, d_out * d_in)
    side, copies = (d_in, d_out) if factors == "input" else (d_out, d_in)
    return copies * (side if rank is None else min(rank, side))


@each_factors
@each_reference
@pytest.mark.parametrize(("rank", "lambda_align"), [(None, 1.0), (3, 0.3), (3, INF), (7, 30.0)])
def test_kronecker_merge_and_certificate_against_dense(
    family: Family,
    kronecker: Callable[[str, str], tuple[Dense, Tensor]],
    precise: None,
    factors: str,
    reference: str,
    rank: int | None,
    lambda_align: float,
) -> None:
    """Oracles 3 to 5 and the certificate end to end: models and examples in, dense algebra in float64 beside it.

    Statistics are summed in fp32, so the merge agrees to 1e-3 of the correction, the certificate to 5e-3.
    """
    ctx, models = family.exact, family.models
    found = merged(shield(factors=factors, reference=reference, rank=rank, lambda_align=lambda_align), ctx)
    for name in matrices(models):
        dense, G = kronecker(factors, name)
        shape = models.base[name].shape
        r = directions(factors, rank, shape)
        base = models.base.read(name).double()
        pool = [(model.read(name).double() - base).flatten() for model in models.pool]
        mean = torch.stack(pool).mean(0)
        d_ref = pool[0] if reference == "anchor" else torch.zeros_like(mean)
        wanted = dense.solve(mean, d_ref, lambda_align, r)
        delta = (found[name].double() - base).flatten()
        assert float((delta - wanted).norm() / (mean - wanted).norm()) < 1e-3

        H, rho, _ = dense.penalty(r)
        within = dense.U[:, : directions(factors, CERTIFIED_RANK if rank is None else rank, shape)]

        def squared(x: Tensor, G: Tensor = G) -> float:
            return float(x @ G @ x)

        def inside(x: Tensor, G: Tensor = G, within: Tensor = within) -> float:
            return float((within.T @ G @ x).square().sum())

        plain = {
            "l_geo": sum(squared(delta - other) for other in pool) / 3,
            "l_geo_floor": sum(squared(other - mean) for other in pool) / 3,
            "l_align": float((delta - d_ref) @ H @ (delta - d_ref)),
            "fisher_length_squared": squared(delta),
            "drift_base_squared": inside(delta),
            "drift_anchor_squared": inside(delta - pool[0]),
            "top_rho": float(rho[0]),
            "energy_ratio_anchor": inside(pool[0]) / squared(pool[0]),
            "energy_ratio_0": inside(pool[1]) / squared(pool[1]),
            "energy_ratio_1": inside(pool[2]) / squared(pool[2]),
        }
        facts = ctx.blocks[name]
        size = squared(mean)  # what is nothing (L_align at lambda = inf) is nothing on this scale
        assert {k: facts[k] for k in plain} == pytest.approx(plain, rel=5e-3, abs=1e-6 * size)
        excess = squared(delta - mean)
        assert facts["l_geo"] - facts["l_geo_floor"] == pytest.approx(excess, rel=1e-2, abs=1e-5 * size)
        assert math.sqrt(facts["gradient"] / facts["gradient_scale"]) < 1e-4
        if lambda_align < INF:  # and the gradient is small in fact, in the norm of G^-1
            gradient = G @ (delta - mean) + lambda_align * H @ (delta - d_ref)
            pull = lambda_align * H @ (mean - d_ref)
            size_of = [math.sqrt(v @ torch.linalg.solve(G, v)) for v in (gradient, pull)]
            assert size_of[0] < 2e-3 * size_of[1]
            assert facts["gradient_scale"] == pytest.approx(size_of[1] ** 2, rel=5e-3)


class Samples(NamedTuple):
    """Dense per-example gradients of the alignment set, the diagonal metric, and their eigenpairs."""

    J: Tensor
    G: Tensor
    dense: Dense


@pytest.fixture(scope="module")
def samples(family: Family) -> Samples:
    model = load_model(family.models.base.folder)
    J, of_metric = (
        torch.stack([flat(plain_pass(model, one).gradients) for one in family.sets[name]])
        for name in ("alignment", "metric")
    )
    diagonal = of_metric.square().mean(0)
    G = diagonal / diagonal.mean() + DAMPING
    return Samples(J, G, Dense.of(J.T @ J / len(J), torch.diag(G)))


@each_reference
@pytest.mark.parametrize(("rank", "lambda_align"), [(None, 1.0), (5, 0.3), (5, INF), (1000, 10.0)])
def test_samples_merge_and_certificate_against_dense(
    family: Family, samples: Samples, precise: None, reference: str, rank: int | None, lambda_align: float
) -> None:
    """The dense solve of all linear weights at once (960 of them); the rest as for Kronecker."""
    ctx, models, n = family.exact, family.models, len(samples.J)
    r = n if rank is None else min(rank, n)
    method = shield(estimator="samples", reference=reference, rank=rank, lambda_align=lambda_align)
    base = flat({name: models.base.read(name) for name in models.base})
    assert len(base) == 960
    pool = [flat({name: model.read(name) for name in model}) - base for model in models.pool]
    mean = torch.stack(pool).mean(0)
    d_ref = pool[0] if reference == "anchor" else torch.zeros_like(mean)
    wanted = samples.dense.solve(mean, d_ref, lambda_align, r)
    delta = flat(merged(method, ctx)) - base
    assert float((delta - wanted).norm() / (mean - wanted).norm()) < 1e-3
    assert relative(delta, wanted) < 1e-4

    H, _, _ = samples.dense.penalty(r)
    G, x = samples.G, mean - d_ref
    certificate = ctx.facts["certificate"]
    plain = {
        "l_align_before": float(x @ H @ x),
        "l_align": float((delta - d_ref) @ H @ (delta - d_ref)),
        "l_geo_excess": float((G * (delta - mean).square()).sum()),
    }
    size = plain["l_align_before"]
    assert {k: certificate[k] for k in plain} == pytest.approx(plain, rel=2e-3, abs=1e-6 * size)
    assert certificate["relative_gradient"] < 1e-9
    assert certificate["eigenvalues"] == pytest.approx(
        (n * samples.dense.values[: min(r, 32)]).tolist(), rel=1e-3
    )


@each_reference
def test_projection_on_samples_leaves_nothing_along_them(
    family: Family, samples: Samples, reference: str
) -> None:
    """Oracle 5 as it runs in production: gradients along J, rounded to bfloat16, fall to a few per cent."""
    found = merged(shield(estimator="samples", reference=reference, lambda_align=INF), family.rounded)
    models = family.models
    target = models.anchor if reference == "anchor" else models.base
    left, before = (
        samples.J @ (flat(point) - flat({n: target.read(n) for n in target})) for point in (found, soup(models))
    )
    assert float(left.norm()) < 0.05 * float(before.norm())


def test_shared_statistics_are_made_once(family: Family) -> None:
    """A sweep over lambda, rank and reference reuses the bases; the layers on one input share one basis."""
    ctx = family.rounded
    merged(shield(), ctx)
    before = list(ctx.loads)
    for fields in ({"lambda_align": 3.0}, {"rank": 2}, {"reference": "base"}):
        merged(shield(**fields), ctx)
    assert ctx.loads == before
    bases = KroneckerBases.of(ctx, family.models.base, "input", DAMPING)
    layer = "model.layers.1.self_attn"
    assert bases.owners[f"{layer}.v_proj.weight"] == f"{layer}.q_proj.weight"
    assert len({name.split("|")[0] for name in bases.tensors}) == 8  # of 14 matrices


def test_certificate_can_be_left_out(family: Family) -> None:
    for estimator in ("kronecker", "samples"):
        ctx = Context(family.models, family.rounded.store, family.rounded.folder, family.sets)
        with_it = merged(shield(estimator=estimator), family.rounded)
        without = merged(shield(estimator=estimator, certificate=False), ctx)
        assert all(torch.equal(with_it[name], without[name]) for name in with_it)
        assert (ctx.facts, ctx.blocks) == ({}, {})


@pytest.mark.parametrize("estimator", ["kronecker", "samples"])
@pytest.mark.parametrize("lambda_align", [0.0, 1.0, INF])
def test_a_pool_of_the_anchor_alone(family: Family, estimator: str, lambda_align: float) -> None:
    """Nothing is to be shrunk: the certificate is finite, and the anchor comes back."""
    alone = family.models._replace(experts={"a": family.models.anchor})
    shared = family.rounded
    ctx = Context(alone, Store(shared.folder.parent / f"alone-{estimator}"), shared.folder, family.sets)
    found = merged(shield(estimator=estimator, lambda_align=lambda_align), ctx)
    for name in alone.base:
        torch.testing.assert_close(found[name], alone.anchor.read(name), rtol=0, atol=1e-6)


def test_what_the_methods_read() -> None:
    assert shield().inputs == GradientStep().inputs == Inputs(examples=("alignment", "metric"))
    assert shield(metric="per_expert").inputs.examples == ("alignment", "metric", EVERY_OWN)
    assert not AlignMerge.elementwise
    assert not (shield().inputs.seed or GradientStep().inputs.seed)


# --- choices ----------------------------------------------------------------------------------------------


def fresh(family: Family, folder: Path, **changes: Any) -> Context:
    """A context with a store of its own."""
    ctx = Context(family.models, Store(folder / "store"), folder / "average", family.sets)
    return replace(ctx, **changes)


each_estimator = pytest.mark.parametrize("estimator", ["kronecker", "samples"])


@pytest.mark.parametrize("factors", ["input", "both"])
def test_identity_chart_against_dense(
    family: Family, moments: Callable[[str, str, str], Tensor], precise: None, factors: str
) -> None:
    """G = 1: the eigenvectors are those of F alone, and the certificate's lengths are Euclidean."""
    ctx, models = family.exact, family.models
    found = merged(shield(chart="identity", factors=factors, rank=3), ctx)
    for name in matrices(models):
        d_out, d_in = models.base[name].shape
        S = moments("alignment", "output", name) if factors == "both" else torch.eye(d_out, dtype=torch.float64)
        F = torch.kron(S, moments("alignment", "input", name))
        dense = Dense.of(F, torch.eye(d_out * d_in, dtype=torch.float64))
        base = models.base.read(name).double()
        pool = [(model.read(name).double() - base).flatten() for model in models.pool]
        mean = torch.stack(pool).mean(0)
        wanted = dense.solve(mean, pool[0], 1.0, directions(factors, 3, (d_out, d_in)))
        delta = (found[name].double() - base).flatten()
        assert float((delta - wanted).norm() / (mean - wanted).norm()) < 1e-3
        assert ctx.blocks[name]["fisher_length_squared"] == pytest.approx(float(delta @ delta), rel=1e-3)


def test_identity_chart_of_samples_against_dense(family: Family, samples: Samples, precise: None) -> None:
    models = family.models
    dense = Dense.of(samples.J.T @ samples.J / len(samples.J), torch.eye(960, dtype=torch.float64))
    base = flat({name: models.base.read(name) for name in models.base})
    pool = [flat({name: model.read(name) for name in model}) - base for model in models.pool]
    wanted = dense.solve(torch.stack(pool).mean(0), pool[0], 1.0, 5)
    found = merged(shield(estimator="samples", chart="identity", rank=5), family.exact)
    assert relative(flat(found) - base, wanted) < 1e-4


@pytest.mark.parametrize(("factors", "rank"), [("input", None), ("both", None), ("both", 4)])
def test_one_subspace_for_all_matrices(
    family: Family,
    kronecker: Callable[[str, str], tuple[Dense, Tensor]],
    precise: None,
    factors: str,
    rank: int | None,
) -> None:
    """rho is measured against its mean over all matrices; of rank r, the 14 r largest of all are in S_A."""
    ctx, models = family.exact, family.models
    names = matrices(models)
    found = merged(shield(subspace="global", factors=factors, rank=rank, lambda_align=3.0), ctx)
    values = torch.cat([kronecker(factors, name)[0].values for name in names]).clamp(min=0)
    kept = values if rank is None else values.topk(rank * len(names)).values
    sizes = set()
    for name in names:
        dense, G = kronecker(factors, name)
        inside = dense.values >= kept.min() * (1 - 1e-6)
        sizes.add(int(inside.sum()))
        U, rho = dense.U[:, inside], dense.values[inside] / kept.mean()
        H = G @ U @ torch.diag(rho) @ U.T @ G
        base = models.base.read(name).double()
        pool = [(model.read(name).double() - base).flatten() for model in models.pool]
        mean = torch.stack(pool).mean(0)
        wanted = torch.linalg.solve(G + 3 * H, G @ mean + 3 * H @ pool[0])
        delta = (found[name].double() - base).flatten()
        assert float((delta - wanted).norm()) < 2e-3 * float((mean - pool[0]).norm())
        assert ctx.blocks[name]["l_align"] == pytest.approx(
            float((delta - pool[0]) @ H @ (delta - pool[0])), rel=1e-2
        )
    assert rank is None or len(sizes) > 2  # some matrices have more of S_A than others
    if rank is None:
        own = merged(shield(factors=factors, lambda_align=3.0), ctx)
        assert not any(torch.allclose(found[name], own[name], rtol=0, atol=1e-5) for name in names)


def test_subspace_of_each_estimator(family: Family) -> None:
    """null is per_block for kronecker and global for samples, which has no other."""
    for estimator, own in (("kronecker", "per_block"), ("samples", "global")):
        one, other = (merged(shield(estimator=estimator, subspace=s), family.rounded) for s in (None, own))
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(
        BadRequest, match=r"method\.estimator, method\.subspace: samples and per_block.*subspace=global"
    ):
        shield(estimator="samples", subspace="per_block")


@each_estimator
@pytest.mark.parametrize("subspace_from", ["refusals", "utility"])
def test_subspace_of_other_examples(family: Family, tmp_path: Path, estimator: str, subspace_from: str) -> None:
    """What one gets with these examples in the place of the alignment set, bit for bit."""
    swapped = {**family.sets, "alignment": family.sets[subspace_from]}
    wanted = merged(shield(estimator=estimator), fresh(family, tmp_path, sets=swapped))
    found = merged(shield(estimator=estimator, subspace_from=subspace_from), family.rounded)
    usual = merged(shield(estimator=estimator), family.rounded)
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert not any(torch.equal(found[name], usual[name]) for name in matrices(family.models))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, m=st.integers(2, 12))
def test_a_turned_basis_has_the_metric_and_the_eigenvalues(seed: int, m: int) -> None:
    normal = random_stream(seed)
    F, metric = moment(normal(3 * m, m)), moment(normal(3 * m, m))
    plain = generalised_basis(F, metric, DAMPING)
    random = turned(plain, torch.Generator().manual_seed(seed % 1000))
    G, U = with_damping(metric), random.vectors
    torch.testing.assert_close(U.T @ G @ U, torch.eye(m, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(random.dual, G @ U, rtol=1e-8, atol=1e-8)
    assert torch.equal(random.values, plain.values)
    assert not torch.allclose(U.abs(), plain.vectors.abs(), rtol=1e-2)


def test_turns_favour_no_direction() -> None:
    """Over many draws the first vector has the covariance of the uniform distribution on the sphere."""
    one = torch.eye(3, dtype=torch.float64)
    basis, generator = Basis(torch.tensor([2.0, 1.0, 0.5]), one, one), torch.Generator().manual_seed(0)
    firsts = torch.stack([turned(basis, generator).vectors[:, 0] for _ in range(3000)])
    torch.testing.assert_close(moment(firsts), one / 3, rtol=0, atol=0.03)
    assert float(firsts.mean(0).abs().max()) < 0.04


@each_estimator
def test_random_subspaces_shrink_as_much_along_other_directions(family: Family, estimator: str) -> None:
    """The same eigenvalues, so projection on all directions still ends at the reference; the seed tells them apart."""
    usual, ctx = family.rounded, replace(family.rounded, blocks={}, facts={})
    method = shield(estimator=estimator, subspace_from="random")
    assert method.inputs.seed
    found = merged(method, ctx)
    again, other = merged(method, ctx), merged(method, replace(ctx, seed=1))
    aligned = merged(shield(estimator=estimator), usual)
    for name in matrices(family.models):
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name]) and not torch.equal(found[name], aligned[name])
    if estimator == "kronecker":
        assert {n: b["top_rho"] for n, b in ctx.blocks.items()} == pytest.approx(
            {n: b["top_rho"] for n, b in usual.blocks.items()}
        )
        whole = merged(shield(subspace_from="random", lambda_align=INF), ctx)
        for name in matrices(family.models):
            assert float((whole[name] - family.models.anchor.read(name)).abs().max()) < 1e-5
    else:
        assert ctx.facts["certificate"]["eigenvalues"] == usual.facts["certificate"]["eigenvalues"]
        assert ctx.facts["certificate"]["relative_gradient"] < 1e-9


WEIGHTS = (1.0, 2.0, 5.0)
GIVEN: dict[str, Any] = {"lambda_k": "given", "pool_weights": WEIGHTS}


@each_estimator
@pytest.mark.parametrize("metric", ["shared", "per_expert"])
def test_without_both_terms_it_is_the_weighted_soup(family: Family, estimator: str, metric: str) -> None:
    """Oracle 1 with weights: sum_k lambda_k theta_k, with per-expert Fishers (sum lambda F)^-1 sum lambda F theta."""
    fields: dict[str, Any] = {"estimator": estimator, "metric": metric, "lambda_align": 0.0, "lambda_bud": 0.0}
    ctx = replace(family.rounded, facts={})
    found = merged(shield(**fields, **GIVEN), ctx)
    models = family.models
    fishers = {a: fisher(family.rounded, m, a) for a, m in zip(models.aliases, models.pool, strict=True)}
    normalised = NormalisedFishers.of(fishers, 1e-3)
    for name in models.base:
        shares = [torch.tensor(w, dtype=torch.float64) / 8 for w in WEIGHTS]
        if metric == "per_expert" and name in matrices(models):
            pairs = zip(shares, fishers.values(), normalised.norms.values(), strict=True)
            shares = [w * (f.read(name).double() / norm).clamp(min=normalised.floor) for w, f, norm in pairs]
        terms = [share * model.read(name).double() for share, model in zip(shares, models.pool, strict=True)]
        wanted = torch.stack(terms).sum(0) / torch.stack(shares).sum(0)
        assert float((found[name] - wanted).abs().max()) <= 1e-6
    assert ctx.facts["lambda_k"] == {"anchor": 1 / 8, "a": 2 / 8, "b": 5 / 8}


def test_weights_move_the_centre_of_the_shield(
    family: Family, kronecker: Callable[[str, str], tuple[Dense, Tensor]], precise: None
) -> None:
    """The dense solve about the weighted mean; L_geo and its floor with the same weights."""
    ctx, models = family.exact, family.models
    found = merged(shield(rank=3, **GIVEN), ctx)
    for name in matrices(models):
        dense, G = kronecker("input", name)
        base = models.base.read(name).double()
        pool = [(model.read(name).double() - base).flatten() for model in models.pool]
        mean = sum((w / 8 * p for w, p in zip(WEIGHTS, pool, strict=True)), torch.zeros_like(pool[0]))
        wanted = dense.solve(mean, pool[0], 1.0, directions("input", 3, models.base[name].shape))
        delta = (found[name].double() - base).flatten()
        assert float((delta - wanted).norm() / (mean - wanted).norm()) < 1e-3
        geo, floor = (
            sum(w / 8 * float((point - p) @ G @ (point - p)) for w, p in zip(WEIGHTS, pool, strict=True))
            for point in (delta, mean)
        )
        assert ctx.blocks[name]["l_geo"] == pytest.approx(geo, rel=5e-3)
        assert ctx.blocks[name]["l_geo_floor"] == pytest.approx(floor, rel=5e-3)


@each_estimator
def test_the_barycentre_is_the_weighted_one(family: Family, tmp_path: Path, estimator: str) -> None:
    """``at: barycentre`` with weights takes its gradients where the weighted soup is, written out by hand."""
    models, ctx = family.models, fresh(family, tmp_path)
    (tmp_path / "soup").mkdir()
    merge(lambda block: average(block.pool, [w / 8 for w in WEIGHTS]), models, tmp_path / "soup")
    shutil.copyfile(models.base.folder / "config.json", tmp_path / "soup" / "config.json")
    soup_there = Checkpoint.open(tmp_path / "soup", "soup")
    found = merged(shield(estimator=estimator, at="barycentre", **GIVEN), ctx)
    moved = replace(ctx, models=models._replace(base=soup_there))
    if estimator == "kronecker":
        wanted = KroneckerBases.of(moved, soup_there, "input", DAMPING)
        used = KroneckerBases.of(ctx, ctx.barycentre([w / 8 for w in WEIGHTS]), "input", DAMPING)
        assert used.tensors.digest == wanted.tensors.digest
    usual = merged(shield(estimator=estimator, at="base", **GIVEN), ctx)
    assert not any(torch.equal(found[name], usual[name]) for name in matrices(models))


def test_rules_for_lambda_k(family: Family, samples: Samples, precise: None) -> None:
    """1 / ||Delta_k||_G with the undamped diagonal Fisher, and exp(-NLL_k), by plain autograd."""
    models, ctx = family.models, family.exact
    base_model = load_model(models.base.folder)
    rows = torch.stack([flat(plain_pass(base_model, one).gradients) for one in family.sets["metric"]])
    base = flat({name: models.base.read(name) for name in models.base})
    deltas = [flat({name: model.read(name) for name in model}) - base for model in models.pool]
    lengths = [float((rows.square().mean(0) * delta.square()).sum().sqrt()) for delta in deltas]
    losses = []
    for model in models.pool:
        loaded = load_model(model.folder)
        losses.append(
            float(torch.tensor([plain_pass(loaded, one).loss for one in family.sets["metric"]]).mean())
        )
    wanted = {
        "inverse_fisher": [1 / length for length in lengths],
        "validation": [math.exp(-loss) for loss in losses],
    }
    for rule, weights in wanted.items():
        found = pool_weights(ctx, rule)
        assert found is not None and list(found) == ["anchor", "a", "b"]
        assert list(found.values()) == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)
        assert sum(found.values()) == pytest.approx(1)
        explicit = {"lambda_k": "given", "pool_weights": tuple(found.values())}
        one, other = merged(shield(lambda_k=rule), ctx), merged(shield(**explicit), ctx)  # type: ignore[arg-type]
        for name in matrices(models):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    assert pool_weights(ctx, "uniform") is None


def test_a_model_that_did_not_move_has_no_inverse_length(family: Family) -> None:
    unmoved = replace(family.rounded, models=family.models._replace(experts={"a": family.models.base}))
    with pytest.raises(ArithmeticError, match="'a' does not differ from the base"):
        pool_weights(unmoved, "inverse_fisher")


def test_weights_are_as_many_as_models(family: Family) -> None:
    method = shield(lambda_k="given", pool_weights=(1.0, 2.0))
    with pytest.raises(
        BadRequest, match=r"method\.pool_weights: 2 numbers; allowed: 3 numbers, for anchor, a, b"
    ):
        method.fit(family.rounded)


@each_estimator
@pytest.mark.parametrize("more", [{}, {"subspace_from": "random", "lambda_align": INF, "rank": 4}], ids=str)
def test_iterate_takes_gradients_at_the_first_solution(
    family: Family, tmp_path: Path, estimator: str, more: dict[str, Any]
) -> None:
    """What ``at: barycentre`` gives where the barycentre is exchanged for the merge that ``at: base`` gives."""
    ctx, models = fresh(family, tmp_path), family.models
    first = shield(estimator=estimator, **more)
    ctx.folder.mkdir()
    merge(first.fit(ctx), models, ctx.folder, elementwise=False)
    shutil.copyfile(models.base.folder / "config.json", ctx.folder / "config.json")
    wanted = merged(replace(first, at="barycentre"), ctx)
    found = merged(replace(first, at="iterate"), family.rounded)
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    once = merged(first, ctx)
    assert any(not torch.equal(found[name], once[name]) for name in found)


# --- the control: as far, but straight ----------------------------------------------------------------------


def fisher_norm(family: Family, tensors: Mapping[str, Tensor]) -> float:
    """||d||_G with the diagonal Fisher of the base on the metric set, over the linear weights."""
    diagonal = fisher(family.rounded, family.models.base, "metric")
    return math.sqrt(sum(float((diagonal.read(n) * tensors[n].square()).double().sum()) for n in diagonal))


@pytest.mark.parametrize(
    "like",
    [
        {"lambda_align": 3.0, "estimator": "kronecker", "lambda_bud": 0.0},
        {"reference": "base", "lambda_bud": 0.0},
    ],
    ids=str,
)
def test_interpolation_goes_as_far_as_alignmerge(family: Family, like: dict[str, Any]) -> None:
    models, ctx = family.models, replace(family.rounded, facts={}, blocks={})
    matched, mean = merged(AlignMerge(**like), family.rounded), soup(models)
    towards = {goal: merged(Interpolate(t=None, like=like, towards=goal), ctx) for goal in ("anchor", "base")}
    assert ctx.blocks == {} and "certificate" not in ctx.facts
    names = list(mean)
    walked, correction = ({n: found[n] - mean[n] for n in names} for found in (towards["anchor"], matched))
    assert fisher_norm(family, walked) == pytest.approx(fisher_norm(family, correction), rel=1e-4)
    lengths = [
        fisher_norm(family, {n: found[n] - models.base.read(n) for n in names})
        for found in (towards["base"], matched)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    t = ctx.facts["t"]
    for name in names:
        shrunk = (1 - t) * mean[name] + t * models.base.read(name)
        torch.testing.assert_close(towards["base"][name], shrunk, rtol=0, atol=1e-6)


def test_plain_interpolation_to_either_end(family: Family) -> None:
    models = family.models
    for towards, goal in (("anchor", models.anchor), ("base", models.base)):
        half = merged(Interpolate(towards=towards), family.rounded)
        whole = merged(Interpolate(towards=towards, t=1.0), family.rounded)
        for name, mean in soup(models).items():
            torch.testing.assert_close(half[name], (mean + goal.read(name)) / 2, rtol=0, atol=1e-6)
            assert torch.equal(whole[name], goal.read(name))


def test_interpolation_reads_what_the_matched_merge_reads() -> None:
    plain = Interpolate()
    assert plain.inputs == Inputs()
    like = Interpolate(t=None, like={"subspace_from": "random", "lambda_bud": 1.0, "metric": "per_expert"})
    assert like.inputs == Inputs(examples=("alignment", "metric", EVERY_OWN), seed=True, probes=True)
    assert hash(like) == hash(
        Interpolate(t=None, like={"lambda_bud": 2.0})
    )  # a plan counts mergers by hash and ==


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"t": None}, "method.t, method.like"),
        ({"like": {"rank": 3}}, "method.t, method.like"),
        ({"t": None, "like": {"rank": 0}}, "method.like.rank"),
        ({"t": None, "like": {"rnk": 3}}, "method.like.rnk"),
        ({"t": None, "like": {"rank": "many"}}, "method.like.rank"),
        ({"towards": "experts"}, "method.towards"),
    ],
)
def test_what_interpolation_refuses(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Interpolate(**fields)
    assert [fault.where for fault in caught.value.faults] == [where]


# --- Fishers as artifacts ---------------------------------------------------------------------------------


def test_fisher_artifact_is_the_mean_square(family: Family, samples: Samples, precise: None) -> None:
    ctx, base = family.exact, family.models.base
    found = fisher(ctx, base, "alignment")
    assert sorted(found) == sorted(matrices(family.models))
    wanted = samples.J.square().mean(0)
    assert relative(flat({name: found.read(name) for name in found}), wanted) < 1e-4
    loads = len(ctx.loads)
    assert fisher(ctx, base, "alignment").digest == found.digest
    assert len(ctx.loads) == loads


def test_the_metric_has_mean_one_and_damping(family: Family, samples: Samples, precise: None) -> None:
    diagonal = fisher(family.exact, family.models.base, "metric")
    mean = mean_value(diagonal)
    metric = flat({name: damped(diagonal.read(name), mean, DAMPING) for name in diagonal})
    assert relative(metric, samples.G) < 1e-4
    assert float(metric.mean()) == pytest.approx(1 + DAMPING)


def test_sampled_fishers_belong_to_their_seed(family: Family) -> None:
    shared = family.rounded
    digests = [
        fisher(
            Context(family.models, Store(shared.folder.parent / folder), shared.folder, family.sets, seed),
            family.models.base,
            "metric",
            "sampled",
        ).digest
        for seed, folder in ((0, "one"), (0, "two"), (1, "one"))
    ]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] != fisher(shared, family.models.base, "metric").digest


def test_fisher_soup_end_to_end(family: Family, precise: None) -> None:
    """Each model's own per-example gradients on its own examples, normalised, floored, by plain autograd."""
    models, fishers = family.models, []
    for alias, model in zip(models.aliases, models.pool, strict=True):
        loaded = load_model(model.folder)
        rows = torch.stack([flat(plain_pass(loaded, one).gradients) for one in family.sets[alias]])
        diagonal = rows.square().mean(0)
        fishers.append(diagonal / diagonal.norm())
    floor = 1e-3 * torch.stack(fishers).mean()
    weights = torch.stack(fishers).clamp(min=float(floor))
    thetas = torch.stack([flat({name: model.read(name) for name in model}) for model in models.pool])
    wanted = (weights * thetas).sum(0) / weights.sum(0)
    method = shield(metric="per_expert", lambda_align=0.0)
    found = flat(merged(method, family.exact))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    fields = {
        alias: fisher(family.exact, model, alias)
        for alias, model in zip(models.aliases, models.pool, strict=True)
    }
    assert NormalisedFishers.of(fields, 1e-3).floor == pytest.approx(float(floor), rel=1e-4)


# --- the control: one natural-gradient step ---------------------------------------------------------------


@pytest.mark.parametrize("at", ["base", "barycentre"])
@pytest.mark.parametrize("length", [0.06, 0.3])
def test_gradient_step_against_plain_autograd(family: Family, precise: None, at: str, length: float) -> None:
    """Along -G^-1 mean g, with gradients and metric taken ``at``; as long as ``length`` average deltas."""
    ctx, models = family.exact, family.models
    loaded = load_model(ctx.barycentre().folder if at == "barycentre" else models.base.folder)
    gradients, of_metric = (
        torch.stack([flat(plain_pass(loaded, one).gradients) for one in family.sets[name]])
        for name in ("alignment", "metric")
    )
    diagonal = of_metric.square().mean(0)
    direction = -gradients.mean(0) / (diagonal / diagonal.mean() + 1.0)
    found, centre = merged(GradientStep(at=at, length=length), ctx), soup(models)
    step = flat(found) - flat(centre)
    everything = [(centre[name] - models.base.read(name)).double().square().sum() for name in models.base]
    wanted = direction / direction.norm() * length * math.sqrt(sum(everything))
    assert relative(step, wanted) < 1e-3
    assert float(step.norm() / wanted.norm()) == pytest.approx(1, rel=1e-5)
    assert ctx.facts["step_scale"] == pytest.approx(float(wanted.norm() / direction.norm()), rel=1e-3)
    for name in set(models.base) - set(matrices(models)):
        assert torch.equal(found[name], centre[name])


def test_gradient_step_goes_downhill(family: Family, tmp_path: Path) -> None:
    def loss(method: Merger, name: str) -> float:
        folder = tmp_path / name
        folder.mkdir()
        merge(method.fit(family.rounded), family.models, folder, block_elements=20)
        shutil.copyfile(family.models.base.folder / "config.json", folder / "config.json")
        return float(nll(load_model(folder), family.sets["alignment"]).mean())

    assert loss(GradientStep(), "step") < loss(Average(), "average") - 1e-3


def test_gradient_step_of_no_length_is_the_average(family: Family) -> None:
    found = merged(GradientStep(length=0.0), family.rounded)
    assert all(torch.equal(found[name], tensor) for name, tensor in soup(family.models).items())


# --- wrong fields -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "key", "values"),
    [
        (AlignMerge, "lambda_align", [math.nan, -1.0, -INF, True, "1"]),
        (AlignMerge, "lambda_bud", [math.nan, INF, -1.0, True]),
        (AlignMerge, "a_min", [math.nan, INF, -1.1, 1.1]),
        (AlignMerge, "kappa", [math.nan, INF, -1.0]),
        (AlignMerge, "damping", [math.nan, INF, -1.0, 0.0]),
        (AlignMerge, "floor", [math.nan, INF, -1.0, 0.0, 1.5]),
        (AlignMerge, "rank", [math.nan, INF, -1, 0]),
        (GradientStep, "length", [math.nan, INF, -1.0]),
        (GradientStep, "damping", [math.nan, INF, -1.0, 0.0]),
        *((AlignMerge, key, ["nonsense", None, 1]) for key in CHOICES),
        (GradientStep, "at", ["nonsense", "anchor"]),
        (AlignMerge, "subspace", ["nonsense", 1]),
    ],
)  # fmt: skip
def test_wrong_fields_name_their_key(make: Callable[..., Merger], key: str, values: Sequence[Any]) -> None:
    for value in values:
        with pytest.raises(BadRequest) as caught:
            make(**{key: value})
        (fault,) = caught.value.faults
        assert (fault.where, fault.given) == (f"method.{key}", str(value))
        assert fault.allowed


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"lambda_k": "given"}, "method.lambda_k, method.pool_weights"),
        ({"pool_weights": (1.0,)}, "method.lambda_k, method.pool_weights"),
        ({"lambda_k": "given", "pool_weights": (0.0, 0.0)}, "method.pool_weights"),
        ({"lambda_k": "given", "pool_weights": (1.0, math.nan)}, "method.pool_weights[1]"),
        ({"lambda_k": "given", "pool_weights": (1.0, -1.0)}, "method.pool_weights[1]"),
    ],
)
def test_wrong_weights_name_their_key(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        AlignMerge(**fields)
    assert [fault.where for fault in caught.value.faults] == [where]


def test_infinity_is_allowed_where_it_projects() -> None:
    assert AlignMerge(lambda_align=INF).lambda_align == INF
    assert AlignMerge(lambda_align=0, rank=None).rank is None
