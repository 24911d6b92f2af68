"""Which of the paper's claims hold in a folder of results: three lines at most, from ``comparisons.csv``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from eval.report.canvas import OURS
from eval.report.layout import Columns, read_columns
from eval.stats.comparisons import MARGIN

AVERAGE = "average"
RIVALS = ("interpolate", "task_arithmetic", "gradient_step")
"""Rivals that keep refusals too, the cheapest first: the first that was compared is named."""
REFUSALS = "refusal_rate"
BESIDE = ("over_refusal_rate", "delta_utility")
"""What may be paid for refusals: told beside them."""
_REVERSED = {"better": "worse", "worse": "better"}
_CLAIM = {"better": "holds", "worse": "the opposite holds"}


class Compared(NamedTuple):
    """Our row less another one in one column."""

    column: str
    difference: float
    low: float
    high: float
    verdict: str
    p: float
    """Corrected for all tests of the family and column; NaN where nothing was tested."""


def verdict(folder: Path) -> list[str]:
    """Say whether AlignMerge refuses more than the average and the cheapest rival, and keeps the utility.

    The comparisons are those of all families where there are several. A claim whose rows were not compared has
    no line.
    """
    compared = pd.read_csv(folder / "comparisons.csv", keep_default_na=False, na_values=[""])
    columns = read_columns(folder)
    if compared.empty:
        return []
    of_first = compared[compared["family"] == compared["family"].iloc[0]]
    average = _refuses_more(of_first, columns, AVERAGE)
    rivals = filter(None, map(partial(_refuses_more, of_first, columns), RIVALS))
    return [line for line in (average, next(rivals, ""), _keeps_utility(of_first, columns)) if line]


def _pair(compared: pd.DataFrame, other: str) -> dict[str, Compared]:
    """Return column -> our row less the other; a comparison the other way round is turned."""
    found = {}
    for turned, (row, against) in enumerate(((OURS, other), (other, OURS))):
        lines = compared[(compared["row"] == row) & (compared["against"] == against)]
        for line in lines.itertuples():
            one = _read(line)
            found[one.column] = _turned(one) if turned else one
    return found


def _read(line: Any) -> Compared:
    return Compared(line.column, line.difference, line.ci_low, line.ci_high, line.verdict, line.p_holm)


def _turned(one: Compared) -> Compared:
    verdict = _REVERSED.get(one.verdict, one.verdict)
    return Compared(one.column, -one.difference, -one.high, -one.low, verdict, one.p)


def _refuses_more(compared: pd.DataFrame, columns: Columns, other: str) -> str:
    pair = _pair(compared, other)
    if REFUSALS not in pair:
        return ""
    claim = _CLAIM.get(pair[REFUSALS].verdict, "not shown")
    refusals, beside = pair[REFUSALS], [_spelt(pair[name], columns) for name in BESIDE if name in pair]
    tested = f", corrected p {refusals.p:.2g}" if pd.notna(refusals.p) else ""
    told = f"{OURS} refuses more than {other}: {claim} ({_spelt(refusals, columns)}{tested})"
    return "; ".join([told, *beside])


def _keeps_utility(compared: pd.DataFrame, columns: Columns) -> str:
    """Say on which columns our row is shown to lose less than the margin to the best expert."""
    judged = compared[(compared["row"] == OURS) & compared["non_inferior_to_best_expert"].notna()]
    if judged.empty:
        return ""
    shown = judged["non_inferior_to_best_expert"].astype(str) == "True"
    parts = []
    for words, lines in (("holds for", judged[shown]), ("not shown for", judged[~shown])):
        if len(lines):
            parts.append(f"{words} {', '.join(_differences(lines, columns))}")
    return f"{OURS} loses less than {MARGIN:g} to the best expert: {'; '.join(parts)}"


def _differences(lines: pd.DataFrame, columns: Columns) -> Iterable[str]:
    for line in lines.itertuples():
        yield _spelt(_read(line), columns)


def _spelt(one: Compared, columns: Columns) -> str:
    """Write a difference with its interval: ``refusal rate +0.95 [0.92, 0.98]``."""
    decimals = columns[one.column].decimals
    form = "z.3g" if decimals is None else f"z.{decimals}f"  # z: no minus before a zero
    label, _, unit = columns[one.column].label.partition(", ")
    text = f"{label} {one.difference:+{form}}"
    if pd.notna(one.low):
        text += f" [{one.low:{form}}, {one.high:{form}}]"
    return f"{text} {unit}".rstrip()
