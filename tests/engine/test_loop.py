"""The streaming loop: what may not change a bit, what it holds in memory, and its compiled sums."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from alignmerge.engine import merger
from alignmerge.engine.checkpoint import Checkpoint, load_tensors
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import SINGLE
from alignmerge.engine.loop import blocks, in_order, merge
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Block, Merger, Models, average, step
from baselines import ties
from baselines.average import Average
from baselines.interpolate import Interpolate
from baselines.task_arithmetic import TaskArithmetic
from baselines.ties import Cut, Ties

SYMMETRIC: list[Merger] = [Average(), TaskArithmetic(scale=0.7), Interpolate(t=0.3)]
SYMMETRIC += [Ties(density=0.4, scale=0.7), Ties(density=0.4, variant="per_tensor")]
near = st.floats(2.0**-12, 2.0**12, width=32) | st.just(0.0)
"""Magnitudes whose sums are exact in float64, as ``average`` says."""
signed = st.tuples(near, st.sampled_from([-1.0, 1.0])).map(lambda pair: pair[0] * pair[1])


def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / SINGLE)
    return load_tensors(folder)


def family(folder: Path, values: Sequence[Tensor]) -> Models:
    """Every model has one matrix, one vector and one scalar, cut from the same numbers."""
    opened = []
    for number, one in enumerate(values):
        tensors = {"m": one[1:].view(-1, 2).clone(), "s": one[0].clone(), "v": one.clone()}
        opened.append(checkpoint(folder / str(number), tensors))
    base, anchor, *experts = opened
    return Models(base, anchor, {f"e{number}": model for number, model in enumerate(experts)})


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 4), st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_neither_order_nor_blocks_nor_threads_change_a_bit(
    count: int, half: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    size = 2 * half + 3
    drawn = st.lists(signed, min_size=size, max_size=size)
    values = [torch.tensor(data.draw(drawn)).to(dtype) for _ in range(count + 2)]
    method = data.draw(st.sampled_from(SYMMETRIC))
    with tempfile.TemporaryDirectory() as folder:
        models = family(Path(folder), values)
        digests = set()
        for order in permutations(models.experts):
            chosen = models._replace(experts={alias: models.experts[alias] for alias in order})
            for elements, workers in ((1, 1), (4, 2), (1000, 1), (1000, 2)):
                ctx: Any = SimpleNamespace(models=chosen, record=lambda **facts: None)
                rule = method.fit(ctx)
                out = Path(folder) / f"out{len(list(Path(folder).iterdir()))}"
                out.mkdir()
                digests.add(merge(rule, chosen, out, block_elements=elements, workers=workers))
    assert len(digests) == 1


@settings(deadline=None)
@given(st.integers(1, 10), st.data())
def test_average_is_the_exact_mean_rounded(count: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(signed, min_size=count, max_size=count))
    found = float(average([torch.tensor([value]) for value in values]))
    exact = sum(map(Fraction, values)) / count
    assert np.float32(found) == np.float32(float(exact))  # Fraction to float64 rounds correctly


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3000), st.integers(0, 1000))
def test_compiled_sums_are_torchs(count: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, *pool = torch.randn(count + 1, size, generator=generator)
    found = average(pool), step(base, pool, 0.4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merger, "_compiled", lambda: None)
        plain = average(pool), step(base, pool, 0.4)
    assert merger._compiled() is not None
    assert all(map(torch.equal, found, plain))
    wanted = sum(one.double() for one in pool) / count
    assert torch.equal(found[0], wanted.float())  # type: ignore[union-attr]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 2500), st.integers(0, 1000), st.sampled_from([-1.0, 0.0, 1.0]))
def test_compiled_ties_are_torchs(count: int, size: int, seed: int, majority: float) -> None:
    """Small multiples of 1/8, so that zeros of both signs, equal magnitudes and cancellations abound."""
    normal = torch.Generator().manual_seed(seed)
    base, *pool = (torch.randint(-4, 5, (count + 1, size), generator=normal) * -0.125).unbind()
    least = torch.randint(0, 4, (count,), generator=normal) * 0.125
    cuts = [Cut(float(one), float(size // 2 + 3)) if one > 0.2 else Cut(float(one)) for one in least]
    block, method = Block("w", slice(0, size), base, pool), Ties(scale=0.7)
    found = method._merged(block, cuts, majority, None), ties._votes(cuts, None, block)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merger, "_compiled", lambda: None)
        plain = method._merged(block, cuts, majority, None), ties._votes(cuts, None, block)
    assert torch.equal(found[0].view(torch.int32), plain[0].view(torch.int32)) and found[1] == plain[1]


def test_negative_zeros_stay() -> None:
    zeros = [torch.tensor([-0.0, 0.0])] * 3
    assert torch.equal(average(zeros).signbit(), torch.tensor([True, False]))


def test_a_model_that_no_rule_asks_for_is_not_read(tmp_path: Path) -> None:
    values = [torch.ones(5), torch.ones(5), 3 * torch.ones(5)]
    models = family(tmp_path, [torch.full((5,), torch.nan), *values[1:]])
    merge(lambda block: average(block.pool), models, tmp_path)
    with pytest.raises(BadRequest, match="not finite"):
        merge(lambda block: block.base, models, tmp_path)


def test_items_come_in_order_and_a_fault_stops_them() -> None:
    assert list(in_order(lambda item: item * item, range(50), 3)) == [item * item for item in range(50)]
    seen = []
    with pytest.raises(ZeroDivisionError):
        for found in in_order(lambda item: 1 // (5 - item), range(1000), 2):
            seen.append(found)
    assert len(seen) == 5


def test_threads_of_torch_are_what_they_were() -> None:
    before = torch.get_num_threads()
    list(in_order(lambda item: torch.get_num_threads(), range(9), 2))
    assert torch.get_num_threads() == before


def test_blocks_cover_every_number_once(tmp_path: Path) -> None:
    models = family(tmp_path, [torch.arange(11.0) + number for number in range(3)])

    def seen(block: Block) -> tuple[str, list[float]]:
        return block.name, block.base.flatten().tolist()

    found: dict[str, list[float]] = {}
    for name, values in blocks(models, seen, block_elements=4):
        found.setdefault(name, []).extend(values)
    assert found == {name: models.base.read(name).flatten().tolist() for name in models.base}


MEMORY = """
import json, struct, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from alignmerge.engine.checkpoint import load_tensors
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Models
from baselines.average import Average
from baselines.dare import Dare
from baselines.safemerge import SafeMerge
from baselines.task_arithmetic import TaskArithmetic
from baselines.ties import Ties

class Whole(Average):
    elementwise = False  # fed as AlignMerge is

folder, rows, columns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model = folder / "model"
model.mkdir()
entries, size = {}, 0
for name, height in (("model.embed_tokens.weight", rows), ("model.layers.0.mlp.up_proj.weight", 4 * columns)):
    end = size + 2 * height * columns
    entries[name] = {"dtype": "BF16", "shape": [height, columns], "data_offsets": [size, end]}
    size = end
header = json.dumps(entries).encode()
header += b" " * (-len(header) % 8)
with (model / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(header)) + header)
    file.truncate(8 + len(header) + size)  # a hole: zeros that take no disk
one = load_tensors(model).known_as("zeros")
models = Models(one, one, {"a": one, "b": one})
ctx = SimpleNamespace(models=models, seed=0, record=lambda **facts: None)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
streamed = [Average(), TaskArithmetic(), Ties(), Ties(variant="per_tensor")]
for method in [*streamed, Whole(), Dare(), SafeMerge()]:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    merge(method.fit(ctx), models, out, elementwise=method.elementwise)
done.set()
watcher.join()
print(peak[0] // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of the process")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Gemma-2's embedding of 256,000 rows, narrower: all that the process holds, torch included, in MiB."""
    peaks = []
    for columns in (64, 160):
        folder = tmp_path / str(columns)
        folder.mkdir()
        command = [sys.executable, "-c", MEMORY, str(folder), "256000", str(columns)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert max(peaks) < 1024
    assert peaks[1] < peaks[0] + 48  # the larger model has 48 MiB more in bf16, and 97 MiB more in fp32 a model
