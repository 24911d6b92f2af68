"""The paper tier: its configs name public models and nothing invented, and its plan costs them without a network."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakesModel
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from test_configs import CONF, composed
from test_costs import PUBLISHED

from alignmerge.engine import hub
from alignmerge.engine.configuration import build
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.zoo.training import Recipe
from eval.grid.experiment import Experiment
from eval.grid.modes import experiment_of
from eval.grid.plan import print_plan
from eval.grid.work import jobs_of

PAPER = sorted((CONF / "family" / "paper").glob("*.yaml"))
GIB = 2**30
Local = Callable[..., Experiment]


def family_of(path: Path) -> Family:
    family: Family = build(yaml.safe_load(path.read_text()), "family", Family)
    return family


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty Hub cache, an empty lock, and nothing that could be asked."""
    from huggingface_hub import constants

    def unasked(*args: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "LOCK", tmp_path / "hub.lock.yaml")
    monkeypatch.setattr(hub, "_network", unasked)
    monkeypatch.delenv(hub.ONLINE, raising=False)
    monkeypatch.setenv("ALIGNMERGE_STORE", str(tmp_path / "store"))


def printed(experiment: Experiment) -> str:
    out = io.StringIO()
    print_plan(experiment, Console(file=out, width=160), workers=1)
    return out.getvalue()


def paper(tmp_path: Path) -> Experiment:
    return experiment_of({**composed("experiment=paper"), "store": str(tmp_path / "store")})


@pytest.fixture
def local(tmp_path: Path) -> Local:
    """Make an experiment on folders: ``local(family={...}, other={...})``, each with base, anchor and experts."""

    def make(**families: dict[str, Any]) -> Experiment:
        experiment = experiment_of({**composed("experiment=smoke"), "store": str(tmp_path / "store")})
        zoo = experiment.zoos[0]
        made = [Family(name=name, dtype="float32", **references) for name, references in families.items()]
        return replace(experiment, zoos=[replace(zoo, family=family) for family in made])

    return make


def test_there_are_five_families_and_the_grid_names_them() -> None:
    names = {f"paper/{path.stem}" for path in PAPER}
    assert len(names) == 5 and set(composed("experiment=paper")["grid"]["families"]) == names


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_family_names_public_models_and_no_invented_revision(path: Path) -> None:
    family = family_of(path)
    assert family.name == f"paper/{path.stem}"
    assert set(yaml.safe_load(path.read_text())) == {field.name for field in fields(Family)}
    remote = {key: ref for key, ref in family.references().items() if not ref.startswith("zoo:")}
    parsed = {key: hub.parse(reference, key) for key, reference in remote.items()}
    assert {reference.revision for reference in parsed.values()} == {"main"}
    assert parsed["base"].name in PUBLISHED
    config = json.loads((CONF / "architectures" / f"{parsed['base'].name}.json").read_text())
    assert config["model_type"] in {"llama": "llama3"}.get(path.stem, {path.stem, path.stem.rstrip("3")})
    stem = parsed["base"].name.rpartition("/")[2]
    if "anchor" in remote:  # MergeBench names its specialists after the model that they come from
        assert {key: r.name for key, r in parsed.items() if key not in ("base", "pretrained")} == {
            key: f"MergeBench/{stem}_{'safety' if key == 'anchor' else key.removeprefix('experts.')}"
            for key in (
                "anchor",
                "experts.instruction",
                "experts.math",
                "experts.coding",
                "experts.multilingual",
            )
        }
        assert not family.recipes
    else:
        assert {ref for ref in family.references().values() if ref.startswith("zoo:")} == {
            f"zoo:{name}" for name in family.recipes
        }
        assert all(isinstance(recipe, Recipe) and recipe.adapter for recipe in family.recipes.values())


def test_rows_are_those_of_the_other_tiers_and_bases_refuse() -> None:
    ours, tiny, real = (composed(f"experiment={name}")["grid"] for name in ("paper", "tiny", "smollm2"))
    methods, settings = (
        [{row: one.get(key) for row, one in grid["rows"].items()} for grid in (ours, tiny, real)]
        for key in ("method", "settings")
    )
    assert methods[0] == methods[1] == methods[2]
    different = [row for row in settings[0] if settings[0][row] != settings[1][row]]
    assert different == ["safemerge"]
    assert ours["dev_scorers"] == real["dev_scorers"]
    assert (ours["against"], ours["matched_refusal"]) == (real["against"], real["matched_refusal"])
    assert {gate["row"] for gate in ours["gates"].values()} == {
        "anchor",
        "base",
    }  # no row that some family lacks
    assert ours["gates"]["the base refuses"] == {"row": "base", "column": "refusal_rate", "at_least": 0.7}
    assert ours["seeds"] == 3


def test_plan_of_the_paper_tier_costs_it_without_a_network_and_writes_nothing(tmp_path: Path) -> None:
    text = printed(paper(tmp_path))
    for name, (parameters, _) in PUBLISHED.items():
        assert f"{parameters:,} parameters (conf/architectures/{name}.json)" in text
        assert f"base: hub:{name}@main (to be fetched, no commit locked yet)" in text
    assert text.count("anchor: zoo:anchor (to be made)") == 3
    assert not (tmp_path / "store").exists() and not hub.LOCK.exists()
    assert re.search(
        r"│ paper/mistral +│ +9 of 9 │ +(\d+) of \1 │ +- │ +- │\n", text
    )  # nothing recorded: no hours
    assert "not in the hours (no time recorded yet" in text and "median" not in text
    cells = {row[0]: row[1:] for row in re.findall(r"│ (\S+) +│ +(\S+) │ +(\S+) │ +(\S+) │ +(\S+) │\n", text)}
    llama, mistral = cells["paper/llama3"], cells["paper/mistral"]
    assert (
        llama[0] == f"{7 * 2 * 8_030_261_248 / GIB:.1f}" and llama[1] == "-"
    )  # base, theta_0, anchor, four experts
    assert mistral[0] == f"{2 * 2 * 7_248_023_552 / GIB:.1f}"
    assert mistral[1] == f"{3 * 3 * 4 * 7_248_023_552 / GIB:.1f}"  # three seeds of three models in fp32


def test_locked_commit_and_local_header_are_shown(tmp_path: Path, tiny_model: MakesModel, local: Local) -> None:
    model = str(tiny_model("llama"))
    hub.LOCK.write_text(f"acme/x@main: {'ab' * 20}\n")
    text = printed(local(one={"base": model, "anchor": model, "experts": {"far": "hub:acme/x@main"}}))
    assert "(headers; 2 of 3 models are here and agree)" in text
    assert f"  base: local:{Path(model).name} (here)" in text and model not in text
    assert "  experts.far: hub:acme/x@main (to be fetched, commit abababababab)" in text


def test_shapes_that_nothing_tells_are_said_to_be_unknown(local: Local) -> None:
    text = printed(
        local(one={"base": "hub:acme/x@main", "anchor": "hub:acme/y@main", "experts": {"z": "hub:a/z@main"}})
    )
    assert "one: size not known yet (the base is not here yet)" in text and "Disk" not in text


def test_conflicts_of_all_families_come_at_once(tiny_model: MakesModel, local: Local) -> None:
    llama, mistral = str(tiny_model("llama")), str(tiny_model("mistral"))
    experiment = local(
        one={"base": llama, "anchor": mistral, "experts": {"far": "hub:acme/x@main"}},
        two={"base": mistral, "anchor": mistral, "experts": {"odd": llama, "gone": "/nowhere"}},
        three={"base": llama, "anchor": llama, "experts": {"odd": mistral}},
    )
    with pytest.raises(BadRequest) as caught:
        print_plan(experiment, Console(file=io.StringIO()), workers=1)
    keys = [fault.where.split(":")[0] for fault in caught.value.faults]
    assert keys == ["family.anchor"] * 2 + ["family.experts.gone"] + ["family.experts.odd"] * 2


def test_what_the_hub_would_refuse_is_asked_where_it_is_on(
    tiny_model: MakesModel, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def refusals(references: dict[str, hub.Reference]) -> list[Fault]:
        asked.append([f"{where} {reference.key}" for where, reference in references.items()])
        return [Fault(where, f"no {reference.name}", "x") for where, reference in references.items()]

    model = str(tiny_model("llama"))
    one = {"base": model, "anchor": "hub:acme/a@main", "experts": {"x": "hub:acme/x@v1"}}
    experiment = local(
        one=one, two={**one, "anchor": model}, three={**one, "anchor": model, "experts": {"x": model}}
    )
    monkeypatch.setattr(hub, "refusals", refusals)
    printed(experiment)
    assert not asked
    monkeypatch.setenv(hub.ONLINE, "1")
    with pytest.raises(BadRequest) as caught:
        printed(experiment)
    assert asked == [
        ["family.anchor acme/a@main", "family.experts.x acme/x@v1"],
        ["family.experts.x acme/x@v1"],
    ]
    assert [fault.given for fault in caught.value.faults] == ["no acme/a", "no acme/x"]  # each fault once


def test_every_cell_is_in_one_job(tmp_path: Path) -> None:
    experiment = paper(tmp_path)
    jobs = {(job.zoo.family.name, job.zoo.seed): job.cells for job in jobs_of(experiment)}
    assert len(jobs) == 15
    settings = sum(len(row.settings) for row in experiment.grid.rows.values())
    rows, models = len(experiment.grid.row_names()), {"paper/llama3": 7, "paper/mistral": 5}
    for family, count in models.items():
        first = jobs[family, 0]
        assert len([cell for cell in first if cell.split == "test"]) == rows + count
        assert len([cell for cell in first if cell.split == "dev"]) == settings + count
    assert all(cell.merger is not None and cell.merger.inputs.seed for cell in jobs["paper/llama3", 1])
    assert len([c for c in jobs["paper/mistral", 2] if c.split == "test"]) == rows + 5  # models of its own


def test_slurm_launcher_composes_with_its_plugin(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'alignmerge[cluster]'")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=main", f"store={tmp_path}"]
        config = compose("config", overrides, return_hydra_config=True)
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    assert launcher["_target_"].endswith("SlurmLauncher") and launcher["partition"] == "main"
    assert (
        launcher["submitit_folder"] == f"{tmp_path}/.sweeps/.submitit/%j"
    )  # scripts and logs: beside the store
    assert launcher["cpus_per_task"] >= max(family_of(path).threads for path in PAPER)
