"""Causal language models in memory: loading, greedy replies, fixed threads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Progress = Callable[[int, int], None]
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_model(folder: Path, dtype: str = "float32", *, gradients: bool = False) -> Any:
    """Load native causal LM weights in evaluation mode; remote code is never run.

    Args:
        gradients: choose plain attention, whose backward pass is several times cheaper on a CPU than that of the
            fused kernel at the lengths of instructions (a quarter of a training step).

    Raises:
        RuntimeError: if a key is missing or unexpected: a silently re-initialised weight would spoil every number.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    attention = {"attn_implementation": "eager"} if gradients else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True, **attention
    )
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise RuntimeError(f"{folder}: {wrong}")
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder as it is written; a missing pad token becomes the end-of-sequence token.

    A folder that names no class of a family's own is not given one: for some families (Qwen2) ``AutoTokenizer`` would
    keep the vocabulary alone and silently put its own rules in place of those of ``tokenizer.json``.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    loader = PreTrainedTokenizerFast if named in GENERIC_TOKENIZERS else AutoTokenizer
    tokenizer = loader.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    rendered: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> list[tuple[str, bool]]:
    """Return the greedy continuation of each rendered prompt, and whether it was cut before an end token."""
    order = sorted(range(len(rendered)), key=lambda i: (len(rendered[i]), i))
    replies: list[tuple[str, bool]] = [("", False)] * len(rendered)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = [rendered[i] for i in chosen]
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, tokens in zip(chosen, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            cut = tokenizer.eos_token_id not in tokens
            replies[i] = (tokenizer.decode(tokens, skip_special_tokens=True).strip(), cut)
        progress(min(start + batch_size, len(order)), len(order))
    return replies


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Fix the intra-op threads for a while: sums in another order would change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
