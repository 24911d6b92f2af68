"""The ledger: every public number and claim of the paper, and what became of it here.

``results/reference/paper.yaml`` holds what the paper says; verdicts are computed from results, never typed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from alignmerge.engine.configuration import build
from alignmerge.engine.faults import BadRequest, Fault, refuse
from alignmerge.engine.manifest import ROOT
from eval.columns import Column
from eval.report.layout import Columns
from eval.report.numbers import interval, number
from eval.stats.claims import FAILS, HOLDS, MISSING, OPEN, Claim
from eval.stats.comparisons import DECIMALS

PAPER = ROOT / "results" / "reference" / "paper.yaml"
REPRODUCED, DIFFERS = "reproduced", "differs"
_OF_CLAIM = {HOLDS: REPRODUCED, FAILS: DIFFERS, OPEN: f"{DIFFERS} ({OPEN})", MISSING: MISSING}
"""What a number is said to be where other models than the paper's were measured: as its claim goes."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """One public number of the paper."""

    says: str
    value: float
    decimals: int
    model: str
    """The paper's name of the model that it was measured on."""
    source: str
    row: str
    """Where ours would be found: in this row and column, of any experiment."""
    column: str
    tolerance: float
    """How far ours may be from it on the paper's own model, in units of the column."""
    claim: str
    """What must hold on other models, where the number itself means nothing."""
    against: str = ""
    """The row that it is a difference from, as in the tests of the claim; empty: it is a mean."""
    note: str = ""

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise BadRequest.of("paper.numbers.tolerance", f"{self.tolerance:g}", "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What is public of the paper's results."""

    paper: str
    sources: Mapping[str, str]
    """Short name -> what it is."""
    models: Mapping[str, str]
    """The paper's name of a model -> the family that stands for it here."""
    claims: Mapping[str, Claim]
    numbers: Mapping[str, Number]

    def __post_init__(self) -> None:
        faults = []
        for name, one in self.numbers.items():
            place = f"paper.numbers.{name}"
            for key, known in (("claim", self.claims), ("model", self.models), ("source", self.sources)):
                faults += _unknown(f"{place}.{key}", getattr(one, key), known)
        for name, claim in self.claims.items():
            faults += _unknown(f"paper.claims.{name}.source", claim.source, self.sources)
        refuse(faults)


class Entry(NamedTuple):
    """One number of the paper with ours beside it, from one folder of results."""

    says: str
    theirs: str
    ours: str
    """With its interval; empty where it was not measured."""
    family: str
    verdict: str
    basis: str
    """What the verdict rests on: the number itself, or a claim."""
    source: str
    note: str


class ClaimLine(NamedTuple):
    """One claim of one family as shown: all its tests in words."""

    says: str
    verdict: str
    p: float
    """Corrected over the claims of the family; NaN where nothing was tested."""
    tests: Sequence[str]


def read_ledger(path: Path = PAPER) -> Ledger:
    """Read and check a ledger.

    Raises:
        BadRequest: with every fault of the file: keys that are unknown or missing, values of another type,
            claims, models and sources that are not declared.
    """
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest.of(str(path), f"cannot be read ({type(error).__name__})", "a YAML file") from None
    made: Ledger = build(node, "paper", Ledger)
    return made


def entries(ledger: Ledger, summary: pd.DataFrame, judged: pd.DataFrame, columns: Columns) -> list[Entry]:
    """Hold the numbers of the paper against a results folder: its ``summary.csv`` and ``claims.csv``.

    A number is compared as it stands where the family that stands for the paper's model was measured, and
    by its claim elsewhere, over all families where there are several.
    """
    return [_entry(ledger, one, summary, judged, columns) for one in ledger.numbers.values()]


def claim_lines(judged: pd.DataFrame, columns: Columns) -> list[ClaimLine]:
    """Return the claims of one family of ``claims.csv`` in their order."""
    lines = []
    for _, of_claim in judged.groupby("claim", sort=False):
        first = of_claim.iloc[0]
        tests = [_test(line, columns) for _, line in of_claim.iterrows()]
        lines.append(ClaimLine(first["says"], first["verdict"], float(first["p_holm"]), tests))
    return lines


def _test(line: pd.Series[Any], columns: Columns) -> str:
    """Write a test: ``toxicity rate of alignmerge less .45 of average: +0.01 [-0.02, 0.05]``."""
    column = columns.get(line["column"], Column(line["column"], "", "info", DECIMALS))
    text: str = f"{column.label}: {line['row']} less "
    if line["factor"] != 1:
        text += f"{line['factor']:g} of "
    text += str(line["against"])
    if pd.isna(line["difference"]):
        return f"{text}: {MISSING}"
    difference = spell(line["difference"], line["ci_low"], line["ci_high"], column.decimals)
    text += f" {'+' * (line['difference'] > 0)}{difference}"
    if line["margin"]:
        text += f", margin {line['margin']:g}"
    return text


def _entry(ledger: Ledger, one: Number, summary: pd.DataFrame, judged: pd.DataFrame, columns: Columns) -> Entry:
    families = summary["family"].unique()
    same, family = ledger.models[one.model] in families, str(families[0])
    if same:
        family = ledger.models[one.model]
    ours = _ours(one, family, summary, judged)
    verdict, basis = MISSING, ""
    if ours is not None and same:
        near = abs(ours[0] - one.value) <= one.tolerance
        verdict, basis = REPRODUCED if near else DIFFERS, f"the number, within {one.tolerance:g}"
    elif ours is not None:
        of_claim = judged[(judged["family"] == family) & (judged["claim"] == one.claim)]["verdict"]
        verdict = _OF_CLAIM[str(of_claim.iloc[0])] if len(of_claim) else MISSING
        basis = f"claim: {ledger.claims[one.claim].says}"
    spelt = "" if ours is None else spell(*ours, columns[one.column].decimals)
    theirs = f"{one.value:.{one.decimals}f}"
    return Entry(one.says, theirs, spelt, family, verdict, basis, ledger.sources[one.source], one.note)


def _ours(
    one: Number, family: str, summary: pd.DataFrame, judged: pd.DataFrame
) -> tuple[float, float, float] | None:
    """Return what stands here for a number of the paper, with its interval; None if it was not measured."""
    lines, value = summary, "mean"
    if one.against:
        lines, value = judged[judged["claim"] == one.claim], "difference"
    there = (lines["family"] == family) & (lines["row"] == one.row) & (lines["column"] == one.column)
    found = lines.loc[there, [value, "ci_low", "ci_high"]].dropna(subset=value)
    if found.empty:
        return None
    mean, low, high = found.iloc[0]
    return float(mean), float(low), float(high)


def spell(mean: float, low: float, high: float, decimals: int | None) -> str:
    """Write a number with its interval, if it has one."""
    text = number(mean, decimals)
    if pd.notna(low):
        text += f" {interval(low, high, decimals)}"
    return text


def _unknown(where: str, given: str, known: Mapping[str, object] | Sequence[str]) -> list[Fault]:
    return [] if given in known else [Fault(where, given, ", ".join(known))]
