"""The templates of a report, and how texts that models and users wrote stand for themselves in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_TEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
})  # fmt: skip


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """Return what renders a file of this name; in HTML all is escaped, else by the filters ``md`` and ``tex``."""
    options: dict[str, Any] = {"autoescape": name.endswith(".html"), "keep_trailing_newline": True}
    if name.endswith(".tex"):  # where {% and {# are common
        options |= {"block_start_string": "<%", "block_end_string": "%>"}
        options |= {"variable_start_string": "<<", "variable_end_string": ">>"}
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    made.filters.update(md=escape_markdown, tex=escape_tex, **filters)
    return made.get_template(f"{name}.jinja")


def escape_markdown(text: str) -> str:
    """Make text that a model or user wrote stand for itself in one line of GitHub markdown."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", _one_line(text))


def escape_tex(text: str) -> str:
    """Make text that a model or user wrote stand for itself in LaTeX."""
    return _one_line(text).translate(_TEX)


def _one_line(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())
