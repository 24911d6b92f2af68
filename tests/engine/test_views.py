"""Fused views: what methods see of a model does not depend on how its architecture stores it."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignmerge.engine.views
import alignmerge.fisher
import alignmerge.kronecker
import alignmerge.samples
import baselines.gradient_step
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.context import Context as StoreContext
from alignmerge.engine.examples import Example
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.keys import merge_recipe
from alignmerge.engine.language import load_model
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Block, Inputs, Merger, Models, average
from alignmerge.engine.store import Store
from alignmerge.engine.views import VERSION, views_of
from alignmerge.fisher import fisher
from alignmerge.gradients import kronecker_factors, squares
from alignmerge.method import AlignMerge
from baselines.average import Average
from baselines.fisher_soup import FisherSoup
from baselines.gradient_step import GradientStep
from baselines.identity import Identity
from baselines.interpolate import Interpolate
from baselines.mergealign import MergeAlign
from baselines.safemerge import SafeMerge
from baselines.task_arithmetic import TaskArithmetic
from baselines.ties import Ties
from eval.scorers.geometry import Geometry
from tests.conftest import SHARED, TRAITS, MakesModel, Perturbs
from tests.oracles.test_alignmerge import Context
from tests.oracles.test_gradients import ARCHITECTURES, examples_of

Tensors = dict[str, Tensor]
LAYOUTS = ("llama", "mistral", "qwen2", "phi3")
FUSED = {
    "self_attn.qkv_proj": {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16},
    "mlp.gate_up_proj": {"mlp.gate_proj": 48, "mlp.up_proj": 48},
}
"""By hand, for the tiny models: 4 heads of 8, 2 groups, an MLP of 48."""
ONE_FUNCTION: dict[str, Any] = {
    **SHARED,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "sliding_window": None,
}
"""What the four configs share; Llama has no sliding window, so nobody has."""

WITHOUT_DATA: list[Merger] = [
    *(Identity(of=name) for name in ("base", "anchor", "a", "b")),
    Average(),
    TaskArithmetic(),
    Ties(),
    Ties(density=0.6, scale=0.7),
    Ties(variant="per_tensor"),
    SafeMerge(),
    SafeMerge(fraction=0.3, safe_weight=0.8),
    MergeAlign(variant="thakkar"),
    Interpolate(t=0.3),
]
WITH_DATA: list[Merger] = [
    MergeAlign(temperature=0.02),
    FisherSoup(labels="sampled"),
    FisherSoup(labels="data"),
    GradientStep(at="barycentre"),
    GradientStep(at="base", length=0.3),
    *(
        AlignMerge(estimator=estimator, metric=metric, factors=factors, at=at, rank=rank, lambda_bud=0.0)
        for (estimator, factors), metric, (at, rank) in itertools.product(
            [("kronecker", "input"), ("kronecker", "output"), ("kronecker", "both"), ("samples", "input")],
            ["shared", "per_expert"],
            [("base", None), ("barycentre", 5)],
        )
    ),
]
PER_MATRIX: list[Merger] = [
    Ties(variant="per_tensor"),
    SafeMerge(),
    AlignMerge(estimator="kronecker", factors="output", lambda_bud=0.0),
    AlignMerge(estimator="kronecker", lambda_bud=0.0),
]
"""Methods whose result would be another one if fused matrices were taken for one."""


# --- one model in four layouts ----------------------------------------------------------------------------


def written_as(layout: str, weights: Mapping[str, Tensor]) -> Tensors:
    """Write a Llama model's weights down as another architecture stores them."""
    if layout == "phi3":
        found = dict(weights)
        for layer in range(2):
            for fused, parts in FUSED.items():
                rows = [found.pop(f"model.layers.{layer}.{part}.weight") for part in parts]
                found[f"model.layers.{layer}.{fused}.weight"] = torch.cat(rows)
        return found
    biases: Tensors = {}
    if layout == "qwen2":
        for name, weight in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                biases[name.replace("weight", "bias")] = torch.zeros(len(weight))
    return {**weights, **biases}


def read_as_llama(folder: Path) -> Tensors:
    """The weights of a folder by their Llama names, cut up by hand; zero biases are nothing."""
    found = load_file(folder / "model.safetensors")
    for name in sorted(found):
        for fused, parts in FUSED.items():
            if f".{fused}." in name:
                rows = found.pop(name).split(list(parts.values()))
                found |= {name.replace(fused, part): value for part, value in zip(parts, rows, strict=True)}
    biases = {name for name in found if name.endswith(".bias")}
    assert not any(bool(found.pop(name).any()) for name in biases)
    return found


class Layout(NamedTuple):
    """The same family (base, anchor, two experts, theta_0) as one architecture has it."""

    name: str
    models: Models
    folder: Path
    store: Store

    def context(self) -> Context:
        return Context(self.models, self.store, self.folder / "average", SETS)

    def merged(self, method: Merger, name: str) -> tuple[Path, Context]:
        """Merge through files, in small row blocks; return the model's folder and what was recorded."""
        ctx, folder = self.context(), self.folder / name
        folder.mkdir()
        merge(method.fit(ctx), self.models, folder, elementwise=method.elementwise, block_elements=300)
        (folder / "config.json").write_bytes((self.models.base.folder / "config.json").read_bytes())
        return folder, ctx


SETS = {
    name: examples_of(seed, 12, 20)
    for seed, name in enumerate(("alignment", "metric", "anchor", "a", "b", "reported"))
}
Family = dict[str, Layout]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("layouts")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **ONE_FUNCTION, attention_bias=False)
        start = AutoModelForCausalLM.from_config(config).state_dict()
    roles = {}
    for seed, role in enumerate(("base", "anchor", "experts.a", "experts.b", "pretrained")):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(w.shape, generator=generator) for name, w in sorted(start.items())}
        roles[role] = {name: w + (0.1 if role == "base" else 0.05) * noise[name] for name, w in start.items()}
    found = {}
    for layout in LAYOUTS:
        config = AutoConfig.for_model(layout, **ONE_FUNCTION)
        for role, weights in roles.items():
            folder = root / layout / role
            config.save_pretrained(folder)
            save_file(written_as(layout, weights), folder / "model.safetensors", {"format": "pt"})
        models = open_models({role: root / layout / role for role in roles})
        found[layout] = Layout(layout, models, root / layout, Store(root / layout / "store"))
    return found


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "precision", "float32")


def fused(checkpoint: Checkpoint) -> bool:
    return checkpoint.views.keys() != checkpoint.keys()


def logits(folder: Path, examples: list[Example]) -> Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([e.ids])).logits[0] for e in examples])


def distance(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([(one[n].double() - other[n].double()).square().sum() for n in one]).sum().sqrt())


def test_the_four_are_one_function(family: Family) -> None:
    """Before anything is merged: else what follows would say nothing."""
    wanted = logits(family["llama"].models.anchor.folder, SETS["a"])
    for layout in LAYOUTS[1:]:
        torch.testing.assert_close(
            logits(family[layout].models.anchor.folder, SETS["a"]), wanted, rtol=0, atol=1e-5
        )
    assert float((logits(family["llama"].models.base.folder, SETS["a"]) - wanted).abs().max()) > 0.1
    stored = [len(family[layout].models.base) for layout in LAYOUTS]
    assert stored == [21, 21, 27, 15]
    assert [fused(family[layout].models.base) for layout in LAYOUTS] == [False, False, False, True]


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=repr)
def test_methods_without_data_merge_all_four_to_the_same_bits(family: Family, method: Merger) -> None:
    name = f"exact-{WITHOUT_DATA.index(method)}"
    wanted, facts = family["llama"].merged(method, name)
    for layout in LAYOUTS[1:]:
        folder, ctx = family[layout].merged(method, name)
        found, llama = read_as_llama(folder), read_as_llama(wanted)
        assert found.keys() == llama.keys()
        assert [n for n in llama if not torch.equal(found[n], llama[n])] == []
        assert ctx.facts == facts.facts


@pytest.mark.parametrize("method", WITH_DATA, ids=repr)
def test_methods_with_data_merge_all_four_to_one_function(
    family: Family, method: Merger, precise: None
) -> None:
    """Mistral's and Qwen2's passes are Llama's bit for bit. Phi-3's products are larger ones, so its statistics
    differ in the last bits: the merges agree to 1e-4 of what the method does beyond the plain average."""
    name = f"close-{WITH_DATA.index(method)}"
    wanted, facts = family["llama"].merged(method, name)
    llama = read_as_llama(wanted)
    plain = {n: average([model.read(n) for model in family["llama"].models.pool]) for n in llama}
    effect = distance(llama, plain)
    assert effect > 0.05
    for layout in LAYOUTS[1:]:
        folder, ctx = family[layout].merged(method, name)
        found = read_as_llama(folder)
        if layout == "phi3":
            assert distance(found, llama) < 1e-4 * effect
        else:
            assert [n for n in llama if not torch.equal(found[n], llama[n])] == []
        torch.testing.assert_close(logits(folder, SETS["a"]), logits(wanted, SETS["a"]), rtol=0, atol=1e-5)
        assert ctx.blocks.keys() == facts.blocks.keys()
        for block, values in facts.blocks.items():
            assert ctx.blocks[block] == pytest.approx(values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", PER_MATRIX, ids=repr)
def test_per_matrix_methods_would_give_something_else_without_views(
    family: Family, method: Merger, precise: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the tests above would find if fused matrices were taken for one."""
    apart, _ = family["phi3"].merged(method, f"apart-{PER_MATRIX.index(method)}")
    monkeypatch.setattr(alignmerge.engine.views, "FUSED", {})
    roles = ("base", "anchor", "experts.a", "experts.b", "pretrained")
    models = open_models({role: family["phi3"].folder / role for role in roles})
    assert not fused(models.base)
    together, _ = Layout("phi3", models, tmp_path, Store(tmp_path / "store")).merged(method, "together")
    assert distance(read_as_llama(together), read_as_llama(apart)) > 0.01


def test_statistics_are_llamas(family: Family) -> None:
    """Names, shapes and values: per-layer diagnostics of a fused model read like those of any other."""
    models = {layout: load_model(family[layout].models.base.folder) for layout in ("llama", "phi3")}
    wanted, found = (squares(models[layout], SETS["a"]) for layout in ("llama", "phi3"))
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.max()))
    for side in ("input", "output"):
        llama, phi = (kronecker_factors(models[layout], SETS["a"], side) for layout in ("llama", "phi3"))
        assert phi.owners == llama.owners
        assert phi.moments.keys() == llama.moments.keys()
        for name, moment in llama.moments.items():
            torch.testing.assert_close(phi.moments[name], moment, rtol=1e-3, atol=1e-5 * float(moment.max()))
    stored = fisher(family["phi3"].context(), family["phi3"].models.base, "metric")
    assert list(stored) == list(wanted)


def test_lengths_are_summed_in_the_same_order(family: Family) -> None:
    assert len({baselines.gradient_step._average_length(family[layout].context()) for layout in LAYOUTS}) == 1


def test_geometry_of_a_fused_model_is_llamas(family: Family, precise: None) -> None:
    """The scorer goes by the names of the statistics."""
    found = {}
    for layout in ("llama", "phi3"):
        one = family[layout]
        subject: Any = SimpleNamespace(folder=one.models.experts["a"].folder, context=one.context)
        found[layout] = {(s.id, s.column): s.value for s in Geometry(rank=4).score(subject)}
    assert found["phi3"] == pytest.approx(found["llama"], rel=1e-4)
    assert min(found["llama"].values()) > 0


# --- biases that say nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5])
def test_zero_biases_do_not_move_the_threshold_of_ties(family: Family, density: float) -> None:
    """192 zeros among 22 thousand weights: counted, they would let a few more entries through."""
    contexts = [family[layout].context() for layout in ("llama", "qwen2")]
    for ctx in contexts:
        Ties(density=density).fit(ctx)
    assert contexts[0].facts == contexts[1].facts


@pytest.mark.parametrize("role", ["base", "anchor", "experts.a"])
def test_biases_count_for_ties_if_one_model_has_them(family: Family, tmp_path: Path, role: str) -> None:
    """Then they are parameters as any other, in every model; only their tensor is."""
    folders = {}
    source = family["qwen2"].folder
    for name in ("base", "anchor", "experts.a"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_bytes((source / name / "config.json").read_bytes())
        weights = load_file(source / name / "model.safetensors")
        if name == role:
            weights["model.layers.1.self_attn.q_proj.bias"][3] = 0.5
        save_file(weights, folders[name] / "model.safetensors")
    models = open_models(folders)
    ctx = Context(models, Store(tmp_path / "store"), tmp_path / "average", SETS)
    Ties(density=0.2).fit(ctx)
    zero = [n for n in models.base if n.endswith(".bias") and n != "model.layers.1.self_attn.q_proj.bias"]
    assert len(zero) == 5
    for alias, model in zip(models.aliases, models.pool, strict=True):
        sizes = torch.cat(
            [(model.read(n) - models.base.read(n)).abs().flatten() for n in models.base if n not in zero]
        )
        k = int(0.2 * len(sizes))
        assert ctx.facts["thresholds"][alias] == float(sizes.kthvalue(len(sizes) - k + 1).values)


# --- views of a checkpoint --------------------------------------------------------------------------------


def test_views_by_hand() -> None:
    config = {"model_type": "phi3", "hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1}
    config |= {"intermediate_size": 5}
    attention, mlp = "model.layers.7.self_attn", "model.layers.7.mlp"
    assert views_of(config, f"{attention}.qkv_proj.weight", 20) == {
        f"{attention}.q_proj.weight": slice(0, 12),
        f"{attention}.k_proj.weight": slice(12, 16),
        f"{attention}.v_proj.weight": slice(16, 20),
    }
    assert views_of(config, f"{mlp}.gate_up_proj.weight", 10) == {
        f"{mlp}.gate_proj.weight": slice(0, 5),
        f"{mlp}.up_proj.weight": slice(5, 10),
    }
    for name in (f"{attention}.o_proj.weight", f"{mlp}.down_proj.weight", "model.norm.weight", "weight", ""):
        assert views_of(config, name, 9) == {name: slice(0, 9)}
    fused = f"{attention}.qkv_proj.weight"
    assert (
        views_of({**config, "model_type": "llama"}, fused, 20)
        == views_of({}, fused, 20)
        == {fused: slice(0, 20)}
    )


sizes = st.integers(1, 40)


@settings(deadline=None)
@given(heads=sizes, groups=st.none() | sizes, head_dim=sizes, stated=st.booleans(), mlp=sizes)
def test_views_cover_every_row_once(
    heads: int, groups: int | None, head_dim: int, stated: bool, mlp: int
) -> None:
    config = {"model_type": "phi3", "num_attention_heads": heads, "num_key_value_heads": groups}
    config |= {"intermediate_size": mlp, "hidden_size": 7 if stated else heads * head_dim}
    config |= {"head_dim": head_dim if stated else None}
    pairs = heads if groups is None else groups
    for name, wanted in (("qkv_proj", [heads, pairs, pairs]), ("gate_up_proj", [mlp, mlp])):
        lengths = [n * head_dim for n in wanted] if name == "qkv_proj" else wanted
        found = list(views_of(config, f"x.{name}.weight", sum(lengths)).values())
        assert [rows.stop - rows.start for rows in found] == lengths
        assert [0, *(rows.stop for rows in found)] == [*(rows.start for rows in found), sum(lengths)]


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 12}, {"num_attention_heads": 8}]
)
def test_views_are_what_the_native_model_cuts(
    tiny_model: MakesModel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero the rows of one view: the native attention then gets zeros for it, and for nothing else."""
    folder = tiny_model("phi3", **changes)
    checkpoint, model = Checkpoint.open(folder, "model"), load_model(folder)
    attention, seen = model.model.layers[0].self_attn, []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        seen[:] = [query, key, value]
        return query.transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recorder", attend)
    model.config._attn_implementation = "recorder"
    names = checkpoint.parts("model.layers.0.self_attn.qkv_proj.weight")
    assert [name.split(".")[-2] for name in names] == ["q_proj", "k_proj", "v_proj"]
    whole = attention.qkv_proj.weight.detach().clone()
    for place, name in enumerate(names):
        view = checkpoint.views[name]
        with torch.no_grad():
            attention.qkv_proj.weight.copy_(whole)
            attention.qkv_proj.weight[view.first : view.first + view.shape[0]] = 0
            attention(torch.ones(1, 3, 32), position_embeddings=_unrotated(model), attention_mask=None)
        assert [bool(states.any()) for states in seen] == [i != place for i in range(3)]


def _unrotated(model: Any) -> tuple[Tensor, Tensor]:
    size = model.model.layers[0].self_attn.head_dim
    return torch.ones(1, 3, size), torch.zeros(1, 3, size)


def test_views_read_rows_of_what_is_stored(family: Family) -> None:
    checkpoint = pickle.loads(pickle.dumps(family["phi3"].models.anchor))
    llama = family["llama"].models.anchor
    assert list(checkpoint.views) == list(llama) == list(llama.views)
    for name, view in checkpoint.views.items():
        wanted = llama.read(name)
        assert view.shape == wanted.shape
        assert torch.equal(checkpoint.read(name), wanted)
        for rows in (slice(3, 9), slice(0, 1), slice(len(wanted) - 1, 10**6), slice(5, 5), slice(-4, None)):
            assert torch.equal(checkpoint.read(name, rows), wanted[rows])
    fused = "model.layers.1.mlp.gate_up_proj.weight"
    both = [llama.read(f"model.layers.1.mlp.{part}_proj.weight") for part in ("gate", "up")]
    assert torch.equal(checkpoint.read(fused), torch.cat(both))
    with pytest.raises(KeyError):
        checkpoint.read("model.layers.1.mlp.side_proj.weight")


def test_rules_are_handed_views_in_small_blocks(family: Family, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def note(block: Block) -> Tensor:
        seen.setdefault(block.name, []).append((block.rows.start, block.rows.stop))
        assert torch.equal(block.base, family["llama"].models.base.read(block.name, block.rows))
        assert block.pretrained is not None
        return block.base

    assert merge(note, family["phi3"].models, tmp_path, block_elements=320) == family["phi3"].models.base.digest
    assert seen["model.layers.0.self_attn.k_proj.weight"] == [(0, 10), (10, 16)]
    assert seen["model.layers.0.mlp.up_proj.weight"][-1] == (40, 48)
    assert seen.keys() == family["llama"].models.base.keys()


# --- what a config may say --------------------------------------------------------------------------------

QKV, GATE = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        (
            {"num_key_value_heads": 4},
            ["tensor '{q}': 64 rows, but q_proj 32 + k_proj 32 + v_proj 32 = 96 by the config; "],
        ),
        (
            {"intermediate_size": 50},
            ["tensor '{g}': 96 rows, but gate_proj 50 + up_proj 50 = 100 by the config; "],
        ),
        (
            {"num_attention_heads": None, "intermediate_size": "48"},
            [
                "tensor '{g}': several matrices in one, but intermediate_size is '48' in the config; ",
                "tensor '{q}': several matrices in one, but num_attention_heads is None in the config; ",
            ],
        ),
        (
            {"num_attention_heads": True},
            ["tensor '{q}': several matrices in one, but num_attention_heads is True in the config; "],
        ),
        ({"head_dim": [8]}, ["tensor '{q}': several matrices in one, but head_dim is [8] in the config; "]),
        (
            {"num_key_value_heads": -2},
            ["tensor '{q}': several matrices in one, but num_key_value_heads is -2 in the config; "],
        ),
    ],
)
def test_a_config_that_does_not_fit_is_found_before_any_weight_is_read(
    family: Family, tmp_path: Path, changes: dict[str, Any], faults: list[str]
) -> None:
    source = family["phi3"].models.base.folder
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    header = {QKV: torch.zeros(64, 32), GATE: torch.zeros(96, 32)}
    save_file(header, tmp_path / "model.safetensors")
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(tmp_path, "family.base")
    where = f"family.base: {tmp_path / 'model.safetensors'}: "
    found = [str(fault) for fault in caught.value.faults]
    assert [line.removeprefix(where).split("allowed: ")[0] for line in found] == [
        fault.format(q=QKV, g=GATE) for fault in faults
    ]


def test_a_matrix_stored_twice_is_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((family["phi3"].models.base.folder / "config.json").read_bytes())
    twice = {GATE: torch.zeros(96, 32), GATE.replace("gate_up", "up"): torch.zeros(48, 32)}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(
        BadRequest, match=rf"up_proj.weight', which is also a part of '{GATE}'; allowed: every matrix"
    ):
        Checkpoint.open(tmp_path, "family.base")


def test_a_scalar_under_a_fused_name_is_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((family["phi3"].models.base.folder / "config.json").read_bytes())
    save_file({GATE: torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(BadRequest, match="0 rows, but gate_proj 48"):
        Checkpoint.open(tmp_path, "family.base")


# --- keys -------------------------------------------------------------------------------------------------


def test_the_version_of_the_views_is_in_the_keys(family: Family, tmp_path: Path) -> None:
    zoo: Any = SimpleNamespace(store=Store(tmp_path), family=SimpleNamespace(threads=1, name="any"))
    for layout in LAYOUTS:
        models = family[layout].models
        recipe = merge_recipe(Ties(variant="per_tensor"), zoo, models, 0)
        ctx = StoreContext(zoo, models, "test", Inputs(), 0)
        artifact = ctx.cached("fisher", {"weights": layout}, lambda folder: None)
        for found in (recipe, artifact.manifest["recipe"]):
            assert found["views"] == VERSION


# --- all five architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(TRAITS))
@pytest.mark.parametrize("estimator", ["kronecker", "samples"])
def test_every_architecture_merges_as_it_runs(
    arch: str, estimator: str, tiny_model: MakesModel, perturbed: Perturbs, tmp_path: Path
) -> None:
    """Native traits (soft-capping, tied head, windows shorter than the examples, biases), passes under autocast.

    Full projection along all directions is the anchor; otherwise every matrix moves from the soup towards it.
    """
    base = tiny_model(arch, **ARCHITECTURES[arch])
    folders = {"base": base, "anchor": perturbed(base, 1, 0.05), "experts.a": perturbed(base, 2, 0.05)}
    models = open_models(folders)
    ctx = Context(models, Store(tmp_path / "store"), tmp_path / "average", SETS)
    method = AlignMerge(estimator=estimator, lambda_align=9.0, lambda_bud=0.0)
    merge(method.fit(ctx), models, tmp_path, elementwise=False)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    merged = Checkpoint.open(tmp_path, "merged")
    linear = [name for name in merged.views if name.endswith("_proj.weight")]
    assert len(linear) == 14
    for name in merged.views:
        anchor, expert, found = models.anchor.read(name), models.experts["a"].read(name), merged.read(name)
        if name not in linear:
            assert torch.equal(found, average([anchor, expert]))
        elif estimator == "kronecker":
            assert float((found - anchor).norm()) < 0.95 * float((average([anchor, expert]) - anchor).norm())
    assert torch.isfinite(logits(tmp_path, SETS["a"])).all()
    if estimator == "kronecker":
        assert sorted(ctx.blocks) == linear
    else:
        certificate = ctx.facts["certificate"]
        assert certificate["l_align"] < 0.3 * certificate["l_align_before"]
