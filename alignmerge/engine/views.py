"""Fused views: matrices that an architecture stores as one tensor, apart and under the names that Llama gives them.

Phi-3 stores W_q, W_k, W_v as the rows of one tensor, in that order, and W_gate, W_up as those of another. What is
done per matrix (trimming, cosines, factors, diagnostics) must not depend on that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LAYER = re.compile(r"\.layers\.(\d+)\.")
VERSION = 1
"""Part of the key of all that is made from fused tensors: raise it when the views change."""
FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
}
"""Model type -> fused layer -> the layers in it, in the order of their rows."""


def layer_of(name: str) -> int | None:
    """Return the decoder layer that the name of a view tells; None: it belongs to none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def views_of(config: Mapping[str, Any], name: str, rows: int) -> dict[str, slice]:
    """Return view name -> rows of the stored tensor ``name`` (``rows`` in all), in order; most have one view, itself.

    Args:
        config: the contents of a config.json.

    Raises:
        ValueError: if the config does not say how many rows belong to which part, or says another number in all.
    """
    path = name.split(".")
    layers = FUSED.get(config.get("model_type", ""), {}).get(path[-2] if len(path) > 1 else "")
    if layers is None or path[-1] != "weight":
        return {name: slice(0, rows)}
    sizes = _mlp(config) if len(layers) == 2 else _attention(config)
    if sum(sizes) != rows:
        words = " + ".join(f"{layer} {size}" for layer, size in zip(layers, sizes, strict=True))
        raise ValueError(f"{rows} rows, but {words} = {sum(sizes)} by the config")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    names = [".".join([*path[:-2], layer, path[-1]]) for layer in layers]
    return {view: slice(end - size, end) for view, size, end in zip(names, sizes, ends, strict=True)}


def _attention(config: Mapping[str, Any]) -> list[int]:
    """Rows of W_q, W_k and W_v."""
    heads = _count(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads")
    stated = config.get("head_dim") is not None
    size = _count(config, "head_dim") if stated else _count(config, "hidden_size") // heads
    return [heads * size, groups * size, groups * size]


def _mlp(config: Mapping[str, Any]) -> list[int]:
    """Rows of W_gate and W_up."""
    return [_count(config, "intermediate_size")] * 2


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"several matrices in one, but {key} is {value!r} in the config")
    return value
