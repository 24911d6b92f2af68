"""How a number is written, in every table, figure and file of a report."""

from __future__ import annotations

import math

WRITTEN = ".6g"
"""How the CSV files of a report write a number."""


def interval(low: float, high: float, decimals: int | None) -> str:
    """Render an interval: ``[0.12, 0.34]``."""
    return f"[{number(low, decimals)}, {number(high, decimals)}]"


def number(value: float, decimals: int | None, digits: int = 3) -> str:
    """Render a value with fixed decimals, for None with ``digits`` significant ones; no negative zero.

    It is rounded as in the CSV files first: whoever reads those shows the same digits.
    """
    value = float(f"{value:{WRITTEN}}")
    if decimals is not None:
        return f"{value:z.{decimals}f}"
    power = 0
    if value and math.isfinite(value):
        power = math.floor(math.log10(abs(value)))
    if not -4 <= power <= 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:z.{max(0, digits - 1 - power)}f}"
