"""The results blocks of the README: rendered from ``summary.csv`` and kept between markers."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from alignmerge.engine.faults import BadRequest
from eval.report.tables import LAYOUT, escape_markdown, markdown_table, present

COLUMNS = (
    "refusal_rate",
    "over_refusal_rate",
    "reasoning",
    "instruction_following",
    "helpfulness",
    "toxicity_rate",
    "aqi",
    "gibberish_rate",
)


def block(folder: Path) -> str:
    """Render the compact markdown table of a results folder, one for each family in its ``summary.csv``."""
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""])
    by_name = {column.name: column for group in LAYOUT.values() for column in group}
    parts = []
    for family, of_family in summary.groupby("family", sort=False):
        shown = present(of_family, [by_name[name] for name in COLUMNS])
        parts += [f"**{escape_markdown(str(family))}**", markdown_table(of_family, shown)]
    return "\n\n".join(parts)


def names(readme: str) -> list[str]:
    """Return the names of the results blocks of a README, in their order."""
    return [match["name"] for match in _BLOCK.finditer(readme)]


def splice(readme: str, name: str, block: str) -> str:
    """Replace what stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.

    Raises BadRequest when the markers are missing.
    """
    if name not in names(readme):
        opening, closing = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        raise BadRequest.of("README.md", f"no block {name}", f"{opening} and {closing} on lines of their own")

    def replaced(match: re.Match[str]) -> str:
        return f"{match['open']}\n{block}\n{match['close']}" if match["name"] == name else match.group()

    return _BLOCK.sub(replaced, readme)


def stale(readme: Path, results_root: Path) -> list[str]:
    """Return the names of the blocks that are not what ``results_root/NAME/summary.csv`` says, or have
    none."""
    text = readme.read_text(encoding="utf-8")
    return [name for name in names(text) if not _fresh(text, name, results_root / name)]


def _fresh(text: str, name: str, folder: Path) -> bool:
    return (folder / "summary.csv").is_file() and splice(text, name, block(folder)) == text


_BLOCK = re.compile(
    r"^(?P<open><!-- results:(?P<name>[\w./-]+) -->)$.*?^(?P<close><!-- /results:(?P=name) -->)$", re.M | re.S
)
