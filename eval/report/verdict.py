"""Which of the paper's claims hold in a folder of results: three lines, from ``claims.csv``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from eval.report.layout import read_frame
from eval.stats.claims import COLUMNS, FAILS, HOLDS, MISSING, OPEN


def verdict(folder: Path) -> list[str]:
    """Say which claims hold, which do not, and which are open, over all families where there are several.

    Claims whose rows or columns are not in the results are counted alone. No lines where nothing was tested.
    """
    judged = read_claims(folder)
    if judged.empty:
        return []
    first = judged[judged["family"] == judged["family"].iloc[0]].drop_duplicates("claim")
    total, missing = len(first), int((first["verdict"] == MISSING).sum())
    scope = f"{first['family'].iloc[0]}, p corrected for all claims"
    open_line = f"claims not shown either way: {_listed(first, OPEN)}"
    if missing:
        open_line += f"; not run: {missing}"
    return [
        f"claims that hold here ({(first['verdict'] == HOLDS).sum()} of {total}; {scope}): {_listed(first, HOLDS)}",
        f"claims that do not hold here: {_listed(first, FAILS)}",
        open_line,
    ]


def read_claims(folder: Path) -> pd.DataFrame:
    """Return ``claims.csv``; without lines for results that are older than it."""
    path = folder / "claims.csv"
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    return read_frame(path)


def _listed(claims: pd.DataFrame, verdict: str) -> str:
    says: Iterable[str] = claims.loc[claims["verdict"] == verdict, "says"]
    return "; ".join(says) or "none"
