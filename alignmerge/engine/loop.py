"""The one loop that reads and writes weights, for every method."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from alignmerge.engine.checkpoint import BLOCK_ELEMENTS, Writer, row_blocks
from alignmerge.engine.merger import Models, Rule, block_of


def merge(
    rule: Rule,
    models: Models,
    folder: Path,
    *,
    elementwise: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream every tensor through ``rule`` into ``folder`` and return the digest (fp32, one rounding).

    The rule is handed views; what comes back is written as the base stores it. Raises BadRequest if an input
    is not finite, ArithmeticError if the rule yields a value that is not finite or of another shape.
    """
    base = models.base
    specs = {name: (spec.dtype, spec.shape) for name, spec in base.items()}
    with closing(Writer(folder, specs, shard_bytes)) as writer:
        for done, name in enumerate(base):
            writer.start(name)
            for view in base.parts(name):
                shape = base.views[view].shape
                for rows in row_blocks(shape, block_elements) if elementwise else [slice(None)]:
                    writer.write(_merged(rule, models, view, rows), name)
            progress(done + 1, len(base))
        return writer.finish()


def _merged(rule: Rule, models: Models, name: str, rows: slice) -> Tensor:
    block = block_of(models, name, rows)
    merged = rule(block)
    if merged.shape != block.base.shape:
        shapes = f"{tuple(merged.shape)}, not {tuple(block.base.shape)}"
        raise ArithmeticError(f"tensor '{name}': the rule returned shape {shapes}")
    return merged
