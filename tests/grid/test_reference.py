"""The committed results: each was made with the present statistics, scorers and methods, or is named here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from alignmerge.engine.configuration import build, choices
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from eval import stats
from eval.grid.folders import COMMITTED, word_of
from eval.scorers.interface import Scorer

FIRST = "of the first edition: made before statistics and digests were recorded"
STALE = {
    "smollm2": FIRST,
}
"""Committed results that nobody has made anew yet, and why: the list only shrinks."""
MANIFESTS: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text()) for path in sorted(COMMITTED.glob("*/manifest.json"))
}
FRESH = [name for name in MANIFESTS if name not in STALE]


def versions(group: str, kind: type) -> dict[str, int]:
    """Return name -> version of the present scorers or methods."""
    found = {}
    for name, path in choices(ROOT / "conf" / group).items():
        node = yaml.safe_load(path.read_text())
        one = build(node.get(name, node), name, kind)
        found[one.name] = one.version
    return found


def behind(manifest: dict[str, Any]) -> list[str]:
    """Return what a manifest was made with that the code has left behind."""
    found = []
    if manifest["statistics"] != stats.VERSION:
        found.append(f"statistics {manifest['statistics']}, now {stats.VERSION}")
    scorers = {name: scorer["version"] for name, scorer in manifest["scorers"].items()}
    present = {**versions("scorer", Scorer), **versions("method", Merger)}
    for name, version in {**scorers, **manifest["methods"]}.items():
        if present.get(name) != version:
            found.append(f"{name} {version}, now {present.get(name)}")
    return found


def test_the_stale_ones_are_named_and_no_others() -> None:
    assert [name for name, manifest in MANIFESTS.items() if "statistics" not in manifest] == sorted(STALE)


def test_no_committed_result_is_behind_the_code() -> None:
    """Make those that are anew: python run.py experiment=NAME, then make reference EXPERIMENT=NAME."""
    found = {name: behind(MANIFESTS[name]) for name in FRESH}
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_results_that_are_behind_are_seen() -> None:
    scorers = {"aqi": {"version": versions("scorer", Scorer)["aqi"]}, "judge": {"version": 0}}
    made = {
        "statistics": 0,
        "scorers": scorers,
        "methods": {"ties": versions("method", Merger)["ties"], "gone": 1},
    }
    found = behind(made)
    assert found[0] == f"statistics 0, now {stats.VERSION}" and found[1].startswith("judge 0, now ")
    assert found[2:] == ["gone 1, now None"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_committed_results_are_of_a_commit_and_of_an_experiment(name: str) -> None:
    manifest = MANIFESTS[name]
    assert manifest["experiment"] == name and manifest["git"]["commit"]
    assert not manifest.get("overridden") and (name not in FRESH or not manifest["git"]["dirty"])
    assert word_of(name) in choices(ROOT / "conf" / "experiment")
    assert (Path(COMMITTED) / name / "summary.csv").is_file()


@pytest.mark.parametrize("name", FRESH)
def test_every_committed_row_has_a_digest_of_each_score(name: str) -> None:
    for family in MANIFESTS[name]["families"].values():
        for seed, facts in family.items():
            if seed.startswith("seed "):
                for row in facts["rows"].values():
                    assert row["digests"].keys() == row["scores"].keys() == row["means"].keys()


def test_samples_have_one_digest_whatever_file_they_lie_in(tmp_path: Path) -> None:
    from eval.grid.record import digest_of

    nan, other = float("nan"), -float("nan")
    samples = pd.DataFrame({"id": ["a", "b"], "value": [0.1 + 0.2, nan], "detail": ["{}", "{}"]})
    samples.to_parquet(tmp_path / "one.parquet", compression="gzip")
    assert digest_of(pd.read_parquet(tmp_path / "one.parquet")) == digest_of(samples)
    assert digest_of(samples.assign(value=[0.1 + 0.2, other])) == digest_of(samples)
    for change in ({"value": [0.3, nan]}, {"id": ["a", "c"]}, {"id": ["ab", ""]}, {"detail": ["{}", "{ }"]}):
        assert digest_of(samples.assign(**change)) != digest_of(samples)
    assert digest_of(samples.iloc[::-1]) != digest_of(samples)
