"""The main table of a results folder in short: in the terminal, and between markers in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from rich.table import Table

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.progress import OUT
from eval.columns import Column
from eval.report.layout import chosen, main_columns, read_columns
from eval.report.markup import template
from eval.report.tables import markdown_table, number, table
from eval.stats.estimates import ALL


def show(folder: Path) -> None:
    """Print the means of the main columns of a results folder."""
    _, summary, columns = _main(folder)
    means = summary.pivot_table(index="row", columns="column", values="mean", sort=False)
    shown = Table("row", *columns, title=f"{folder.name} (intervals: {folder}/table.md)")
    for row, values in means[list(columns)].iterrows():
        cells = [number(values[name], column.decimals) for name, column in columns.items()]
        shown.add_row(str(row), *cells)
    OUT.print(shown)


def _main(folder: Path) -> tuple[list[str], pd.DataFrame, dict[str, Column]]:
    """Return the families, what is of the first (the mean over all, if any), and its main columns."""
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values=[""])
    families = summary["family"].unique().tolist()
    of_first = summary[summary["family"] == families[0]]
    measured = of_first.loc[of_first["mean"].notna(), "column"]
    return families, of_first, chosen(main_columns(read_columns(folder)), measured)


def block(folder: Path) -> str:
    """Render the main table of committed results, ``results/reference/NAME`` as seen from the README.

    With several families it is the table of their mean, with figures and the way to the tables of each.
    """
    families, of_first, columns = _main(folder)
    return template("readme.md", pipe=markdown_table).render(
        families=families, over_families=families[0] == ALL, path=f"results/reference/{folder.name}",
        table=table(of_first, "", columns), figures=[path.stem for path in folder.glob("figures/*.png")],
    )  # fmt: skip


def names(readme: str) -> list[str]:
    """Return the names of the results blocks of a README, in their order."""
    blocks = r"^<!-- results:(?P<name>[\w./-]+) -->$.*?^<!-- /results:(?P=name) -->$"
    return re.findall(blocks, readme, re.M | re.S)


def splice(readme: str, name: str, block: str) -> str:
    """Replace what stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.

    Raises BadRequest when the markers are missing.
    """
    opening, closing = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    if name not in names(readme):
        raise BadRequest.of("README.md", f"no block {name}", f"{opening} and {closing} on lines of their own")
    between = re.compile(f"^{re.escape(opening)}$.*?^{re.escape(closing)}$", re.M | re.S)
    return between.sub(lambda _: f"{opening}\n{block}\n{closing}", readme)
