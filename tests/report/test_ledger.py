"""The ledger: its file is checked, and its verdicts follow from results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from alignmerge.engine.configuration import choices
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import ROOT
from eval.columns import Column
from eval.report.ledger import PAPER, claim_lines, entries, read_ledger
from eval.scorers.aqi import AQI
from eval.scorers.geometry import Geometry
from eval.scorers.judge import Judge
from eval.scorers.toxicity import Toxicity
from eval.scorers.utility import Utility
from eval.stats import claims
from eval.stats.derived import DERIVED

COLUMNS = {"aqi": Column("AQI", "Alignment", "up", 3)}
SMALL: dict[str, Any] = {
    "paper": "some paper",
    "sources": {"figure 5": "caption of figure 5"},
    "models": {"Mistral 7B": "paper/mistral"},
    "claims": {
        "above": {
            "says": "above the anchor",
            "source": "figure 5",
            "tests": [{"column": "aqi", "against": "anchor"}],
        }
    },
    "numbers": {
        "aqi": {
            "says": "AQI of AlignMerge", "value": 0.75, "decimals": 2, "model": "Mistral 7B",
            "source": "figure 5", "row": "alignmerge", "column": "aqi", "tolerance": 0.03, "claim": "above",
        }
    },
}  # fmt: skip


def ledger_of(tmp_path: Path, changed: dict[str, Any]) -> Path:
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(SMALL | changed))
    return path


def number(**changed: Any) -> dict[str, Any]:
    fields = {**SMALL["numbers"]["aqi"], **changed}
    return {"numbers": {"aqi": {key: value for key, value in fields.items() if value is not None}}}


def results(family: str, mean: float, verdict: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    place = {"family": [family], "row": ["alignmerge"], "column": ["aqi"], "ci_low": [mean - 0.1]}
    summary = pd.DataFrame(place | {"mean": [mean], "ci_high": [mean + 0.1]})
    judged = pd.DataFrame(place | {"claim": ["above"], "difference": [-0.2], "ci_high": [0.0]})
    return summary, judged.assign(verdict=verdict)


@pytest.mark.parametrize(
    ("family", "mean", "verdict", "said", "basis"),
    [
        ("paper/mistral", 0.77, claims.FAILS, "reproduced", "the number, within 0.03"),
        ("paper/mistral", 0.71, claims.HOLDS, "differs", "the number, within 0.03"),
        ("tiny/llama3", 0.75, claims.FAILS, "differs", "claim: above the anchor"),
        ("tiny/llama3", 0.31, claims.HOLDS, "reproduced", "claim: above the anchor"),
        ("tiny/llama3", 0.31, claims.OPEN, "differs (not shown)", "claim: above the anchor"),
        ("tiny/llama3", 0.31, claims.MISSING, "not run", "claim: above the anchor"),
    ],
)
def test_a_number_counts_on_the_papers_model_and_its_claim_elsewhere(
    tmp_path: Path, family: str, mean: float, verdict: str, said: str, basis: str
) -> None:
    (entry,) = entries(read_ledger(ledger_of(tmp_path, {})), *results(family, mean, verdict), COLUMNS)
    assert (entry.theirs, entry.verdict, entry.basis) == ("0.75", said, basis)
    assert entry.ours == f"{mean:.3f} [{mean - 0.1:.3f}, {mean + 0.1:.3f}]" and entry.family == family


def test_a_difference_is_that_of_the_claims_test(tmp_path: Path) -> None:
    ledger = read_ledger(ledger_of(tmp_path, number(value=-0.2, against="anchor")))
    (entry,) = entries(ledger, *results("paper/mistral", 0.3, claims.OPEN), COLUMNS)
    assert (entry.theirs, entry.ours, entry.verdict) == ("-0.20", "-0.200 [0.200, 0.000]", "reproduced")


def test_what_was_not_measured_is_not_run(tmp_path: Path) -> None:
    summary, judged = results("tiny/llama3", 0.5, claims.HOLDS)
    ledger = read_ledger(ledger_of(tmp_path, number(row="alignmerge/soup")))
    (entry,) = entries(ledger, summary, judged, COLUMNS)
    assert (entry.ours, entry.verdict) == ("", "not run")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (number(claim="below"), "paper.numbers.aqi.claim: below; allowed: above"),
        (number(model="GPT"), "paper.numbers.aqi.model: GPT; allowed: Mistral 7B"),
        (number(source="table 1"), "paper.numbers.aqi.source: table 1; allowed: figure 5"),
        (number(value="high"), "paper.numbers.aqi.value: 'high' (str); allowed: float"),
        (number(column=None), "paper.numbers.aqi.column: not given; allowed: str"),
        (number(tolerence=0.1), "paper.numbers.aqi.tolerence: unknown key; allowed: tolerance? "),
        (number(tolerance=0.0), "paper.numbers.tolerance: 0; allowed: a number above 0"),
        ({"claims": {"above": {**SMALL["claims"]["above"], "tests": []}}}, "claims.tests: none; allowed: at least"),
        ({"verdicts": {}}, "paper.verdicts: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_ledger_is_refused_in_a_plain_line(tmp_path: Path, changed: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_ledger(ledger_of(tmp_path, changed))
    assert str(refused.value).startswith(fault)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "paper.yaml").write_text("claims: [")
    with pytest.raises(BadRequest, match=r"paper\.yaml: cannot be read \(ParserError\); allowed: a YAML file"):
        read_ledger(tmp_path / "paper.yaml")


def test_a_claim_is_shown_with_its_tests() -> None:
    lines = {
        "claim": "c",
        "says": "so",
        "verdict": claims.HOLDS,
        "p_holm": 0.01,
        "row": "ours",
        "column": "aqi",
    }
    numbers = {
        "against": "anchor",
        "factor": 0.45,
        "margin": 0.02,
        "difference": 0.1,
        "ci_low": 0.05,
        "ci_high": 0.2,
    }
    missing = {"against": "ties", "factor": 1.0, "margin": 0.0, "difference": None}
    (line,) = claim_lines(pd.DataFrame([lines | numbers, lines | missing]), COLUMNS)
    assert (line.says, line.verdict, line.p) == ("so", "holds", 0.01)
    assert line.tests == [
        "AQI: ours less 0.45 of anchor +0.100 [0.050, 0.200], margin 0.02",
        "AQI: ours less ties: not run",
    ]


# --- the committed ledger ---


def test_the_ledger_has_the_numbers_of_the_caption_of_figure_5() -> None:
    """Read off the caption again, by hand."""
    node = yaml.safe_load(PAPER.read_text())
    values = sorted(abs(one["value"]) for one in node["numbers"].values())
    caption = [0.58, 0.69, 0.75, 0.11, 0.041, 0.235, 0.089, 0.192, 0.049, 0.072, 0.035, 0.008, 0.008]
    assert values == sorted(caption)


def test_the_ledger_names_columns_and_families_that_there_are() -> None:
    ledger = read_ledger()
    columns = {*DERIVED, claims.SAFETY}
    for scorer in (AQI, Geometry, Judge, Toxicity, Utility):
        columns |= set(scorer.columns)
    named = {test.column for claim in ledger.claims.values() for test in claim.tests}
    assert named | {one.column for one in ledger.numbers.values()} <= columns
    assert set(ledger.models.values()) <= set(choices(ROOT / "conf" / "family"))
