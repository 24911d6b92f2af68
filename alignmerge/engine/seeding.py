"""Named random streams: every draw comes from a generator that its name and the seed determine."""

import hashlib
import random

import torch


def stream_seed(seed: int, *names: str) -> int:
    """Return the 63-bit seed of the stream ``names`` under ``seed``: equal on every machine."""
    text = "\x1f".join([str(seed), *names]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def torch_stream(seed: int, *names: str) -> torch.Generator:
    """Return the torch generator of a named stream."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def python_stream(seed: int, *names: str) -> random.Random:
    """Return the Python generator of a named stream (shuffles, choices)."""
    return random.Random(stream_seed(seed, *names))
