"""AlignMerge of random checkpoints, from an empty store to the merged folder, at one or more lambda_align.

``python -m tests.benchmarks.merges SIZE [FIELD=VALUE ...] [--points N] [--threads N] [--folder DIR]`` writes a base,
an anchor and two experts (bf16) to a temporary folder in DIR, merges them at lambda_align 1, 2, ... N, prints a JSON
line for each step and removes everything. The 1.24 B model takes 25 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint, Writer
from alignmerge.engine.context import Context
from alignmerge.engine.examples import Example
from alignmerge.engine.language import threads
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.store import Store
from alignmerge.method import AlignMerge
from baselines.average import Average
from tests.benchmarks.workloads import SIZES, Size, memory, random_examples, reset_peak

Facts = dict[str, Any]


def random_models(folder: Path, size: Size) -> Models:
    """Write four checkpoints: the anchor and the experts are a tenth of the base's scale away from it."""
    base, anchor, first, second = (_checkpoint(folder / str(seed), size, seed) for seed in range(4))
    return Models(base, anchor, {"first": first, "second": second})


def random_source(folder: Path, size: Size) -> Any:
    """Random examples and a store of its own."""
    sets = {"alignment": random_examples(size, 0), "metric": random_examples(size, 1)}

    def examples(name: str) -> Sequence[Example]:
        return sets[name]

    return SimpleNamespace(
        store=Store(folder / "store"), examples=examples, examples_digest=lambda name: f"random {name}",
        family=SimpleNamespace(threads=1),
    )  # fmt: skip


def points(folder: Path, size: Size, fields: Mapping[str, Any], count: int, cores: int) -> Iterator[Facts]:
    """Yield what each point cost: its fit (the first one makes the statistics), and its merge.

    Last comes the plain average: what reading, writing and rounding cost without any method.
    """
    models = random_models(folder, size)
    source = random_source(folder, size)
    for checkpoint in [models.base, *models.pool]:
        assert checkpoint.digest  # part of the keys, which are no part of a merge
    usual = {"estimator": "kronecker", "lambda_bud": 0.0}  # a budget needs probes
    for number in range(count):
        merger = AlignMerge(**{**usual, "lambda_align": 1.0 + number, **fields})
        with threads(cores):
            yield {"lambda_align": merger.lambda_align, **_merged(merger, source, models, folder / "merged")}
    with threads(cores):
        yield {"average": True, **_merged(Average(), source, models, folder / "merged")}


def _merged(merger: Merger, source: Any, models: Models, target: Path) -> Facts:
    facts: Facts = {}
    ctx = Context(source, models, merger.name, merger.inputs, 0)
    target.mkdir()
    with _measured(facts, "fit"):
        rule = merger.fit(ctx)
    with _measured(facts, "merge"):
        merge(rule, models, target, elementwise=merger.elementwise)
    shutil.rmtree(target)
    return facts


@contextmanager
def _measured(facts: Facts, step: str) -> Iterator[None]:
    """Note seconds and peak memory in GB; ``anonymous`` leaves out what is mapped from files, which can be dropped."""
    before, most, done = reset_peak(), [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        facts[f"{step}_seconds"] = round(time.perf_counter() - started, 2)
        done.set()
        watcher.join()
        peaks = {"before": before, "peak": memory("VmHWM"), "anonymous": most[0]}
        facts[f"{step}_gb"] = {name: round(value / 1e9, 2) for name, value in peaks.items()}


def _checkpoint(folder: Path, size: Size, seed: int) -> Checkpoint:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(size.config())
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.named_parameters())}
    folder.mkdir()
    size.config().save_pretrained(folder)
    writer = Writer(folder, {name: ("BF16", shape) for name, shape in shapes.items()})
    for number, (name, shape) in enumerate(shapes.items()):
        writer.start(name)
        writer.write(_weights(shape, number, seed), name)
    writer.finish()
    return Checkpoint.open(folder, folder.name)


def _weights(shape: tuple[int, ...], number: int, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)  # a norm
    values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
    moved = torch.Generator().manual_seed(1000 * seed + number)
    return values if seed == 0 else values + 0.002 * torch.randn(shape, generator=moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("fields", nargs="*", help="of AlignMerge, such as certificate=false")
    parser.add_argument("--points", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    fields = {key: yaml.safe_load(value) for key, value in (field.split("=", 1) for field in asked.fields)}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for facts in points(Path(folder), SIZES[asked.size], fields, asked.points, asked.threads):
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
