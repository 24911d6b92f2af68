"""The one loop that reads and writes weights, for every method: cache-sized blocks, over all cores, in order."""

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from alignmerge.engine.checkpoint import BLOCK_ELEMENTS, Writer, rounded, row_blocks
from alignmerge.engine.merger import Block, Buffers, MappedBlock, Models, Rule
from alignmerge.engine.views import is_matrix

PIECE_ELEMENTS = 1 << 22
"""How many numbers are rounded before they are hashed and written at one go."""
MOST_WORKERS = 4
"""More do not help: memory and disk set the pace."""
AHEAD = 2
"""How many items are done ahead for each worker."""
MOST_PIECES = AHEAD * MOST_WORKERS + 2
"""Those that wait, one that waits no longer and one that is written."""
MMAP_THRESHOLD, TRIM_THRESHOLD, KEPT_BYTES = -3, -1, 32 << 20
"""What glibc calls the sizes up to which freed memory is kept, and ours."""
WHOLE = slice(None)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Piece(NamedTuple):
    """Rows of a view that are merged block by block and written at one go."""

    stored: str
    view: str
    blocks: list[slice]


def merge(
    rule: Rule,
    models: Models,
    folder: Path,
    *,
    elementwise: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
    shard_bytes: int = 5_000_000_000,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream every tensor through ``rule`` into ``folder`` and return the digest (fp32, one rounding).

    The rule is handed views; what comes back is written as the base stores it. Blocks of elementwise rules are
    merged by ``workers`` threads (None: one a core), while this one hashes and writes. Neither their number nor
    the size of blocks changes a bit. Other rules are handed the matrices of decoder layers whole.

    Raises BadRequest if what the rule reads is not finite, ArithmeticError if it yields a value that is not finite
    or of another shape.
    """
    base = models.base
    specs = {name: (spec.dtype, spec.shape) for name, spec in base.items()}
    keep_memory()
    pieces = _pieces(models, block_elements, whole=not elementwise)
    work = partial(_merged_piece, rule, models, _buffers(models, block_elements))
    merged = in_order(work, pieces, workers if elementwise else 1)
    with closing(Writer(folder, specs, shard_bytes)) as writer, closing(merged):
        for done, (name, parts) in enumerate(groupby(merged, key=lambda one: one[0])):
            writer.start(name)
            for _, piece in parts:
                for rows in piece:
                    writer.append(rows)
            progress(done + 1, len(base))
        return writer.finish()


def blocks(
    models: Models,
    work: Callable[[Block], Result],
    names: Iterable[str] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[Result]:
    """Yield what ``work`` makes of every block of the models (or of the named views), in order, over all cores.

    The tensors of a block hold until ``work`` returns.
    """
    keep_memory()
    buffers, views = _buffers(models, block_elements), models.base.views
    places = [(name, rows) for name in names or views for rows in row_blocks(views[name].shape, block_elements)]
    return in_order(lambda place: work(MappedBlock(models, *place, buffers)), places)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield ``work`` of every item, in order; ``workers`` threads (None: one a core) run a few items ahead.

    One worker is the calling thread, with all of torch's threads; of several each has one.
    """
    count = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    if count == 1:
        yield from map(work, items)
        return
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


@cache
def keep_memory() -> None:
    """Let freed blocks be used again: by default glibc returns them, and the system zeroes the next ones anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def _pieces(models: Models, block_elements: int, *, whole: bool) -> Iterator[Piece]:
    """Cut every view, in the order in which they are stored, into blocks, and gather these.

    ``whole``: the matrices of decoder layers are not cut.
    """
    for name in models.base:
        for view in models.base.parts(name):
            shape = models.base.views[view].shape
            found = [WHOLE] if whole and is_matrix(view, shape) else row_blocks(shape, block_elements)
            step = max(1, PIECE_ELEMENTS // block_elements)
            for first in range(0, len(found), step):
                yield Piece(name, view, found[first : first + step])


def _buffers(models: Models, block_elements: int) -> Buffers:
    """Return memory for the largest block: one row, where rows are longer."""
    row = max(math.prod(view.shape[1:]) for view in models.base.views.values())
    return Buffers(max(row, block_elements))


def _merged_piece(rule: Rule, models: Models, buffers: Buffers, piece: Piece) -> tuple[str, list[Tensor]]:
    """Return the name of the stored tensor, and the merged rows as they are stored."""
    merged = []
    for rows in piece.blocks:
        memory = None if rows == WHOLE else buffers
        merged.append(_merged(rule, models, MappedBlock(models, piece.view, rows, memory)))
    return piece.stored, merged


def _merged(rule: Rule, models: Models, block: Block) -> Tensor:
    merged, view = rule(block), models.base.views[block.name]
    shape = view.shape
    if shape:
        shape = (len(range(*block.rows.indices(shape[0]))), *shape[1:])
    if merged.shape != shape:
        raise ArithmeticError(
            f"tensor '{block.name}': the rule returned shape {tuple(merged.shape)}, not {shape}"
        )
    return rounded(merged, models.base[view.stored].dtype, block.name)
