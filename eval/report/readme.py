"""The results blocks of the README: rendered from ``summary.csv`` and kept between markers."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from alignmerge.engine.faults import BadRequest
from eval.report.tables import LAYOUT, escape_markdown, markdown_table, present
from eval.stats.estimates import ALL

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


FIGURES = {
    "overview": "Main columns of every row: mean over families with interval, and each family",
    "training": "AQI and tau along the training of every family's anchor",
}
"""Figures over all families that the README shows, with what a reader sees in each."""


def block(folder: Path) -> str:
    """Render the compact markdown table of a results folder, ``results/NAME`` as seen from the README.

    With several families it is the table of their mean, with figures and the way to the tables of each.
    """
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""])
    by_name = {column.name: column for group in LAYOUT.values() for column in group}
    families = list(summary["family"].unique())
    shown = families[0]
    of_shown = summary[summary["family"] == shown]
    table = markdown_table(of_shown, present(of_shown, [by_name[name] for name in COLUMNS]))
    parts = [f"**{escape_markdown(str(shown))}**", table]
    if shown == ALL:
        named = ", ".join(escape_markdown(str(family)) for family in families[1:])
        parts[0] = f"**{ALL}** (mean over {named})"
        parts += _more(f"{folder.parent.name}/{folder.name}", folder)
    return "\n\n".join(parts)


def _more(path: str, folder: Path) -> list[str]:
    """Return what stands below the table of several families; ``path`` is that of the folder from the README."""
    there = {name: words for name, words in FIGURES.items() if (folder / "figures" / f"{name}.png").is_file()}
    images = [f"![{words}]({path}/figures/{name}.png)" for name, words in there.items()]
    page = f"[report.html]({path}/report.html)"
    tables = f"Each family: [table.md]({path}/table.md); with figures and comparisons: {page}."
    return [tables, *images]


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
