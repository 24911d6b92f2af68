"""Settings of config.json that make another function of the same weights are named; others are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakesModel
from torch import Tensor

from alignmerge.engine.compatibility import open_models
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model

Copies = Callable[[Path], Path]
IDS = torch.arange(5, 29).reshape(1, -1)
"""Longer than the window of the tiny models."""
LONG = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
OTHER_FUNCTION: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["rope_theta"]),
    ("llama", {"rope_parameters": None, "rope_theta": 100.0}, ["rope_theta"]),  # as older versions wrote it
    ("llama", {"rope_parameters": LONG | {"rope_theta": 5e5}}, ["rope_type", "factor"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act"]),
    ("llama", {"rms_norm_eps": 1e-2}, ["rms_norm_eps"]),
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, ["num_attention_heads"]),
    ("mistral", {"sliding_window": None}, ["sliding_window"]),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None},
        ["sliding_window"],
    ),
    ("phi3", {"sliding_window": 4}, ["sliding_window"]),
    ("gemma2", {"attn_logit_softcapping": 0.5}, ["attn_logit_softcapping"]),
    ("gemma2", {"final_logit_softcapping": None}, ["final_logit_softcapping"]),
    ("gemma2", {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar"]),
    ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, ["layer_types"]),
]
SAME_FUNCTION: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"transformers_version": "4.40.0", "torch_dtype": "bfloat16", "dtype": "float16"}),
    (
        "llama",
        {"_name_or_path": "/home/x", "use_cache": False, "attention_dropout": 0.5, "initializer_range": 1.0},
    ),
    ("llama", {"eos_token_id": [2, 5], "pad_token_id": 4, "bos_token_id": None}),
    ("llama", {"max_position_embeddings": 4096, "unsloth_version": "2025.1", "pretraining_tp": 2}),
    ("llama", {"rope_scaling": None, "head_dim": None, "rope_parameters": {"rope_theta": 5e5}}),
    ("qwen2", {"max_window_layers": 1, "sliding_window": 4, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True}),  # all of its layer_types are full_attention
    ("phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "original_max_position_embeddings": 64}),
    ("gemma2", {"architectures": ["Gemma2ForCausalLM", "Another"]}),
]


def edited(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(folder)(IDS).logits
    return found


@pytest.mark.parametrize(("arch", "changes", "keys"), OTHER_FUNCTION)
def test_another_function_is_named_unless_it_is_allowed(
    arch: str, changes: dict[str, Any], keys: list[str], tiny_model: MakesModel, copied: Copies
) -> None:
    base = tiny_model(arch)
    other = edited(copied(base), changes)
    assert not torch.equal(logits(base), logits(other))
    with pytest.raises(BadRequest) as caught:
        open_models({"base": base, "anchor": base, "experts.x": other})
    lines = [str(fault) for fault in caught.value.faults]
    assert all(line.startswith(f"family.experts.x: {other / 'config.json'}: ") for line in lines)
    named = [line.split(": ")[2].split(" is ")[0] for line in lines]
    assert set(keys) <= set(named)
    assert all(
        f"or family.allow_config_differences=[{key}]" in line for key, line in zip(named, lines, strict=True)
    )
    folders = {"base": base, "anchor": base, "experts.x": other}
    assert open_models(folders, named).aliases
    with pytest.raises(BadRequest):
        open_models(folders, named[1:])
    assert open_models({**folders, "experts.x": base, "pretrained": other}).pretrained is not None


@pytest.mark.parametrize(("arch", "changes"), SAME_FUNCTION)
def test_the_same_function_otherwise_written_is_silent(
    arch: str, changes: dict[str, Any], tiny_model: MakesModel, copied: Copies
) -> None:
    base = tiny_model(arch)
    other = edited(copied(base), changes)
    assert torch.equal(logits(base), logits(other))
    if "architectures" in changes:
        edited(other, {"architectures": ["Gemma2ForCausalLM"]})
    assert open_models({"base": base, "anchor": other, "experts.x": other}).aliases
    assert open_models({"base": other, "anchor": base, "experts.x": base}).aliases


def test_defaults_count_as_if_they_were_stated(tiny_model: MakesModel, copied: Copies) -> None:
    base, other = copied(tiny_model("gemma2")), copied(tiny_model("gemma2"))
    config = json.loads((other / "config.json").read_text())
    for key in (
        "hidden_activation",
        "final_logit_softcapping",
        "attention_bias",
        "rms_norm_eps",
        "layer_types",
    ):
        del config[key]  # the tiny model has the values that the architecture has by default
    (other / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(base), logits(other))
    assert open_models({"base": base, "anchor": other, "experts.x": other}).aliases
