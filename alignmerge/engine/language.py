"""Causal language models in memory: loading, greedy replies, fixed threads."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import TOKENIZER_CONFIG, VOCABULARY, vocabulary_file

Progress = Callable[[int, int], None]
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
READERS = ("sentencepiece", "tiktoken", "protobuf")
"""Optional packages that read tokenizers which have no tokenizer.json."""
DECODING = 3
"""Version of how replies are decoded: part of the key of whatever is made of them."""


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


def load_tokenizer(folder: Path, template: str | None = None) -> Any:
    """Load the tokenizer of a folder as it is written; a missing pad token becomes the end-of-sequence token.

    ``template`` replaces the folder's default chat template, and none under another name. A folder that names no
    class of a family's own is not given one: for some families (Qwen2) ``AutoTokenizer`` would keep the vocabulary
    alone and silently put its own rules in place of those of ``tokenizer.json``. Raises BadRequest if there is
    no tokenizer, if it cannot be read, or if it has no end token.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if is_generic(folder) else AutoTokenizer
    tokenizer = _read_tokenizer(loader, folder)
    if tokenizer.eos_token_id is None:
        raise BadRequest.of(f"tokenizer of {folder}", "no end token", "an eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        named = templates_of(tokenizer)
        tokenizer.chat_template = {**named, "default": template} if named.keys() - {"default"} else template
    return tokenizer


def templates_of(tokenizer: Any) -> dict[str, str]:
    """Return name -> chat template; the one without a name is the ``default``."""
    own = tokenizer.chat_template
    if own is None or isinstance(own, dict):
        return dict(own or {})
    return {"default": own}


def is_generic(folder: Path) -> bool:
    """Tell whether the tokenizer of a folder is of no family's own class: tokenizer.json alone says what it does."""
    config = folder / TOKENIZER_CONFIG
    return config.is_file() and json.loads(config.read_text()).get("tokenizer_class") in GENERIC_TOKENIZERS


def _read_tokenizer(loader: Any, folder: Path) -> Any:
    where = f"tokenizer of {folder}"
    if not vocabulary_file(folder).is_file():
        raise BadRequest.of(where, "no tokenizer", f"a folder with one of {', '.join(VOCABULARY)}")
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its readers raise whatever they please
        installed = {package.name for package in metadata.distributions()}
        missing = [name for name in READERS if name not in installed]
        advice = (
            f"a tokenizer.json, or: pip install {' '.join(missing)}" if missing else "files that it can read"
        )
        raise BadRequest.of(where, f"transformers cannot read it ({error})", advice) from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save weights, config and tokenizer as a Hugging Face folder and return the weights' digest."""
    vars(model.config).pop("auto_map", None)  # of a native class: it would point to code that is not there
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder, str(folder)).digest


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a turn: the tokenizer's and the generation config's, in ascending order.

    transformers takes those of config.json where a folder has no generation_config.json.
    """
    stated = model.generation_config.eos_token_id
    named = stated if isinstance(stated, list) else [stated]
    return sorted({tokenizer.eos_token_id, *named} - {None})


@contextmanager
def plain_decoding(model: Any, tokenizer: Any) -> Iterator[None]:
    """Let nothing of a model's generation config act for a while but its end tokens: greedy is greedy.

    A config that is passed to ``generate`` would not do: transformers fills its gaps from the model's own.
    """
    from transformers import GenerationConfig

    usual, ends = model.generation_config, end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = usual


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
    """Return the greedy continuation of each rendered prompt, and whether it was cut before an end token.

    A reply ends before the first of ``end_tokens``.
    """
    order = sorted(range(len(rendered)), key=lambda i: (len(rendered[i]), i))
    replies: list[tuple[str, bool]] = [("", False)] * len(rendered)
    padded = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    ends = set(end_tokens(model, tokenizer))
    with plain_decoding(model, tokenizer):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer([rendered[i] for i in chosen], **padded)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
            for i, tokens in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
                said = list(takewhile(lambda token: token not in ends, tokens))
                text = tokenizer.decode(said, skip_special_tokens=True).strip()
                replies[i] = (text, len(said) == len(tokens))
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
