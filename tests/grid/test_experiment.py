"""A whole experiment: results, resumption, failures, kills. Reads packages from PyPI (about 100 MB, once)."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from test_cli import Result, call, launch, start
from test_configs import composed

from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.progress import EVERY, Reporter
from alignmerge.engine.store import Store
from eval.grid.cells import Cell, measure
from eval.scorers.judge import ENCODER, HUMAN
from eval.scorers.toxicity import BILSTM, LINEAR
from tests.kills.kills import WORDS, alive

PLACE = "smoke, seed 0"
UNMERGED = ["base", "anchor", "expert:arithmetic", "expert:format"]
COLUMNS = {
    "refusal_rate", "over_refusal_rate", "helpfulness", "gibberish_rate", "judge_score", "toxicity_mean",
    "toxicity_rate", "toxicity_check", "aqi", "aqi_raw", "instruction_following", "reasoning", "gsm8k", "mmlu",
    "drift_anchor", "drift_base", "fisher_length", "l_geo", "l_geo_excess",
}  # fmt: skip
SECONDS = 1800
"""For a run: far more than it needs on an idle machine."""
FIGURES = {"aqi_by_layer", "dev_front", "drift_by_layer", "front", "heatmap", "tau_by_layer"}

RULE = ("refusal_rate", "over_refusal_rate", "safety", "utility", "balanced")
METHODS = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}


class Smoke(NamedTuple):
    """What one run of ``experiment=smoke`` left."""

    store: Path
    results: Path
    grid: dict[str, Any]
    said: Result

    @property
    def folder(self) -> Path:
        return self.results / "smoke"

    def manifest(self) -> dict[str, Any]:
        """What stands behind the rows of the one family with the one seed."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        found: dict[str, Any] = manifest["families"]["smoke"]["seed 0"]
        return found

    def rows(self) -> list[str]:
        """Every row of the tables, in order of the grid."""
        matched = [line["row"] for line in table(self.folder / "matched.csv") if line["reached"] == "True"]
        return [*UNMERGED, *self.grid["rows"], *matched]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store that holds the packages that the scorers read, or skip where they are not to be had."""
    root = tmp_path_factory.mktemp("packages") / "store"
    (root / "assets").mkdir(parents=True)
    for have in Path(os.environ.get("ALIGNMERGE_STORE", ROOT / "store"), "assets").glob("*/manifest.json"):
        (root / "assets" / have.parent.name).symlink_to(have.parent.resolve())
    assets = Assets(Store(root), yaml.safe_load((ROOT / "conf" / "assets.yaml").read_text()))
    try:
        for reference in (ENCODER, HUMAN, BILSTM, LINEAR):
            assets.path(reference, "package")
    except BadRequest as error:
        pytest.skip(f"the smoke experiment needs packages from PyPI: {error}")
    return root


def linked(source: Path, target: Path, stages: Iterable[str]) -> Path:
    """Give another store the finished artifacts of some stages, without copying bytes."""
    for stage in stages:
        for have in (source / stage).glob("*/manifest.json"):
            (target / stage).mkdir(parents=True, exist_ok=True)
            (target / stage / have.parent.name).symlink_to(have.parent.resolve())
    return target


@pytest.fixture(scope="module")
def smoke(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """Run the smoke experiment once, as a user does."""
    folder = tmp_path_factory.mktemp("smoke")
    linked(packages, folder / "store", ["assets"])
    said = launch("experiment=smoke", folder=folder, seconds=SECONDS)
    grid = composed("experiment=smoke")["grid"]
    return Smoke(folder / "store", folder / "results", grid, said)


@pytest.fixture
def at(smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> Smoke:
    """Work in the folder of the smoke run."""
    monkeypatch.chdir(smoke.results.parent)
    monkeypatch.setenv("ALIGNMERGE_STORE", str(smoke.store))
    return smoke


def whole(store: Path) -> list[str]:
    """Return the artifacts under their final names, each of which must have a manifest that can be read."""
    found = []
    for stage in store.iterdir():
        if stage.is_dir() and not stage.name.startswith(".") and stage.name not in ("failed", "assets"):
            for artifact in stage.iterdir():
                manifest = json.loads((artifact / "manifest.json").read_text())
                assert manifest["key"] == artifact.name and manifest["stage"] == stage.name
                if list(artifact.glob("*.safetensors")) and stage.name in ("models", "weights"):
                    assert Checkpoint.open(artifact, "model").digest == manifest["facts"]["digest"]
                found.append(f"{stage.name}/{artifact.name}")
    return found


# --- the whole of it -----------------------------------------------------------------------------------------------


def test_smoke_ends_well_and_says_where_the_results_are(smoke: Smoke) -> None:
    assert smoke.said.code == 0, smoke.said.err
    assert "report: results/smoke/report.html (" in smoke.said.out
    assert "Traceback" not in smoke.said.err and "failed" not in smoke.said.err


def test_progress_in_a_pipe_covers_the_whole_run_and_ends_at_its_total(smoke: Smoke) -> None:
    """Every task printed four lines, and time left was that of the stage alone."""
    lines = [line for line in smoke.said.err.splitlines() if "whole run" in line]
    assert lines == smoke.said.err.splitlines()
    counts = [tuple(map(int, re.findall(r"whole run (\d+)/(\d+)", line)[0])) for line in lines]
    assert counts == sorted(counts) and all(done <= total for done, total in counts)
    assert counts[-1][0] == counts[-1][1] == counts[0][1]  # what was forecast is what was done
    gone = re.search(r"; (\d+) (s|min) gone", lines[-1])
    assert gone is not None
    seconds = int(gone[1]) * {"s": 1, "min": 60}[gone[2]] + 60
    assert len(lines) <= 2 + seconds / EVERY


def test_a_missed_gate_informs_and_the_run_goes_on_to_its_report(at: Smoke) -> None:
    gate = "{row: anchor, column: refusal_rate, at_least: 1.0}"
    met = "{row: anchor, column: refusal_rate, at_most: 1.0}"
    said = call("experiment=smoke", "grid.name=gated", f"+grid.gates={{refuses: {gate}, any: {met}}}")
    assert said.code == 0, said.err
    assert "gates (dev split): 1 of 2 met" in said.out
    assert "gate missed: smoke, seed 0: refuses: refusal_rate of anchor: at least 1; measured 0." in said.out
    assert "smoke (gates missed: seed 0)" in (at.results / "gated" / "table.md").read_text()
    shutil.rmtree(at.results / "gated")


def test_smoke_leaves_every_file(smoke: Smoke) -> None:
    files = {
        "summary.csv",
        "claims.csv",
        "fronts.csv",
        "columns.csv",
        "comparisons.csv",
        "selection.csv",
        "matched.csv",
        "table.md",
        "table.tex",
        "report.html",
        "manifest.json",
        "figures",
    }
    assert {path.name for path in smoke.folder.iterdir()} == files
    for name in FIGURES:
        png, svg = (smoke.folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
        assert png.read_bytes().startswith(b"\x89PNG\r\n") and png.stat().st_size > 5000
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert [path.name for path in smoke.results.iterdir()] == ["smoke"]
    assert sorted(path.name for path in smoke.results.parent.iterdir()) == ["results", "store"]


def test_every_row_has_every_column(smoke: Smoke) -> None:
    have: dict[str, set[str]] = {}
    for line in table(smoke.folder / "summary.csv"):
        assert line["family"] == "smoke" and int(line["n"]) >= 1 and int(line["seeds"]) == 1
        assert line["column"] not in have.setdefault(line["row"], set())
        have[line["row"]].add(line["column"])
    assert sorted(have) == sorted(smoke.rows()) and len(have) >= 22  # and the matched rows that were reached
    assert set.intersection(*have.values()) >= COLUMNS
    for text in ((smoke.folder / "table.md").read_text(), (smoke.folder / "table.tex").read_text()):
        assert all(row.split("/")[0].split("_")[0] in text for row in have)


def number(text: str) -> float:
    return float(text or "nan")


def test_every_mean_is_that_of_the_scored_samples_that_the_manifest_points_to(smoke: Smoke) -> None:
    rows = smoke.manifest()["rows"]
    assert set(rows) == set(smoke.rows())
    lines = {(line["row"], line["column"]): line for line in table(smoke.folder / "summary.csv")}
    seen = set()
    for name, row in rows.items():
        for key in row["scores"].values():
            samples = pd.read_parquet(smoke.store / "scores" / key / "samples.parquet")
            once = samples[
                ~samples["id"].str.startswith("boot:") & ~samples["column"].str.endswith("_by_layer")
            ]
            for column in set(once["column"]):
                values = [float(value) for value in once.loc[once["column"] == column, "value"]]
                scored = [value for value in values if not math.isnan(value)]
                place = (name, column)
                assert int(lines[place]["unscored"]) == len(values) - len(scored)
                plain = sum(scored) / len(scored) if scored else math.nan
                assert number(lines[place]["mean"]) == pytest.approx(plain, rel=1e-4, abs=1e-9, nan_ok=True), (
                    place
                )
                seen.add(place)
    derived = {(row, "budget_violations") for row in smoke.rows()}  # counted over the replicates of AQI
    assert seen == set(lines) - derived


def test_manifest_names_models_merges_and_versions_and_nobody(smoke: Smoke) -> None:
    text = (smoke.folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["experiment"] == "smoke" and manifest["versions"]["torch"]
    assert list(manifest["families"]) == ["smoke"]
    manifest = smoke.manifest()
    assert set(manifest["models"]) == {"base", "anchor", "arithmetic", "format"}
    assert len(set(manifest["models"].values())) == 4
    for name, row in manifest["rows"].items():
        if name in UNMERGED:
            assert "merge" not in row
            continue
        record = json.loads((smoke.store / "merges" / row["merge"] / "manifest.json").read_text())
        assert record["facts"]["digest"] == row["facts"]["digest"]
        assert row["method"]["name"] in ("alignmerge", *METHODS)
    assert not [path for path in (str(Path.home()), str(ROOT), str(smoke.store)) if path in text]


def test_one_setting_of_each_tuned_row_is_selected_by_the_one_rule(smoke: Smoke) -> None:
    lines = table(smoke.folder / "selection.csv")
    tuned = {name: row["settings"] for name, row in smoke.grid["rows"].items() if row.get("settings")}
    assert sorted({line["row"] for line in lines}) == sorted(tuned)
    for name, settings in tuned.items():
        mine = [line for line in lines if line["row"] == name]
        spelt = {", ".join(f"{key}={value}" for key, value in setting.items()) for setting in settings}
        assert {line["setting"] for line in mine} == spelt and len(mine) == len(spelt)
        for line in mine:
            refusal, over, safety, utility, both = map(float, (line[key] for key in RULE))
            assert safety == pytest.approx(max(0.0, refusal - over), abs=1e-5)
            assert both == pytest.approx(2 * safety * utility / ((safety + utility) or 1), abs=1e-5)
        (chosen,) = (line for line in mine if line["selected"] == "True")
        assert float(chosen["balanced"]) == max(float(line["balanced"]) for line in mine)
    field, value = next(x["setting"] for x in lines if (x["row"], x["selected"]) == ("ties", "True")).split("=")
    assert smoke.manifest()["rows"]["ties"]["method"][field] == float(value)


def test_matched_rows_come_within_5_points_on_dev_or_have_no_numbers(smoke: Smoke) -> None:
    tried, rows = table(smoke.folder / "selection.csv"), smoke.manifest()["rows"]
    aliases = json.loads((smoke.folder / "manifest.json").read_text())["aliases"]["smoke"]
    lines = table(smoke.folder / "matched.csv")
    assert [line["row"] for line in lines] == ["interpolate/matched", "alignmerge/matched"]
    for line in lines:
        plain = line["row"].removesuffix("/matched")
        rates = [float(one["refusal_rate"]) for one in tried if one["row"] == aliases.get(plain, plain)]
        nearest = min(rates, key=lambda rate: abs(rate - 0.6))
        assert float(line["dev"]) == pytest.approx(nearest, abs=1e-5)
        assert (line["reached"] == "True") == (abs(nearest - 0.6) <= 0.05)
        assert (line["row"] in rows) == (line["reached"] == "True") == (line["test"] != "")


def test_an_alias_is_the_row_that_the_manifest_says_and_controls_have_its_setting(smoke: Smoke) -> None:
    rows = smoke.manifest()["rows"]
    reading = json.loads((smoke.folder / "manifest.json").read_text())["aliases"]["smoke"]["alignmerge"]
    assert rows["alignmerge"] == rows[reading]
    for name, changed in (("random", {"subspace_from": "random"}), ("no_budget", {"lambda_bud": 0.0})):
        assert rows[f"alignmerge/{name}"]["method"] == {**rows["alignmerge"]["method"], **changed}


def test_every_row_is_compared_with_the_average(smoke: Smoke) -> None:
    lines = table(smoke.folder / "comparisons.csv")
    assert {line["against"] for line in lines} == {"average"}
    assert {line["row"] for line in lines} == set(smoke.rows()) - {"average"}
    summary = {(line["row"], line["column"]): line for line in table(smoke.folder / "summary.csv")}
    compared = 0
    for line in lines:
        row, average = (summary[name, line["column"]] for name in (line["row"], "average"))
        if line["p"] == "":
            continue  # a column without a test, such as a diagnostic
        compared += 1
        assert 0 <= number(line["p"]) <= number(line["p_holm"]) <= 1
        if (
            row["unscored"] == average["unscored"] == "0"
        ):  # else the difference is that of the prompts both answered
            assert number(line["difference"]) == pytest.approx(
                number(row["mean"]) - number(average["mean"]), abs=2e-5
            )
    assert compared > 100


def test_store_is_left_in_order(smoke: Smoke) -> None:
    assert len(whole(smoke.store)) > 100
    assert not list((smoke.store / "weights").iterdir())  # dropped: they can be built again
    assert not list((smoke.store / ".staging").iterdir())
    assert not (smoke.store / "failed").exists()


# --- again ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first model that is loaded, and at the first task that is given to a worker."""

    def nothing(_: object, tasks: list[Any], stage: str) -> list[Any]:
        assert tasks == [], [task[0] for task in tasks]
        return []

    for place in ("alignmerge.engine.language", "alignmerge.zoo.zoo", "alignmerge.engine.context"):
        monkeypatch.setattr(f"{place}.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("eval.grid.workers.Workers.run", nothing)


@pytest.mark.parametrize("mode", ["run", "report"])
def test_again_loads_no_model_and_gives_the_same_bytes(mode: str, at: Smoke, idle: None) -> None:
    before = contents(at.folder)
    shutil.rmtree(at.folder)
    result = call("experiment=smoke", f"mode={mode}")
    assert result.code == 0, result.err
    after = contents(at.folder)
    for files in (before, after):
        files.pop("manifest.json")  # holds the commit, which may move between the runs
    assert after == before


def test_status_says_that_all_is_done(at: Smoke, idle: None) -> None:
    result = call("experiment=smoke", "mode=status")
    assert result.code == 0
    dev = len(table(at.folder / "selection.csv")) + 2  # and the experts beside the settings
    assert result.out.splitlines()[-1] == f"{dev + len(at.rows())} done, 0 failed, 0 missing"


def test_plan_of_models_that_are_made(at: Smoke, idle: None) -> None:
    result = call("experiment=smoke", "mode=plan")
    assert result.code == 0
    assert all(
        f"  {key}: zoo:" in result.out for key in ("base", "anchor", "experts.arithmetic", "experts.format")
    )
    assert "to be made" not in result.out


def test_score_gives_the_numbers_of_the_experiment(
    at: Smoke, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measure the base again, from a folder and in a store that has seen no score."""
    manifest = at.manifest()
    made = [(p.parent, json.loads(p.read_text())) for p in (at.store / "models").glob("*/manifest.json")]
    models = {one["facts"]["digest"]: folder for folder, one in made}
    linked(at.store, tmp_path / "store", ["models", "lessons", "corpus"])
    monkeypatch.setenv("ALIGNMERGE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    request = ["mode=score", f"model={models[manifest['models']['anchor']]}", "family=smoke", "corpus=toy"]
    result = call(*request, "scorer=[aqi,geometry,utility]", "out=scores.json")
    assert result.code == 0, result.err
    assert (tmp_path / "scores.tasks").is_dir() and "wrote scores.json" in result.out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["weights"] == manifest["models"]["anchor"]
    lines = {x["column"]: x for x in table(at.folder / "summary.csv") if x["row"] == "anchor"}
    assert {"aqi", "drift_anchor", "reasoning", "mmlu"} <= set(scores["columns"]) <= set(lines)
    for column, value in scores["columns"].items():
        mean, given = float(lines[column]["mean"] or "nan"), value["mean"]
        assert math.isnan(mean) if given is None else given == pytest.approx(mean, rel=1e-5, abs=1e-9), column
    assert scores["columns"]["drift_anchor"]["mean"] == 0.0


# --- failures and kills --------------------------------------------------------------------------------------------


def own_experiment(folder: Path, **rows: dict[str, Any]) -> list[str]:
    """Write a small experiment into a config folder of one's own, and return the words that choose it."""
    grid = {
        "name": "small",
        "title": "Small",
        "against": ["average"],
        "dev_scorers": {"judge": {}, "utility": {"tasks": ["format", "arithmetic"]}},
    }
    config = {
        "defaults": [
            {"override /family": "smoke"},
            {"override /corpus": "toy"},
            {"override /scorer": ["judge"]},
        ],
        "grid": {**grid, "rows": rows},
    }
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "small.yaml").write_text("# @package _global_\n" + yaml.safe_dump(config))
    return [f"--config-dir={folder}", "experiment=small"]


def fragile(cell: Cell, reporter: Reporter) -> None:
    """Measure a cell in a worker where one method is broken."""
    from baselines.interpolate import Interpolate

    def broken(self: Interpolate, ctx: object) -> None:
        raise ZeroDivisionError("broken for the test")

    Interpolate.fit = broken  # type: ignore[method-assign, assignment]
    measure(cell, reporter)


def test_failing_rows_leave_their_tracebacks_and_the_others_go_on(
    at: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = own_experiment(
        tmp_path / "conf",
        average={"method": "average"},
        walk={"method": "interpolate", "fixed": {"t": 0.123}},
        tuned={"method": "interpolate", "settings": [{"t": 0.21}, {"t": 0.22}]},
        scaled={"method": "task_arithmetic", "fixed": {"scale": 0.123}},
    )
    with monkeypatch.context() as patch:
        patch.setattr("eval.grid.experiment.measure", fragile)
        result = call(*chosen)
    assert result.code == 1
    labels = [f"test: {PLACE}: walk", f"dev: {PLACE}: tuned [t=0.21]", f"dev: {PLACE}: tuned [t=0.22]"]
    said = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    told = [line.partition(" (traceback: ")[0] for line in said]
    assert sorted(told) == sorted(f"failed: {x}: ZeroDivisionError: broken for the test" for x in labels)
    for line in said:
        record = json.loads(Path(line.rpartition("traceback: ")[2].rstrip(")")).read_text())
        assert "ZeroDivisionError: broken for the test" in record["traceback"]
    rows = {line["row"] for line in table(at.results / "small" / "summary.csv")}
    assert rows == {*UNMERGED, "average", "scaled"}
    records = [json.loads(path.read_text()) for path in (at.store / "failed").glob("cells-*.json")]
    assert {record["recipe"]["cell"] for record in records} == set(labels)
    for record in records:
        assert (
            "ZeroDivisionError: broken for the test" in record["traceback"]
            and "in broken" in record["traceback"]
        )
    status = call(*chosen, "mode=status")
    assert status.out.splitlines()[-1] == "6 done, 2 failed, 0 missing"  # what is reported is not chosen yet
    mended = call(*chosen)
    assert mended.code == 0, mended.err
    assert {line["row"] for line in table(at.results / "small" / "summary.csv")} == {*rows, "walk", "tuned"}
    assert not list((at.store / "failed").iterdir())
    assert call(*chosen, "mode=status").out.splitlines()[-1] == "12 done, 0 failed, 0 missing"


def test_every_setting_of_a_swept_row_is_reported(at: Smoke, tmp_path: Path) -> None:
    settings = [{"scale": 0.3}, {"scale": 0.5}, {"scale": 0.7}]
    chosen = own_experiment(
        tmp_path / "conf",
        average={"method": "average"},
        scaled={"method": "task_arithmetic", "settings": settings, "swept": True},
    )
    assert "0 settings on the dev split, then 8 rows on the test split" in call(*chosen, "mode=plan").out
    result = call(*chosen)
    assert result.code == 0, result.err
    folder, names = at.results / "small", [f"scaled@scale={setting['scale']}" for setting in settings]
    lines = table(folder / "summary.csv")
    assert list(dict.fromkeys(line["row"] for line in lines)) == [*UNMERGED, "average", *names]
    assert [(line["row"], line["value"]) for line in table(folder / "sweeps.csv")] == list(
        zip(names, ("0.3", "0.5", "0.7"), strict=True)
    )
    assert not (folder / "selection.csv").exists() and (folder / "figures" / "sweep_effects.png").is_file()
    manifest = json.loads((folder / "manifest.json").read_text())["families"]["smoke"]["seed 0"]["rows"]
    assert [manifest[name]["method"]["scale"] for name in names] == [0.3, 0.5, 0.7]
    chosen_by_smoke = at.manifest()["rows"][
        "task_arithmetic"
    ]  # one of the first two: the same merge, made once
    same = names[[0.3, 0.5].index(chosen_by_smoke["method"]["scale"])]
    assert manifest[same]["merge"] == chosen_by_smoke["merge"]
    assert call(*chosen, "mode=status").out.splitlines()[-1] == "8 done, 0 failed, 0 missing"


def in_training(store: Path) -> bool:
    """Whether the base is made and another model is under way."""
    return any((store / "models").glob("*/manifest.json")) and any((store / ".staging").glob("models-*"))


@pytest.mark.parametrize("moment", [in_training, lambda at: len(list((at / "replies").glob("*"))) >= 2])
def test_ctrl_c_ends_all_work_within_two_seconds_in_one_line(
    packages: Path, tmp_path: Path, moment: Callable[[Path], bool]
) -> None:
    """The queue of the stage went on, and 165 lines of traceback followed."""
    words = own_experiment(tmp_path / "conf", average={"method": "average"}, ties={"method": "ties"})
    linked(packages, tmp_path / "store", ["assets"])
    process = start(*words, folder=tmp_path)
    deadline = time.monotonic() + SECONDS
    try:
        while not moment(tmp_path / "store"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        while alive(process.pid):
            assert time.monotonic() - began < 2, "something outlives the run"
            time.sleep(0.02)
        assert time.monotonic() - began < 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    assert said == ["interrupted: what is finished is kept, and the same command goes on with the rest"]
    whole(tmp_path / "store")


def test_kills_at_any_moment_cost_nothing_and_two_runs_at_once_agree(smoke: Smoke) -> None:
    """The short form of ``make test-kills``: a kill each in training, merging, scoring and reporting."""
    command = [sys.executable, "-m", "tests.kills.kills", "--kills", "4", "--lender", str(smoke.store)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, whole, pair = done.stdout.splitlines()
    assert re.fullmatch(r"all +4 +\d +0 +4", whole) and pair == "two runs at once: the same digests as of one"


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Mount two small disks, for a store and for results."""
    places = tmp_path / "store", tmp_path / "results"
    for place in places:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield places
    finally:
        for place in places:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def resized(disk: Path, room: int) -> None:
    """Leave so many kilobytes on a tmpfs free."""
    used = shutil.disk_usage(disk).used // 1024
    subprocess.run(["mount", "-o", f"remount,size={used + room}k", str(disk)], check=True)


ROOMS = {"training": 300, "merging": 2650, "reporting": 20_000}
"""Kilobytes free in the store at the start of a run that stops there: a model, or a merge, has 580."""


def test_a_full_disk_is_one_line_at_every_stage_and_the_store_heals(
    smoke: Smoke, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    store, results = disks
    linked(smoke.store, store, ["assets", "calibration"])
    words = [*WORDS, "method=average", f"store={store}", f"results={results}"]
    for stage, room in ROOMS.items():
        resized(store, room)
        ended = launch(*words, folder=tmp_path, seconds=SECONDS)
        said = [line for line in ended.err.splitlines() if "whole run" not in line]
        assert ended.code == 1 and len(said) == 1, (stage, ended)
        full = results if stage == "reporting" else store
        assert said[0].startswith(f"failed: no room on the disk: {full}"), (stage, said)
        whole(store)
    resized(results, 20_000)
    ended = launch(*words, "mode=report", folder=tmp_path, seconds=SECONDS)
    assert ended.code == 0, ended.err
    assert len(list(results.glob("*/report.html"))) == 1 and not list((store / ".staging").iterdir())
