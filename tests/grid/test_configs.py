"""Every YAML composes, builds and says the same defaults as its class; unknown keys and wrong types are refused."""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from alignmerge.engine.configuration import build, choices
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from alignmerge.zoo.corpus import Packaged
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.world import World
from eval.grid.gates import EXPERTS
from eval.scorers.interface import Scorer

CONF = ROOT / "conf"
KINDS: dict[str, tuple[type, ...]] = {
    "method": (Merger,),
    "corpus": (Packaged, Toy, World),
    "family": (Family,),
}
DUMMIES = ("family.base=a", "family.anchor=b", "family.experts={math: c, code: d}")


def stems(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found
    return found


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """Compose as ``run.py`` does; the result is shared, so it may not be changed."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return typing.cast(dict[str, Any], config)


class Node(NamedTuple):
    """A config node with the key that names it."""

    where: str
    node: dict[str, Any]
    kinds: tuple[type, ...]

    def build(self, **changes: object) -> Any:
        return build({**self.node, **changes}, self.where, *self.kinds)

    def faults(self, **changes: object) -> list[Fault]:
        with pytest.raises(BadRequest) as caught:
            self.build(**changes)
        return list(caught.value.faults)


GROUPS = ("method", "scorer", "corpus", "family")


def nodes_together(place: int) -> dict[tuple[str, str], Node]:
    """Compose the file at ``place`` of each group in one config (the shorter groups start again)."""
    chosen = {group: (names := stems(group))[place % len(names)] for group in GROUPS}
    overrides = [f"{group}={stem}" for group, stem in chosen.items()]
    config = composed(*overrides, *(DUMMIES if chosen["family"] == "local" else ()))
    scorer = chosen["scorer"]
    assert list(config["scorer"]) == [scorer]
    nodes = {("scorer", scorer): Node(f"scorer.{scorer}", config["scorer"][scorer], (Scorer,))}
    return nodes | {(g, chosen[g]): Node(g, config[g], kinds) for g, kinds in KINDS.items()}


ALL = [(group, stem) for group in GROUPS for stem in stems(group)]
PLAIN = [(group, stem) for group, stem in ALL if group != "family"]


@pytest.fixture(scope="module")
def nodes() -> dict[tuple[str, str], Node]:
    found: dict[tuple[str, str], Node] = {}
    for place in range(max(len(stems(group)) for group in GROUPS)):
        found |= nodes_together(place)
    assert set(found) == set(ALL)
    return found


@pytest.mark.parametrize(("group", "stem"), PLAIN)
def test_yaml_states_every_field_with_the_default_of_its_class(
    group: str, stem: str, nodes: dict[tuple[str, str], Node]
) -> None:
    made: Any = nodes[group, stem].build()
    assert issubclass(type(made), KINDS.get(group, (Scorer,)))
    assert made == type(made)()
    assert set(nodes[group, stem].node) == {"_target_", *(field.name for field in fields(made))}


@pytest.mark.parametrize("stem", stems("family"))
def test_family_yaml_states_every_field(stem: str, nodes: dict[tuple[str, str], Node]) -> None:
    family = nodes["family", stem].build()
    assert family.name == stem
    assert set(nodes["family", stem].node) == {field.name for field in fields(Family)}
    assert next(iter(family.references())) == "base" and len(family.experts) >= 2


def test_local_family_needs_its_three_references_and_else_has_the_defaults(
    nodes: dict[tuple[str, str], Node],
) -> None:
    local = nodes["family", "local"].build()
    assert (local.base, local.anchor, dict(local.experts)) == ("a", "b", {"math": "c", "code": "d"})
    optional = [field for field in fields(Family) if field.default is not MISSING]
    assert optional and all(getattr(local, field.name) == field.default for field in optional)
    with pytest.raises(BadRequest) as caught:
        build(composed("family=local")["family"], "family", Family)
    assert [fault.where for fault in caught.value.faults] == ["family.base", "family.anchor", "family.experts"]


@pytest.mark.parametrize(("group", "stem"), ALL)
def test_unknown_key_is_named_with_the_nearest_known_one(
    group: str, stem: str, nodes: dict[tuple[str, str], Node]
) -> None:
    node = nodes[group, stem]
    known = [key for key in node.node if key != "_target_"]
    for key in known:
        (fault,) = node.faults(**{f"{key}x": 1})
        assert fault.where == f"{node.where}.{key}x" and fault.given == "unknown key"
        assert fault.allowed.startswith(f"{key}? ")
        assert fault.allowed.endswith(", ".join(sorted(known)))
    (fault,) = node.faults(zzz=1)
    assert str(fault) == f"{node.where}.zzz: unknown key; allowed: {', '.join(sorted(known)) or 'no key'}"


def wrong_for(hint: Any) -> list[object]:
    """Return values that a plain reading of the type does not admit."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wrong: dict[Any, list[object]] = {
        str: [3, 1.5, True, ["a"], {"a": 1}],
        bool: [3, 0, "true", None, [True], {"a": 1}],
        float: ["abc", True, [0.5], {"a": 1}],
        int: ["abc", "1", 1.5, 1.0, True, [1], {"a": 1}],
        typing.Literal: ["nonsense", 3, None, True, ["a"], {"a": 1}],
        Mapping: ["abc", 3, None, [1]],
        Sequence: ["abc", 3, None, {"a": 1}],
    }
    return next(wrong[kind] for kind in wrong if kind in options or typing.get_origin(hint) is kind)


@pytest.mark.parametrize(("group", "stem"), ALL)
def test_wrong_type_of_each_field_is_named(group: str, stem: str, nodes: dict[tuple[str, str], Node]) -> None:
    node = nodes[group, stem]
    for key, hint in typing.get_type_hints(type(node.build())).items():
        if key not in node.node:
            continue  # a ClassVar
        for wrong in wrong_for(hint):
            (fault,) = node.faults(**{key: wrong})
            assert fault.where == f"{node.where}.{key}", (key, wrong)
            assert str(wrong).strip("{}[]") in fault.given and fault.allowed
        (fault,) = node.faults(**{key: object()})
        assert fault.where == f"{node.where}.{key}"


@pytest.mark.parametrize(("group", "stem"), [*PLAIN, ("family", "smoke")])
def test_nan_and_infinity_are_refused_in_every_number(
    group: str, stem: str, nodes: dict[tuple[str, str], Node]
) -> None:
    node = nodes[group, stem]
    numbers = [
        key
        for key, hint in typing.get_type_hints(type(node.build())).items()
        if key in node.node and (hint is float or float in typing.get_args(hint))
    ]
    for key in numbers:
        for value in (float("nan"), float("inf"), float("-inf")):
            if key == "lambda_align" and value == float("inf"):
                assert node.build(lambda_align=value).lambda_align == value  # documented: it projects
                continue
            faults = node.faults(**{key: value})
            assert any(f"{node.where}.{key}" in fault.where for fault in faults), (key, value)


def test_recipes_are_built_and_their_fields_checked(nodes: dict[tuple[str, str], Node]) -> None:
    node = nodes["family", "smoke"]
    recipes = node.node["recipes"]
    worse = {**recipes, "format": {**recipes["format"], "lr": float("nan"), "steps": 0, "batch": 0}}
    assert len(node.faults(recipes=worse)) == 3
    typo = {**recipes, "format": {**recipes["format"], "stepz": 3}}
    (fault,) = node.faults(recipes=typo)
    assert fault.where == "family.recipes.format.stepz" and fault.allowed.startswith("steps? ")


EXPERIMENTS = [name for name in choices(CONF / "experiment") if not name.rpartition("/")[2].startswith("_")]
SWEEPS = ("lambda_sweep", "rank_sweep", "budget_sweep")
SPLIT = ("ablation", "matched", *SWEEPS)
"""Experiments that there are for two tiers, with rows of their own in a shared file."""


def file_of(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    assert isinstance(loaded, dict)
    return typing.cast(dict[str, Any], loaded)


def written_rows(name: str) -> list[str]:
    """Return the rows that an experiment's file and the files of its defaults say, in the order of composition."""
    rows: list[str] = []
    parts = file_of(name).get("defaults", [])
    for one in parts if "_self_" in parts else [*parts, "_self_"]:
        if one == "_self_":
            rows += file_of(name).get("grid", {}).get("rows", {})
        elif isinstance(one, str):
            rows += written_rows(one.removeprefix("/experiment/"))
    return rows


def test_every_split_experiment_is_there_for_both_tiers() -> None:
    assert {f"{name}/{tier}" for name in SPLIT for tier in ("tiny", "smollm2")} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_every_row_and_setting_builds(name: str) -> None:
    from eval.grid.modes import experiment_of

    experiment = experiment_of(composed(f"experiment={name}"))
    experiment.check()
    grid, rows = experiment.grid, experiment.grid.rows
    assert grid.name == name.replace("/", "-")  # the folder of its results
    assert list(rows) == list(dict.fromkeys(written_rows(name)))
    tried, swept = (
        {n: r.settings for n, r in rows.items() if r.settings and r.swept is way} for way in (False, True)
    )
    assert len(experiment.dev_cells()) == sum(map(len, tried.values())) * len(experiment.first_seed)
    assert {cell.split for cell in experiment.dev_cells()} <= {"dev"}
    reported = experiment.provisional()[experiment.zoos[0].family.name]
    matched = sum(row.matched for row in rows.values())
    assert len(reported) == len(rows) - len(swept) + sum(map(len, swept.values())) + matched
    assert set(grid.against) <= set(reported) and grid.against
    gated = {row for gate in grid.gates.values() for row in (gate.row, gate.minus) if row is not None}
    models = {key.replace("experts.", "expert:") for key in experiment.zoos[0].family.references()} | {EXPERTS}
    assert gated - models <= {row for row in rows if not rows[row].settings}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_setting_of_a_row_is_tried_twice(name: str) -> None:
    rows = composed(f"experiment={name}")["grid"]["rows"].values()
    tuned = [row["settings"] for row in rows if row.get("settings") and not row.get("swept")]
    for settings in tuned:
        assert len({tuple(sorted(setting.items())) for setting in settings}) == len(settings)


def own_candidates(name: str) -> dict[str, list[Merger]]:
    """Return the methods, one a setting, of the rows of an experiment that follow no other row."""
    from eval.grid.modes import experiment_of

    experiment = experiment_of(composed(f"experiment={name}"))
    return {row: experiment.candidates(row) for row, one in experiment.grid.rows.items() if not one.derived}


MAIN = {"tiny": 12, "paper": 12, "smollm2": 4}
"""The main experiments -> how many settings each tuned row has."""


@pytest.mark.parametrize("name", MAIN)
def test_rivals_are_tuned_alike_in_the_main_experiments(name: str) -> None:
    tuned = {row: found for row, found in own_candidates(name).items() if row not in UNTUNED}
    readings = [tuned.pop(f"alignmerge/reference_{one}") for one in ("base", "anchor")]
    assert [len(found) for found in readings] == [MAIN[name] // 2] * 2  # together they are `alignmerge`
    assert {len(found) for found in tuned.values()} == {MAIN[name]}
    assert set(tuned) == {
        "task_arithmetic", "ties", "fisher_soup", "safemerge", "mergealign/hammoud", "mergealign/thakkar",
        "interpolate", "interpolate/base", "interpolate/soup", "gradient_step", "gradient_step/soup",
        "alignmerge/kronecker", "alignmerge/soup", "alignmerge/task_arithmetic", "alignmerge/experts",
    }  # fmt: skip


UNTUNED = {"average"}


@pytest.mark.parametrize("name", MAIN)
def test_no_setting_is_offered_that_switches_its_method_off_or_is_another_rows(name: str) -> None:
    candidates = own_candidates(name)
    said = {f"{row}: {one}": one.switched_off({}) for row, found in candidates.items() for one in found}
    assert {key: why for key, why in said.items() if why} == {}
    rows: dict[str, list[str]] = {}
    for row, found in candidates.items():
        for one in found:
            rows.setdefault(repr(one), []).append(row)
    assert [names for names in rows.values() if len(names) > 1] == []
    sums = [(one.scale, one.anchor_share) for one in typing.cast(list[Any], candidates["task_arithmetic"])]
    pools = {len(choices_of_family["experts"]) + 1 for choices_of_family in families_of(name)}
    assert not {(1 / size, None) for size in pools} & set(sums)  # a sum that is the plain average


def families_of(name: str) -> list[dict[str, Any]]:
    config = composed(f"experiment={name}")
    named = config["grid"].get("families") or []
    files = [yaml.safe_load((CONF / "family" / f"{family}.yaml").read_text()) for family in named]
    return files or [config["family"]]


@pytest.mark.parametrize("name", MAIN)
def test_controls_of_alignmerge_change_one_thing_at_the_selected_setting(name: str) -> None:
    rows = composed(f"experiment={name}")["grid"]["rows"]
    controls = {row: one["fixed"] for row, one in rows.items() if one.get("like")}
    assert controls == {
        "alignmerge/random": {"subspace_from": "random"},
        "alignmerge/utility": {"subspace_from": "utility"},
        "alignmerge/identity": {"chart": "identity"},
        "alignmerge/no_align": {"lambda_align": 0.0},
        "alignmerge/no_budget": {"lambda_bud": 0.0},
    }
    assert {rows[row]["like"] for row in controls} == {"alignmerge"}
    assert rows["alignmerge"]["best_of"] == ["alignmerge/reference_base", "alignmerge/reference_anchor"]


@pytest.mark.parametrize("name", SPLIT)
def test_experiments_of_a_tier_have_its_models_scorers_and_gates(name: str) -> None:
    for tier in ("tiny", "smollm2"):
        ours, main = composed(f"experiment={name}/{tier}"), composed(f"experiment={tier}")
        for key in ("family", "corpus", "seed"):
            assert ours[key] == main[key], (tier, key)
        more = {"subspaces"} if name == "ablation" else set()
        assert {key: value for key, value in ours["scorer"].items() if key not in more} == main["scorer"], tier
        seeds = {("matched", "smollm2"): 2} | {(sweep, "tiny"): 1 for sweep in SWEEPS}  # two anchors; a trend
        assert ours["grid"].get("seeds") == seeds.get((name, tier), main["grid"].get("seeds"))
        for key in ("families", "gates", "dev_scorers"):
            assert ours["grid"].get(key) == main["grid"].get(key), (tier, key)
        assert ours["grid"]["rows"]["average"] == main["grid"]["rows"]["average"]


def test_ablations_change_one_thing_each() -> None:
    """Rows of AlignMerge differ from ``alignmerge`` in one field; those without L_align are the budget's."""
    for tier in ("tiny", "smollm2"):
        rows = composed(f"experiment=ablation/{tier}")["grid"]["rows"]
        ours = {name: row["fixed"] for name, row in rows.items() if row["method"] == "alignmerge"}
        assert ours.pop("alignmerge") == {"lambda_align": 1.0}
        assert ours.pop("alignmerge/budget") == {"lambda_align": 1.0, "lambda_bud": 100.0}
        assert ours.pop("alignmerge/budget_only") == {"lambda_align": 0.0, "lambda_bud": 100.0}
        assert ours.pop("alignmerge/neither") == {"lambda_align": 0.0}
        assert all(fixed.pop("lambda_align") == 1.0 and len(fixed) == 1 for fixed in map(dict, ours.values()))
        assert len({str(fixed) for fixed in ours.values()}) == len(ours) >= 8


def test_rows_with_unequal_numbers_of_settings_are_refused() -> None:
    from eval.grid.grid import Grid

    node = copy.deepcopy(composed("experiment=smoke")["grid"])
    node["rows"]["ties"]["settings"].append({"density": 0.9})
    with pytest.raises(BadRequest, match=r"grid.rows: \[2, 3\] settings; allowed: the same number"):
        build(node, "grid", Grid)


def test_the_readings_of_a_best_of_share_the_number_of_settings() -> None:
    from eval.grid.grid import Grid

    node = copy.deepcopy(composed("experiment=smoke")["grid"])
    node["rows"]["alignmerge/reference_base"]["settings"].append({"lambda_align": 0.5})
    with pytest.raises(BadRequest, match=r"grid.rows: \[2, 3\] settings; allowed: the same number"):
        build(node, "grid", Grid)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_class_is_named_where_the_type_of_a_field_tells_it(name: str) -> None:
    assert "_target_" not in str(composed(f"experiment={name}")["grid"])
    assert "_target_" not in composed(f"experiment={name}")["family"]


def test_scorers_of_a_grid_are_the_files_of_conf_scorer_but_for_what_is_said() -> None:
    from eval.grid.grid import Grid

    node = copy.deepcopy(composed("experiment=tiny")["grid"])
    usual = composed("experiment=smoke")["scorer"]
    grid = build(node, "grid", Grid)
    judge = build({**usual["judge"], "relevance": None}, "scorer", Scorer)
    assert grid.trajectory_scorers == {"aqi": build(usual["aqi"], "scorer", Scorer), "judge": judge}
    tasks = ["format", "arithmetic", "knowledge", "helpful"]
    utility = build({**usual["utility"], "tasks": tasks}, "scorer", Scorer)
    assert grid.dev_scorers == {**grid.trajectory_scorers, "utility": utility}
    node["dev_scorers"] |= {"judg": {}, "aqi": {"layer": 1}}
    node["gates"]["the base helps"]["rows"] = "base"
    with pytest.raises(BadRequest) as caught:
        build(node, "grid", Grid)
    known = "aqi, geometry, judge, subspaces, toxicity, utility"
    assert set(map(str, caught.value.faults)) == {
        f"grid.dev_scorers.judg: no such choice; allowed: judge? {known}",
        "grid.dev_scorers.aqi.layer: unknown key; allowed: layers? layers, replicates",
        "grid.gates.the base helps.rows: unknown key; allowed: row? at_least, at_most, column, minus, row",
    }


def test_smoke_has_every_method() -> None:
    grid = composed("experiment=smoke")["grid"]
    assert {row["method"] for row in grid["rows"].values() if "method" in row} == set(stems("method")) - {
        "identity"
    }


def test_every_package_that_is_read_has_its_sha256_and_no_other() -> None:
    checksums = yaml.safe_load((CONF / "assets.yaml").read_text())
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in checksums.values())
    places: list[Path] = [
        p for d in ("alignmerge", "baselines", "eval", "conf") for p in (ROOT / d).rglob("*.*")
    ]
    text = "\n".join(p.read_text() for p in places if p.suffix in (".py", ".yaml"))
    assert set(re.findall(r"pypi:([\w.-]+==\d[\w.]*)/", text)) == set(checksums)
