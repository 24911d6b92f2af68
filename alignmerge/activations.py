"""What a language model holds at the last token of each prompt: the points that AQI is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from alignmerge.engine.examples import Batch


def last_states(model: Any, batch: Batch, layers: Sequence[int]) -> Tensor:
    """Run a causal LM without its head; return the states of the last tokens after ``layers``.

    The result is [layers, B, d], fp32 on the CPU, and carries the graph of the pass. Layers count from
    1; the state after the last one is that after the final norm.
    """
    out = model.base_model(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask.long().to(model.device),
        use_cache=False,
        output_hidden_states=True,
    )
    return torch.stack([_last(out.hidden_states[layer], batch) for layer in layers])


@contextmanager
def last_mlp_inputs(model: Any, batch: Batch) -> Iterator[list[Tensor]]:
    """Collect each layer's ``down_proj`` input at the last tokens of ``batch``, [B, m] fp32.

    The list stays empty unless every layer has a ``down_proj``.
    """
    modules = [module for name, module in model.named_modules() if name.endswith("down_proj")]
    if len(modules) != model.config.num_hidden_layers:
        modules = []
    caught: list[Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(_last(inputs[0], batch))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        yield caught


def in_order(parts: Sequence[Tensor], places: Iterable[Sequence[int]]) -> Tensor:
    """Join [L, B, d] of batches into [L, N, d] of prompts; ``places`` of the prompts of each batch."""
    return torch.cat(list(parts), 1)[:, torch.tensor(list(chain.from_iterable(places))).argsort()]


def _last(states: Tensor, batch: Batch) -> Tensor:
    """Pick the last real token of right-padded states [B, T, d]: fp32 [B, d] on the CPU."""
    return states[torch.arange(len(states)), batch.mask.sum(1) - 1].float().cpu()
