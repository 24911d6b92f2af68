"""Every baseline against its formula, written as plainly as possible; through files where bytes matter."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alignmerge.fisher
import alignmerge.pool
import baselines.fisher_soup
import baselines.ties
from alignmerge.engine.checkpoint import Checkpoint, load_tensors, save_tensors
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.loop import blocks, merge
from alignmerge.engine.merger import EVERY_OWN, Block, Merger, Models, Rule, own
from alignmerge.engine.store import Artifact, Store
from alignmerge.engine.validation import read_headers
from alignmerge.method import AlignMerge
from baselines.average import Average
from baselines.fisher_soup import FisherSoup
from baselines.gradient_step import GradientStep
from baselines.identity import Identity
from baselines.interpolate import Interpolate
from baselines.mergealign import MergeAlign
from baselines.safemerge import SafeMerge, lowest, subspace_cosine
from baselines.task_arithmetic import TaskArithmetic
from baselines.ties import Ties, kth_largest

Tensors = dict[str, Tensor]

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 9),
    "model.layers.0.mlp.up_proj.weight": (9, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.down_proj.weight": (4, 9),
    "model.layers.1.mlp.up_proj.weight": (9, 4),
    "model.scale": (),
}
MATRICES = [name for name in SHAPES if "mlp" in name]
METHODS: list[Merger] = [
    Average(),
    TaskArithmetic(),
    Ties(),
    Ties(density=0.3, scale=0.7, variant="per_tensor"),
    SafeMerge(),
    SafeMerge(threshold=0.35, fraction=None, safe_weight=0.2),
    MergeAlign(),
    MergeAlign(variant="thakkar", alpha=0.6, beta=0.4),
    Interpolate(t=0.3),
    FisherSoup(labels="data"),
    TaskArithmetic(scale=0.3, anchor_share=0.5),
    Ties(density=0.4, anchor_share=0.6),
    FisherSoup(labels="data", anchor_share=0.6),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


@dataclass
class Context:
    """A merge context on small folders; the networks are replaced by what they would have computed."""

    models: Models
    store: Store
    seed: int = 0
    precision: ClassVar[str] = "float32"
    facts: dict[str, Any] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    def examples(self, name: str) -> Sequence[Example]:
        self.read.append(name)
        return []

    def examples_digest(self, name: str) -> str:
        return name

    def cached(self, stage: str, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Artifact:
        return self.store.obtain(stage, recipe, lambda folder: make(folder) or {})

    def loaded(self, checkpoint: Checkpoint) -> Any:
        return checkpoint

    def barycentre(self) -> Checkpoint:
        raise AssertionError("no baseline asks for it")

    def merged(self, merger: Merger) -> Checkpoint:
        raise AssertionError("no baseline asks for it")

    def record(self, **facts: Any) -> None:
        json.dumps(facts, allow_nan=False)
        self.facts |= facts

    def record_block(self, name: str, **facts: float) -> None:
        raise AssertionError("no baseline asks for it")


class Bench:
    """Builds families in a temporary folder and merges them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self.fishers: dict[str, Tensors] = {}
        self.losses: dict[str, list[float]] = {}

    def new(self) -> Path:
        self.made += 1
        path = self.folder / str(self.made)
        path.mkdir()
        return path

    def checkpoint(self, alias: str, tensors: Tensors) -> Checkpoint:
        folder = self.new()
        save_tensors(folder, tensors)
        return Checkpoint(folder, alias, {}, read_headers(folder, alias)[0])

    def models(
        self, base: Tensors, anchor: Tensors, experts: dict[str, Tensors], pretrained: Tensors | None = None
    ) -> Models:
        origin = None if pretrained is None else self.checkpoint("pretrained", pretrained)
        named = {alias: self.checkpoint(alias, tensors) for alias, tensors in experts.items()}
        return Models(self.checkpoint("base", base), self.checkpoint("anchor", anchor), named, origin)

    def random(self, dtype: torch.dtype = torch.float32, pretrained: bool = False) -> Models:
        """A family whose tensors have all ranks, with three experts and some untouched weights."""
        generator = torch.Generator().manual_seed(5)
        base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

        def tuned(scale: float) -> Tensors:
            found = {}
            for name, weight in base.items():
                step = torch.randn(weight.shape, generator=generator) * scale
                step *= torch.rand(weight.shape, generator=generator) < 0.7
                found[name] = (weight + step).to(dtype)
            return found

        experts = {alias: tuned(0.1) for alias in ("math", "code", "format")}
        stored = {name: weight.to(dtype) for name, weight in base.items()}
        return self.models(stored, tuned(0.2), experts, tuned(0.3) if pretrained else None)

    def context(self, models: Models) -> Context:
        return Context(models, Store(self.folder / "store"))

    def merged(self, method: Merger, models: Models, block_elements: int = 16_000_000) -> Checkpoint:
        folder = self.new()
        rule = method.fit(self.context(models))
        merge(rule, models, folder, elementwise=method.elementwise, block_elements=block_elements)
        return load_tensors(folder)

    def nll(self, model: Checkpoint, examples: Sequence[Example]) -> Tensor:
        return torch.tensor(self.losses.get(model.where, [len(model.where) / 8]))

    def fisher(self, ctx: Context, of: Checkpoint, examples: str, labels: str) -> Checkpoint:
        assert own(of.where) == examples, "each model's own data"
        folder = self.new()
        generator = torch.Generator().manual_seed(zlib.crc32(examples.encode()))
        chance = {name: torch.rand(SHAPES[name], generator=generator).pow(8) for name in MATRICES}
        save_tensors(folder, self.fishers.get(of.where, chance))
        return load_tensors(folder)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    monkeypatch.setattr(alignmerge.pool, "nll", bench.nll)
    monkeypatch.setattr(alignmerge.fisher, "fisher", bench.fisher)
    return bench


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def whole(models: Models, name: str) -> Block:
    pretrained = None if models.pretrained is None else models.pretrained.read(name)
    pool = [model.read(name) for model in models.pool]
    return Block(name, slice(None), models.base.read(name), pool, pretrained)


# --- what holds for every method --------------------------------------------------------------------------


@each_method
def test_blocks_do_not_show(bench: Bench, method: Merger) -> None:
    models = bench.random(pretrained=True)
    digests = {bench.merged(method, models, size).digest for size in (1, 7, 40, 10_000)}
    assert len(digests) == 1


@each_method
def test_order_of_experts_does_not_show(bench: Bench, method: Merger) -> None:
    models = bench.random(pretrained=True)
    swapped = models._replace(experts=dict(reversed(models.experts.items())))
    assert list(swapped.experts) != list(models.experts)
    assert bench.merged(method, models).digest == bench.merged(method, swapped).digest


@each_method
def test_bf16_inputs_are_rounded_once(bench: Bench, method: Merger) -> None:
    models = bench.random(torch.bfloat16, pretrained=True)
    rule = method.fit(bench.context(models))
    merged = bench.merged(method, models, 7)
    finer = 0
    for name in models.base:
        exact = rule(whole(models, name))
        assert exact.dtype == torch.float32
        assert merged[name].dtype == "BF16"
        assert torch.equal(merged.read(name), exact.bfloat16().float())
        finer += int((exact != exact.bfloat16().float()).sum())
    assert finer > 0, "the rule itself must not round to bf16"


@each_method
def test_rules_are_pure(bench: Bench, method: Merger) -> None:
    models = bench.random(pretrained=True)
    rule = method.fit(bench.context(models))
    block = whole(models, MATRICES[0])
    before = [block.base.clone(), *(theta.clone() for theta in block.pool)]
    assert torch.equal(rule(block), rule(block))
    assert all(map(torch.equal, before, [block.base, *block.pool]))


def test_what_methods_say_of_themselves() -> None:
    assert all(method.elementwise for method in METHODS)
    read = [method.inputs.examples for method in METHODS if method.inputs.examples]
    assert read == [("metric",), (EVERY_OWN,), (EVERY_OWN,)]
    assert FisherSoup().inputs.seed and not any(method.inputs.seed for method in METHODS)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (TaskArithmetic, "scale"),
        (Ties, "density"),
        (Ties, "scale"),
        (SafeMerge, "fraction"),
        (SafeMerge, "safe_weight"),
        (MergeAlign, "temperature"),
        (MergeAlign, "alpha"),
        (MergeAlign, "beta"),
        (Interpolate, "t"),
        (FisherSoup, "floor"),
        (FisherSoup, "anchor_share"),
        (TaskArithmetic, "anchor_share"),
        (Ties, "anchor_share"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 1e4])
def test_out_of_range(make: Callable[..., Merger], key: str, value: float) -> None:
    with pytest.raises(BadRequest, match=rf"^method\.{key}: .*allowed: a number in "):
        make(**{key: value})


@pytest.mark.parametrize(
    ("make", "key"), [(Ties, "density"), (MergeAlign, "temperature"), (FisherSoup, "floor")]
)
def test_zero_is_refused_where_it_divides(make: Callable[..., Merger], key: str) -> None:
    with pytest.raises(BadRequest, match=rf"^method\.{key}: 0"):
        make(**{key: 0.0})


@pytest.mark.parametrize(
    ("make", "key"),
    [(Ties, "variant"), (MergeAlign, "variant"), (FisherSoup, "labels")],
)
def test_unknown_choice(make: Callable[..., Merger], key: str) -> None:
    with pytest.raises(BadRequest, match=rf"^method\.{key}: nonsense; allowed: "):
        make(**{key: "nonsense"})


# --- identity, average, task arithmetic, interpolation ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity(bench: Bench, dtype: torch.dtype) -> None:
    models = bench.random(dtype)
    own = {"base": models.base, "anchor": models.anchor, **models.experts}
    for alias, model in own.items():
        assert bench.merged(Identity(of=alias), models).digest == model.digest


def test_identity_names_the_aliases(bench: Bench) -> None:
    ctx = bench.context(bench.random())
    with pytest.raises(BadRequest, match=r"^method\.of: poet; allowed: base, anchor, math, code, format$"):
        Identity(of="poet").fit(ctx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_of_a_model_with_itself(bench: Bench, dtype: torch.dtype) -> None:
    models = bench.random(dtype)
    alone = models._replace(experts={"a": models.anchor, "b": models.anchor})
    assert bench.merged(Average(), alone).digest == models.anchor.digest


def test_average_leaves_the_base_out(bench: Bench) -> None:
    models = bench.models({"w": tensor(100)}, {"w": tensor(1)}, {"a": {"w": tensor(2)}, "b": {"w": tensor(6)}})
    assert bench.merged(Average(), models).read("w").tolist() == [3]


def test_task_arithmetic_is_a_sum(bench: Bench) -> None:
    models = bench.models({"w": tensor(10)}, {"w": tensor(11)}, {"a": {"w": tensor(12)}, "b": {"w": tensor(6)}})
    assert bench.merged(TaskArithmetic(scale=2), models).read("w").tolist() == [10 + 2 * (1 + 2 - 4)]


def test_task_arithmetic_of_two_at_a_half_is_the_soup(bench: Bench) -> None:
    models = bench.random()
    models = models._replace(experts={"math": models.experts["math"]})
    half, soup = bench.merged(TaskArithmetic(scale=0.5), models), bench.merged(Average(), models)
    for name in models.base:
        torch.testing.assert_close(half.read(name), soup.read(name), rtol=0, atol=1e-6)


def test_the_anchors_part_of_the_sum(bench: Bench) -> None:
    """Three models, half for the anchor, a quarter each for the others: 1.5, 0.75 and 0.75 instead of 1."""
    models = bench.models({"w": tensor(10)}, {"w": tensor(11)}, {"a": {"w": tensor(12)}, "b": {"w": tensor(6)}})
    merged = bench.merged(TaskArithmetic(scale=2, anchor_share=0.5), models)
    assert merged.read("w").tolist() == [10 + 2 * (1.5 * 1 + 0.75 * 2 - 0.75 * 4)]


@pytest.mark.parametrize(
    "method",
    [TaskArithmetic(scale=0.7), Ties(density=0.4), Ties(density=0.4, variant="per_tensor"), FisherSoup()],
)
def test_an_equal_share_is_no_share(bench: Bench, method: Merger) -> None:
    models = bench.random()
    equal = bench.merged(replace(method, anchor_share=0.25), models)
    usual = bench.merged(method, models)
    for name in models.base:
        torch.testing.assert_close(equal.read(name), usual.read(name), rtol=0, atol=1e-6)


def test_interpolation_in_deltas(bench: Bench) -> None:
    models = bench.random()
    merged = bench.merged(Interpolate(t=0.25), models)
    for name in models.base:
        deltas = [(theta - models.base.read(name)).double() for theta in whole(models, name).pool]
        wanted = models.base.read(name) + 0.75 * sum(deltas) / 4 + 0.25 * deltas[0]
        torch.testing.assert_close(merged.read(name), wanted.float(), rtol=0, atol=1e-6)


def test_interpolation_ends(bench: Bench) -> None:
    models = bench.random()
    assert bench.merged(Interpolate(t=0), models).digest == bench.merged(Average(), models).digest
    assert bench.merged(Interpolate(t=1), models).digest == models.anchor.digest


# --- TIES -------------------------------------------------------------------------------------------------


def pair(bench: Bench, first: Tensors, second: Tensors, base: float = 0) -> Models:
    """The models base + first (the anchor) and base + second (an expert)."""
    origin = {name: torch.full_like(delta, base) for name, delta in first.items()}
    shifted = [{name: delta + base for name, delta in deltas.items()} for deltas in (first, second)]
    return bench.models(origin, shifted[0], {"a": shifted[1]})


@pytest.mark.parametrize("variant", ["global", "per_tensor"])
def test_ties_by_hand(bench: Bench, variant: Any) -> None:
    models = pair(bench, {"w": tensor(3, -1, 0.1, 0)}, {"w": tensor(2, 2, -0.2, 0)})
    merged = bench.merged(Ties(density=0.5, variant=variant), models)
    torch.testing.assert_close(merged.read("w"), tensor(2.5, 2, 0, 0))


@pytest.mark.parametrize("variant", ["global", "per_tensor"])
def test_ties_scales_the_merged_delta_about_the_base(bench: Bench, variant: Any) -> None:
    models = pair(bench, {"w": tensor(3, -1, 0.125, 0)}, {"w": tensor(2, 2, -0.25, 0)}, base=8)
    merged = bench.merged(Ties(density=0.5, scale=2, variant=variant), models)
    assert merged.read("w").tolist() == [8 + 2 * 2.5, 8 + 2 * 2, 8, 8]


def test_ties_zero_sums(bench: Bench) -> None:
    """Globally more coordinates fall than rise, though not in ``a``; mergekit lets every zero sum rise."""
    first = {"a": tensor(2, 1, 1), "b": tensor(-1, -1, -1, -1)}
    second = {"a": tensor(-2, 1, 1), "b": tensor(-1, -1, -1, -1)}
    models = pair(bench, first, second)
    assert bench.merged(Ties(density=1), models).read("a").tolist() == [-2, 1, 1]
    assert bench.merged(Ties(density=1, variant="per_tensor"), models).read("a").tolist() == [2, 1, 1]


def test_ties_trims_globally_or_per_tensor(bench: Bench) -> None:
    deltas = {"large": tensor(10, 9, 8, 7), "small": tensor(1, 2, 3, 4)}
    models = pair(bench, deltas, deltas)
    merged = bench.merged(Ties(density=0.5), models)
    assert [merged.read(name).tolist() for name in deltas] == [[10, 9, 8, 7], [0, 0, 0, 0]]
    merged = bench.merged(Ties(density=0.5, variant="per_tensor"), models)
    assert [merged.read(name).tolist() for name in deltas] == [[10, 9, 0, 0], [0, 0, 3, 4]]


def test_ties_keeps_at_least_one_entry_and_all_equal_ones(bench: Bench) -> None:
    models = pair(bench, {"w": tensor(4, 1, 1, 1)}, {"w": tensor(2, 2, 1, 1)})
    assert bench.merged(Ties(density=0.01), models).read("w").tolist() == [3, 2, 0, 0]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
grids = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4e38])


@settings(deadline=None)
@given(st.lists(st.tuples(floats | grids, floats | grids), min_size=1, max_size=60), st.data())
def test_streamed_threshold_is_exact(values: list[tuple[float, float]], data: st.DataObject) -> None:
    size = len(values)
    k = data.draw(st.integers(1, size))
    block = data.draw(st.integers(1, size))
    models = torch.tensor(values, dtype=torch.float32).T.contiguous()
    parts = [[model[i : i + block] for model in models] for i in range(0, size, block)]

    def over(count: Callable[[Tensor, Sequence[Tensor]], None]) -> Iterable[None]:
        return (count(torch.zeros_like(part[0]), part) for part in parts)

    for rank, model in zip(kth_largest(over, k), models, strict=True):
        sizes = model.abs().sort(descending=True).values
        assert rank.value == float(sizes[k - 1])
        assert rank.kept == int((sizes[:k] == sizes[k - 1]).sum())
        assert rank.equal == int((sizes == sizes[k - 1]).sum())


@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
def test_threshold_over_several_tensors_in_small_blocks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    monkeypatch.setattr(baselines.ties, "blocks", partial(blocks, block_elements=5))
    models = bench.random(torch.bfloat16)
    ctx = bench.context(models)
    Ties(density=density).fit(ctx)
    for alias, model in zip(models.aliases, models.pool, strict=True):
        sizes = torch.cat([(model.read(n) - models.base.read(n)).abs().flatten() for n in models.base])
        k = max(1, int(density * len(sizes)))
        assert ctx.facts["thresholds"][alias] == float(sizes.kthvalue(len(sizes) - k + 1).values)


def elected(deltas: list[list[float]], zero: Callable[[list[int]], int]) -> list[float]:
    """Steps 2 and 3 of TIES, coordinate by coordinate; ``zero`` says what sign a zero sum gets."""
    signs = [(total > 0) - (total < 0) for total in map(sum, zip(*deltas, strict=True))]
    merged = []
    for sign, entries in zip(signs, zip(*deltas, strict=True), strict=True):
        wanted = sign or zero(signs)
        agreeing = [entry for entry in entries if entry * wanted > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return merged


def majority(signs: list[int]) -> int:
    return (sum(signs) > 0) - (sum(signs) < 0)


def gridded(bench: Bench, seed: int) -> tuple[Models, list[Tensors]]:
    """A family whose deltas are small multiples of 1/8: equal magnitudes, zeros and cancellations abound."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 3), "b": (7,), "c": (2, 2)}

    def draw() -> Tensors:
        return {n: torch.randint(-5, 5, s, generator=generator).float() / 8 for n, s in shapes.items()}

    base, deltas = draw(), [draw() for _ in range(4)]
    thetas = [{name: base[name] + delta[name] for name in base} for delta in deltas]
    experts = {str(i): theta for i, theta in enumerate(thetas[1:])}
    return bench.models(base, thetas[0], experts), deltas


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_global_ties_against_everything_flattened(bench: Bench, seed: int, density: float) -> None:
    models, deltas = gridded(bench, seed)
    trimmed = []
    for delta in deltas:
        flat = torch.cat([delta[name].flatten() for name in models.base]).tolist()
        least = sorted(map(abs, flat), reverse=True)[max(1, int(density * len(flat))) - 1]
        trimmed.append([x if abs(x) >= least else 0.0 for x in flat])
    wanted = tensor(*elected(trimmed, majority))
    merged = bench.merged(Ties(density=density), models)
    found = torch.cat([(merged.read(name) - models.base.read(name)).flatten() for name in models.base])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_per_tensor_ties_against_mergekits_definition(bench: Bench, seed: int, density: float) -> None:
    models, deltas = gridded(bench, seed)
    merged = bench.merged(Ties(density=density, scale=0.5, variant="per_tensor"), models)
    for name in models.base:
        trimmed = []
        for delta in deltas:
            flat = delta[name].flatten().tolist()
            order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
            kept = order[: max(1, int(density * len(flat)))]
            trimmed.append([x if i in kept else 0.0 for i, x in enumerate(flat)])
        wanted = 0.5 * tensor(*elected(trimmed, lambda signs: 1))
        found = (merged.read(name) - models.base.read(name)).flatten()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0625, 0.25, 0.625, 1.0])  # exact in binary, as a third of the rest is
def test_weighted_ties_against_mergekits_definition(bench: Bench, seed: int, share: float) -> None:
    """Weights before the election and in the mean (mergekit's normalize): tensor by tensor, entry by entry."""
    models, deltas = gridded(bench, seed)
    weights = [share, *[(1 - share) / 3] * 3]
    merged = bench.merged(Ties(density=0.7, variant="per_tensor", anchor_share=share), models)
    for name in models.base:
        trimmed = []
        for delta in deltas:
            flat = delta[name].flatten().tolist()
            order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
            kept = order[: max(1, int(0.7 * len(flat)))]
            trimmed.append([x if i in kept else 0.0 for i, x in enumerate(flat)])
        wanted = []
        for entries in zip(*trimmed, strict=True):
            weighted = list(zip(weights, entries, strict=True))
            whole = math.fsum(w * x for w, x in weighted)
            sign = -1 if whole < 0 else 1
            agreeing = [(w, x) for w, x in weighted if x * sign > 0 and w > 0]
            below = math.fsum(w for w, _ in agreeing)
            wanted.append(math.fsum(w * x for w, x in agreeing) / below if agreeing else 0.0)
        found = (merged.read(name) - models.base.read(name)).flatten()
        torch.testing.assert_close(found, tensor(*wanted), rtol=0, atol=1e-6)


# --- SafeMERGE --------------------------------------------------------------------------------------------


def dense_cosine(V: Tensor, delta: Tensor) -> float:
    V, delta = V.double(), delta.double()
    C = V @ V.T / V.square().sum().sqrt()
    return float(torch.cosine_similarity((C @ delta).flatten(), delta.flatten(), dim=0))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_cosine_against_the_dense_matrix(shape: tuple[int, int], scale: float) -> None:
    V, delta = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)) * scale
    assert subspace_cosine(V, delta) == pytest.approx(dense_cosine(V / scale, delta / scale), abs=1e-6)


def test_cosine_at_its_ends() -> None:
    column, across = tensor(1, 2, -1)[:, None], tensor(1, 0, 1)[:, None]
    V, within = column @ tensor(3, 1, 0, 2)[None], column @ tensor(-1, 5, 2, 2)[None]
    assert subspace_cosine(V, within) == pytest.approx(1, abs=1e-6)
    assert subspace_cosine(V, across @ tensor(1, 2, 3, 4)[None]) == pytest.approx(0, abs=1e-6)
    assert subspace_cosine(torch.zeros(3, 4), within) == 0
    assert subspace_cosine(V, torch.zeros(3, 4)) == 0


def test_safemerge_merges_where_alignment_moved_nothing_and_keeps_what_lies_in_its_subspace(
    bench: Bench,
) -> None:
    zero, column = torch.zeros(3, 2), tensor(1, 2, -1)[:, None]
    tuned = column @ tensor(1, 4)[None]
    names = ("inside", "model.embed_tokens.weight", "still")
    base = {**dict.fromkeys(names, zero), "norm": tensor(0, 0)}
    anchor = {**dict.fromkeys(names, torch.ones(3, 2)), "norm": tensor(1, 1)}
    expert = {**dict.fromkeys(names, tuned), "norm": tensor(3, 5)}
    pretrained = {**base, "inside": column @ tensor(-2, 1)[None]}  # V has rank 1 here and is 0 elsewhere
    models = bench.models(base, anchor, {"a": expert}, pretrained)
    ctx = bench.context(models)
    rule: Rule = SafeMerge(threshold=0.35, fraction=None, safe_weight=0.25).fit(ctx)
    torch.testing.assert_close(rule(whole(models, "still")), 0.75 * tuned + 0.25)
    assert torch.equal(rule(whole(models, "inside")), tuned)
    assert torch.equal(rule(whole(models, "model.embed_tokens.weight")), tuned)
    assert rule(whole(models, "norm")).tolist() == [3, 5]
    assert ctx.facts["fraction_merged"] == 0.5
    assert ctx.facts["threshold"] == 0.35
    assert ctx.facts["alignment_direction"] == "base - pretrained"


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.25, 1), (0.5, 2), (1, 4)])
def test_safemerge_merges_the_fraction_with_the_lowest_cosines(
    bench: Bench, pretrained: bool, fraction: float, count: int
) -> None:
    models = bench.random(pretrained=pretrained)
    ctx = bench.context(models)
    rule = SafeMerge(fraction=fraction, safe_weight=0.3).fit(ctx)
    fine, safe, cosines = {}, {}, {}
    for name in models.base:
        block = whole(models, name)
        safe[name] = block.pool[0] - block.base
        fine[name] = sum(theta.double() - block.base for theta in block.pool[1:]).float() / 3
        V = safe[name] if block.pretrained is None else block.base - block.pretrained
        if name in MATRICES:
            cosines[name] = dense_cosine(V, fine[name])
    merged = sorted(cosines, key=lambda name: cosines[name])[:count]
    for name in models.base:
        mixed = 0.7 * fine[name] + 0.3 * safe[name] if name in merged else fine[name]
        torch.testing.assert_close(rule(whole(models, name)), models.base.read(name) + mixed, atol=1e-6, rtol=0)
    assert ctx.facts["fraction_merged"] == fraction
    assert ctx.facts["cosine_quantiles"]["0"] == pytest.approx(min(cosines.values()), abs=1e-5)
    assert ctx.facts["cosine_quantiles"]["1"] == pytest.approx(max(cosines.values()), abs=1e-5)
    assert ctx.facts["alignment_direction"] == ("base - pretrained" if pretrained else "anchor - base")


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, unique=True), st.floats(0, 1))
def test_threshold_for_a_fraction(cosines: list[float], fraction: float) -> None:
    below = sum(cosine < lowest(cosines, fraction) for cosine in cosines)
    assert below == pytest.approx(fraction * len(cosines), abs=0.5 + 1e-9)


@pytest.mark.parametrize("fields", [{"threshold": 0.3}, {"fraction": None}])
def test_safemerge_wants_one_of_threshold_and_fraction(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"^method\.threshold, method\.fraction: .*exactly one"):
        SafeMerge(**fields)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.1, 1.1])
def test_safemerge_threshold_range(value: float) -> None:
    with pytest.raises(BadRequest, match=r"^method\.threshold: "):
        SafeMerge(threshold=value, fraction=None)


# --- MergeAlign -------------------------------------------------------------------------------------------


def test_hammoud_by_hand(bench: Bench) -> None:
    """Mean losses ln 2, 0 and ln 4 (nats) give odds 1/2, 1 and 1/4, so weights 2/7, 4/7 and 1/7."""
    bench.losses = {"anchor": [0, 2 * math.log(2)], "a": [0, 0], "b": [math.log(2), math.log(8)]}
    models = bench.models({"w": tensor(9)}, {"w": tensor(7)}, {"a": {"w": tensor(14)}, "b": {"w": tensor(-7)}})
    ctx = bench.context(models)
    rule = MergeAlign().fit(ctx)
    assert rule(whole(models, "w")).item() == pytest.approx(2 + 8 - 1, abs=1e-5)
    assert ctx.facts["losses"] == pytest.approx({"anchor": math.log(2), "a": 0, "b": math.log(4)}, abs=1e-6)
    assert ctx.facts["weights"] == pytest.approx({"anchor": 2 / 7, "a": 4 / 7, "b": 1 / 7}, abs=1e-6)
    assert set(ctx.read) == {"metric"}


@pytest.mark.parametrize("temperature", [0.01, 2.0, 1000.0])
def test_hammoud_is_a_softmax(bench: Bench, temperature: float) -> None:
    losses = {"anchor": 1.5, "math": 1.0, "code": 1.25, "format": 40.0}
    bench.losses = {alias: [loss] for alias, loss in losses.items()}
    ctx = bench.context(bench.random())
    MergeAlign(temperature=temperature).fit(ctx)
    wanted = torch.softmax(-torch.tensor(list(losses.values()), dtype=torch.float64) / temperature, 0)
    assert list(ctx.facts["weights"].values()) == pytest.approx(wanted.tolist(), abs=1e-12)


def test_hammoud_measures_each_model_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    models = bench.random()
    first, second = bench.context(models), bench.context(models)
    MergeAlign().fit(first)
    monkeypatch.setattr(alignmerge.pool, "nll", None)
    MergeAlign(temperature=2).fit(second)
    assert first.facts["losses"] == second.facts["losses"]


@pytest.mark.parametrize("pretrained", [True, False])
def test_thakkar(bench: Bench, pretrained: bool) -> None:
    models = bench.models(
        {"w": tensor(1)},
        {"w": tensor(5)},
        {"a": {"w": tensor(2)}, "b": {"w": tensor(4)}},
        {"w": tensor(-2)} if pretrained else None,
    )
    ctx = bench.context(models)
    found = MergeAlign(variant="thakkar", alpha=0.75, beta=0.5).fit(ctx)(whole(models, "w"))
    assert found.item() == (-2 + 0.75 * (3 + 2) + 0.5 * (5 + 2) if pretrained else 1 + 0.75 * 2 + 0.5 * 4)
    assert ctx.facts == {"theta_pre": "pretrained" if pretrained else "base"}
    assert ctx.read == []


# --- Fisher soup ------------------------------------------------------------------------------------------


def fisher_pair(bench: Bench, first: Tensor, second: Tensor) -> Models:
    bench.fishers = {"anchor": {"w": first}, "a": {"w": second}}
    thetas = [{"w": tensor(1, 2, 3), "norm": tensor(4)}, {"w": tensor(5, -2, 9), "norm": tensor(6)}]
    return bench.models({"w": tensor(0, 0, 0), "norm": tensor(0)}, thetas[0], {"a": thetas[1]})


def test_equal_fishers_give_the_soup(bench: Bench) -> None:
    models = fisher_pair(bench, tensor(1e-9, 3, 0), tensor(1e-9, 3, 0))
    assert bench.merged(FisherSoup(), models).digest == bench.merged(Average(), models).digest


def test_coefficients_of_the_fisher_soup_by_hand(bench: Bench) -> None:
    """Norms 5 and 13, no zeros: (.75 F theta + .25 F' theta') / (.75 F + .25 F'); .75 and .25 where no Fisher is."""
    models = fisher_pair(bench, tensor(3, 4, 0.001), tensor(5, 0.001, 12))
    merged = bench.merged(FisherSoup(floor=1e-12, anchor_share=0.75), models)
    first, second = tensor(3, 4, 0.001).double(), tensor(5, 0.001, 12).double()
    first, second = 0.75 * first / first.norm(), 0.25 * second / second.norm()
    thetas = [tensor(1, 2, 3), tensor(5, -2, 9)]
    wanted = (first * thetas[0] + second * thetas[1]) / (first + second)
    torch.testing.assert_close(merged.read("w"), wanted.float())
    assert merged.read("norm").tolist() == [0.75 * 4 + 0.25 * 6]


def test_outside_its_support_a_model_has_no_say(bench: Bench) -> None:
    """The third coordinate is seen by nobody and falls back to the plain average, as do other tensors."""
    models = fisher_pair(bench, tensor(2, 0, 0), tensor(0, 7, 0))
    merged = bench.merged(FisherSoup(floor=1e-12), models)
    torch.testing.assert_close(merged.read("w"), tensor(1, -2, 6))
    assert merged.read("norm").tolist() == [5]


def test_fisher_soup_by_hand(bench: Bench) -> None:
    """Norms 5 and 13; half of the mean of the six normalised values is the floor: it lifts the two zeros."""
    models = fisher_pair(bench, tensor(3, 4, 0), tensor(5, 0, 12))
    ctx = bench.context(models)
    found = FisherSoup(floor=0.5).fit(ctx)(whole(models, "w")).tolist()
    low = 0.5 * (3 / 5 + 4 / 5 + 0 + 5 / 13 + 0 + 12 / 13) / 6
    wanted = [
        (3 / 5 * 1 + 5 / 13 * 5) / (3 / 5 + 5 / 13),
        (4 / 5 * 2 + low * -2) / (4 / 5 + low),
        (low * 3 + 12 / 13 * 9) / (low + 12 / 13),
    ]
    assert found == pytest.approx(wanted, rel=1e-6)
    assert ctx.facts["fisher_norms"] == pytest.approx({"anchor": 5, "a": 13})
    assert ctx.facts["fisher_floor"] == pytest.approx(low)


def test_a_sharper_model_does_not_win_by_its_scale(bench: Bench) -> None:
    models = fisher_pair(bench, tensor(3, 4, 1), tensor(6, 2, 8))
    plain = bench.merged(FisherSoup(), models).read("w")
    bench.fishers["anchor"] = {"w": tensor(3, 4, 1) * 2**20}
    assert torch.equal(bench.merged(FisherSoup(), models).read("w"), plain)


def test_a_blind_fisher_is_an_error(bench: Bench) -> None:
    models = fisher_pair(bench, tensor(1, 2, 3), tensor(0, 0, 0))
    with pytest.raises(ArithmeticError, match="the Fisher of 'a' is zero everywhere"):
        FisherSoup().fit(bench.context(models))


# --- what switches a method off ---------------------------------------------------------------------------


def test_a_merge_that_is_nearly_one_model_names_its_temperature(bench: Bench) -> None:
    """Losses 0 and ln 19 at T = 1 give weights .95 and .05; at T = 2 about .81 and .19."""
    bench.losses = {"anchor": [0], "a": [math.log(19)]}
    models = bench.models({"w": tensor(0)}, {"w": tensor(1)}, {"a": {"w": tensor(2)}})
    said = []
    for method in (MergeAlign(), MergeAlign(temperature=2)):
        ctx = bench.context(models)
        method.fit(ctx)
        said.append(method.switched_off(ctx.facts))
    assert said == ["temperature 1: 0.95 of the weight is on 'anchor', above 0.9", ""]


@pytest.mark.parametrize(
    ("method", "facts", "said"),
    [
        (Average(), {}, ""),
        (Ties(density=0.9), {}, ""),
        (Ties(density=1), {}, "density 1: nothing is trimmed"),
        (SafeMerge(), {"fraction_merged": 0.5}, ""),
        (SafeMerge(fraction=1.0), {}, "every matrix is merged, whatever its cosine"),
        (SafeMerge(threshold=0.3, fraction=None), {}, ""),
        (
            SafeMerge(threshold=0.3, fraction=None),
            {"fraction_merged": 1.0},
            "every matrix is merged, whatever its",
        ),
        (SafeMerge(threshold=0.3, fraction=None), {"fraction_merged": 0.0}, "no matrix is merged"),
        (Interpolate(t=0.5), {}, ""),
        (Interpolate(t=1.0), {}, "t 1: an end of the walk"),
        (GradientStep(), {}, ""),
        (GradientStep(length=0.0), {}, "length 0: no step"),
        (AlignMerge(), {}, ""),
        (AlignMerge(lambda_align=0.0), {}, "lambda_align 0: there is no shield"),
        (MergeAlign(), {}, ""),
        (MergeAlign(variant="thakkar", beta=0.0), {}, "beta 0: nothing of these vectors is merged"),
    ],
)
def test_what_switches_a_method_off(method: Merger, facts: dict[str, Any], said: str) -> None:
    found = method.switched_off(facts)
    assert found.startswith(said) and bool(found) == bool(said)
