"""Sentence embeddings by a small encoder (MiniLM), read from a local folder, never from the network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256  # the encoder's own limit (its ``sentence_bert_config.json``): the rest is cut off


class Encoder(NamedTuple):
    """A sentence encoder in memory, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def read_encoder(folder: Path) -> Encoder:
    """Load the encoder in ``folder`` (config, safetensors, tokenizer) in float32, from disk alone."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return Encoder(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``states`` (n, t, d) where ``mask`` (n, t) is 1, as unit vectors (n, d)."""
    total = (states * mask.to(states.dtype).unsqueeze(-1)).sum(1)
    # Scaling to unit length makes the division by the number of tokens needless.
    return torch.nn.functional.normalize(total, dim=-1)


@torch.inference_mode()
def embed(encoder: Encoder, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return one unit row per text, float32 (n, d); texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), encoder.model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        words = list(map(texts.__getitem__, part))
        batch = encoder.tokenizer(
            words, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        found[part] = mean_pooled(encoder.model(**batch).last_hidden_state, batch["attention_mask"])
    return found


def cosines(encoder: Encoder, left: Sequence[str], right: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the cosine between the embeddings of ``left[i]`` and ``right[i]``, float32 (n,)."""
    if len(left) != len(right):
        raise ValueError(f"{len(left)} texts on the left, {len(right)} on the right")
    return (embed(encoder, left, batch_size) * embed(encoder, right, batch_size)).sum(-1)
