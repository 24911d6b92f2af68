"""Examples (prompt, response) as token ids: what statistics and training read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignmerge.engine.faults import BadRequest


class Example(NamedTuple):
    """One tokenised example; the response is ``ids[start:]``."""

    ids: tuple[int, ...]
    start: int


class Batch(NamedTuple):
    """Right-padded examples."""

    ids: Tensor
    """(B, T) int64; padded with 0."""
    mask: Tensor
    """(B, T) bool: real tokens."""
    targets: Tensor
    """(B, T) int64: the next token where it belongs to the response, -100 elsewhere."""

    @property
    def keep(self) -> int:
        """How many trailing positions hold every target: the output matrix is only needed there."""
        first = int((self.targets >= 0).int().argmax(dim=1).min())
        return self.ids.shape[1] - first


def read_jsonl(path: Path, where: str, keys: Sequence[str] = ("prompt", "response")) -> list[dict[str, Any]]:
    """Read JSON lines that must have ``keys``; raises BadRequest naming the line at fault."""
    if not path.is_file():
        raise BadRequest.of(where, f"no such file: {path}", "a JSONL file with " + " and ".join(keys))
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or any(not isinstance(record.get(key), str) for key in keys):
            raise BadRequest.of(
                f"{where}: {path}:{number}", "not a record", "JSON with the texts " + ", ".join(keys)
            )
        records.append(record)
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines with sorted keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def render(tokenizer: Any, prompt: str) -> str:
    """Put a user turn through the chat template and open the assistant's turn."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def tokenise(tokenizer: Any, records: Iterable[Mapping[str, Any]], max_length: int = 1024) -> list[Example]:
    """Tokenise {prompt, response[, open]} records; an ``open`` response was cut: no end-of-turn token."""
    examples = []
    for record in records:
        prompt = tokenizer(render(tokenizer, record["prompt"]), add_special_tokens=False)["input_ids"]
        response = tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        if not record.get("open"):
            response = [*response, tokenizer.eos_token_id]
        examples.append(Example(tuple((prompt + response)[:max_length]), len(prompt)))
    return [example for example in examples if 0 < example.start < len(example.ids)]


def batches(examples: Sequence[Example], tokens: int = 1024) -> Iterator[tuple[list[int], Batch]]:
    """Yield (indices, batch) of similar lengths with at most ``tokens`` padded tokens each; deterministic."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(examples[i].ids) > tokens:
            yield group, collate([examples[j] for j in group])
            group = []
        group.append(i)
    if group:
        yield group, collate([examples[j] for j in group])


def collate(examples: Sequence[Example]) -> Batch:
    """Right-pad examples into one batch."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    targets = torch.full((len(examples), width), -100, dtype=torch.long)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
        targets[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return Batch(ids, mask, targets)
