"""The columns of the paper's figures 4 and 5 as stacked tables, for markdown and LaTeX, from
``summary.csv``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from eval.stats.estimates import ALL, KAPPA, is_method
from eval.stats.resampling import LEAST_SEEDS, LEVEL, RESAMPLES

if TYPE_CHECKING:
    from eval.columns import Direction


class Column(NamedTuple):
    """How a column of ``summary.csv`` is shown."""

    name: str
    label: str
    tex: str
    decimals: int | None = 2
    """Digits after the point; None: three significant digits, for quantities without a natural scale."""


class Entry(NamedTuple):
    """One number as shown."""

    value: float
    mean: str
    interval: str
    best: bool
    """Whether no other method is better; never true for theta_IT, the anchor and the experts."""


LAYOUT: dict[str, tuple[Column, ...]] = {
    "Alignment": (
        Column("aqi", "AQI", "AQI", 3),
        Column("toxicity_mean", "mean toxicity", "mean toxicity", 3),
        Column("toxicity_rate", "toxicity rate", "toxicity rate"),
        Column("judge_score", "judge score", "judge score"),
        Column("refusal_rate", "refusal rate", "refusal rate"),
        Column("over_refusal_rate", "over-refusal rate", "over-refusal rate"),
        Column("gibberish_rate", "gibberish rate", "gibberish rate"),
    ),
    "Utility": (
        Column("instruction_following", "instruction following", "instruction following"),
        Column("reasoning", "reasoning", "reasoning"),
        Column("helpfulness", "helpfulness", "helpfulness"),
        Column("delta_utility", "ΔUtility, %", r"$\Delta$Utility, \%", 1),
        Column("gsm8k", "GSM8K", "GSM8K"),
        Column("mmlu", "MMLU", "MMLU"),
        Column("factual", "factual recall", "factual recall"),
    ),
    "Geometry": (
        Column("drift_anchor", "drift from anchor", "drift from anchor", None),
        Column("drift_base", "drift from base", "drift from base", None),
        Column("budget_violations", "budget violations", "budget violations"),
        Column("l_geo", "L_geo", r"$L_\mathrm{geo}$", None),
        Column("l_geo_excess", "L_geo excess", r"$L_\mathrm{geo}$ excess", None),
        Column("fisher_length", "Fisher length", "Fisher length", None),
        Column("tau_gap", "τ gap", r"$\tau$ gap", None),
        Column("energy_alignment", "energy in S_A", r"energy in $S_A$", None),
        Column("energy_utility", "energy in S_U", r"energy in $S_U$", None),
        Column("overlap", "overlap of S_A and S_U", r"overlap of $S_A$ and $S_U$", None),
    ),
}
ARROWS: dict[Direction, str] = {"up": "↑", "down": "↓", "info": ""}
_TEX_ARROWS: dict[Direction, str] = {"up": r"$\uparrow$", "down": r"$\downarrow$", "info": ""}
_NONE = "–"


def number(value: float, decimals: int | None, digits: int = 3) -> str:
    """Render a value with fixed decimals, or for None with ``digits`` significant ones; no negative zero."""
    if decimals is not None:
        return f"{value:z.{decimals}f}"
    power = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    if not -4 <= power <= 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:z.{max(0, digits - 1 - power)}f}"


def present(of_family: pd.DataFrame, columns: Iterable[Column]) -> list[Column]:
    """Return the columns in which at least one row of the family has a value."""
    names = set(of_family.loc[of_family["mean"].notna(), "column"])
    return [column for column in columns if column.name in names]


def directions(of_family: pd.DataFrame) -> dict[str, Direction]:
    """Return the better direction of each column of a family."""
    return dict(zip(of_family["column"], of_family["better_direction"], strict=True))


def cells(of_family: pd.DataFrame, column: Column) -> dict[str, Entry]:
    """Return row -> cell for the rows of a family that have a value in the column."""
    values = of_family[(of_family["column"] == column.name) & of_family["mean"].notna()].set_index("row")
    best = best_methods(values["mean"], directions(of_family)[column.name])
    shown = {}
    for row, mean, low, high in values[["mean", "ci_low", "ci_high"]].itertuples(name=None):
        ends = f"[{number(low, column.decimals)}, {number(high, column.decimals)}]" if np.isfinite(low) else ""
        shown[row] = Entry(mean, number(mean, column.decimals), ends, row in best)
    return shown


def best_methods(means: pd.Series[float], direction: Direction) -> set[str]:
    """Return the best methods of a column, ties included; none where they are all alike or only differ."""
    methods = means[[row for row in means.index if is_method(row)]]
    if direction == "info" or methods.nunique() < 2:
        return set()
    top = methods.max() if direction == "up" else methods.min()
    return set(methods.index[methods == top])


def escape_markdown(text: str) -> str:
    """Make text that a model or user wrote stand for itself in one line of GitHub markdown."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", _one_line(text))


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {character: "\\" + character for character in "&%$#_{}"}


def escape_tex(text: str) -> str:
    """Make text that a model or user wrote stand for itself in LaTeX."""
    return "".join(_TEX.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())


def grid(
    of_family: pd.DataFrame,
    columns: Sequence[Column],
    name: Callable[[str], str],
    show: Callable[[Entry], str],
) -> list[list[str]]:
    """Return one list of texts a row: the row's name, then each column."""
    shown = [cells(of_family, column) for column in columns]
    return [
        [name(row), *(show(of_row[row]) if row in of_row else _NONE for of_row in shown)]
        for row in of_family["row"].unique()
    ]


def markdown_table(of_family: pd.DataFrame, columns: Sequence[Column]) -> str:
    """Return one GitHub table of a family; the best method of a column is bold."""
    from tabulate import tabulate

    def show(cell: Entry) -> str:
        mean = f"**{cell.mean}**" if cell.best else cell.mean
        return f"{mean} {cell.interval}".strip()

    ways = directions(of_family)
    header = ["row", *(f"{escape_markdown(c.label)} {ARROWS[ways[c.name]]}".strip() for c in columns)]
    body = grid(of_family, columns, escape_markdown, show)
    align = ("left", *["right"] * len(columns))
    return tabulate(body, header, tablefmt="pipe", disable_numparse=True, colalign=align)


def unscored(of_family: pd.DataFrame) -> list[str]:
    """Return what could not be scored, a line for all columns that lack as many samples of the same rows."""
    lacking = of_family[of_family["unscored"] > 0]
    columns: dict[str, list[str]] = {}
    for column, of in lacking.groupby("column", sort=False):
        rows = ", ".join(f"{row} {count}" for row, count in zip(of["row"], of["unscored"], strict=True))
        columns.setdefault(rows, []).append(str(column))
    return [f"{', '.join(names)} unscored: {rows}" for rows, names in columns.items()]


def missing(summary: pd.DataFrame) -> list[str]:
    """Return one line with the rows that are not in every family, and so have no mean over families."""
    families = [family for family in summary["family"].unique() if family != ALL] if _whole(summary) else []
    lacking = {
        row: [family for family in families if family not in set(of["family"])]
        for row, of in summary.groupby("row", sort=False)
    }
    lines = [f"{row!s} (not in {', '.join(names)})" for row, names in lacking.items() if names]
    return [f"No mean over families: {'; '.join(lines)}"] if lines else []


def _whole(summary: pd.DataFrame) -> bool:
    return bool(summary["family"].eq(ALL).any())


def legend(summary: pd.DataFrame) -> list[str]:
    """Return what a reader must know to read the tables."""
    return [
        _intervals(seeds=bool(summary["seeds"].max() >= LEAST_SEEDS)),
        *([_OVER_FAMILIES] if _whole(summary) else []),
        "Bold: the best merged model of a column; base, anchor and experts do not compete. Arrows: the "
        "better direction; columns without one only describe.",
        "Budget violations: the fraction of bootstrap replicates of AQI below that of the anchor minus "
        f"{KAPPA:g} of its sd. Delta utility: mean relative change against the best expert.",
    ]


_OVER_FAMILIES = (
    "All families: the plain mean over the families named here, which are not taken as a sample of others. The same "
    "prompts are drawn for all of them, the seeds for each by itself. AQI and geometry have no common scale across "
    "architectures: their means only order the rows."
)


def _intervals(*, seeds: bool) -> str:
    """Say what the brackets are; ``seeds``: whether any row has enough of them to be resampled."""
    if not seeds:
        return (
            f"Brackets hold {LEVEL:.0%} intervals from {RESAMPLES} resamples of the prompts, shared by all rows; "
            "seeds are averaged first. Where all answers of a 0/1 column agree, Wilson's limit stands instead. A "
            "column that is one number per model has no interval."
        )
    return (
        f"Brackets hold {LEVEL:.0%} intervals from {RESAMPLES} resamples, shared by all rows, of both the prompts and "
        f"the seeds of a family (from {LEAST_SEEDS} seeds on): each seed has models of its own and all answer the "
        "same prompts, so the two are drawn independently and crossed. One seed less than there are is drawn, as "
        "drawing all would understate their variance; where nothing but the seeds varies the interval of three is "
        "their range, which covers the truth in about three cases of four. A row of one seed, on models that all "
        "seeds share, varies with the prompts only. Where all answers of a 0/1 column agree, Wilson's limit for that "
        "many prompts stands instead. A column that is one number per model varies with the seeds only."
    )


def heading(family: str, marks: Mapping[str, str]) -> str:
    """Return the heading of a family's tables, with its mark (a missed gate); the mean bears the marks of all."""
    if family == ALL:
        return "; ".join([family, *(f"{name}: {mark}" for name, mark in marks.items())])
    return f"{family} ({marks[family]})" if family in marks else family


def markdown(summary: pd.DataFrame, title: str, notes: Sequence[str], marks: Mapping[str, str]) -> str:
    """Render ``table.md``: tables of alignment, utility and geometry, over all families first, then the notes."""
    parts = [f"# {escape_markdown(title)}"]
    for family, of_family in summary.groupby("family", sort=False):
        parts.append(f"## {escape_markdown(heading(str(family), marks))}")
        for group, columns in LAYOUT.items():
            if shown := present(of_family, columns):
                parts += [f"### {group}", markdown_table(of_family, shown)]
        parts += _bullets([*unscored(of_family), *(missing(summary) if family == ALL else [])])
    parts += ["## Notes", *_bullets([*notes, *legend(summary)])]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Iterable[str]) -> list[str]:
    """Return the lines as one markdown list, or nothing."""
    text = "\n".join(f"- {escape_markdown(line)}" for line in lines)
    return [text] if text else []


_TEMPLATE = r"""% Needs booktabs and graphicx; XeLaTeX or LuaLaTeX for letters outside Latin-1.
<% for table in tables %>
\begin{table}[p]
  \centering
  \caption{<< table.caption >>}
  \resizebox{\linewidth}{!}{%
  \begin{tabular}{l*{<< table.header | length >>}{r}}
    \toprule
    & << table.header | join(" & ") >> \\
<% for block in table.blocks %>
    \midrule
<% for line in block %>
    << line | join(" & ") >> \\
<% endfor %>
<% endfor %>
    \bottomrule
  \end{tabular}}
\end{table}
<% endfor %>
\begin{itemize}\footnotesize\raggedright
<% for note in notes %>
  \item << note >>
<% endfor %>
\end{itemize}
"""


def latex(summary: pd.DataFrame, title: str, notes: Sequence[str], marks: Mapping[str, str]) -> str:
    """Render ``table.tex``: the tables of ``markdown`` as floats for booktabs, then the notes as a list."""
    from jinja2 import Environment

    families = [(str(family), of_family) for family, of_family in summary.groupby("family", sort=False)]
    tables = [
        _tex_table(of_family, shown, f"{title}: {heading(family, marks)}, {group.lower()}")
        for family, of_family in families
        for group, columns in LAYOUT.items()
        if (shown := present(of_family, columns))
    ]
    below = [f"{family}: {line}" for family, of_family in families for line in unscored(of_family)]
    below += missing(summary)
    environment = Environment(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # jinja2 knows no LaTeX: every text is escaped before it gets here
    )
    template = environment.from_string(_TEMPLATE)
    return template.render(
        tables=tables, notes=[escape_tex(line) for line in [*below, *notes, *legend(summary)]]
    )


def _tex_table(of_family: pd.DataFrame, columns: Sequence[Column], caption: str) -> dict[str, Any]:
    """Return what the template needs for one table: identity rows and methods are blocks of their own."""

    def show(cell: Entry) -> str:
        mean = rf"\textbf{{{cell.mean}}}" if cell.best else cell.mean
        return rf"{mean} {{\scriptsize {cell.interval}}}" if cell.interval else mean

    ways = directions(of_family)
    lines = grid(of_family, columns, escape_tex, show)
    identity = sum(not is_method(row) for row in of_family["row"].unique())
    blocks = [lines[:identity], lines[identity:]]
    return {
        "caption": escape_tex(caption),
        "header": [f"{column.tex} {_TEX_ARROWS[ways[column.name]]}".strip() for column in columns],
        "blocks": [block for block in blocks if block],
    }
