"""Paths and chat templates on the command line, quoted for Hydra's grammar: a user types them as they are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

EXPERTS = "family.experts"
PATHS = {
    "store", "results", "model", "out", "family.base", "family.anchor", "family.pretrained", "family.alignment",
    "family.metric", "scorer.toxicity.checkpoint", "scorer.toxicity.checkpoint_config",
}  # fmt: skip
"""Keys whose value is a path, or null."""
TEXT = "family.chat_template"
"""A key whose value is taken whole, whatever marks and commas it holds."""
BY_THE_USER = re.compile(r"|null|'.*'|\".*\"", re.S)
"""Texts that are left as they are: nothing, or quoted already."""
LEFT = re.compile(r"|null|'.*'|\".*\"|.*\$\{.*", re.S)
"""Values that are left as they are: nothing, quoted by the user, no plain text."""
BETWEEN = re.compile(r",\s*(?=['\"]?[\w.-]+['\"]?\s*:)")
"""Between two entries of a mapping alias -> path; a path may hold a comma."""


QUOTES = " '\""


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Quote what is plainly a path, and the chat template; let ``family.experts.math=DIR`` add an expert."""
    sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    return [_with_path(argument, sweep) for argument in arguments]


def quoted(value: str) -> str:
    """Write any text so that Hydra's grammar reads it back as this text."""
    escaped = re.sub(r"(\\*)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"'{escaped}'"


def for_the_shell(key: str, value: str) -> str:
    """Return an override as it is to be typed in a shell, whatever its value holds."""
    plain = not re.search(r"[\"\\]", value)
    return shlex.quote(f'{key}="{value}"' if plain else f"{key}={quoted(value)}")


def _with_path(argument: str, sweep: bool) -> str:
    given, equals, value = argument.partition("=")
    key = given.lstrip("+")
    if not equals:
        return argument
    if key == EXPERTS and re.fullmatch(r"\{.*\}", value, re.S):
        entries = map(_entry, BETWEEN.split(value[1:-1].strip()))
        return f"{given}={{{', '.join(entries)}}}"
    if key == TEXT:
        return argument if BY_THE_USER.fullmatch(value) else f"{given}={quoted(value)}"
    expert = key.startswith(f"{EXPERTS}.")
    if not expert and key not in PATHS:
        return argument
    values = [value]
    if sweep:
        values = value.split(",")
    if expert:
        given = f"++{key}"
    return f"{given}={','.join(map(_path, values))}"


def _entry(entry: str) -> str:
    alias, colon, value = entry.partition(":")
    if not colon:
        return entry
    return f"{alias.strip(QUOTES)}: {_path(value.strip())}"


def _path(value: str) -> str:
    if LEFT.fullmatch(value):
        return value
    if value.startswith("~"):
        value = str(Path(value).expanduser())
    return quoted(value)
