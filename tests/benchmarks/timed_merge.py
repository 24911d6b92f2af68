"""One merge in a process of its own, by us or by mergekit: prints what it cost as JSON.

``python tests/benchmarks/timed_merge.py TOOL METHOD FOLDER EXPERTS OUT`` merges FOLDER/0 (the base) and FOLDER/1 to
FOLDER/EXPERTS. TOOL is ``ours``, ``ours+digests`` (as from an empty store), ``mergekit`` or ``floor`` (every input but
the base is read once from the page cache and as much as one of them is written, by two threads, with fsync). Runs in
either environment; start-up is printed apart.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STARTED = time.perf_counter()
WEIGHTS = "model.safetensors"
READ_BYTES, WRITTEN_BYTES = 1 << 19, 1 << 23
Work = Callable[[], object]


def ours(method: str, folders: list[Path], out: Path, *, digests: bool) -> Work:
    """Prepare a merge of ours; the base is the first folder."""
    from alignmerge.engine.kernels import fix

    fix()
    from alignmerge.engine.checkpoint import Checkpoint
    from alignmerge.engine.loop import merge
    from alignmerge.engine.merger import Models
    from baselines.average import Average
    from baselines.dare import Dare
    from baselines.interpolate import Interpolate
    from baselines.mergealign import MergeAlign
    from baselines.safemerge import SafeMerge
    from baselines.task_arithmetic import TaskArithmetic
    from baselines.ties import Ties

    methods: dict[str, Any] = {
        "linear": Average(), "task_arithmetic": TaskArithmetic(), "ties": Ties(variant="per_tensor"),
        "ties_global": Ties(), "interpolate": Interpolate(), "thakkar": MergeAlign(variant="thakkar"),
        "safemerge": SafeMerge(), "dare": Dare(),
    }  # fmt: skip
    merger = methods[method]
    opened = [Checkpoint.open(folder, folder.name) for folder in folders]
    base, anchor, *experts = opened
    models = Models(base, anchor, {model.where: model for model in experts})
    ctx: Any = SimpleNamespace(models=models, seed=0, record=lambda **facts: None)
    if method == "dare" and not digests:
        for model in models.pool:
            model.known_as(model.where)

    def work() -> None:
        if digests:
            assert all(model.digest for model in opened)
        merge(merger.fit(ctx), models, out, elementwise=merger.elementwise)

    return work


def mergekit(method: str, folders: list[Path], out: Path) -> Work:
    """Prepare a merge of mergekit with its own defaults."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, *pool = folders
    parameters = {"weight": 1 / len(pool)} if method == "linear" else {"weight": 0.4, "density": 0.2}
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    recipe["models"] = [{"model": str(folder), "parameters": parameters} for folder in pool]
    if method != "linear":
        recipe["base_model"] = str(base)
    config = MergeConfiguration.model_validate(json.loads(json.dumps(recipe)))
    return lambda: run_merge(config, out_path=str(out), options=MergeOptions(copy_tokenizer=False))


def floor(folders: list[Path], out: Path) -> Work:
    """Prepare reading every input but the base and writing one output."""
    size = (folders[0] / WEIGHTS).stat().st_size
    files = [os.open(folder / WEIGHTS, os.O_RDONLY) for folder in folders[1:]]
    local = threading.local()

    def move(start: int, target: int) -> None:
        if not hasattr(local, "read"):
            local.read, local.written = bytearray(READ_BYTES), bytearray(WRITTEN_BYTES)
        end = min(start + WRITTEN_BYTES, size)
        for file in files:
            for place in range(start, end, READ_BYTES):
                os.preadv(file, [local.read], place)
        os.pwrite(target, memoryview(local.written)[: end - start], start)

    def work() -> None:
        target = os.open(out / WEIGHTS, os.O_CREAT | os.O_RDWR)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda start: move(start, target), range(0, size, WRITTEN_BYTES)))
        os.fsync(target)

    return work


def prepared(tool: str, method: str, folders: list[Path], out: Path) -> Work:
    """Return the work to be measured; importing and opening is done."""
    if tool == "mergekit":
        return mergekit(method, folders, out)
    if tool == "floor":
        return floor(folders, out)
    return ours(method, folders, out, digests=tool == "ours+digests")


@contextmanager
def measured(facts: dict[str, float]) -> Iterator[None]:
    """Note wall, user and system seconds, and the peak of anonymous memory in GB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
            peak[0] = max(peak[0], int(anonymous) * 1024 / 1e9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    facts["wall"] = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    facts["user"], facts["system"] = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    done.set()
    watcher.join()
    facts["anonymous"] = peak[0]


def main() -> None:
    tool, method, folder, experts, out = sys.argv[1:]
    folders = [Path(folder) / str(number) for number in range(int(experts) + 1)]
    work = prepared(tool, method, folders, Path(out))
    facts = {"start": time.perf_counter() - STARTED}
    with measured(facts):
        work()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
