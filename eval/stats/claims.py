"""The paper's claims as paired tests: one row at least, or well below, what another row has in a column.

A claim is a list of tests that must all hold (an intersection-union test): its p is the largest of theirs, and
needs no correction for their number. Holm corrects over the claims of a family, which are declared beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest
from eval.stats.comparisons import DECIMALS, comparisons, holm
from eval.stats.derived import SIDES, best_expert
from eval.stats.estimates import Estimate, combined
from eval.stats.resampling import LEVEL, Floats

OURS = "alignmerge"
BEST_EXPERT = "best expert"
"""Stands for the expert with the largest value of the column."""
SAFETY = "safety"
"""Refusal rate less over-refusal rate."""
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not shown", "not run"
"""Verdicts: shown, its opposite shown, neither, rows or columns that are not there."""
COLUMNS = (
    "family", "claim", "says", "row", "column", "against", "factor", "margin", "ours", "theirs", "difference",
    "ci_low", "ci_high", "p", "p_claim", "p_holm", "verdict",
)  # fmt: skip
_ARRAYS = ("mean", "by_seed", "over_prompts", "replicates", "drawn_by_seed")
"""What of an estimate a difference is made of; rows are the first axis."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """``row`` is better than ``factor`` times ``against``, or worse by less than ``margin``."""

    column: str
    against: str
    """A row, or BEST_EXPERT."""
    row: str = OURS
    factor: float = 1.0
    margin: float = 0.0
    """In units of the column, not negative."""
    better: Literal["up", "down"] | None = None
    """Where better is, of a column that only describes; null: as the column declares."""

    def __post_init__(self) -> None:
        if self.margin < 0 or self.factor <= 0:
            given = f"factor {self.factor:g}, margin {self.margin:g}"
            raise BadRequest.of("claims.tests", given, "a factor above 0, a margin of at least 0")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement and the tests that must all hold for it."""

    says: str
    tests: Sequence[Bound]
    source: str
    of: Literal["paper", "project"] = "paper"
    """Who claims it: the paper, or this project beyond it."""

    def __post_init__(self) -> None:
        if not self.tests:
            raise BadRequest.of("claims.tests", "none", "at least one test")


def judge(
    measured: Mapping[str, Mapping[str, Estimate]],
    claims: Mapping[str, Claim],
    decimals: Mapping[str, int | None],
) -> pd.DataFrame:
    """Test every claim in each family and over all: ``claims.csv``, one line a test.

    ``difference`` is row less factor times against, with its paired interval, both before the margin is
    added; ``p`` is two-sided and takes the margin in. ``p_claim`` is that of all tests of the claim together,
    ``p_holm`` the same after Holm's correction over the claims of the family. The verdict is the claim's:
    HOLDS, FAILS (a test is shown to go the other way), OPEN, or MISSING where a row or column is not there.
    A difference without margin that would be printed as zero (``decimals``) shows nothing.
    """
    frames = []
    for family, columns in measured.items():
        lines: list[dict[str, Any]] = []
        for name, claim in claims.items():
            lines += _of_claim(family, name, claim, with_safety(columns), decimals)
        frames.append(_corrected(pd.DataFrame(lines, columns=COLUMNS)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def with_safety(columns: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Return the columns and SAFETY, where both of its sides were measured."""
    found = dict(columns)
    if SAFETY in found or not set(SIDES) <= set(found):
        return found
    sides = [found[name] for name in SIDES]
    parts = tuple(map(_safety, zip(*(side.parts for side in sides), strict=True)))
    return found | {SAFETY: replace(_safety(sides), parts=parts)}


def _safety(sides: Sequence[Estimate]) -> Estimate:
    def less(values: Floats) -> Floats:
        signs = np.array([2.0, -2.0]).reshape(2, *[1] * (values.ndim - 1))  # their mean is the difference
        signed: Floats = values * signs
        return signed

    return combined(SAFETY, "up", sides, less)


def _of_claim(
    family: str,
    name: str,
    claim: Claim,
    columns: Mapping[str, Estimate],
    decimals: Mapping[str, int | None],
) -> list[dict[str, Any]]:
    lines = []
    for test in claim.tests:
        fields: dict[str, Any] = {"row": test.row, "column": test.column, "against": test.against}
        fields |= {"factor": test.factor, "margin": test.margin}
        lines.append({"family": family, "claim": name, "says": claim.says, **fields})
        if test.column in columns:
            lines[-1] |= _tested(test, columns[test.column], decimals.get(test.column, DECIMALS))
    p, verdict = _together([line for line in lines if "gain" in line], len(lines))
    return [{**line, "p_claim": p, "verdict": verdict} for line in lines]


def _tested(test: Bound, estimate: Estimate, digits: int | None) -> dict[str, Any]:
    """Return the numbers of one test; nothing where a row has no value."""
    against = _row_of(test.against, estimate)
    if against is None or test.row not in estimate.rows or test.row == against:
        return {}
    sign = -1.0 if (test.better or estimate.direction) == "down" else 1.0
    pair = _moved(estimate, (test.row, against), test.factor, sign * test.margin)
    compared = comparisons({estimate.family: {estimate.name: pair}}, [against])
    lines = compared[(compared["row"] == test.row) & (compared["against"] == against)]
    if lines.empty:
        return {}
    found = lines.iloc[0]
    ours, theirs = estimate.mean[[estimate.rows.index(row) for row in (test.row, against)]]
    ends = np.array([found[key] for key in ("difference", "ci_low", "ci_high")]) - sign * test.margin
    nothing = not test.margin and digits is not None and round(float(ends[0]), digits) == 0
    return {
        "against": against, "ours": ours, "theirs": theirs, "p": 1.0 if nothing else found["p"],
        **dict(zip(("difference", "ci_low", "ci_high"), ends, strict=True)), "gain": sign * found["difference"],
    }  # fmt: skip


def _row_of(against: str, estimate: Estimate) -> str | None:
    if against == BEST_EXPERT:
        best = best_expert(estimate)
        return None if best is None else estimate.rows[best]
    return against if against in estimate.rows else None


def _moved(estimate: Estimate, rows: tuple[str, str], factor: float, shift: float) -> Estimate:
    """Return two rows of an estimate, the first shifted, the second times ``factor``."""
    pair = estimate.select(rows)
    changed: dict[str, Any] = {}
    for name in _ARRAYS:
        values = getattr(pair, name)
        across = (2, *[1] * (values.ndim - 1))
        scales, shifts = np.array([1.0, factor]), np.array([shift, 0.0])
        changed[name] = values * scales.reshape(across) + shifts.reshape(across)
    parts = tuple(_moved(part, rows, factor, shift) for part in pair.parts)
    return replace(pair, **changed, parts=parts)


def _together(tested: Sequence[Mapping[str, Any]], count: int) -> tuple[float, str]:
    """Return p and verdict of a claim of ``count`` tests before Holm's correction: which way it points."""
    if len(tested) < count:
        return np.nan, MISSING
    p = np.array([line["p"] for line in tested], dtype=np.float64)
    gains = np.array([line["gain"] for line in tested])
    if np.isnan(p).any():
        return np.nan, OPEN
    if (gains > 0).all():
        return float(p.max()), HOLDS
    return min(1.0, float(count * p[gains <= 0].min())), FAILS


def _corrected(lines: pd.DataFrame) -> pd.DataFrame:
    """Fill in ``p_holm``, and take back the verdicts that it does not bear out."""
    claims = lines.drop_duplicates("claim").set_index("claim")
    corrected = pd.Series(holm(claims["p_claim"].to_numpy(dtype=np.float64)), index=claims.index)
    p_holm = lines["claim"].map(corrected)
    unshown = lines["verdict"].isin((HOLDS, FAILS)) & (p_holm >= 1 - LEVEL)
    return lines.assign(p_holm=p_holm, verdict=lines["verdict"].mask(unshown, OPEN))
