"""Merges of ours and of mergekit, side by side in one run, on random Llama checkpoints: prints a table.

``python -m tests.benchmarks.side_by_side SIZE --mergekit PYTHON`` (``make bench-merges``). Every merge runs in a
process of its own, inputs in the page cache, tools in turn, and a table of medians is printed: seconds without
start-up, peak of anonymous memory, ratio to the floor (one read of every input but the base, one write, fsync, in the
same rounds) and to mergekit. mergekit does not wait for the disk (no fsync); we do. Everything written is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

from alignmerge.engine.checkpoint import Writer
from alignmerge.engine.manifest import ROOT
from tests.benchmarks.workloads import SIZES, Size

SCRIPT = str(Path(__file__).with_name("timed_merge.py"))
METHODS = "linear task_arithmetic ties ties_global interpolate thakkar safemerge dare".split()
PEERS = ("linear", "task_arithmetic", "ties")
SLOW = ("ties",)
"""What mergekit does in the first round only, unless the model is small: minutes each at 1.24 B."""
NUMBERS = 1 << 24


class Merge(NamedTuple):
    """One line of the table."""

    tool: str
    method: str
    experts: int


Facts = dict[str, float]


def write_models(folder: Path, size: Size, count: int) -> None:
    """Write a base and ``count`` models a tenth of its scale away from it, in bf16."""
    from transformers import LlamaForCausalLM

    config = size.config()
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.named_parameters())}
    numbers = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    for place in range(count + 1):
        one = folder / str(place)
        one.mkdir()
        config.save_pretrained(one)
        writer = Writer(one, {name: ("BF16", shape) for name, shape in shapes.items()}, shard_bytes=1 << 40)
        for number, (name, shape) in enumerate(shapes.items()):
            writer.start(name)
            _write(writer, name, shape, number, place, numbers)
        writer.finish()


def _write(
    writer: Writer, name: str, shape: tuple[int, ...], number: int, place: int, numbers: torch.Tensor
) -> None:
    """Write a tensor in slices of the same random numbers, moved by tensor, slice and model."""
    width = torch.Size(shape[1:]).numel()
    step = NUMBERS // width
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        origin = numbers.roll(997 * number + first)[: rows * width]
        moved = numbers.roll(131071 * place + 31 * number + first)[: rows * width]
        values = 0.02 * origin + (0.002 * moved if place else 0)
        writer.write(values.view(rows, *shape[1:]), name)


def merges(methods: list[str], experts: list[int], peer: str | None) -> Iterator[Merge]:
    """Yield the lines of the table: all methods at the first number of models, and growth with that number."""
    for count in experts:
        yield Merge("floor", "", count)
        for method in methods if count == experts[0] else [one for one in methods if one in PEERS]:
            yield Merge("ours", method, count)
            if method in PEERS:
                yield Merge("ours+digests", method, count)
                if peer is not None:
                    yield Merge("mergekit", method, count)


def cost(merge: Merge, folder: Path, peer: str | None) -> Facts:
    """Run one merge in a process of its own and return what it cost."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()  # what earlier merges wrote is not this one's
    python = sys.executable if merge.tool != "mergekit" else str(peer)
    command = [python, SCRIPT, merge.tool, merge.method, str(folder), str(merge.experts), str(out)]
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(ROOT)} if merge.tool != "mergekit" else {})
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    found: Facts = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(
    folder: Path, lines: list[Merge], rounds: int, peer: str | None, *, small: bool
) -> dict[Merge, Facts]:
    """Run all merges in turn, ``rounds`` times, and return the median of each figure."""
    found: dict[Merge, list[Facts]] = defaultdict(list)
    for turn in range(rounds):
        for merge in lines:
            once = merge.tool == "mergekit" and merge.method in SLOW and not small
            if turn == 0 or not once:
                found[merge].append(cost(merge, folder, peer))
                print(turn, *merge, found[merge][-1], file=sys.stderr, flush=True)
    result = {}
    for merge, facts in found.items():
        result[merge] = {name: statistics.median(one[name] for one in facts) for name in facts[0]}
    return result


def table(found: dict[Merge, Facts]) -> str:
    """Return the table in markdown: seconds, GB, and ratios of wall (and CPU) time."""
    rows = []
    for merge, facts in found.items():
        least = found[Merge("floor", "", merge.experts)]["wall"]
        theirs = found.get(Merge("mergekit", merge.method, merge.experts))
        row = [merge.method, merge.experts, merge.tool]
        row += [f"{facts[name]:.2f}" for name in ("wall", "user", "system", "anonymous", "start")]
        row += [f"{facts['wall'] / least:.2f}", "" if theirs is None else _against(facts, theirs)]
        rows.append(row)
    heads = "method models tool wall user system GB start-up".split()
    return tabulate(
        rows, [*heads, "to the floor", "to mergekit: wall (CPU)"], tablefmt="github", disable_numparse=True
    )


def _against(facts: Facts, theirs: Facts) -> str:
    cpu = (facts["user"] + facts["system"]) / (theirs["user"] + theirs["system"])
    return f"{facts['wall'] / theirs['wall']:.3f} ({cpu:.3f})"


def publish(page: Path, size: str, text: str) -> None:
    """Put the table between the marks of its size in a page."""
    begin, end = f"<!-- merges:{size} -->\n", f"<!-- /merges:{size} -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no marks {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument(
        "--mergekit", help="the Python of its environment (tests/benchmarks/mergekit.sh makes one)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--experts", nargs="+", type=int, default=[3], help="how many models are merged")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--page", type=Path, help="a page with marks for the table, such as docs/benchmarks.md")
    asked = parser.parse_args()
    lines = list(merges(asked.methods, asked.experts, asked.mergekit))
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        write_models(Path(name), SIZES[asked.size], max(asked.experts))
        found = medians(Path(name), lines, asked.rounds, asked.mergekit, small=asked.size in ("0.5M", "135M"))
    text = table(found)
    print(text)
    if asked.page is not None:
        publish(asked.page, asked.size, text)


if __name__ == "__main__":
    main()
