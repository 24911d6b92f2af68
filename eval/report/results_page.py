"""``docs/results.md``: the full tables, the claims and the ledger of all committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from eval.report.layout import read_columns, read_frame
from eval.report.ledger import ClaimLine, Entry, Ledger, claim_lines, entries
from eval.report.main_table import whole
from eval.report.markup import template
from eval.report.tables import Table, markdown_table
from eval.report.verdict import read_claims, verdict

TIERS = ("tiny", "smollm2", "paper")
"""The experiments whose numbers stand beside the paper's."""


class Shown(NamedTuple):
    """What the page has of one committed experiment."""

    name: str
    said: Sequence[str]
    claims: Sequence[ClaimLine]
    """Over all families where there are several."""
    table: Table
    files: Sequence[str]


def results_page(reference: Path, ledger: Ledger) -> str:
    """Render the page from the folders of ``reference``, whose tiers come first; a tier without results is not run."""
    folders = sorted(path.parent for path in reference.glob("*/columns.csv"))
    folders.sort(key=lambda folder: TIERS.index(folder.name) if folder.name in TIERS else len(TIERS))
    shown = list(map(_shown, folders))
    tiers: Mapping[str, Sequence[Entry]] = {folder.name: _entries(folder, ledger) for folder in folders}
    empty: list[None] = [None] * len(ledger.numbers)
    beside = [tiers.get(name, empty) for name in TIERS]
    lines = list(zip(ledger.numbers.values(), *beside, strict=True))
    made = template("results.md", pipe=markdown_table, p=_p)
    return made.render(shown=shown, tiers=TIERS, lines=lines, paper=ledger.paper, sources=ledger.sources)


def _shown(folder: Path) -> Shown:
    judged = read_claims(folder)
    claims: list[ClaimLine] = []
    if len(judged):
        claims = claim_lines(judged[judged["family"] == judged["family"].iloc[0]], read_columns(folder))
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return Shown(folder.name, verdict(folder), claims, whole(folder), files)


def _entries(folder: Path, ledger: Ledger) -> list[Entry]:
    summary = read_frame(folder / "summary.csv")
    return entries(ledger, summary, read_claims(folder), read_columns(folder))


def _p(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.2g}"
