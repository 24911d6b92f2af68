"""DARE against its paper's formula (arXiv 2311.03099, eq. 2) written out, and against what it promises."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import Block, Inputs
from baselines.dare import Dare

BASE = torch.full((40, 50), 10.0)
POOL = [BASE + 1.0, BASE - 2.0]
BLOCK = Block("w", slice(None), BASE, POOL)


def context(seed: int, digests: tuple[str, ...] = ("a", "b")) -> Any:
    pool = [SimpleNamespace(digest=digest) for digest in digests]
    models = SimpleNamespace(pool=pool, aliases=["anchor", "math"])
    return SimpleNamespace(seed=seed, models=models, record=lambda **facts: None)


def merged(method: Dare, seed: int, block: Block = BLOCK) -> torch.Tensor:
    return method.fit(context(seed))(block)


def test_every_delta_is_dropped_or_divided_by_what_is_kept() -> None:
    """m * delta / (1 - p): with two models of weight 1/2 four values can come out."""
    found = merged(Dare(drop=0.75), 3) - BASE
    first, second = 0.5 * 1.0 / 0.25, 0.5 * -2.0 / 0.25
    allowed = torch.tensor([0.0, first, second, first + second])
    assert torch.isin(found, allowed).all() and len(found.unique()) == 4
    kept = ((found == first) | (found == first + second)).float().mean()
    assert abs(float(kept) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / found.numel())


def test_the_mean_over_many_seeds_is_the_plain_average() -> None:
    draws = torch.stack([merged(Dare(drop=0.9), seed) for seed in range(300)])
    error = (draws.mean() - torch.stack(POOL).mean()).abs()
    assert float(error) < 5 * float(draws.std()) / math.sqrt(draws.numel())


def test_nothing_dropped_is_task_arithmetic() -> None:
    scaled = merged(Dare(drop=0.0, scale=2.0), 0)
    torch.testing.assert_close(scaled, BASE + 2.0 * (0.5 * 1.0 + 0.5 * -2.0), rtol=0, atol=0)


def test_masks_hang_on_seed_and_content_and_on_nothing_else() -> None:
    method = Dare(drop=0.5)
    assert torch.equal(merged(method, 1), merged(method, 1))
    assert not torch.equal(merged(method, 1), merged(method, 2))
    swapped = method.fit(context(1, ("b", "a")))(Block("w", slice(None), BASE, POOL[::-1]))
    torch.testing.assert_close(swapped, merged(method, 1), rtol=0, atol=0)


def test_inputs_are_declared() -> None:
    assert Dare().inputs == Inputs(seed=True)
    assert Dare(weights="validation").inputs == Inputs(seed=True, examples=("metric",))


@pytest.mark.parametrize("fields", [{"drop": 1.0}, {"drop": -0.1}, {"scale": math.nan}, {"weights": "mine"}])
def test_wrong_fields_are_named(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"method.{next(iter(fields))}"):
        Dare(**fields)
