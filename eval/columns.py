"""What a column of scores is, to those who measure it, summarise it and show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "info"]
BOOTSTRAP = "boot:"
"""Samples whose id starts so are bootstrap replicates of a column that is not a mean (AQI): they give its
interval, never its value."""
GROUPS = ("Alignment", "Utility", "Geometry")
"""The groups whose tables come first, in this order; others follow in the order of their declaration."""


@dataclass(frozen=True)
class Column:
    """How a column is shown. Whoever computes it declares it; tables, figures and the page read that."""

    label: str
    group: str
    """Which table it stands in; empty: it is in ``summary.csv`` alone."""
    direction: Direction
    """Where better is; ``info``: the column only describes."""
    decimals: int | None = 2
    """Digits after the point; None: three significant digits, for quantities without a natural scale."""
    main: int = 0
    """Its place in the main table (README, terminal, overview) from 1 on; 0: it is not in it."""
    rank: int = 99
    """Its place within its group; columns of equal rank stand in the order of their declaration."""
    by_layer: bool = False
    """Whether its samples are layers: drawn as a curve, neither averaged nor tabulated."""
    tex: str = ""
    """The label in LaTeX, where that is more than the label escaped."""
