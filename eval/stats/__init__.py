"""From samples to estimates: intervals, tests, comparisons."""

VERSION = 3
"""Raise it when an estimate, an interval or a test changes: committed results are then due to be made anew."""
