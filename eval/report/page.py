"""``report.html``: everything of a report on one page that needs no network, next to its ``figures/``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from eval.report.figures import Drawn
from eval.report.tables import (
    ARROWS,
    LAYOUT,
    Column,
    cells,
    directions,
    heading,
    legend,
    missing,
    number,
    present,
    unscored,
)
from eval.stats.comparisons import MARGIN
from eval.stats.estimates import ALL, is_method
from eval.stats.resampling import LEVEL

_COMPARED = ("Alignment", "Utility")
"""The groups of columns whose comparisons are on the page; all are in ``comparisons.csv``."""
_SIGNS = {"better": "▲", "worse": "▼", "differs": "◆"}
_TESTS = (
    "Each cell is the row less the row of the heading, with its paired interval. ▲ better, ▼ worse, ◆ differs: "
    f"p below {1 - LEVEL:.2g} after Holm's correction over all tests of a column; no sign: no difference shown. "
    "Tests: min F' over prompts and seeds (Clark 1973) wherever seeds are resampled and over all families, else exact "
    "McNemar for 0/1 columns, sign flips for others, bootstrap replicates for AQI."
)
_AS_GOOD = f"≈: shown to lose less than {MARGIN:g} to the best expert of the column."


def html(
    summary: pd.DataFrame,
    compared: pd.DataFrame,
    drawn: Sequence[Drawn],
    *,
    title: str,
    notes: Sequence[str],
    selection: pd.DataFrame | None,
    gates: pd.DataFrame | None,
    marks: Mapping[str, str],
) -> str:
    """Render the page; all that models and users wrote is escaped."""
    from jinja2 import Environment

    sections = [
        _section(str(family), of_family, compared[compared["family"] == family], drawn, marks)
        for family, of_family in summary.groupby("family", sort=False)
    ]
    sections[0]["lines"] += missing(summary)
    # Only text and numbers reach the template: autoescape makes every text stand for itself.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        provenance=notes[:1],
        notes=[*notes, *legend(summary)],
        tests=_TESTS,
        sections=sections,
        gates=None if gates is None else _plain_table(gates),
        unmet=0 if gates is None else int((~gates["met"].astype(bool)).sum()),
        selection=None if selection is None else _plain_table(selection),
    )


def _section(
    family: str,
    of_family: pd.DataFrame,
    compared: pd.DataFrame,
    drawn: Sequence[Drawn],
    marks: Mapping[str, str],
) -> dict[str, Any]:
    """Return what the template needs for one family, or for all of them."""
    groups = {group: present(of_family, columns) for group, columns in LAYOUT.items()}
    matched = compared[compared["non_inferior_to_best_expert"].fillna(False).astype(bool)]
    as_good = set(zip(matched["row"], matched["column"], strict=True))
    return {
        "name": heading(family, marks),
        "open": family == ALL,
        "tables": [_table(group, of_family, columns, as_good) for group, columns in groups.items() if columns],
        "lines": [*([_AS_GOOD] if as_good else []), *unscored(of_family)],
        "figures": [figure for figure in drawn if figure.family == family],
        "comparisons": _matrices(of_family, compared, [c for group in _COMPARED for c in groups[group]]),
    }


def _header(of_family: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    ways = directions(of_family)
    return [f"{column.label} {ARROWS[ways[column.name]]}".strip() for column in columns]


def _table(
    group: str, of_family: pd.DataFrame, columns: Sequence[Column], as_good: set[tuple[str, str]]
) -> dict[str, Any]:
    shown = {column.name: cells(of_family, column) for column in columns}

    def cell(row: str, column: str) -> dict[str, Any] | None:
        found = shown[column].get(row)
        if found is None:
            return None
        return found._asdict() | {"value": f"{found.value:.6g}", "as_good": (row, column) in as_good}

    rows = [
        {"name": row, "method": is_method(row), "cells": [cell(row, column) for column in shown]}
        for row in of_family["row"].unique()
    ]
    return {"caption": group, "header": _header(of_family, columns), "rows": rows}


def _matrices(
    of_family: pd.DataFrame, compared: pd.DataFrame, columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Return one matrix of rows x columns for each row that others were tested against."""
    tested = compared[compared["test"].fillna("") != ""]
    matrices = []
    for against, of_row in tested.groupby("against", sort=False):
        by_place = {(line["row"], line["column"]): line for line in of_row.to_dict("records")}
        measured = {column for _, column in by_place}
        shown = [column for column in columns if column.name in measured]
        rows = [
            {"name": row, "cells": [_difference(by_place.get((row, column.name)), column) for column in shown]}
            for row in of_family["row"].unique()
            if row != against
        ]
        matrices.append({"caption": f"less {against}", "header": _header(of_family, shown), "rows": rows})
    return matrices


def _difference(line: Mapping[Hashable, Any] | None, column: Column) -> dict[str, Any] | None:
    if line is None:
        return None
    value, low, high = (number(line[key], column.decimals) for key in ("difference", "ci_low", "ci_high"))
    return {
        "value": f"{line['difference']:.6g}",
        "text": value if value.startswith("-") else f"+{value}",
        "sign": _SIGNS.get(line["verdict"], ""),
        "verdict": line["verdict"] if line["verdict"] in _SIGNS else "",
        "hint": f"[{low}, {high}], {line['test']}: p {line['p']:.2g}, after Holm {line['p_holm']:.2g}",
    }


def _plain_table(frame: pd.DataFrame) -> dict[str, Any]:
    """Return header and texts of a frame as it is, numbers with three digits."""
    rows = [[_text(value) for value in line] for line in frame.itertuples(index=False)]
    return {"header": list(frame.columns), "rows": rows}


def _text(value: Any) -> str:
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return str(value)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --line: #ddd; --soft: #f5f5f3; --ink: #222; --grey: #666; --good: #117733; --bad: #aa3311; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; padding: 1rem 2rem 4rem;
  max-width: 1500px; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 2px solid var(--ink); }
h3 { margin: 1.4rem 0 .3rem; }
nav a { margin-right: 1rem; } .lead { color: var(--grey); max-width: 70rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { background: #fff; vertical-align: bottom; } .sortable th { cursor: pointer; }
.sortable th[aria-sort]::after { content: " ▾"; } .sortable th[aria-sort=ascending]::after { content: " ▴"; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: inherit; }
tr { background: #fff; } tr.identity { background: var(--soft); } tbody tr:hover { background: #eef3fb; }
.ci { color: var(--grey); font-size: 11px; font-weight: 400; } .best { font-weight: 700; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.plain td, .plain th { text-align: left; white-space: normal; } .no { color: var(--bad); font-weight: 700; }
figure { display: inline-block; margin: .6rem 1rem .6rem 0; vertical-align: top; max-width: 100%; }
figure img { max-width: min(100%, 900px); height: auto; border: 1px solid var(--line); }
figcaption, summary { color: var(--grey); } summary { cursor: pointer; margin: .6rem 0; }
h2 + details > summary, summary h2 { display: inline; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in provenance %}<p class="lead">{{ note }}</p>{% endfor %}

<nav>{% for section in sections %}<a href="#f{{ loop.index }}">{{ section.name }}</a>{% endfor %}
{% if gates %}<a href="#gates">gates</a>{% endif %}
{% if selection %}<a href="#selection">settings tried</a>{% endif %}
<a href="#notes">notes</a></nav>
<p>Numbers: <a href="summary.csv">summary.csv</a>, <a href="comparisons.csv">comparisons.csv</a>,
<a href="table.md">table.md</a>, <a href="table.tex">table.tex</a>. A click on a heading sorts a table.</p>
{% macro heading(header) %}<thead><tr><th scope="col">row</th>
{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>{% endmacro %}
{% for section in sections %}
<section id="f{{ loop.index }}">
<h2>{{ section.name }}</h2>
{% for table in section.tables %}
<h3>{{ table.caption }}</h3>
<div class="scroll"><table class="sortable">{{ heading(table.header) }}<tbody>
{% for row in table.rows %}
<tr{% if not row.method %} class="identity"{% endif %}><td>{{ row.name }}</td>
{% for cell in row.cells %}
{% if cell %}<td data-v="{{ cell.value }}"{{ " class=best" if cell.best }}>
{{- cell.mean }}{{ "≈" if cell.as_good }}{% if cell.interval %} <span class="ci">{{ cell.interval }}</span>{% endif %}
</td>{% else %}<td>–</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% if section.lines %}<ul>{% for line in section.lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if section.figures %}
<details{% if section.open or sections | length == 1 %} open{% endif %}><summary>Figures</summary>
{% for figure in section.figures %}
<figure><a href="figures/{{ figure.path }}"><img loading="lazy" src="figures/{{ figure.path }}"
alt="{{ figure.title }}, {{ section.name }}"></a>
<figcaption>{{ figure.title }} (<a href="figures/{{ figure.path[:-3] }}svg">svg</a>)</figcaption></figure>
{% endfor %}
</details>
{% endif %}
{% if section.comparisons %}
<details><summary>Paired comparisons</summary>
<p class="lead">{{ tests }}</p>
{% for table in section.comparisons %}
<h3>{{ table.caption }}</h3>
<div class="scroll"><table class="sortable">{{ heading(table.header) }}<tbody>
{% for row in table.rows %}
<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}
{% if cell %}<td data-v="{{ cell.value }}" class="{{ cell.verdict }}" title="{{ cell.hint }}">
{{- cell.text }} {{ cell.sign }}</td>{% else %}<td>–</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</details>
{% endif %}
</section>
{% endfor %}
{% macro plain(table) %}<div class="scroll"><table class="plain"><thead><tr>
{% for name in table.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% if gates %}
<h2 id="gates">Gates</h2>
<p{% if unmet %} class="no"{% endif %}>{{ gates.rows | length - unmet }} of {{ gates.rows | length }} met.</p>
<details{% if unmet %} open{% endif %}><summary>What must hold of the models before their merges are worth measuring
</summary>{{ plain(gates) }}</details>
{% endif %}
{% if selection %}
<h2 id="selection">Settings tried on the dev split</h2>
<details><summary>{{ selection.rows | length }} settings</summary>{{ plain(selection) }}</details>
{% endif %}
<h2 id="notes">Notes</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<script>
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].addEventListener("click", (event) => {
    const head = event.target.closest("th"), body = table.tBodies[0];
    if (!head) return;
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      return "v" in cell.dataset ? Number(cell.dataset.v) : head.cellIndex ? -Infinity : cell.textContent;
    };
    const order = (a, b) => (key(a) > key(b)) - (key(a) < key(b));
    body.append(...[...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
  });
</script>
</body>
</html>
"""
