"""What the benchmarks measure: random Llamas of three sizes, examples as long as real ones, statistics, their floors.

``python -m tests.benchmarks.workloads SIZE WORK PRECISION`` does one of them in a process of its own and prints its
peak memory above the loaded model, in MB.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.examples import Example, batches, collate
from alignmerge.gradients import example_losses, gram, kronecker_factors, linear_layers, linear_weights, squares
from eval.grid.workers import give_memory_back


class Size(NamedTuple):
    """The shape of a Llama, and how many examples a statistic is taken on."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    examples: int

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.intermediate,
            tie_word_embeddings=self.tied,
        )  # fmt: skip


SIZES = {
    "0.5M": Size(3000, 64, 3, 2, 1, 128, tied=False, examples=96),  # the tiny tier's shape, with more words
    "135M": Size(49152, 576, 30, 9, 3, 1536, tied=True, examples=96),  # SmolLM2-135M
    "1.24B": Size(128256, 2048, 16, 32, 8, 8192, tied=True, examples=16),  # Llama-3.2-1B
    "3B": Size(128256, 3072, 28, 24, 8, 8192, tied=True, examples=16),  # Llama-3.2-3B
}


def random_examples(size: Size, seed: int = 0) -> list[Example]:
    """Random tokens, as long as the alignment data of smollm2: 31 to 68 tokens, of which about 4 in 7 answer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(31, 69, (size.examples,), generator=generator).tolist()
    rows = [torch.randint(3, size.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Example(tuple(row), len(row) - len(row) * 4 // 7) for row in rows]


def random_model(size: Size) -> Any:
    """An fp32 model as ``load_model(gradients=True)`` gives it."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(size.config(), attn_implementation="eager")
    return model.eval().requires_grad_(False)


@contextmanager
def trained(model: Any) -> Iterator[list[Tensor]]:
    """Give the decoder's linear weights, which have gradients meanwhile; embeddings, norms and the head have none."""
    weights: list[Tensor] = [layer.weight for layer in linear_layers(model).values()]
    for weight in weights:
        weight.requires_grad_(True)
    yield weights
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)


def backward(model: Any, examples: Sequence[Example], precision: str) -> None:
    """The floor: one pass in the same batches, with summed gradients: a training step without optimiser."""
    with trained(model):
        for _, batch in batches(examples):
            torch.autograd.backward(example_losses(model, batch, precision=precision).sum())


def backward_at_once(model: Any, examples: Sequence[Example], precision: str) -> None:
    """The same with all examples in one batch: the training step that sees every example's activations at once."""
    with trained(model):
        torch.autograd.backward(example_losses(model, collate(examples), precision=precision).sum())


def squares_by_loop(model: Any, examples: Sequence[Example], precision: str) -> None:
    """The diagonal Fisher as it is defined: one backward pass for each example."""
    with trained(model) as weights:
        total = [torch.zeros_like(weight) for weight in weights]
        for example in examples:
            loss = example_losses(model, collate([example]), precision=precision).sum()
            for into, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                into.addcmul_(gradient, gradient)


def fisher(model: Any, examples: Sequence[Example], precision: str) -> None:
    squares(model, examples, precision=precision)


def kronecker(model: Any, examples: Sequence[Example], precision: str) -> None:
    kronecker_factors(model, examples, "input", precision=precision)


def gram_matrix(model: Any, examples: Sequence[Example], precision: str) -> None:
    """K and J x, in a metric and along a direction that are at hand: what a merge reads for them is not counted."""
    weights = linear_weights(model)
    columns = {name: weight[None] for name, weight in weights.items()}
    gram(model, examples, lambda name: weights[name].square() + 1, columns.__getitem__, precision=precision)


Work = Callable[[Any, Sequence[Example], str], None]
STATISTICS: dict[str, Work] = {"fisher": fisher, "kronecker": kronecker, "gram": gram_matrix}
FLOORS: dict[str, Work] = {"backward": backward, "backward_at_once": backward_at_once, "loop": squares_by_loop}


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at its peak, ``RssAnon`` without what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def reset_peak() -> int:
    """Give free memory back, start ``VmHWM`` anew and return what is in use."""
    gc.collect()
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main(size: str, work: str, precision: str) -> None:
    model, examples = random_model(SIZES[size]), random_examples(SIZES[size])
    backward(model, examples[:1], precision)  # what libraries allocate once is not the work's
    before = reset_peak()
    (STATISTICS | FLOORS)[work](model, examples, precision)
    print(round((memory("VmHWM") - before) / 1e6))


if __name__ == "__main__":
    main(*sys.argv[1:])
