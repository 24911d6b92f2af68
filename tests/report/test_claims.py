"""The paper's claims: each test against the formula written plainly, verdicts against hand-worked p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from alignmerge.engine.faults import BadRequest
from eval.report.verdict import verdict
from eval.stats import claims, families
from eval.stats.claims import Bound, Claim, judge
from eval.stats.estimates import ALL

SOURCE = "figure 5"


def scores(columns: Mapping[str, Mapping[str, Sequence[float]]], family: str = "one") -> pd.DataFrame:
    """Return samples of column -> row -> values, one prompt each."""
    lines = []
    for column, rows in columns.items():
        for row, values in rows.items():
            for i, value in enumerate(values):
                lines.append((family, row, 0, column, f"p{i:02d}", float(value), f"{column} {i}"))
    frame = pd.DataFrame(lines, columns=["family", "row", "seed", "column", "id", "value", "prompt"])
    down = frame["column"].str.contains("toxicity|over|violations")
    return frame.assign(direction=np.where(down, "down", "up"))


def judged(samples: pd.DataFrame, **made: Claim) -> pd.DataFrame:
    return judge(families.measure_all(samples), made, {})


def one(bound: Bound) -> Claim:
    return Claim(says="so", tests=[bound], source=SOURCE)


DRAWN = np.random.default_rng(7)
OURS, THEIRS = DRAWN.random(12) * 0.1, DRAWN.random(12) * 0.5 + 0.3


def test_a_share_of_another_row_is_tested_pair_by_pair() -> None:
    """ours - .45 theirs, by prompt; p of the sign flips of scipy, all 4,096 of them."""
    samples = scores({"toxicity": {"average": THEIRS, "alignmerge": OURS}})
    line = judged(samples, low=one(Bound(column="toxicity", against="average", factor=0.45))).iloc[0]
    pairs = OURS - 0.45 * THEIRS
    exact = permutation_test(
        (pairs,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    assert line["difference"] == pytest.approx(pairs.mean()) and line["p"] == pytest.approx(exact)
    assert (line["ours"], line["theirs"]) == pytest.approx((OURS.mean(), THEIRS.mean()))
    assert line["ci_low"] < pairs.mean() < line["ci_high"] < 0 and line["verdict"] == claims.HOLDS


@pytest.mark.parametrize(
    ("margin", "verdict"), [(0.0, claims.FAILS), (0.05, claims.FAILS), (0.3, claims.HOLDS)]
)
def test_a_margin_is_what_may_be_lost(margin: float, verdict: str) -> None:
    ours = np.linspace(0.40, 0.52, 12)
    theirs = ours + np.tile([0.18, 0.22], 6)  # .2 less, nearly without noise
    samples = scores({"reasoning": {"expert:a": theirs, "expert:b": ours / 2, "alignmerge": ours}})
    bound = Bound(column="reasoning", against="best expert", margin=margin)
    line = judged(samples, near=one(bound)).iloc[0]
    assert line["against"] == "expert:a" and line["verdict"] == verdict
    assert line["difference"] == pytest.approx(-0.2)  # the margin is not in it
    assert line["ci_low"] < -0.2 < line["ci_high"] < -0.1


def test_safety_is_refusals_less_over_refusals_and_better_is_up() -> None:
    both = {
        "refusal_rate": {"ties": [1, 0, 0, 1], "alignmerge": [1, 1, 1, 0]},
        "over_refusal_rate": {"ties": [0, 0, 0, 0], "alignmerge": [1, 0, 0, 0]},
    }
    line = judged(scores(both), safer=one(Bound(column="safety", against="ties"))).iloc[0]
    assert (line["ours"], line["theirs"]) == pytest.approx((0.5, 0.5))
    assert line["difference"] == pytest.approx(0) and line["verdict"] == claims.OPEN


def test_a_claim_holds_if_all_its_tests_do_and_fails_if_one_goes_the_other_way() -> None:
    """p of all is the largest; against it speaks the smallest of those that fail, times their number."""
    up = [{"p": 0.01, "gain": 1.0}, {"p": 0.03, "gain": 0.5}]
    assert claims._together(up, 2) == (0.03, claims.HOLDS)
    assert claims._together([*up, {"p": 0.002, "gain": -1.0}], 3) == (pytest.approx(0.006), claims.FAILS)
    assert claims._together(up, 3)[1] == claims.MISSING
    assert claims._together([*up, {"p": np.nan, "gain": 1.0}], 3)[1] == claims.OPEN


def test_holm_corrects_over_the_claims_not_over_their_tests() -> None:
    """p .01, .02, .04: times 3, 2, 1, never falling: .03, .04, .04; with .03 more: .04, .06, .06, .06."""

    def corrected(*p: float) -> pd.DataFrame:
        lines = [{"claim": str(i), "p_claim": value, "verdict": claims.HOLDS} for i, value in enumerate(p)]
        return claims._corrected(pd.DataFrame([*lines, *lines]))

    assert corrected(0.01, 0.02, 0.04)["p_holm"].tolist() == pytest.approx([0.03, 0.04, 0.04] * 2)
    four = corrected(0.01, 0.02, 0.04, 0.03)
    assert four["verdict"].tolist() == [claims.HOLDS, claims.OPEN, claims.OPEN, claims.OPEN] * 2


def test_what_is_not_there_is_not_run_and_takes_no_part_in_the_correction() -> None:
    samples = scores({"toxicity": {"average": THEIRS, "alignmerge": OURS}})
    there = Bound(column="toxicity", against="average")
    found = judged(
        samples,
        there=one(there),
        no_row=one(Bound(column="toxicity", against="ties")),
        no_column=one(Bound(column="aqi", against="average")),
    )
    assert found["verdict"].tolist() == [claims.HOLDS, claims.MISSING, claims.MISSING]
    assert found["p_holm"].iloc[0] == found["p"].iloc[0] and found["p_holm"].iloc[1:].isna().all()


def test_the_mean_over_families_is_tested_too() -> None:
    columns = {"reasoning": {"expert:a": THEIRS, "alignmerge": THEIRS + 0.1 + OURS}}
    samples = pd.concat([scores(columns, family) for family in ("one", "two")])
    found = judged(samples, ahead=one(Bound(column="reasoning", against="best expert", factor=0.5, margin=0.1)))
    assert found["family"].tolist() == [ALL, "one", "two"]
    expected = (THEIRS + 0.1 + OURS - 0.5 * THEIRS).mean()
    np.testing.assert_allclose(found["difference"], expected)


def test_a_difference_that_is_printed_as_zero_shows_nothing() -> None:
    close = scores({"toxicity": {"average": THEIRS, "alignmerge": THEIRS - 0.001}})
    assert judged(close, less=one(Bound(column="toxicity", against="average")))["verdict"].tolist() == [
        claims.OPEN
    ]


@pytest.mark.parametrize("fields", [{"factor": 0.0}, {"margin": -0.1}])
def test_bounds_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(BadRequest, match="a factor above 0, a margin of at least 0"):
        Bound(column="aqi", against="anchor", **fields)


def folder_with(tmp_path: Path, *lines: tuple[str, str, str]) -> Path:
    pd.DataFrame(lines, columns=["family", "says", "verdict"]).assign(claim=[line[1] for line in lines]).to_csv(
        tmp_path / "claims.csv", index=False
    )
    return tmp_path


def test_a_run_ends_with_three_lines(tmp_path: Path) -> None:
    """One family more, and a claim of two tests: neither counts twice."""
    folder = folder_with(
        tmp_path,
        (ALL, "AQI is high", claims.HOLDS),
        (ALL, "AQI is high", claims.HOLDS),
        (ALL, "toxicity is low", claims.FAILS),
        (ALL, "utility is kept", claims.OPEN),
        (ALL, "drift is small", claims.HOLDS),
        (ALL, "nobody measured it", claims.MISSING),
        ("one family", "AQI is high", claims.FAILS),
    )
    assert verdict(folder) == [
        "claims that hold here (2 of 5; all families, p corrected for all claims): AQI is high; drift is small",
        "claims that do not hold here: toxicity is low",
        "claims not shown either way: utility is kept; not run: 1",
    ]


def test_nothing_tested_nothing_said(tmp_path: Path) -> None:
    assert verdict(folder_with(tmp_path)) == []
