"""``eval.stats.VERSION`` counts the changes of the statistics: a change that it does not count fails here."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from eval import stats
from eval.stats import comparisons, families

KNOWN = {1: "d4a5183aec2bc839", 2: "36f2c2196d054b66", 3: "ea5f6f7fed1a5374"}
"""Version -> the first 16 digits of the sha256 of summary and comparisons of the samples below."""
COLUMNS = {"refusal_rate": "up", "reasoning": "up", "helpfulness": "up", "l_geo": "down"}
ROWS = ("base", "anchor", "expert:sums", "average", "alignmerge")


def samples() -> pd.DataFrame:
    """Two families of three seeds and one of one: rates, numbers, AQI with replicates, unscored prompts."""
    generator = np.random.default_rng(7)
    lines = []
    for family, seeds in (("a", 3), ("b", 3)):
        for seed in range(seeds):
            for place, row in enumerate(ROWS):
                for column in COLUMNS:
                    values = generator.random(12)
                    if column != "l_geo":
                        values = np.round(values * (place + 1) / 5 + 0.2)
                    if column == "reasoning":
                        values[0] = np.nan
                    lines += [(family, row, seed, column, f"p{i}", value) for i, value in enumerate(values)]
                ids = ["all", *(f"boot:{i}" for i in range(30))]
                values = 0.1 * place + 0.02 * generator.standard_normal(31)
                lines += [(family, row, seed, "aqi", i, value) for i, value in zip(ids, values, strict=True)]
    frame = pd.DataFrame(lines, columns=["family", "row", "seed", "column", "id", "value"])
    return frame.assign(prompt="", direction=frame["column"].map({**COLUMNS, "aqi": "up"}))


def test_statistics_that_change_have_another_version() -> None:
    for_all = samples()
    text = ""
    for scores in (for_all, for_all[(for_all["family"] == "a") & (for_all["seed"] == 0)]):
        measured = families.measure_all(scores)
        for frame in (families.summary(measured), comparisons.comparisons(measured, ["average"])):
            text += frame.to_csv(index=False, float_format="%.6g")
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert KNOWN.get(stats.VERSION) == found, (
        "the statistics changed: raise eval.stats.VERSION and record this digest"
    )
