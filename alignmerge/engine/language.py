"""Causal language models in memory: loading, greedy replies, fixed threads."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alignmerge.engine.checkpoint import Checkpoint

Progress = Callable[[int, int], None]
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_model(folder: Path, dtype: str = "float32", *, gradients: bool = False) -> Any:
    """Load native causal LM weights in evaluation mode; remote code is never run.

    ``gradients`` chooses plain attention, whose backward pass is several times cheaper on a CPU than that of
    the fused kernel at the lengths of instructions (a quarter of a training step). Raises RuntimeError if a
    key is missing or unexpected: a silently re-initialised weight would spoil every number.
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


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save weights, config and tokenizer as a Hugging Face folder and return the weights' digest."""
    vars(model.config).pop("auto_map", None)  # of a native class: it would point to code that is not there
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder, str(folder)).digest


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
    padded = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    decoded = {"max_new_tokens": max_new_tokens, "do_sample": False}
    decoded |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([rendered[i] for i in chosen], **padded)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = model.generate(input_ids=ids, attention_mask=mask, **decoded)
        for i, tokens in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
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
