"""Work: what is missing is counted once, and takes as long as finished artifacts say."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import MakesModel
from rich.console import Console
from test_configs import composed

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.family import Family
from alignmerge.engine.merger import Merger
from alignmerge.engine.store import Artifact
from alignmerge.method import AlignMerge
from baselines.average import Average
from baselines.fisher_soup import FisherSoup
from baselines.gradient_step import GradientStep
from eval.grid import work
from eval.grid.cells import Cell, CellResult
from eval.grid.experiment import Experiment
from eval.grid.modes import experiment_of
from eval.grid.plan import needs_of, print_plan, shapes
from eval.grid.work import Job, jobs_of, present, recorded, seconds_of, statistics_of, times_for, work_of
from eval.scorers.geometry import Geometry

Records = Callable[..., None]
SCORER = "judge"
KINDS = {"models", "merges", "statistics"}


def test_no_other_method_keeps_bases() -> None:
    assert AlignMerge(estimator="kronecker").kept_sides == ("input", "output")
    assert AlignMerge(estimator="kronecker", factors="input").kept_sides == ("input",)
    assert AlignMerge().kept_sides == Average().kept_sides == FisherSoup().kept_sides == ()
    assert Geometry().kept_sides == ("input",)


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: MakesModel) -> Experiment:
    """The rows of smoke on a family of local models, and an empty store."""
    made = experiment_of({**composed("experiment=smoke"), "store": str(tmp_path / "store")})
    model = str(tiny_model("llama"))
    family = Family(name="one", dtype="float32", base=model, anchor=model, experts={"x": model, "y": model})
    return replace(made, zoos=[replace(made.zoos[0], family=family)])


@pytest.fixture
def record(tmp_path: Path) -> Records:
    """Put a manifest into the store: ``record("fisher", 2.5, family="one")``."""

    def put(stage: str, seconds: float, recipe: dict[str, Any] | None = None, **facts: Any) -> None:
        folder = tmp_path / "store" / stage
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"stage": stage, "recipe": recipe or {}, "facts": {"seconds": seconds, **facts}}
        manifest["provenance"] = {"system": "Linux", "machine": "abacus"}
        artifact = folder / f"{len(list(folder.iterdir())):03}"
        artifact.mkdir()
        (artifact / "manifest.json").write_text(json.dumps(manifest))

    return put


def test_recorded_times_by_kind_and_family(tmp_path: Path, record: Records) -> None:
    record("models", 9, {"recipe": {}}, family="a")
    record("models", 0.1, {"average of": []}, family="a")  # a method's own intermediate: no model of the family
    record("merges", 2, family="a", parameters=100)
    record("merges", 3, family="b")
    record("gram", 4, family="b")
    record("nll", 5)  # by an older version, which did not say whose it is
    record("scores", 6, {"scorer": SCORER, "split": "dev"}, family="a")
    record("replies", 7, family="a")  # within the scores
    times = recorded(tmp_path / "store")
    assert {tuple(row) for row in times[["kind", "family", "seconds", "machine"]].to_numpy()} == {
        ("models", "a", 9, "Linux abacus"),
        ("merges", "a", 2, "Linux abacus"),
        ("merges", "b", 3, "Linux abacus"),
        ("statistics", "b", 4, "Linux abacus"),
        ("scores by judge on dev", "a", 6, "Linux abacus"),
    }
    sizes = times.groupby("family")["parameters"]
    assert set(sizes.get_group("a")) == {100} and sizes.get_group("b").isna().all()


@pytest.mark.parametrize("content", ["", '{"facts": {"seco', "[]", '{"facts": {}}'])
def test_a_damaged_manifest_tells_no_time_and_stops_no_plan(
    content: str, tmp_path: Path, record: Records
) -> None:
    record("merges", 2, family="a")
    record("merges", 3, family="a")
    (tmp_path / "store" / "merges" / "000" / "manifest.json").write_text(content)
    assert list(recorded(tmp_path / "store")["seconds"]) == [3]


def test_no_more_of_a_stage_is_read_than_a_sample(
    tmp_path: Path, record: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in range(5):
        record("merges", seconds, family="a")
        record("fisher", seconds, family="a")
    monkeypatch.setattr(work, "SAMPLE", 3)
    assert recorded(tmp_path / "store")["kind"].value_counts().to_dict() == {"merges": 3, "statistics": 3}


def test_store_without_times(tmp_path: Path) -> None:
    times = times_for(recorded(tmp_path / "store"), KINDS, "a", 10)
    assert times.empty and seconds_of(times, {"merges": 3}) == 0


def known(*rows: tuple[str, str, float | None, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["kind", "family", "parameters", "seconds"])


def test_own_times_come_before_those_of_others() -> None:
    times = known(
        ("merges", "a", 10, 1), ("merges", "a", 10, 3), ("merges", "b", 20, 100), ("models", "b", 20, 8)
    )
    mine = times_for(times, KINDS, "a", 10)
    assert sorted(mine["seconds"]) == [1, 3, 4]  # own merges, and b's model at half the size
    assert seconds_of(mine, {"merges": 5, "models": 2, "statistics": 8}) == 5 * 2 + 2 * 4
    assert seconds_of(times_for(times, ["merges"], "a", None), {"merges": 1}) == 2


@pytest.mark.parametrize(("size", "source", "seconds"), [(30, "b", 15), (300, "c", 30), (3, "b", 1.5)])
def test_times_of_the_family_nearest_in_size_are_scaled(size: int, source: str, seconds: float) -> None:
    times = known(("merges", "b", 20, 10), ("merges", "c", 1000, 100), ("merges", "d", None, 7))
    mine = times_for(times, KINDS, "a", size)
    assert list(mine["family"]) == [source] and seconds_of(mine, {"merges": 1}) == pytest.approx(seconds)
    assert times_for(times, KINDS, "a", None).empty  # no size to scale by
    assert times_for(times[times["family"] == "d"], KINDS, "a", size).empty


def cells_of(experiment: Experiment, *mergers: Merger, scored: bool = False) -> list[Cell]:
    scorers = [Geometry()] if scored else []
    return [Cell(experiment.zoos[0], "row", "", "test", scorers, merger=merger) for merger in mergers]


def test_statistics_are_those_that_methods_and_scorers_declare(experiment: Experiment) -> None:
    def statistics(*mergers: Merger, scored: bool = False) -> tuple[Any, Any]:
        return statistics_of(experiment.zoos[0], cells_of(experiment, *mergers, scored=scored))

    assert statistics(Average()) == (set(), set())
    own = {("anchor", "own:anchor"), ("x", "own:x"), ("y", "own:y")}
    assert statistics(FisherSoup()) == (own, set())
    seen = {("base", "alignment"), ("base", "metric")}
    assert statistics(AlignMerge(estimator="kronecker")) == (seen, {("base", "input"), ("base", "output")})
    moved = {("barycentre", name) for _, name in seen}
    assert statistics(AlignMerge(), AlignMerge(at="barycentre"))[0] == seen | moved
    assert statistics(AlignMerge(), AlignMerge(lambda_align=2.0)) == statistics(AlignMerge())
    assert statistics(AlignMerge(metric="per_expert"))[0] == seen | own
    assert statistics(GradientStep()) == (moved, set())
    assert statistics(Average(), scored=True)[1] == {("base", "input")}


def test_what_comes_to_the_same_is_counted_once(experiment: Experiment) -> None:
    cells = cells_of(experiment, Average(), FisherSoup(), AlignMerge(estimator="kronecker"), scored=True)
    once = work_of(experiment, [Job(experiment.zoos[0], cells)])
    twice = work_of(experiment, [Job(experiment.zoos[0], [*cells, *cells])])
    assert once == twice and once.cells == (3, 3) and once.models == (0, 0)
    assert once.missing == {"merges": 3, "statistics": 8, "scores by geometry on test": 3}


def test_seeds_that_share_a_model_make_it_once(tmp_path: Path) -> None:
    experiment = experiment_of({**composed("experiment=tiny"), "store": str(tmp_path / "store")})
    jobs = [job for job in jobs_of(experiment) if job.zoo.family.name == "tiny/llama3"]
    assert len(jobs) == 3
    assert work_of(experiment, jobs).models == (16, 16)  # one start of all; base, anchor, three experts a seed


def test_finished_cells_are_not_missing(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Experiment, cells: list[Cell]) -> list[CellResult]:
        return [CellResult(cell, {}, None) for cell in cells if isinstance(cell.merger, Average)]

    monkeypatch.setattr(Experiment, "read", read)
    found = work_of(experiment, [Job(experiment.zoos[0], cells_of(experiment, Average(), FisherSoup()))])
    assert found.cells == (1, 2) and found.missing == {"merges": 1, "statistics": 3}


def test_disk_of_statistics_does_not_count_them_twice(experiment: Experiment) -> None:
    (job,) = jobs_of(experiment)
    tensors, _ = shapes(job.zoo, present(job.zoo))
    assert tensors is not None

    def kept(cells: list[Cell]) -> int:
        return needs_of([job._replace(cells=cells)], tensors, present(job.zoo))[0][2]

    models = [cell for cell in job.cells if cell.merger is None]
    assert 0 < kept(models) < kept(job.cells) == kept([*job.cells, *job.cells])  # geometry alone keeps some


def printed(experiment: Experiment, workers: int) -> str:
    out = io.StringIO()
    print_plan(experiment, Console(file=out, width=160), workers)
    return out.getvalue()


def test_plan_says_what_hours_rest_on(experiment: Experiment, record: Records) -> None:
    assert "not in the hours (no time recorded yet" in printed(experiment, 1)
    record("merges", 36_000, family="other", parameters=2 * 17_000)
    text = printed(experiment, 2)
    merges = work_of(experiment, jobs_of(experiment)).missing["merges"]
    tensors, _ = shapes(experiment.zoos[0], present(experiment.zoos[0]))
    assert tensors is not None
    hours = 10 * merges * tensors.parameters / 34_000 / 2
    assert f"> {hours:.2f} │ scaled from other, 0.03 M parameters │" in text
    assert "the median seconds that 1 finished artifacts recorded (Linux abacus), with workers=2" in text
    record("merges", 360, family="one")
    assert re.search(rf"> {0.1 * merges:.2f} │ +its own │", printed(experiment, 1))


def test_a_frozen_zoo_looks_for_a_model_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell asked again, and opened its folder and those of all ancestors: half the time of ``mode=status``."""
    (zoo,) = experiment.zoos
    zoo.models()
    frozen, opened = zoo.frozen(), []
    real = Checkpoint.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda *given: opened.append(given) or real(*given)))
    found = [frozen.source("anchor") for _ in range(3)]
    once = len(opened)
    assert found[0] == found[1] == found[2] == zoo.source("anchor") and once >= 1
    assert len(opened) == 2 * once


def test_values_are_those_of_the_whole_samples(tmp_path: Path, experiment: Experiment) -> None:
    scores = {}
    for number, name in enumerate(("one", "two")):
        frame = pd.DataFrame({"id": ["a", "b"], "column": [name, "x"], "value": [number, 0.5], "detail": "{}"})
        (tmp_path / name).mkdir()
        frame.astype({"value": float}).to_parquet(tmp_path / name / "samples.parquet")
        scores[name] = Artifact(name, tmp_path / name, {})
    result = CellResult(experiment.dev_cells()[0], scores, None)
    assert result.values.equals(result.frame[["column", "value"]])
