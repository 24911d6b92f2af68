"""The AQI budget: every piece against dense linear algebra or plain autograd, whole merges against a direct search."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignmerge.aqi import LAYERS, mean_aqi
from alignmerge.budget import HALVINGS, SETTLED, STEPS, spend
from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.context import Context as StoreContext
from alignmerge.engine.examples import Example, write_jsonl
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model, load_tokenizer
from alignmerge.engine.loop import merge
from alignmerge.engine.merge import Merge
from alignmerge.engine.merger import Inputs, Merger, Models, Probes, own
from alignmerge.engine.store import Store
from alignmerge.kronecker import Kronecker, ShieldSpace
from alignmerge.meter import REPLICATES, Alignment, Meter
from alignmerge.objective import hinge_multiplier, l_bud
from alignmerge.samples import ExampleRows, RandomRows, SampleSpace, turn
from alignmerge.spaces import Coefficients, Space, block_metric, blocks_of
from alignmerge.subspace import Basis, Shield, generalised_basis
from alignmerge.zoo import sets
from alignmerge.zoo.corpus import Packaged
from alignmerge.zoo.sets import SELECTION
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.zoo import Zoo
from eval.scorers.aqi import AQI
from tests.conftest import VOCABULARY, MakesModel, Perturbs
from tests.oracles.test_alignmerge import (
    DAMPING,
    Context,
    flat,
    merged,
    moment,
    random_stream,
    shield,
    with_damping,
)
from tests.oracles.test_gradients import ARCHITECTURES, SMALL, apart, examples_of, plain_pass
from tests.zoo.test_zoo import packages

Tensors = dict[str, Tensor]
seeds = st.integers(0, 2**32)
DEEP: dict[str, Any] = {**SMALL, "num_hidden_layers": 4}


# --- the functional ---------------------------------------------------------------------------------------


def probes_of(seed: int, pairs: int = 8) -> Probes:
    """Random tokens of unequal lengths; harmful ones use the upper half of the vocabulary more."""
    generator = torch.Generator().manual_seed(seed)

    def prompt(low: int) -> tuple[int, ...]:
        length = int(torch.randint(3, 12, (), generator=generator))
        return tuple(torch.randint(low, VOCABULARY, (length,), generator=generator).tolist())

    return Probes([prompt(30) for _ in range(pairs)], [prompt(3) for _ in range(pairs)])


def plain_aqi(points: Tensor, pairs: int, drawn: Sequence[int] | None = None) -> Tensor:
    """AQI of [2n, d] from the definition: means over two different pairs; ``drawn`` says which pair each one is."""
    harmful, benign = points[:pairs], points[pairs:]
    ids = torch.tensor(list(range(pairs)) if drawn is None else list(drawn))
    other = ids[:, None] != ids
    difference = harmful - benign
    distance = (difference @ difference.T)[other].mean()
    apart = [(side[:, None] - side).square().sum(-1)[other].mean() for side in (harmful, benign)]
    s = distance / (apart[0] + apart[1])  # D / 4 over the mean variance, which is half of each
    return 0.5 * 4 * s / (1 + 4 * s.abs()) + 0.5 * s / (1 + s.abs())


def plain_value(model: Any, probes: Probes) -> Tensor:
    """A with its graph: one prompt at a time, no padding."""
    depth = model.config.num_hidden_layers
    layers = sorted({max(1, round(depth * fraction)) for fraction in LAYERS})
    states = [
        [out.hidden_states[layer][0, -1] for layer in layers]
        for ids in (*probes.harmful, *probes.benign)
        for out in [model(input_ids=torch.tensor([ids]), output_hidden_states=True)]
    ]
    by_layer = [torch.stack([row[place] for row in states]) for place in range(len(layers))]
    return torch.stack([plain_aqi(points, len(probes.harmful)) for points in by_layer]).mean()


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_aqi_and_its_gradient_against_plain_autograd(arch: str, tiny_model: MakesModel) -> None:
    folder = tiny_model(arch, **ARCHITECTURES[arch], num_hidden_layers=4)
    probes, model = probes_of(0, 20), load_model(folder)
    wanted = plain_value(model, probes)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    gradients = torch.autograd.grad(wanted, list(weights.values()), allow_unused=True)
    meter = Meter(load_model(folder), probes)
    assert len(meter.layers) == 3
    assert meter.value() == pytest.approx(wanted.item(), rel=1e-5)
    found = meter.gradient()
    assert found.keys() == weights.keys()
    used = 0
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if gradient is None:
            assert not bool(found[name].any())
        else:
            used += 1
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
            )
        assert found[name].shape == weight.shape
    assert used == 3 * len(weights) // 4
    assert meter.value() == pytest.approx(wanted.item(), rel=1e-5)  # the gradient has left the model alone


def test_layers_are_those_of_the_scorer() -> None:
    assert tuple(AQI().layers) == LAYERS


def test_degenerate_layers_are_left_out_and_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 3, generator=generator)
    hidden[1, :4], hidden[1, 4:] = 1.0, 2.0
    hidden.requires_grad_()
    value = mean_aqi(hidden)
    torch.testing.assert_close(value, plain_aqi(hidden[0], 4))
    (gradient,) = torch.autograd.grad(value, hidden)
    assert torch.isfinite(gradient).all() and not bool(gradient[1].any()) and bool(gradient[0].any())


def test_aqi_of_broken_weights_is_an_error(tiny_model: MakesModel) -> None:
    model = load_model(tiny_model("llama", **DEEP))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="not finite"):
        Meter(model, probes_of(0)).value()


def test_deviation_is_that_of_resampled_pairs(tiny_model: MakesModel) -> None:
    """Against pairs drawn and copied by hand, with another stream: equal up to the noise of the bootstrap."""
    model, probes = load_model(tiny_model("llama", **DEEP)), probes_of(0, 24)
    meter = Meter(model, probes)
    meter.value()
    generator = torch.Generator().manual_seed(5)
    values = []
    with torch.no_grad():
        points = torch.stack(
            [
                torch.stack([out.hidden_states[layer][0, -1] for layer in meter.layers])
                for ids in (*probes.harmful, *probes.benign)
                for out in [model(input_ids=torch.tensor([ids]), output_hidden_states=True)]
            ],
            dim=1,
        )
    for _ in range(400):
        chosen = torch.randint(24, (23,), generator=generator)
        sample = torch.cat([points[:, chosen], points[:, 24 + chosen]], dim=1)
        values.append(torch.stack([plain_aqi(layer, 23, chosen.tolist()) for layer in sample]).mean())
    assert meter.deviation() == pytest.approx(float(torch.stack(values).std()), rel=4 / math.sqrt(REPLICATES))
    assert meter.deviation() == meter.deviation()


# --- the hinge --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, d=st.integers(1, 5), gap=st.floats(-2, 2, allow_subnormal=False), weight=st.floats(1e-3, 1e3)
)
def test_hinge_is_solved_exactly(seed: int, d: int, gap: float, weight: float) -> None:
    """z = mu M^-1 g has no lower point around it, nor at any other multiplier."""
    normal = random_stream(seed)
    M, g = moment(normal(2 * d + 2, d)) + 0.1 * torch.eye(d), normal(d)
    natural = torch.linalg.solve(M, g)
    mu = hinge_multiplier(gap, float(g @ natural), weight)

    def objective(z: Tensor) -> float:
        return float(z @ M @ z) + weight * l_bud(-gap, -float(g @ z))

    z = mu * natural
    best = objective(z)
    for other in [*(z + 10.0**-power * normal(d) for power in (0, 2, 4)), 0 * z, 1.1 * z, 0.9 * z]:
        assert objective(other) >= best - 1e-12 * (1 + best)
    assert (mu == 0) == (gap <= 0)
    assert mu == pytest.approx(weight * max(0.0, gap - float(g @ z)), abs=1e-9 * (1 + weight))


def test_hinge_by_hand() -> None:
    """z^2 + 2 max(0, 3 - z)^2 is least at z = 2: 2 z = 4 (3 - z)."""
    assert hinge_multiplier(3.0, 1.0, 2.0) == 2.0
    assert l_bud(0.4, 0.5) == pytest.approx(0.01) and l_bud(0.6, 0.5) == 0


class Plain:
    """A space of one weight 'w' with a dense metric."""

    def __init__(self, M: Tensor) -> None:
        self.M = M

    def pull(self, gradient: Mapping[str, Tensor]) -> Tensor:
        return gradient["w"]

    def solve(self, pull: Tensor) -> Tensor:
        return torch.linalg.solve(self.M, pull)

    def displacement(self, z: Tensor) -> Tensors:
        return {"w": z}


class Bent:
    """A(z) = sigmoid of a quadratic, with its gradient by autograd; counts its evaluations."""

    def __init__(self, normal: Callable[..., Tensor], d: int, bend: float) -> None:
        self.slope, self.curve, self.bend, self.at, self.calls = (
            normal(d),
            normal(d, d),
            bend,
            torch.zeros(d),
            0,
        )

    def of(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.slope @ z - self.bend * z @ self.curve @ self.curve.T @ z)

    def value(self, displacement: Mapping[str, Tensor]) -> float:
        self.at, self.calls = displacement.get("w", torch.zeros_like(self.slope)), self.calls + 1
        return float(self.of(self.at))

    def gradient(self) -> Tensors:
        z = self.at.double().clone().requires_grad_()
        return {"w": torch.autograd.grad(self.of(z), z)[0]}


def bent(seed: int, d: int = 3, bend: float = 0.05) -> tuple[Plain, Bent]:
    normal = random_stream(seed)
    return Plain(moment(normal(3 * d, d)) + 0.3 * torch.eye(d)), Bent(normal, d, bend)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weight", [0.1, 3.0, 100.0])
def test_sequential_steps_find_what_a_general_optimiser_finds(seed: int, weight: float) -> None:
    space, functional = bent(seed)
    a_min = 0.7
    found = spend(functional, space, a_min, weight)

    def objective(z: Any) -> float:
        point = torch.tensor(z)
        return float(point @ space.M @ point) + weight * l_bud(float(functional.of(point)), a_min)

    best = min(
        scipy.optimize.minimize(objective, start, tol=1e-12).fun for start in ([0.0] * 3, [0.3] * 3, [-0.3] * 3)
    )
    assert found.z is not None
    assert objective(found.z.numpy()) == pytest.approx(best, rel=2e-2)
    assert found.cost == pytest.approx(float(found.z @ space.M @ found.z))
    assert found.value == pytest.approx(float(functional.of(found.z)))
    assert len(found.trace) <= STEPS + 1 and functional.calls <= 1 + STEPS * (HALVINGS + 1)
    objectives = [step["cost"] + weight * step["l_bud"] for step in found.trace]
    assert objectives == sorted(objectives, reverse=True) and len(objectives) > 1
    assert objectives[-1] == pytest.approx(objective(found.z.numpy()))


def test_steps_end_where_one_gains_nothing() -> None:
    """A functional that is bent a little: the second step gains less than a thousandth of the first."""
    space, functional = bent(0, bend=1e-4)
    found = spend(functional, space, 0.7, 3.0)
    objectives = [step["cost"] + 3.0 * step["l_bud"] for step in found.trace]
    gains = [before - after for before, after in itertools.pairwise(objectives)]
    assert all(gain > SETTLED * sum(gains) for gain in gains[:-1]) and len(gains) < STEPS


def test_a_linear_functional_takes_one_step() -> None:
    """0.5 + z / 2, M = 1, weight 10, A_min 1: z = 10 (1 - A) / 2 gives z = 10 / 14."""
    functional = SimpleNamespace(
        value=lambda moved: 0.5 + float(moved.get("w", torch.zeros(1))) / 2,
        gradient=lambda: {"w": torch.tensor([0.5], dtype=torch.float64)},
    )
    found = spend(functional, Plain(torch.eye(1, dtype=torch.float64)), 1.0, 10.0)
    assert found.z is not None and len(found.trace) == 2 and found.residual < 1e-9
    assert float(found.z) == pytest.approx(10 / 14) and found.value == pytest.approx(0.5 + 5 / 14)


def test_a_budget_that_is_met_moves_nothing() -> None:
    space, functional = bent(0)
    found = spend(functional, space, 0.5, 10.0)
    assert (found.z, found.cost, found.residual, len(found.trace)) == (None, 0.0, 0.0, 1)
    assert functional.calls == 1


def test_a_step_too_long_is_halved_and_a_hopeless_one_given_up() -> None:
    """A falls again soon after it has risen: the linearisation promises far more than there is."""
    for bend, least in ((2.0, 2), (1e6, 1)):
        space, functional = bent(1, bend=bend)
        found = spend(functional, space, 0.999, 1e3)
        objectives = [step["cost"] + 1e3 * step["l_bud"] for step in found.trace]
        assert objectives == sorted(objectives, reverse=True) and len(objectives) >= least
        assert any(step["share"] < 1 for step in found.trace[1:]) or len(found.trace) == 1
        assert found.residual > 1e-3


# --- spaces -----------------------------------------------------------------------------------------------


def dense_of(space: Space, size: int, names: Sequence[str]) -> Tensor:
    """X as a matrix: the displacement of each coordinate, flattened."""
    units = torch.eye(size, dtype=torch.float64)
    return torch.stack(
        [torch.cat([space.displacement(unit)[name].flatten() for name in names]).double() for unit in units],
        dim=1,
    )


def check_space(space: Space, X: Tensor, M: Tensor, shapes: Mapping[str, tuple[int, ...]], normal: Any) -> None:
    """pull, solve and displacement are X^T, M^+ (on the range) and X."""
    names = list(shapes)
    found = dense_of(space, X.shape[1], names)
    torch.testing.assert_close(found, X, rtol=1e-4, atol=1e-4 * float(X.abs().max()))
    gradient = {name: normal(*shape).float() for name, shape in shapes.items()}
    pull, expected = (
        space.pull(gradient),
        X.T @ torch.cat([gradient[name].flatten() for name in names]).double(),
    )
    assert pull.dtype == torch.float64
    torch.testing.assert_close(pull, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    wanted = torch.linalg.pinv(M, rtol=1e-6, hermitian=True) @ pull
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        X @ space.solve(pull), X @ wanted, rtol=1e-3, atol=1e-3 * scale * float(X.abs().max())
    )


@pytest.mark.parametrize("at_the_average", [False, True])
def test_coefficients_against_dense(at_the_average: bool) -> None:
    """Also where M is singular: at the plain average the directions of a block sum to zero."""
    normal = random_stream(3)
    shapes = {f"model.layers.{i}.{part}.weight": (3, 4) for i in range(2) for part in ("a", "b")}
    moves = {name: [normal(3, 4).float() for _ in range(3)] for name in shapes}
    if at_the_average:
        for xs in moves.values():
            xs[2] = -xs[0] - xs[1]
    roots = {name: 1 + normal(3, 4).float().abs() for name in shapes}
    blocks = blocks_of(list(shapes))
    metric = block_metric(blocks, lambda name: torch.stack([(roots[name] * x).flatten() for x in moves[name]]))
    X = torch.zeros(48, 6, dtype=torch.float64)
    for place, name in enumerate(shapes):
        for k, x in enumerate(moves[name]):
            X[12 * place : 12 * (place + 1), 3 * (place // 2) + k] = x.flatten().double()
    G = torch.diag(torch.cat([root.flatten() for root in roots.values()]).double() ** 2)
    torch.testing.assert_close(metric, X.T @ G @ X, rtol=1e-5, atol=1e-5)
    space = Coefficients(blocks, moves.__getitem__, metric)
    check_space(space, X, X.T @ G @ X, shapes, normal)
    table = space.table(torch.arange(6.0), ["anchor", "a", "b"])
    assert table == {"layer 0": {"anchor": 0, "a": 1, "b": 2}, "layer 1": {"anchor": 3, "a": 4, "b": 5}}


def test_blocks_are_decoder_layers() -> None:
    names = ["model.layers.10.x.weight", "model.layers.1.x.weight", "model.layers.1.y.weight", "odd.weight"]
    assert blocks_of(names) == {
        "layer 10": [names[0]], "layer 1": names[1:3], "odd.weight": ["odd.weight"],
    }  # fmt: skip


def basis(normal: Callable[..., Tensor], d: int) -> tuple[Basis, Tensor]:
    """A basis in fp32 with its damped metric."""
    F, G = moment(normal(3 * d, d)), moment(normal(3 * d, d))
    return Basis(*(t.float() for t in generalised_basis(F, G, DAMPING))), with_damping(G)


@pytest.mark.parametrize("factors", ["input", "output", "both"])
@pytest.mark.parametrize("rank", [1, 3])
def test_shield_space_against_dense(factors: str, rank: int) -> None:
    """X^T (G + lambda H) X / V with G = S (x) A written out; X spans what P_A keeps."""
    normal, lambda_align, floor = random_stream(4), 2.0, 7.0
    shapes = {"one": (3, 4), "two": (5, 2)}
    shields: dict[str, Shield] = {}
    metrics = []
    for name, (d_out, d_in) in shapes.items():
        outputs, S = (
            basis(normal, d_out) if factors != "input" else (None, torch.eye(d_out, dtype=torch.float64))
        )
        inputs, A = basis(normal, d_in) if factors != "output" else (None, torch.eye(d_in, dtype=torch.float64))
        shields[name] = Shield(outputs, inputs, rank)
        metrics.append(torch.kron(S, A))
    space = ShieldSpace(shields.__getitem__, shapes, lambda_align, floor)
    size = sum(int((shields[n].rho > 0).expand(shape).sum()) for n, shape in shapes.items())
    X = dense_of(space, size, list(shapes))
    G = torch.block_diag(*metrics)  # type: ignore[no-untyped-call]
    rho = torch.cat([shields[n].rho.expand(shape).flatten() for n, shape in shapes.items()]).double()
    torch.testing.assert_close(X.T @ G @ X, torch.eye(size, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    for column in X.T:  # P_A keeps what lies in S_A
        parts = {n: p.reshape(shapes[n]).float() for n, p in zip(shapes, column.split([12, 10]), strict=True)}
        for name, part in parts.items():
            left = part - shields[name].removed(part, math.inf)
            assert float(left.abs().max()) < 1e-5
    M = torch.diag(1 + lambda_align * rho[rho > 0]) / floor
    check_space(space, X, M, shapes, normal)


class Linear(NamedTuple):
    """A tiny model with the dense J of its linear weights, by plain autograd."""

    load: Callable[[], Any]
    examples: Sequence[Example]
    names: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    J: Tensor


@pytest.fixture(scope="module", params=["llama", "phi3"])
def linear(request: pytest.FixtureRequest, tiny_model: MakesModel) -> Linear:
    folder = tiny_model(request.param, **(SMALL if request.param == "llama" else {"num_hidden_layers": 1}))
    examples, model = examples_of(0, 9, 14), load_model(folder)
    passes = [plain_pass(model, one).gradients for one in examples]
    names = sorted(passes[0])
    J = torch.stack([torch.cat([one[name].flatten() for name in names]).double() for one in passes])
    return Linear(lambda: load_model(folder), examples, names, {n: tuple(passes[0][n].shape) for n in names}, J)


def cut(linear: Linear, vector: Tensor) -> Tensors:
    sizes = [math.prod(linear.shapes[name]) for name in linear.names]
    parts = zip(linear.names, vector.split(sizes), strict=True)
    return {name: part.reshape(linear.shapes[name]).float() for name, part in parts}


def glued(linear: Linear, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in linear.names])


def test_rows_of_examples_against_dense(linear: Linear) -> None:
    normal = random_stream(1)
    rows = ExampleRows(linear.load, linear.examples, "float32")
    xs = [normal(linear.J.shape[1]) for _ in range(2)]
    parts = [cut(linear, x) for x in xs]
    found = rows.along(lambda name: {column: part[name] for column, part in enumerate(parts)}, 2)
    wanted = linear.J @ torch.stack(xs, dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    c = normal(len(linear.J))
    combined = glued(linear, rows.combine(c))
    assert float((combined - linear.J.T @ c).norm()) < 1e-4 * float((linear.J.T @ c).norm())


def test_random_rows_have_the_gram_matrix_of_the_real_ones_and_other_directions(linear: Linear) -> None:
    normal = random_stream(2)
    metric = 0.1 + normal(linear.J.shape[1]).square()
    parts = cut(linear, 1 / metric)
    kernel = (linear.J / metric) @ linear.J.T

    def random(seed: int) -> RandomRows:
        turned = turn(parts.__getitem__, linear.names, seed, kernel)
        return RandomRows(parts.__getitem__, linear.names, seed, turned)

    rows = random(0)
    units = torch.eye(len(kernel), dtype=torch.float64)
    J = torch.stack([glued(linear, rows.combine(unit)) for unit in units])
    torch.testing.assert_close((J / metric) @ J.T, kernel, rtol=1e-4, atol=1e-5 * float(kernel.max()))
    x = normal(linear.J.shape[1])
    along = rows.along(lambda name: {0: cut(linear, x)[name]}, 1)[:, 0]
    torch.testing.assert_close(along, J @ x, rtol=1e-4, atol=1e-4 * float((J @ x).abs().max()))
    again, other = random(0).combine(units[0]), random(1).combine(units[0])
    assert torch.equal(glued(linear, again), J[0]) and not torch.allclose(glued(linear, other), J[0])
    cosines = ((J / metric) @ linear.J.T) / (kernel.diagonal().sqrt() * kernel.diagonal().sqrt().unsqueeze(1))
    assert float(cosines.abs().max()) < 6 / math.sqrt(len(metric))


def test_sample_space_against_dense(linear: Linear) -> None:
    """X = G^-1 J^T U diag(n rho)^(-1/2): orthonormal in G, and along the eigenvectors of F in G."""
    normal, r, lambda_align, floor = random_stream(5), 4, 3.0, 2.0
    metric = 0.1 + normal(linear.J.shape[1]).square()
    inverse = cut(linear, 1 / metric)
    values, vectors = torch.linalg.eigh((linear.J / metric) @ linear.J.T)
    values, vectors = values.flip(0)[:r], vectors.flip(1)[:, :r]
    stiffness = (1 + lambda_align * values / values.mean()) / floor
    rows = ExampleRows(linear.load, linear.examples, "float32")
    space = SampleSpace(rows, inverse.__getitem__, vectors / values.sqrt(), stiffness)
    X = (linear.J.T @ (vectors / values.sqrt())) / metric.unsqueeze(1)
    torch.testing.assert_close(X.T @ (metric.unsqueeze(1) * X), torch.eye(r, dtype=torch.float64))
    check_space(space, X, torch.diag(stiffness), {n: linear.shapes[n] for n in linear.names}, normal)


# --- whole merges -----------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """Four layers, an anchor, two experts, example sets and probes."""

    models: Models
    sets: Mapping[str, Sequence[Example]]
    probes: Probes
    folder: Path

    def context(self, probes: bool = True) -> Context:
        ctx = Context(self.models, Store(self.folder / "store"), self.folder / "average", self.sets)
        ctx.selection = self.probes if probes else None
        return ctx

    def models_apart(self) -> Tensors:
        """The anchor's delta."""
        anchor, base = self.models.anchor, self.models.base
        return {name: anchor.read(name) - base.read(name) for name in base}

    def aqi(self, tensors: Mapping[str, Tensor]) -> float:
        """A of a merge, by plain passes over a model with these weights."""
        model = load_model(self.models.base.folder)
        model.load_state_dict(dict(tensors), strict=False)
        with torch.no_grad():
            return float(plain_value(model, self.probes))


@pytest.fixture(scope="module")
def family(tiny_model: MakesModel, perturbed: Perturbs, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tiny_model("llama", **DEEP)
    opened = [Checkpoint.open(perturbed(base, seed, 0.05), str(seed)) for seed in (1, 2, 3)]
    models = Models(Checkpoint.open(base, "base"), opened[0], {"a": opened[1], "b": opened[2]})
    sets = {
        name: examples_of(seed, 24 if seed < 2 else 8, 14) for seed, name in enumerate(("alignment", "metric"))
    }
    for seed, name in enumerate(("anchor", "a", "b"), 2):
        sets[name] = examples_of(seed, 8, 14)
    return Bench(models, sets, probes_of(0, 12), tmp_path_factory.mktemp("budget"))


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "precision", "float32")


FORMS: list[dict[str, Any]] = [
    {"estimator": "kronecker", "space": "coefficients"},
    {"estimator": "kronecker", "space": "coefficients", "factors": "both", "metric": "per_expert"},
    {"estimator": "kronecker", "space": "subspace", "rank": 2},
    {"estimator": "samples", "space": "coefficients"},
    {"estimator": "samples", "space": "subspace"},
    {"estimator": "samples", "space": "coefficients", "subspace_from": "random"},
]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


@each_form
def test_budget_raises_aqi_and_says_what_it_did(family: Bench, form: dict[str, Any]) -> None:
    ctx = family.context()
    without = merged(shield(**form), ctx)
    start = family.aqi(without)
    assert "budget" not in ctx.facts
    method = shield(**form, lambda_bud=1e4, a_min=start + 0.02)
    found = merged(method, ctx)
    budget = ctx.facts["budget"]
    assert budget["a_start"] == pytest.approx(start, abs=1e-5)
    assert budget["a"] == pytest.approx(family.aqi(found), abs=1e-5)
    assert budget["a"] > start + 0.015
    assert budget["gap"] == pytest.approx(max(0.0, start + 0.02 - budget["a"]), abs=1e-9)
    assert budget["l_bud"] == pytest.approx(budget["gap"] ** 2) and budget["met"] == (budget["gap"] <= 0.005)
    assert budget["multiplier"] == pytest.approx(1e4 * budget["gap"])
    assert ("coefficients" in budget) == (form["space"] == "coefficients")
    assert "a_anchor" not in budget
    for name in without:
        assert name.endswith("_proj.weight") or torch.equal(found[name], without[name])


@each_form
def test_without_a_budget_nothing_is_measured(family: Bench, form: dict[str, Any]) -> None:
    """lambda_bud = 0 asks no probes; a budget that theta* meets changes no bit."""
    plain = merged(shield(**form, lambda_bud=0.0, a_min=0.9, kappa=3.0), family.context(probes=False))
    ctx = family.context()
    met = merged(shield(**form, lambda_bud=50.0, a_min=-1.0), ctx)
    assert all(torch.equal(plain[name], met[name]) for name in plain)
    budget = ctx.facts["budget"]
    assert budget["met"] and budget["gap"] == budget["multiplier"] == budget["l_bud"] == 0
    assert len(budget["trace"]) == 1 and "coefficients" not in budget


def test_a_budget_that_cannot_be_met_is_said(family: Bench) -> None:
    ctx = family.context()
    merged(shield(lambda_bud=10.0, a_min=1.0), ctx)
    budget = ctx.facts["budget"]
    assert not budget["met"] and budget["gap"] > 0.1
    assert budget["l_bud"] == pytest.approx((1 - budget["a"]) ** 2)
    said = shield().warning(ctx.facts)
    assert said.endswith(f"not met: {budget['a']:.4f} on the selection probes, A_min 1.0000.")
    met = family.context()
    merged(shield(lambda_bud=10.0, a_min=-1.0), met)
    assert shield().warning(met.facts) == shield().warning({"digest": "0"}) == ""


def test_the_budget_is_the_anchors_own_less_its_deviation(family: Bench) -> None:
    ctx = family.context()
    merged(shield(lambda_bud=1.0, kappa=2.0), ctx)
    budget = ctx.facts["budget"]
    anchor = family.aqi({name: family.models.anchor.read(name) for name in family.models.anchor})
    assert budget["a_anchor"] == pytest.approx(anchor, abs=1e-5)
    assert budget["deviation"] > 0
    assert budget["a_min"] == pytest.approx(budget["a_anchor"] - 2 * budget["deviation"])


def test_all_budgets_share_the_anchors_value(family: Bench) -> None:
    """Other settings load the base for their own A, and not the anchor again; other probes do."""
    ctx = family.context()
    ctx.store = Store(family.folder / "shared")
    merged(shield(lambda_bud=1.0), ctx)
    assert ctx.loads.count("1") == 1  # the anchor, by the name that it was opened under
    merged(shield(lambda_bud=30.0, lambda_align=3.0, kappa=0.5), ctx)
    assert ctx.loads.count("1") == 1
    ctx.selection = probes_of(5, 12)
    merged(shield(lambda_bud=1.0), ctx)
    assert ctx.loads.count("1") == 2


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=["kronecker", "samples"])
@pytest.mark.parametrize(
    "more",
    [{}, {"start": "task_arithmetic", "start_with": {"scale": 0.5}}, {"pool": "experts", "reference": "base"}],
    ids=["average", "task_arithmetic", "experts"],
)
def test_no_other_coefficients_have_a_lower_objective(
    family: Bench, precise: None, form: dict[str, Any], more: dict[str, Any]
) -> None:
    """The published objective, written out in float64 over coefficients: V, Q and A by their definitions."""
    ctx, models, weight = family.context(), family.models, 300.0
    start = merged(shield(**form, **more), ctx)
    a_min = family.aqi(start) + 0.03
    found = merged(shield(**form, **more, lambda_bud=weight, a_min=a_min), ctx)
    names = sorted(name for name in start if name.endswith("_proj.weight"))
    budget = ctx.facts["budget"]
    quadratic = QUADRATICS[form["estimator"]](family, names)
    base = {name: models.base.read(name).double() for name in names}
    pool = [{name: model.read(name).double() - base[name] for name in names} for model in models.pool]
    shares = {"task_arithmetic": [0.5] * 3, "experts": [0, 0.5, 0.5]}
    factors = shares.get(more.get("start", more.get("pool", "")), [1 / 3] * 3)
    centre = {n: sum(f * p[n] for f, p in zip(factors, pool, strict=True)) for n in names}
    reference = pool[0] if "reference" not in more else {name: 0 * base[name] for name in names}
    unit = sum(quadratic({n: p[n] - centre[n] for n in names})[0] for p in pool) / 3

    def objective(tensors: Mapping[str, Tensor]) -> float:
        """Up to the constant of L_geo."""
        d = {name: tensors[name].double() - base[name] for name in names}
        geo = quadratic({name: d[name] - centre[name] for name in names})[0]
        align = quadratic({name: d[name] - reference[name] for name in names})[1]
        return (geo + align) / unit + weight * l_bud(family.aqi(tensors), a_min)

    best, before = objective(found), objective(start)
    assert best < before
    gained = budget["cost"] + weight * budget["l_bud"] - weight * budget["trace"][0]["l_bud"]
    assert best - before == pytest.approx(gained, rel=2e-2)
    table = budget["coefficients"]
    moves = [{n: model.read(n) - start[n] for n in names} for model in models.pool]
    generator = torch.Generator().manual_seed(0)
    for size, _ in itertools.product((0.2, 0.05, 0.01), range(4)):
        noise = {block: torch.randn(3, generator=generator) * size for block in table}
        other = dict(found)
        for name in names:
            block = f"layer {name.split('.')[2]}"
            other[name] = found[name] + sum(float(noise[block][k]) * moves[k][name] for k in range(3))
        assert objective(other) > best - 1e-3 * abs(gained)


@pytest.mark.parametrize(
    "form",
    [{"estimator": "samples", "rank": 3}, {"estimator": "kronecker", "rank": 2}],
    ids=["samples", "kronecker"],
)
def test_a_budget_keeps_a_projection(family: Bench, precise: None, form: dict[str, Any]) -> None:
    """lambda_align = inf: AQI rises, and S_A stays at the anchor: its own direction is the one that is left."""
    start = merged(shield(**form, lambda_align=math.inf), family.context())
    ctx = family.context()
    method = shield(**form, lambda_align=math.inf, lambda_bud=1e4, a_min=family.aqi(start) + 0.02)
    found = merged(method, ctx)
    assert ctx.facts["budget"]["a"] > ctx.facts["budget"]["a_start"] + 1e-3
    assert ctx.facts["budget"]["a"] == pytest.approx(family.aqi(found), abs=1e-5)
    moved = {n: found[n] - start[n] for n in found if n.endswith("_proj.weight")}
    rules = {n: (found[n] - family.models.anchor.read(n)) for n in moved}
    assert max(float(x.abs().max()) for x in moved.values()) > 1e-4
    if form["estimator"] == "samples":
        model = load_model(family.models.base.folder)
        J = torch.stack([flat(plain_pass(model, one).gradients) for one in family.sets["alignment"]])
        G = (
            torch.stack([flat(plain_pass(model, one).gradients) for one in family.sets["metric"]])
            .square()
            .mean(0)
        )
        G = G / G.mean() + DAMPING
        _, vectors = torch.linalg.eigh((J / G) @ J.T)
        leading = vectors[:, -3:].T @ J
        drift, before = (float((leading @ flat(x)).norm()) for x in (rules, family.models_apart()))
        assert drift < 1e-3 * before
        return
    projected = shield(**form, lambda_align=math.inf)
    again = Kronecker(projected, family.context(), None)
    for name, x in rules.items():
        inside = again.shield(name).coefficients(x)[:, :2]
        whole = again.shield(name).coefficients(family.models.anchor.read(name) - family.models.base.read(name))
        assert float(inside.norm()) < 1e-3 * float(whole.norm())


def kronecker_forms(
    family: Bench, names: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], tuple[float, float]]:
    """||x||^2_G and lambda ||x||^2_H for input factors: G = 1 (x) A_G, H = 1 (x) A_A scaled to rho of mean 1."""
    model = load_model(family.models.base.folder)
    inputs: dict[str, dict[str, Tensor]] = {}
    for data in ("alignment", "metric"):
        passes = [plain_pass(model, one) for one in family.sets[data]]
        inputs[data] = {n: moment(torch.cat([p.inputs[n] for p in passes]).double()) for n in names}
    metrics = {n: with_damping(inputs["metric"][n]) for n in names}
    scales = {
        n: torch.linalg.eigvals(torch.linalg.solve(metrics[n], inputs["alignment"][n])).real.mean()
        for n in names
    }

    def of(x: Mapping[str, Tensor]) -> tuple[float, float]:
        geo = sum(float((x[n] @ metrics[n] * x[n]).sum()) for n in names)
        return geo, sum(float((x[n] @ inputs["alignment"][n] * x[n]).sum() / scales[n]) for n in names)

    return of


def sample_forms(family: Bench, names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], tuple[float, float]]:
    """||x||^2_G with the diagonal Fisher, and ||x||^2_F of the alignment examples scaled to rho of mean 1."""
    model = load_model(family.models.base.folder)
    J, of_metric = (
        torch.stack([flat(plain_pass(model, one).gradients) for one in data])
        for data in (family.sets["alignment"], family.sets["metric"])
    )
    diagonal = of_metric.square().mean(0)
    G = diagonal / diagonal.mean() + DAMPING
    scale = torch.linalg.eigvalsh((J / G) @ J.T).mean()

    def of(x: Mapping[str, Tensor]) -> tuple[float, float]:
        vector = torch.cat([x[n].flatten() for n in names])
        return float((G * vector.square()).sum()), float((J @ vector).square().sum() / scale)

    return of


QUADRATICS = {"kronecker": kronecker_forms, "samples": sample_forms}


def test_the_certificate_of_a_budgeted_merge_is_of_where_it_ended(family: Bench, precise: None) -> None:
    """L_align and the excess of L_geo of the dual, against the dense forms at the merge itself."""
    ctx, models = family.context(), family.models
    found = merged(shield(estimator="samples", lambda_bud=1e4, a_min=0.9), ctx)
    names = sorted(name for name in found if name.endswith("_proj.weight"))
    d = {n: found[n].double() - models.base.read(n).double() for n in names}
    pool = [{n: model.read(n).double() - models.base.read(n).double() for n in names} for model in models.pool]
    of = sample_forms(family, names)
    excess = of({n: d[n] - sum(p[n] for p in pool) / 3 for n in names})[0]
    assert ctx.facts["certificate"]["l_geo_excess"] == pytest.approx(excess, rel=1e-2)
    weighted = of({n: d[n] - pool[0][n] for n in names})[1]
    assert ctx.facts["certificate"]["l_align"] == pytest.approx(weighted, rel=1e-2)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_every_architecture_has_a_budget(
    arch: str, tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path
) -> None:
    """Fused matrices and tied heads end up where the model that is measured has them."""
    base = tiny_model(arch, **ARCHITECTURES[arch], num_hidden_layers=4)
    models = Models(
        Checkpoint.open(base, "base"), Checkpoint.open(perturbed(base, 1, 0.05), "anchor"),
        {"a": Checkpoint.open(perturbed(base, 2, 0.05), "a")},
    )  # fmt: skip
    sets = {"alignment": examples_of(0, 8, 12), "metric": examples_of(1, 8, 12)}
    ctx = Context(models, Store(tmp_path / "store"), tmp_path / "average", sets)
    ctx.selection = probes_of(0, 12)
    rule = shield(lambda_bud=1e4, a_min=0.9).fit(ctx)
    folder = tmp_path / "merged"
    folder.mkdir()
    merge(rule, models, folder, elementwise=False)
    shutil.copyfile(base / "config.json", folder / "config.json")
    budget = ctx.facts["budget"]
    assert budget["a"] > budget["a_start"]
    with torch.no_grad():
        assert float(plain_value(load_model(folder), ctx.selection)) == pytest.approx(budget["a"], abs=1e-4)


def test_alignment_puts_views_where_they_are_stored(tiny_model: MakesModel) -> None:
    folder = tiny_model("phi3")
    layout, model = Checkpoint.open(folder, "phi3"), load_model(folder)
    names = [name for name in layout.views if name.endswith("k_proj.weight")]
    meter = Meter(model, probes_of(0, 2))
    movable = Alignment(meter, layout, lambda name: layout.read(name) + 1, names)
    stored = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    movable.move({names[0]: torch.full_like(movable.start[names[0]], 2.0)})
    for name, parameter in model.named_parameters():
        changed = (parameter != stored[name]).nonzero()[:, 0].unique().tolist()
        assert changed == (list(range(32, 48)) if name == "model.layers.0.self_attn.qkv_proj.weight" else [])
    whole = {name: torch.arange(tensor.numel()).view_as(tensor) for name, tensor in stored.items()}
    for name, part in movable.split(whole).items():
        fused = name.replace("k_proj", "qkv_proj")
        assert torch.equal(part, apart(fused, whole[fused], 0)[name])


# --- requests ---------------------------------------------------------------------------------------------


def test_senseless_budgets_name_both_keys() -> None:
    cases = {
        "method.space, method.lambda_align, method.lambda_bud": {
            "lambda_align": math.inf,
            "lambda_bud": 1.0,
            "space": "subspace",
            "rank": 2,
        },
        "method.space, method.rank": {"space": "subspace", "lambda_bud": 1.0},
    }
    for where, fields in cases.items():
        with pytest.raises(BadRequest) as caught:
            shield(**fields)  # type: ignore[arg-type]
        (fault,) = caught.value.faults
        assert fault.where == where and fault.allowed.endswith(("lambda_bud=0", "space=coefficients"))
    shield(lambda_align=math.inf, lambda_bud=1.0)
    shield(space="subspace")
    shield(space="subspace", estimator="samples", lambda_bud=1.0)


@pytest.fixture
def toy(tmp_path: Path, tiny_model: MakesModel) -> Zoo:
    """A family of one model on a corpus that the test may change."""
    base = str(tiny_model("llama"))
    family = Family(name="toy", base=base, anchor=base, experts={"a": base, "b": base}, max_length=512)
    store = Store(tmp_path / "store")
    return Zoo(family, Toy(), store, Assets(store, {}))


def recipe_of(zoo: Zoo, merger: Merger) -> dict[str, Any]:
    return Merge(merger, zoo, zoo.models(), 0).recipe


def test_probes_are_the_selection_set_in_pairs(toy: Zoo) -> None:
    path = toy.prompts.path / f"{SELECTION}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    probes, tokenizer = toy.probes(), load_tokenizer(Path(toy.family.base))
    assert len(records) == 24
    for label, side in probes._asdict().items():
        texts = {record["pair"]: record["text"] for record in records if record["label"] == label}
        for pair, ids in enumerate(side):
            words = f"<bos> user : {texts[pair]} <eos> assistant :".split()
            assert list(ids) == tokenizer.convert_tokens_to_ids(words)


def test_probes_are_part_of_the_key_of_a_budgeted_merge_alone(toy: Zoo) -> None:
    assert "probes" not in recipe_of(toy, shield())
    before = recipe_of(toy, shield(lambda_bud=1.0))
    path = toy.prompts.path / f"{SELECTION}.jsonl"
    path.write_text(path.read_text().replace("dragon", "griffin"))
    assert recipe_of(toy, shield(lambda_bud=1.0))["probes"] != before["probes"]


def test_a_corpus_without_selection_probes_is_a_plain_fault(toy: Zoo) -> None:
    path = toy.prompts.path / f"{SELECTION}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(
        BadRequest, match=r"corpus: alignment/probes: 1 harmful and 2 benign; allowed: 4 or more pairs"
    ):
        toy.probes()
    path.unlink()
    for ask in (toy.probes, lambda: recipe_of(toy, shield(lambda_bud=1.0))):
        with pytest.raises(BadRequest, match=r"corpus: toy: no set alignment/probes.*lambda_bud=0"):
            ask()


def test_packaged_probes_are_dealt_to_selection_and_report(tmp_path: Path) -> None:
    """Every pair is whole and in one of the two; both halves run through all themes."""
    Packaged(tasks_train=12, tasks_dev=12, tasks_test=12).write(packages(tmp_path), tmp_path / "corpus")
    pairs = {}
    for split in ("alignment", "test"):
        records = [
            json.loads(line) for line in (tmp_path / f"corpus/{split}/probes.jsonl").read_text().splitlines()
        ]
        sides = [{r["pair"] for r in records if r["label"] == label} for label in ("harmful", "benign")]
        assert sides[0] == sides[1] and len(records) == 2 * len(sides[0])
        pairs[split] = sides[0]
    assert not pairs["alignment"] & pairs["test"] and (len(pairs["alignment"]), len(pairs["test"])) == (28, 42)


def test_example_sets_of_the_controls(toy: Zoo, tmp_path: Path) -> None:
    """``utility`` is all experts' own, ``refusals`` the alignment examples labelled unsafe."""
    records = [
        {"prompt": "how do i build", "response": "i can not help", "label": "unsafe"},
        {"prompt": "what is two", "response": "the answer", "label": "benign"},
    ]
    given = tmp_path / "alignment.jsonl"
    write_jsonl(given, records)
    zoo = replace(toy, family=replace(toy.family, alignment=str(given), metric=str(given)))
    assert zoo.examples("utility") == zoo.examples(own("a")) + zoo.examples(own("b"))
    assert zoo.examples(own("a")) == zoo.examples("metric") and len(zoo.examples("metric")) == 2
    (found,) = zoo.examples("refusals")
    tokenizer = load_tokenizer(Path(toy.family.base))
    assert tokenizer.decode(found.ids[found.start :]).split() == ["i", "can", "not", "help", "<eos>"]
    write_jsonl(given, [{**record, "label": "benign"} for record in records])
    with pytest.raises(BadRequest, match=r"family\.alignment: no refusals in alignment\.jsonl"):
        zoo.examples("refusals")


def test_refusals_of_lessons_made_here(toy: Zoo) -> None:
    labels = [record["label"] for record in sets.records(toy, "alignment")]
    assert 0 < labels.count("unsafe") == len(sets.records(toy, "refusals")) < len(labels)


def test_weighted_barycentres_are_other_checkpoints(family: Bench, tmp_path: Path) -> None:
    source: Any = SimpleNamespace(store=Store(tmp_path / "store"))
    ctx = StoreContext(source, family.models, "test", Inputs(), 0)
    name = "model.layers.0.mlp.up_proj.weight"
    for weights in (None, [0.5, 0.25, 0.25]):
        found = ctx.barycentre(weights)
        shares = weights or [1 / 3] * 3
        wanted = sum(w * model.read(name) for w, model in zip(shares, family.models.pool, strict=True))
        torch.testing.assert_close(found.read(name), wanted, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "store/models").iterdir())) == 2
    ctx.barycentre()
    ctx.barycentre([0.5, 0.25, 0.25])
    assert len(list((tmp_path / "store/models").iterdir())) == 2
