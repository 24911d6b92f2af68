"""The lm-eval tasks of the ``utility`` scorer, which copies them beside their data."""
