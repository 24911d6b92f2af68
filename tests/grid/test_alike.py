"""A row is what its name says: no two rows of a table are one model, and none has its defining part switched off."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from test_reference import STALE

from alignmerge.engine.configuration import build, choices
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from eval.grid.alike import rows_alike
from eval.grid.folders import COMMITTED

MANIFESTS: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text()) for path in sorted(COMMITTED.glob("*/manifest.json"))
}
MET = "tiny/mistral, seed 1: the shield alone meets the budget there, so that it moves nothing"
ACCEPTED: dict[str, dict[tuple[str, str], str]] = {
    "tiny": {
        ("alignmerge", "alignmerge/no_budget"): MET,
        ("alignmerge/no_budget", "alignmerge/reference_anchor"): MET,
    }
}
"""Committed results -> pairs of rows that are one model there, and why that is a finding and not a fault."""


def row(digest: str, **means: float) -> dict[str, Any]:
    return {"facts": {"digest": digest}, "means": {"judge": means}}


def manifest(aliases: dict[str, str] | None = None, *places: dict[str, Any]) -> dict[str, Any]:
    seeds = {f"seed {number}": {"rows": rows} for number, rows in enumerate(places)}
    return {"families": {"one": {"note": "", **seeds}}, "aliases": {"one": aliases or {}}}


def test_equal_weights_are_found_in_any_family_and_seed() -> None:
    first = {
        "a": row("1", x=0.1),
        "b": row("2", x=0.9),
        "base": {"means": {"judge": {"x": 0.5}}, "model": "base"},
    }
    second = {
        "a": row("3", x=0.2),
        "b": row("3", x=0.2),
        "base": {"means": {"judge": {"x": 0.5}}, "model": "base"},
    }
    assert rows_alike(manifest(None, first, second)) == {("a", "b"): "the same weights in one, seed 1"}
    assert rows_alike(manifest(None, first)) == {}


def test_rows_within_a_thousandth_in_every_column_are_one() -> None:
    """Means over two seeds: a and b differ by .0005; c by .002 in one column; d by .05 of 100."""
    first = {"a": row("1", x=0.10, y=100.0), "b": row("2", x=0.13, y=100.0), "c": row("3", x=0.1, y=100.0)}
    second = {"a": row("4", x=0.20, y=100.0), "b": row("5", x=0.171, y=100.0), "c": row("6", x=0.204, y=100.0)}
    first["d"], second["d"] = row("7", x=0.1, y=100.05), row("8", x=0.2, y=100.05)
    found = rows_alike(manifest(None, first, second))
    assert set(found) == {("a", "b"), ("a", "d"), ("b", "d")}
    assert set(found.values()) == {"every mean is the same within 0.001"}


def test_an_alias_and_a_matched_row_may_be_what_they_stand_for() -> None:
    rows = {name: row("1", x=0.1) for name in ("best", "best/matched", "first", "first/matched", "other")}
    found = rows_alike(manifest({"best": "first"}, rows))
    assert set(found) == {(name, "other") for name in list(rows)[:4]}


def test_an_anchor_that_is_called_a_merge_is_found() -> None:
    """As Hammoud's MergeAlign was: .9996 of its weight on the anchor, and printed as the best merge."""
    rows = {
        "anchor": {"means": {"judge": {"x": 0.98}}, "model": "anchor"},
        "mergealign/hammoud": row("1", x=0.9804),
    }
    assert set(rows_alike(manifest(None, rows))) == {("anchor", "mergealign/hammoud")}


FRESH = [name for name in MANIFESTS if name not in STALE]


@pytest.mark.parametrize("name", FRESH)
def test_no_two_rows_of_committed_results_are_one_model(name: str) -> None:
    found = rows_alike(MANIFESTS[name])
    assert {pair: where for pair, where in found.items() if pair not in ACCEPTED.get(name, {})} == {}


def merger_of(recorded: dict[str, Any]) -> Merger:
    """Build the method of a row from the fields that its manifest recorded."""
    files = choices(ROOT / "conf" / "method")
    node = {**yaml.safe_load(files[recorded["name"]].read_text()), **recorded}
    del node["name"]
    merger: Merger = build(node, "method", Merger)
    return merger


@pytest.mark.parametrize("name", FRESH)
def test_no_selected_setting_of_committed_results_switches_its_method_off(name: str) -> None:
    found = {}
    for family, parts in MANIFESTS[name]["families"].items():
        for seed, part in parts.items():
            rows = part["rows"] if seed.startswith("seed ") else {}
            for row_name, one in rows.items():
                control = row_name == "alignmerge/no_align"  # what its name says
                if "method" in one and not control:
                    found[family, seed, row_name] = merger_of(one["method"]).switched_off(one["facts"])
    assert {place: why for place, why in found.items() if why} == {}
