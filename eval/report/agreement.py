"""Whether two folders of results say the same: number by number, as far as they can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from eval.stats import VERSION
from eval.stats.derived import DERIVED
from eval.stats.estimates import ALL

NAMED = 3
"""How many differences are spelled out before the rest is counted."""
_KEY = ["family", "row", "column"]
_NUMBER = ["mean", "ci_low", "ci_high"]


class Difference(NamedTuple):
    """One number that the folders have in common and do not agree on: an estimate with its interval."""

    name: str
    here: str
    there: str


class Agreement(NamedTuple):
    """What came of a comparison."""

    equal: int
    different: Sequence[Difference]
    left_out: Sequence[str]
    """What was not compared, and why."""

    @property
    def compared(self) -> int:
        """How many numbers both folders have."""
        return self.equal + len(self.different)


def agreement(here: Path, there: Path) -> Agreement:
    """Compare the numbers of two results folders by the text of ``summary.csv``.

    A number is one line of it: family, row, column. Families are compared that have the same seeds and prompts
    in both, and columns of scorers with the same settings.
    """
    ours, theirs = _manifest(here), _manifest(there)
    families, left_out = _comparable(ours, theirs)
    columns = _other_columns(ours, theirs)
    if columns:
        left_out.append(f"the columns {', '.join(columns)}: their scorers have other settings")
    left, right = _numbers(here, families, columns), _numbers(there, families, columns)
    both = left.index.intersection(right.index)
    for only, where in ((left, "the reference"), (right, "this run")):
        missing = only.index.difference(both)
        if len(missing) and len(both):
            left_out.append(f"{len(missing):,} numbers that {where} lacks (rows {_first_rows(missing)})")
    different = []
    for place in both[left[both].to_numpy() != right[both].to_numpy()]:
        different.append(Difference(", ".join(place), left[place], right[place]))
    return Agreement(len(both) - len(different), different, left_out)


def said(found: Agreement, there: Path) -> list[str]:
    """Say what came of a comparison with the committed results in ``there``, in lines to print."""
    manifest = _manifest(there)
    commit = str(manifest.get("git", {}).get("commit", "unknown"))[:7]
    made = f"{there}, made on {manifest.get('cpu', 'a CPU that is not recorded')} (commit {commit})"
    if not found.compared:
        return [f"no number can be compared with {made}: {'; '.join(found.left_out)}"]
    lines = [f"{found.equal:,} of {found.compared:,} numbers equal {made}"]
    for one in found.different[:NAMED]:
        lines.append(f"  {one.name}: {one.here}, in the reference {one.there}")
    if len(found.different) > NAMED:
        lines.append(f"  and {len(found.different) - NAMED:,} more")
    lines += [f"  not compared: {reason}" for reason in found.left_out]
    if manifest.get("statistics") is None:
        lines.append("  the reference was made before versions of statistics were recorded")
    elif manifest["statistics"] != VERSION:
        lines.append(f"  statistics of version {VERSION} here, {manifest['statistics']} in the reference")
    return lines


def _first_rows(places: pd.Index[Any]) -> str:
    rows = list(places.get_level_values("row").unique())
    more = [f"{len(rows) - NAMED} more"] if len(rows) > NAMED else []
    return ", ".join([*rows[:NAMED], *more])


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the families that can be compared, the mean over all among them, and why others cannot."""
    left, right = ours["families"], theirs["families"]
    reasons: dict[str, list[str]] = {}
    for name in dict.fromkeys([*left, *right]):
        reasons.setdefault(_apart(left.get(name), right.get(name)), []).append(name)
    families = reasons.pop("", [])
    if len(families) == len(left) == len(right):
        families.append(ALL)
    return families, [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _apart(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    """Say why the numbers of a family cannot be compared; nothing where they can."""
    if theirs is None:
        return "not in the reference"
    if ours is None:
        return "not in this run"
    if ours["corpus"] != theirs["corpus"]:
        return "other prompts"
    here, there = _seeds(ours), _seeds(theirs)
    return "" if here == there else f"{here} here, {there} in the reference"


def _seeds(family: Mapping[str, Any]) -> str:
    return ", ".join(sorted(key for key in family if key.startswith("seed ")))


def _other_columns(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the columns of scorers that both manifests name with different fields, and what derives from them."""
    columns: list[str] = []
    for name, scorer in ours.get("scorers", {}).items():
        other = theirs.get("scorers", {}).get(name, scorer)
        if other["fields"] != scorer["fields"]:
            columns += scorer["columns"]
    return [*columns, *DERIVED] if columns else []


def _numbers(folder: Path, families: Sequence[str], without: Sequence[str]) -> pd.Series[str]:
    """Return (family, row, column) -> an estimate with its interval, as written in ``summary.csv``."""
    lines = pd.read_csv(folder / "summary.csv", dtype=str, keep_default_na=False)
    kept = lines[lines["family"].isin(families) & ~lines["column"].isin(without)]
    texts = kept["mean"] + " [" + kept["ci_low"] + ", " + kept["ci_high"] + "]"
    texts.index = pd.MultiIndex.from_frame(kept[_KEY])
    return texts
