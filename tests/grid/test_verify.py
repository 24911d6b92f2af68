"""Committed results: made only when asked, made again from their manifest, compared at the end of every run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import MakesModel, Perturbs
from test_cli import Result, call, tree

from alignmerge.engine.progress import silent
from eval.grid.folders import replace_folder
from eval.grid.workers import Failure

Change = Callable[[dict[str, Any]], object]
ROWS = ["base", "anchor", "expert:math", "average", "ties"]
OR_NONE = "; allowed: a folder of results, or none"
README = "# Title\n\n<!-- results:small -->\nold\n<!-- /results:small -->\n"


def inline(_: object, tasks: list[Any], stage: str = "") -> list[Any]:
    """Stand in for the workers, whose processes take seconds to start."""
    for _label, function, arguments in tasks:
        function(*arguments, silent)
    return []


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.grid.workers.Workers.run", inline)


class Desk(NamedTuple):
    """A finished run of a small experiment on folders of one's own, with results that a test may change."""

    words: list[str]
    results: Path

    @property
    def folder(self) -> Path:
        return self.results / "small"

    @property
    def committed(self) -> Path:
        return self.results / "reference" / "small"

    def call(self, *words: str) -> Result:
        return call(*self.words, f"results={self.results}", *words)

    def record(self, change: Change, folder: Path | None = None) -> None:
        """Change the manifest of the run's results, or of another folder."""
        path = (folder or self.folder) / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: MakesModel, perturbed: Perturbs) -> Desk:
    folder = tmp_path_factory.mktemp("bench")
    base = tiny_model("llama")
    models = {
        "base": str(base),
        "anchor": str(perturbed(base, 1)),
        "experts": {"math": str(perturbed(base, 2))},
    }
    rows = {"average": {"method": "average"}, "ties": {"method": "ties", "fixed": {"density": 0.5}}}
    gate = {"row": "anchor", "column": "instruction_following", "at_least": 0.9}
    grid = {"name": "small", "title": "Small", "against": ["average"], "rows": rows, "gates": {"obeys": gate}}
    config = {
        "defaults": [{"override /family": "local"}, {"override /corpus": "toy"}, {"override /scorer": ["aqi"]}],
        "family": {**models, "dtype": "float32", "max_length": 128},
        "grid": {**grid, "dev_scorers": {"utility": {"tasks": ["format"]}}},
    }
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "small.yaml").write_text("# @package _global_\n" + yaml.safe_dump(config))
    desk = Desk(
        [f"--config-dir={folder / 'conf'}", "experiment=small", f"store={folder / 'store'}"], folder / "results"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.grid.workers.Workers.run", inline)
        said = desk.call()
    assert said.code == 0, said.err
    (desk.results / "said.txt").write_text(said.out)
    desk.record(lambda manifest: manifest.update(git={"commit": "0123456789", "dirty": False}))
    return desk


@pytest.fixture
def desk(finished: Desk, tmp_path: Path) -> Desk:
    shutil.copytree(finished.results, tmp_path / "results")
    return finished._replace(results=tmp_path / "results")


@pytest.fixture
def settled(desk: Desk) -> Desk:
    """With the results committed."""
    said = desk.call("mode=reference")
    assert said.code == 0, said.err
    return desk


def rows_of(manifest: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = manifest["families"]["local"]["seed 0"]["rows"]
    return rows


def last(said: Result) -> str:
    return said.out.splitlines()[-1]


# --- the end of a run ---


def test_a_run_ends_with_its_missed_gates_the_page_and_one_next_command(finished: Desk) -> None:
    lines = (finished.results / "said.txt").read_text().splitlines()
    start = "gate missed: local, seed 0: obeys: instruction_following of anchor: at least 0.9; measured 0.000 ["
    assert lines[-3].startswith(start)
    assert lines[-2].startswith(f"report: {finished.folder}/report.html")
    assert lines[-1].startswith("next: python run.py mode=merge family=local ")
    assert (finished.folder / "report.html").is_file()


def test_a_single_cell_ends_with_its_table_and_its_page(finished: Desk, tmp_path: Path) -> None:
    conf = finished.results.parent / "conf" / "experiment" / "small.yaml"
    family = yaml.safe_load(conf.read_text())["family"]
    words = [f"family.{key}={family[key]}" for key in ("base", "anchor", "dtype", "max_length")]
    words += [f"family.experts={{math: {family['experts']['math']}}}", "family=local", "corpus=toy"]
    said = call(*words, "method=average", "scorer=[aqi]", finished.words[-1], f"results={tmp_path}")
    assert said.code == 0, said.err
    (folder,) = tmp_path.iterdir()
    assert "│ average" in said.out and last(said).startswith(f"report: {folder}/report.html")
    assert not any(line.startswith(("next", "gate", "alignmerge")) for line in said.out.splitlines())


def test_a_run_says_how_many_of_the_committed_numbers_it_gives(settled: Desk) -> None:
    before = tree(settled.committed)
    said = settled.call()
    assert said.code == 0, said.err
    count = len((settled.folder / "summary.csv").read_text().splitlines()) - 1
    (line,) = (line for line in said.out.splitlines() if " numbers equal " in line)
    assert line.startswith(f"{count} of {count} numbers equal {settled.committed}, made on ")
    assert line.endswith(" (commit 0123456)")
    assert tree(settled.committed) == before


def test_a_number_that_differs_is_named_with_both_values(settled: Desk) -> None:
    path = settled.committed / "summary.csv"
    lines = path.read_text().splitlines()
    family, row, column, mean, low, high, *rest = lines[1].split(",")
    path.write_text(
        "\n".join([lines[0], ",".join([family, row, column, "0.123", low, high, *rest]), *lines[2:]])
    )
    said = settled.call()
    assert (
        f"  local, {row}, {column}: {mean} [{low}, {high}], in the reference 0.123 [{low}, {high}]" in said.out
    )
    assert f"{len(lines) - 2} of {len(lines) - 1} numbers equal" in said.out
    assert said.out.splitlines()[-1] == "next: python run.py mode=verify experiment=small"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["grid.name=reference"], "grid.name: 'reference'; allowed: a plain folder name, not reference"),
        (["grid.name=../small"], "grid.name: '../small'; allowed: a plain folder name, not reference"),
        (["grid.name=own"], "results: {results}/own exists and holds no results" + OR_NONE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["run", "report"])
def test_a_run_replaces_nothing_but_results(desk: Desk, mode: str, words: list[str], fault: str) -> None:
    (desk.results / "own").mkdir()
    (desk.results / "own" / "thesis.txt").write_text("not yours")
    before = tree(desk.results)
    said = desk.call(f"mode={mode}", *words)
    assert (said.code, said.errors) == (2, [fault.format(results=desk.results)])
    assert tree(desk.results) == before


def test_no_run_writes_among_the_committed_results(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.grid.folders.COMMITTED", desk.results)
    said = desk.call()
    assert (said.code, said.errors) == (
        2, [f"results: {desk.results}; allowed: a folder outside the committed results"]
    )  # fmt: skip


def test_results_that_two_publish_at_once_are_those_of_one(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(name)

    def publish(name: str) -> None:
        for _ in range(10):
            replace_folder(tmp_path / name, tmp_path / "results" / "small", {"of": name})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, "abcd"))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["small"]
    of = json.loads((tmp_path / "results" / "small" / "manifest.json").read_text())["of"]
    texts = [path.read_text() for path in (tmp_path / "results" / "small").glob("*.txt")]
    assert texts == [of] * 20


# --- mode=reference ---


def test_reference_copies_the_results_and_refreshes_the_readme_which_a_run_leaves_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = desk.results.parent
    (project / "README.md").write_text(README)
    (project / "docs").mkdir()
    monkeypatch.setattr("eval.grid.reference.ROOT", project)
    monkeypatch.setattr("eval.grid.reference.COMMITTED", desk.committed.parent)
    assert desk.call("mode=report").code == 0
    assert (project / "README.md").read_text() == README and not desk.committed.exists()
    desk.record(lambda manifest: manifest.update(git={"commit": "0123456789", "dirty": False}))
    said = desk.call("mode=reference")
    assert said.code == 0, said.err
    assert said.out == f"committed results in {desk.committed}\n"
    pictures = {name for name in tree(desk.folder) if name.endswith(".svg")}  # report.html holds them all
    assert pictures and tree(desk.committed).keys() == tree(desk.folder).keys() - pictures
    assert "## small\n" in (project / "docs" / "results.md").read_text()
    block = (project / "README.md").read_text()
    assert "| average" in block and "\nold\n" not in block
    assert desk.call().code == 0
    assert (project / "README.md").read_text() == block


def other_setting(manifest: dict[str, Any]) -> None:
    rows_of(manifest)["ties"]["method"]["density"] = 0.4


REFUSED: dict[str, tuple[Change, str]] = {
    "dirty": (
        lambda m: m["git"].update(dirty=True),
        "git: files were changed or new when the results were made; ",
    ),
    "no commit": (lambda m: m.update(git={}), "git: no commit is recorded; "),
    "kernels": (lambda m: m.update(overridden={"MKL_CBWR": "AVX512"}), "MKL_CBWR: AVX512; "),
    "statistics": (lambda m: m.update(statistics=0), "statistics: version 0; "),
    "scorer": (lambda m: m["scorers"]["aqi"].update(version=0), "scorer.aqi: not as in the results; "),
    "row": (lambda m: rows_of(m).pop("ties"), "results: missing: local, seed 0: ties; "),
    "scores": (lambda m: rows_of(m)["base"]["scores"].clear(), "results: missing: local, seed 0: base; "),
    "seed": (lambda m: m["families"]["local"].clear(), "results: missing: local, seed 0: base; "),
    "gate": (
        lambda m: m["families"]["local"]["seed 0"]["gates"].clear(),
        "results: missing: local, seed 0: gate obeys; ",
    ),
    "setting": (other_setting, "results: missing: local, seed 0: ties at a setting of the experiment; "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_results_that_others_could_not_make_again_are_refused(desk: Desk, name: str) -> None:
    change, fault = REFUSED[name]
    desk.record(change)
    said = desk.call("mode=reference")
    assert said.code == 2 and said.errors[0].startswith(fault)
    assert not desk.committed.exists()


def test_reference_without_results_and_without_an_experiment(desk: Desk) -> None:
    said = desk.call("mode=reference", "grid.name=other")
    allowed = "allowed: experiment=other without a mode first"
    assert (said.code, said.errors) == (2, [f"experiment: no results in {desk.results}/other; {allowed}"])
    for mode in ("reference", "verify"):
        said = call(f"mode={mode}")
        assert said.code == 2 and said.errors[0].startswith("experiment: not given; allowed: ")


# --- mode=verify ---


def test_everything_is_made_again_in_an_empty_store_and_equal(settled: Desk, tmp_path: Path) -> None:
    said = settled.call("mode=verify", f"store={tmp_path / 'store'}")
    assert said.code == 0, said.err
    made = len(ROWS) + 3 + 2  # a score each, three models, two merges
    assert last(said).startswith(f"verified: {made} of {made} artifacts equal {settled.committed}, made on ")
    assert len(list((tmp_path / "store" / "merges").iterdir())) == 2
    assert len(list((tmp_path / "store" / "scores").iterdir())) == len(ROWS)  # nothing of the dev split


def test_recorded_fields_are_made_not_those_of_the_config(settled: Desk) -> None:
    said = settled.call("mode=verify", "grid.rows.ties.fixed.density=0.9")
    assert said.code == 0 and last(said).startswith("verified: ")


DIFFERENT: dict[str, tuple[Change, str]] = {
    "model": (
        lambda m: m["families"]["local"]["seed 0"]["models"].update(base="f" * 64),
        "different: local seed 0 base: weights {} is not ffffffffffff",
    ),
    "merge": (
        lambda m: rows_of(m)["ties"]["facts"].update(digest="f" * 64),
        "different: local seed 0 ties: weights {} is not ffffffffffff",
    ),
    "score": (
        lambda m: rows_of(m)["ties"]["digests"].update(aqi="f" * 64),
        "different: local seed 0 ties aqi: samples {} is not ffffffffffff",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_an_artifact_that_is_not_the_committed_one_is_named(settled: Desk, name: str) -> None:
    change, line = DIFFERENT[name]
    settled.record(change, settled.committed)
    said = settled.call("mode=verify")
    assert said.code == 1
    begin, _, end = line.partition("{}")
    (found,) = (one for one in said.out.splitlines() if one.startswith("different: "))
    assert found.startswith(begin) and found.endswith(end)
    assert last(said).startswith("not verified: 1 of 10 artifacts are different or missing; ")


def without_ties(_: object, tasks: list[Any], stage: str = "") -> list[Failure]:
    """Work in this process, and fail at one row."""
    failing = [label for label, _, _ in tasks if label.endswith(": ties")]
    inline(_, [task for task in tasks if task[0] not in failing])
    return [Failure(label, RuntimeError("broken for the test")) for label in failing]


def test_what_cannot_be_made_is_missing(settled: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.grid.workers.Workers.run", without_ties)
    said = settled.call("mode=verify", f"store={tmp_path / 'store'}")
    assert said.code == 1 and said.err == "failed: test: local, seed 0: ties: broken for the test\n"
    assert last(said).startswith("not verified: 2 of 10 artifacts are different or missing; ")
    assert "missing: local seed 0 ties: weights " in said.out
    assert "missing: local seed 0 ties aqi: samples " in said.out


def elsewhere(manifest: dict[str, Any], column: str, drift: float) -> None:
    """As made on another class of machine, where a number of the ties row came out so much higher."""
    manifest["machine"] = {"device": "cpu", "kernels": "others"}
    row = rows_of(manifest)["ties"]
    row["facts"]["digest"] = row["digests"]["aqi"] = "f" * 64
    row["means"]["aqi"][column] += drift


@pytest.mark.parametrize(
    ("column", "drift", "code"), [("aqi", 0.04, 0), ("aqi", 0.06, 1), ("aqi_raw", 1e-9, 0), ("aqi_raw", 9, 1)]
)
def test_on_another_machine_means_may_differ_by_half_of_their_interval(
    settled: Desk, column: str, drift: float, code: int
) -> None:
    path = settled.committed / "summary.csv"
    lines = []
    for line in path.read_text().splitlines():
        parts = line.split(",")
        if parts[1:3] == ["ties", "aqi"]:
            parts[4:6] = ["0.3", "0.4"]
        lines.append(",".join(parts))
    path.write_text("\n".join(lines))
    settled.record(lambda manifest: elsewhere(manifest, column, drift), settled.committed)
    said = settled.call("mode=verify")
    assert said.code == code, said.err
    if code:
        assert column != "aqi" or "(may differ by 0.05)" in said.out
        assert last(said).startswith("not verified: 2 of 10 artifacts ")
    else:
        assert last(said).startswith("verified within tolerance: 8 of 10 artifacts equal, 2 near; ")


def test_equal_means_are_not_enough_where_bits_must_be_equal(settled: Desk) -> None:
    settled.record(
        lambda manifest: rows_of(manifest)["ties"]["digests"].update(aqi="f" * 64), settled.committed
    )
    assert settled.call("mode=verify").code == 1


def test_what_cannot_be_verified_is_said_plainly(settled: Desk) -> None:
    said = settled.call("mode=verify", "grid.name=other")
    assert said.code == 2 and said.errors[0].startswith("experiment: other has no committed results; allowed: ")
    said = settled.call("mode=verify", "seed=7")
    allowed = "none with a seed that the manifest names; allowed: local"
    assert (said.code, said.errors) == (2, [f"grid.families: {allowed}"])
    settled.record(lambda manifest: manifest.pop("statistics"), settled.committed)
    said = settled.call("mode=verify")
    assert said.code == 2 and "was made before digests of scores were recorded" in said.errors[0]
    (settled.committed / "manifest.json").write_text("{")
    for mode in ("run", "verify"):
        said = settled.call(f"mode={mode}")
        assert said.code == 2 and "manifest.json: cannot be read; allowed: " in said.errors[0]
