"""Sentence embeddings by a small encoder (MiniLM), read from a local folder and never from the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256
"""The encoder's own limit (its ``sentence_bert_config.json``): what follows is not looked at."""


class Encoder(NamedTuple):
    """A sentence encoder in memory, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def read_encoder(folder: Path) -> Encoder:
    """Load the encoder in ``folder`` (config, safetensors, tokenizer) in float32 from the disk alone."""
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return Encoder(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``states`` (n, t, d) where ``mask`` (n, t) is 1, scaled to unit length: (n, d)."""
    total = (states * mask.to(states.dtype).unsqueeze(-1)).sum(1)  # the scaling takes the number of tokens out
    return torch.nn.functional.normalize(total, dim=-1)


@torch.inference_mode()
def embed(encoder: Encoder, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return one unit row per text, float32 (n, d); texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = encoder.tokenizer(
            [texts[i] for i in part],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        pooled = mean_pooled(encoder.model(**batch).last_hidden_state, batch["attention_mask"])
        for i, row in zip(part, pooled, strict=True):
            rows[i] = row
    return torch.stack(rows) if rows else torch.empty(0, encoder.model.config.hidden_size)


def cosines(encoder: Encoder, left: Sequence[str], right: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the cosine between the embeddings of ``left[i]`` and ``right[i]``, float32 (n,)."""
    if len(left) != len(right):
        raise ValueError(f"{len(left)} texts on the left, {len(right)} on the right")
    return (embed(encoder, left, batch_size) * embed(encoder, right, batch_size)).sum(-1)
