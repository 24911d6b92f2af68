"""Each benchmark prints its ratio to the floor of the same work, measured in the same run: ``make bench``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from alignmerge.engine.checkpoint import Checkpoint, save_tensors
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Merger, Models
from baselines.average import Average
from baselines.task_arithmetic import TaskArithmetic

ROWS, COLUMNS, TENSORS = 4096, 1024, 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Four random checkpoints of 100 M parameters (400 MB) each."""
    root = tmp_path_factory.mktemp("models")
    opened = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        folder = root / str(seed)
        folder.mkdir()
        save_tensors(
            folder, {f"w{i:02d}": torch.randn(ROWS, COLUMNS, generator=generator) for i in range(TENSORS)}
        )
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
        opened.append(Checkpoint.open(folder, f"model {seed}"))
    return Models(opened[0], opened[1], {"a": opened[2], "b": opened[3]})


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic()], ids=["average", "task_arithmetic"])
def test_merge_against_one_read_and_one_write(
    benchmark: BenchmarkFixture, models: Models, merger: Merger, tmp_path: Path
) -> None:
    def floor() -> None:
        for checkpoint in [models.base, *models.pool]:
            for file in {spec.file for spec in checkpoint.values()}:
                file.read_bytes()
        source = next(iter(models.base.values())).file
        (tmp_path / "copy").write_bytes(source.read_bytes())

    rule = merger.fit(None)  # type: ignore[arg-type]  # data-free: the context is not touched
    benchmark.pedantic(lambda: merge(rule, models, tmp_path), rounds=3, warmup_rounds=1)
    benchmark.extra_info["ratio to reading and writing the bytes"] = benchmark.stats.stats.min / _seconds(floor)
