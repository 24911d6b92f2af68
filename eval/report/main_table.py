"""The main table of a results folder: in the terminal, and in short between markers in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from rich.table import Table as Screen

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.progress import OUT
from eval.columns import Column
from eval.report.layout import chosen, main_columns, read_columns, read_frame
from eval.report.markup import template
from eval.report.numbers import number
from eval.report.tables import Table, markdown_table, table
from eval.report.verdict import verdict
from eval.stats.estimates import ALL

IN_SHORT = (
    "base", "anchor", "average", "ties", "fisher_soup", "safemerge", "mergealign/hammoud", "mergealign/thakkar",
    "gradient_step", "alignmerge",
)  # fmt: skip
"""The rows of the table in the README."""


def show(folder: Path) -> None:
    """Print the means of the main columns of a results folder."""
    _, summary, columns = _main(folder)
    means = summary.pivot_table(index="row", columns="column", values="mean", sort=False)
    shown = Screen("row", *columns, title=f"{folder.name} (intervals: {folder}/table.md)")
    for row, values in means[list(columns)].iterrows():
        cells = [number(values[name], column.decimals) for name, column in columns.items()]
        shown.add_row(str(row), *cells)
    OUT.print(shown)


def _main(folder: Path) -> tuple[list[str], pd.DataFrame, dict[str, Column]]:
    """Return the families, what is of the first (the mean over all, if any), and its main columns."""
    summary = read_frame(folder / "summary.csv")
    families = summary["family"].unique().tolist()
    of_first = summary[summary["family"] == families[0]]
    measured = of_first.loc[of_first["mean"].notna(), "column"]
    return families, of_first, chosen(main_columns(read_columns(folder)), measured)


def block(folder: Path) -> str:
    """Render the result of committed results for the README: three lines, one figure, a table of ten rows at most.

    ``folder`` is ``results/reference/NAME`` as seen from the README.
    """
    families, of_first, columns = _main(folder)
    of_all = table(of_first, "", columns)  # bold is the best of all rows, in short as well
    rows = {row: entries for row, entries in of_all.rows.items() if row in IN_SHORT}
    return template("readme.md", pipe=markdown_table).render(
        said=verdict(folder), families=families, over_families=families[0] == ALL,
        path=f"results/reference/{folder.name}", table=of_all._replace(rows=rows),
        picture=(folder / "figures" / "front.png").is_file(),
    )  # fmt: skip


def whole(folder: Path) -> Table:
    """Return the main columns of all rows of a results folder: the mean over families where there are several."""
    _, of_first, columns = _main(folder)
    return table(of_first, "", columns)


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
