"""How often intervals cover and tests err, at the sizes of our experiments; ``python tests/stats/simulation.py``
writes the table of ``docs/statistics.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alignmerge.aqi import aqi01, mean_aqi
from eval.scorers.aqi import resamples
from eval.stats.comparisons import min_f_p, sign_flip_p
from eval.stats.intervals import interval, percentile_interval
from eval.stats.resampling import LEAST_SEEDS, Resampled, in_clusters, mean, mean_over_families, resample

Floats = NDArray[np.float64]
DOCS = Path(__file__).parents[2] / "docs" / "statistics.md"
OPEN, CLOSE = "<!-- simulation -->", "<!-- /simulation -->"


class Design(NamedTuple):
    """Requests about things, answered by models of several seeds and families; deviations are on the logit."""

    requests: int
    things: int
    seeds: int
    families: int
    middle: float
    """The logit of a model's rate at a thing and a seed without effect."""
    of_things: float = 1.0
    of_seeds: float = 0.5

    @property
    def clusters(self) -> tuple[int, ...]:
        """The thing of each request."""
        return tuple(at % self.things for at in range(self.requests))


class Found(NamedTuple):
    """What was found of a design; ``rate`` is the true one."""

    rate: float
    covers: float
    """Share of intervals of a rate that hold the true rate."""
    difference_covers: float
    """Share of intervals of the difference of two rows of equal rate that hold 0."""
    level: float
    """Share of tests of that difference with p < .05."""


DESIGNS = [
    Design(requests, things, seeds, families, middle)
    for requests, things, seeds, families in (
        (192, 17, 1, 1), (48, 10, 1, 1), (192, 17, 3, 1), (192, 17, 8, 1), (192, 17, 3, 5), (192, 17, 8, 5),
        (64, 64, 3, 1),
    )
    for middle in (-4.0, -1.5, 0.0, 2.5)
]  # fmt: skip
PAIRS = [(pairs, shift) for pairs in (24, 48, 96) for shift in (0.5, 1.5, 4.0)]


def expected(design: Design) -> float:
    """Return the mean rate over things and, where seeds are sampled, seeds."""
    spread = math.hypot(design.of_things, design.of_seeds if design.seeds >= LEAST_SEEDS else 0.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    return float((weights / (1 + np.exp(-design.middle - spread * nodes))).sum() / weights.sum())


def answers(design: Design, trials: int, rows: int, generator: np.random.Generator) -> Floats:
    """Return 0/1 answers [families, rows, trials, seeds, requests]: the things are those of all rows."""
    things = generator.normal(0, design.of_things, (trials, 1, design.things))
    shape = (design.families, rows, trials, design.seeds, 1)
    seeds = generator.normal(0, design.of_seeds, shape) if design.seeds >= LEAST_SEEDS else np.zeros(shape)
    logit = design.middle + things[..., list(design.clusters)] + seeds
    drawn = generator.random((design.families, rows, trials, design.seeds, design.requests))
    return (drawn < 1 / (1 + np.exp(-logit))).astype(float)


def measured(values: Floats, design: Design) -> tuple[list[Resampled], Resampled]:
    """Return the estimates of [families, trials, seeds, requests], and their mean over families."""
    seeds = np.full(values.shape[1], design.seeds)
    empty = np.empty((*values.shape[1:3], 0))
    parts = [
        resample(of, empty, seeds, design.clusters, column="x", family=str(number))
        for number, of in enumerate(values)
    ]
    return parts, mean_over_families(parts)


def p_values(parts: Sequence[Resampled], design: Design) -> Floats:
    """Return the [trials] p-values that a comparison of two rows has."""
    if design.seeds >= LEAST_SEEDS or len(parts) > 1:
        return min_f_p(parts)
    return sign_flip_p(in_clusters(mean(parts[0].by_seed, axis=1), design.clusters))


def simulate(design: Design, trials: int, seed: int = 0) -> Found:
    """Draw ``trials`` experiments, each of two rows of equal rate."""
    values = answers(design, trials, 2, np.random.default_rng([seed, *map(abs, map(int, design))]))
    rate = expected(design)
    _, one = measured(values[:, 0], design)
    low, high = interval(one, one.varies, binary=True, least=0.0)
    parts, difference = measured(values[:, 0] - values[:, 1], design)
    below, above = interval(difference, difference.varies, binary=True, least=-1.0)
    p = p_values(parts, design)
    return Found(
        rate,
        float(np.mean((low <= rate) & (rate <= high))),
        float(np.mean((below <= 0) & (above >= 0))),
        float(np.mean(p < 0.05)),
    )


def simulate_aqi(pairs: int, shift: float, trials: int, seed: int = 0) -> tuple[float, float, float]:
    """Return the true AQI of 16 correlated dimensions, its mean estimate, and the coverage of its interval."""
    stream = torch.Generator().manual_seed(seed)
    counts = resamples(pairs, 500)
    true = float(aqi01(torch.tensor(shift**2 / 4 / 16), 1, 1))
    values, hits = [], 0
    for _ in range(trials):
        common, *own = torch.randn(3, pairs, 16, generator=stream)
        harmful, benign = ((common + one) / math.sqrt(2) for one in own)
        harmful[:, 0] += shift
        points = torch.cat([harmful, benign])[None]
        values.append(float(mean_aqi(points)))
        low, high = percentile_interval(mean_aqi(points, counts).double().numpy()[None])
        hits += int(low[0] <= true <= high[0])
    return true, float(np.mean(values)), hits / trials


def table(trials: int) -> str:
    """Return both tables in markdown."""
    lines = [
        f"{trials} experiments a line; the standard error of a share of .95 is {math.sqrt(0.0475 / trials):.3f}.",
        "",
        "| requests | things | seeds | families | true rate | interval covers | difference covers "
        "| level of the test |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for design in DESIGNS:
        found = simulate(design, trials)
        sizes = f"{design.requests} | {design.things} | {design.seeds} | {design.families}"
        shares = f"{found.covers:.3f} | {found.difference_covers:.3f} | {found.level:.3f}"
        lines.append(f"| {sizes} | {found.rate:.3f} | {shares} |")
    lines += ["", "| pairs of probes | true AQI | mean estimate | interval covers |", "|---:|---:|---:|---:|"]
    for pairs, shift in PAIRS:
        true, estimate, covers = simulate_aqi(pairs, shift, trials)
        lines.append(f"| {pairs} | {true:.3f} | {estimate:.3f} | {covers:.3f} |")
    return "\n".join(lines)


def written(text: str, made: str) -> str:
    """Return ``text`` with ``made`` between the marks."""
    before, rest = text.split(OPEN)
    _, after = rest.split(CLOSE)
    return f"{before}{OPEN}\n{made}\n{CLOSE}{after}"


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text(encoding="utf-8"), table(1000)), encoding="utf-8")
