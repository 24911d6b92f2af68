"""What the rooms of ``eval`` say to each other of columns: direction, and how replicates are told from samples."""

from __future__ import annotations

from typing import Literal

Direction = Literal["up", "down", "info"]
BOOTSTRAP = "boot:"
"""Samples whose id starts so are bootstrap replicates of a column that is not a mean (AQI): they give its
interval, never its value."""
