"""Fused views: matrices that an architecture stores as one tensor, apart and named as Llama names them.

Phi-3 stores W_q, W_k, W_v as the rows of one tensor, in that order, and W_gate, W_up as those of
another. What is done per matrix (trimming, cosines, factors, diagnostics) must not depend on that.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_VOCABULARY = re.compile("embed|lm_head")
VERSION = 1
"""Part of the key of all that is made from fused tensors: raise it when the views change."""
FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
}
"""Model type -> fused layer -> the layers in it, in the order of their rows."""


class View(NamedTuple):
    """A tensor as methods see it: rows of a stored one; all of them, unless matrices are fused."""

    stored: str
    first: int
    """The first of its rows."""
    shape: tuple[int, ...]


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Say whether a view is a linear weight of a decoder layer: not an embedding, not the output matrix."""
    return len(shape) == 2 and not _VOCABULARY.search(name)


def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer that a view belongs to by its name, or None."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def views_of(config: Mapping[str, Any], name: str, rows: int) -> dict[str, slice]:
    """Return view name -> rows of the stored tensor ``name``, in order; most have one view, themselves.

    ``config`` is the content of a config.json; ``rows``, how many rows the tensor has in all. Raises
    ValueError if the config does not say how many rows each part has, or says another sum.
    """
    path, _, kind = name.rpartition(".")
    module = path.rpartition(".")[2]
    layers = FUSED.get(config.get("model_type", ""), {}).get(module)
    if layers is None or kind != "weight":
        return {name: slice(0, rows)}
    sizes = _sizes(config, layers)
    if sum(sizes) != rows:
        words = " + ".join(map("{} {}".format, layers, sizes))
        raise ValueError(f"{rows} rows, but {words} = {sum(sizes)} by the config")
    parent = path.removesuffix(module)
    parts = {}
    for layer, size, end in zip(layers, sizes, accumulate(sizes), strict=True):
        parts[f"{parent}{layer}.{kind}"] = slice(end - size, end)
    return parts


def _sizes(config: Mapping[str, Any], layers: Sequence[str]) -> list[int]:
    """Return the number of rows of W_gate and W_up, or of W_q, W_k and W_v."""
    if len(layers) == 2:
        return [_count(config, "intermediate_size")] * 2
    heads = _count(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads")
    stated = config.get("head_dim") is not None
    size = _count(config, "head_dim") if stated else _count(config, "hidden_size") // heads
    return [heads * size, groups * size, groups * size]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"several matrices in one, but {key} is {value!r} in the config")
    return value
