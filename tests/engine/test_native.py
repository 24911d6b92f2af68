"""One model seen by all: what transformers loads cleanly we see weight for weight, anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import INDEX, SINGLE
from alignmerge.engine.language import load_model
from alignmerge.engine.loop import merge
from tests.conftest import TRAITS, MakesModel

Copies = Callable[[Path], Path]
Layout = Callable[[Path], object]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def sharded(folder: Path, wrong: bool = False, scale: float = 1.0, **metadata: Any) -> None:
    """Write two shards and their index beside the single file; ``wrong`` names each tensor in the other shard."""
    tensors = {name: scale * tensor for name, tensor in load_file(folder / SINGLE).items()}
    names = sorted(tensors)
    weight_map = {}
    for i, shard in enumerate(SHARDS):
        save_file({name: tensors[name] for name in names[i::2]}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::2], SHARDS[i ^ wrong])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map, **metadata}
    (folder / INDEX).write_text(json.dumps(index))


def only_shards(folder: Path, **options: Any) -> None:
    sharded(folder, **options)
    (folder / SINGLE).unlink()


def with_a_shard_too_many(folder: Path) -> None:
    only_shards(folder)
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model-00003-of-00003.safetensors")


def linked(folder: Path) -> None:
    """As in the Hub's cache, or as somebody laid them by hand: links out of the folder."""
    only_shards(folder)
    blobs = folder.parent / f"blobs of {folder.name}"
    blobs.mkdir()
    for shard in SHARDS:
        (folder / shard).rename(blobs / shard)
        (folder / shard).symlink_to(blobs / shard)


def linked_single(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / "blob")
    (folder / SINGLE).symlink_to("../blob")


def old_buffers(folder: Path) -> None:
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        rewritten(folder, lambda tensors, name=name: tensors.update({name: torch.ones(4)}))  # type: ignore[misc]


def without_prefix(folder: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewritten(folder, rename)


def prefixed_twice(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(32)}))


def tied(*kept: str, stated: Any = True) -> Layout:
    """Tie the head (``stated`` in the config or not) and keep only some of the two matrices."""

    def change(folder: Path) -> None:
        set_config(folder, tie_word_embeddings=stated)
        rewritten(folder, lambda tensors: heads(tensors, kept))

    return change


def heads(tensors: dict[str, Tensor], kept: tuple[str, ...]) -> None:
    matrix = tensors.pop(EMBEDDINGS)
    tensors.pop(HEAD, None)
    tensors.update({name: matrix.clone() for name in kept})


def differing(folder: Path) -> None:
    """The last row alone differs: transformers compares all, and does not tie them."""
    tied(HEAD, EMBEDDINGS)(folder)
    rewritten(folder, lambda tensors: tensors[HEAD][-1].add_(1))


def untied(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=False)
    rewritten(folder, lambda tensors: tensors.pop(HEAD, None))


def stray(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"model.layers.0.side.weight": torch.ones(3)}))


def fewer(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("model.norm.weight"))


def misshapen(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}))


def doubled(folder: Path) -> None:
    only_shards(folder)
    first = folder / SHARDS[0]
    save_file({**load_file(folder / SHARDS[1]), **load_file(first)}, folder / SHARDS[1], {"format": "pt"})


def quantised(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})


SAME: dict[str, Layout] = {
    "as saved": lambda folder: None,
    "shards": only_shards,
    "shards, placed wrongly by the index": lambda folder: only_shards(folder, wrong=True),
    "an index left over beside a single file": lambda folder: sharded(folder, scale=2),
    "a shard that the index does not name": with_a_shard_too_many,
    "shards that are links": linked,
    "a single file that is a link": linked_single,
    "buffers of old checkpoints": old_buffers,
    "names without the prefix": without_prefix,
    "tied, only the embeddings": tied(EMBEDDINGS),
    "tied, only the head": tied(HEAD),
    "tied, both": tied(HEAD, EMBEDDINGS),
    "both, the config does not say": tied(HEAD, EMBEDDINGS, stated="absent"),
    "no quantization": lambda folder: set_config(folder, quantization_config=None),
}
REFUSED: dict[str, tuple[Layout, str]] = {
    "tied, neither": (tied(), f"'{EMBEDDINGS}' is missing"),
    "tied, both, differing": (differing, f"'{HEAD}' differs from '{EMBEDDINGS}'"),
    "untied, no head": (untied, f"'{HEAD}' is missing; allowed: every weight of"),
    "untied, no embeddings": (tied(HEAD, stated=False), f"'{EMBEDDINGS}' is missing"),
    "a tensor too many": (stray, "'model.layers.0.side.weight' has no place in the model"),
    "a tensor too few": (fewer, "'model.norm.weight' is missing"),
    "another shape": (misshapen, "'model.norm.weight' has shape [33]; allowed: [32], as config.json"),
    "one weight under two names": (prefixed_twice, "'model.norm.weight' and 'norm.weight' are one weight"),
    "one tensor in two shards": (doubled, f"which is also in {SHARDS[0]}"),
    "an index without metadata": (
        lambda folder: only_shards(folder, metadata=None),
        "no metadata, without which transformers fails",
    ),
    "float weights called quantised": (quantised, "float weights, but quantization_config (fp8)"),
    "weights elsewhere": (
        lambda folder: set_config(folder, transformers_weights="other.safetensors"),
        "transformers_weights names other files",
    ),
    "a config elsewhere": (
        lambda folder: set_config(folder, configuration_files=["config.4.0.0.json"]),
        "configuration_files names other files",
    ),
    "settings of another kind": (
        lambda folder: set_config(folder, rms_norm_eps="small"),
        "transformers does not take it",
    ),
}


def loaded(folder: Path) -> Any:
    """What transformers makes of the folder, or None if it does not load it cleanly."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return None if any(info.values()) else model


@pytest.mark.parametrize("arch", sorted(TRAITS))
@pytest.mark.parametrize("layout", SAME)
def test_what_transformers_loads_cleanly_is_seen_weight_for_weight(
    layout: str, arch: str, tiny_model: MakesModel, copied: Copies
) -> None:
    folder = copied(tiny_model(arch))
    SAME[layout](folder)
    model = loaded(folder)
    if model is None:  # a bare model without a head, say
        with pytest.raises(BadRequest):
            Checkpoint.open(folder, "model")
        return
    checkpoint, wanted = Checkpoint.open(folder, "model"), model.state_dict()
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert checkpoint.tied == is_tied
    assert checkpoint.keys() == wanted.keys() - ({HEAD} if is_tied else set())
    assert all(torch.equal(checkpoint.read(name), wanted[name]) for name in checkpoint)


def test_every_layout_is_loaded_cleanly_for_some_architecture(tiny_model: MakesModel, copied: Copies) -> None:
    for layout, change in SAME.items():
        folder = copied(tiny_model("gemma2"))
        change(folder)
        assert loaded(folder) is not None, layout


@pytest.mark.parametrize("arch", ["phi3", "gemma2"])
@pytest.mark.parametrize("layout", REFUSED)
def test_what_it_would_see_differently_is_one_plain_line(
    layout: str, arch: str, tiny_model: MakesModel, copied: Copies
) -> None:
    folder = copied(tiny_model(arch))
    change, words = REFUSED[layout]
    change(folder)
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(folder, "family.base")
    assert words in str(caught.value)
    assert {str(fault).split(":")[0] for fault in caught.value.faults} == {"family.base"}


@pytest.mark.parametrize(
    "layout", ["tied, only the head", "buffers of old checkpoints", "names without the prefix"]
)
def test_merge_of_an_odd_layout_loads_and_is_that_of_the_plain_one(
    layout: str, tiny_model: MakesModel, copied: Copies, tmp_path: Path
) -> None:
    odd = copied(tiny_model("gemma2"))
    SAME[layout](odd)
    digests = set()
    for name, folder in {"odd": odd, "plain": tiny_model("gemma2")}.items():
        out = tmp_path / name
        out.mkdir()
        models = open_models({"base": folder, "anchor": folder, "experts.a": folder})
        digests |= {models.base.digest, merge(lambda block: block.base, models, out)}
        models.base.furnish(out)
        assert torch.equal(load_model(out).lm_head.weight, load_model(tiny_model("gemma2")).lm_head.weight)
    assert len(digests) == 1


def test_architecture_that_transformers_does_not_have(tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    set_config(folder, model_type="exotic")
    with pytest.raises(
        BadRequest, match=r"transformers does not have: 'exotic'; allowed: llama, mistral, qwen2"
    ):
        Checkpoint.open(folder, "model")
    set_config(folder, model_type="t5")
    with pytest.raises(BadRequest, match="no causal language model of transformers is a 't5'"):
        Checkpoint.open(folder, "model")


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_one_line(code: torch.dtype, tiny_model: MakesModel, copied: Copies) -> None:
    folder = copied(tiny_model("llama"))
    quantised(folder)
    rewritten(
        folder, lambda tensors: tensors.update({n: t.to(code) for n, t in tensors.items() if t.dim() > 1})
    )
    with pytest.raises(BadRequest, match=r"quantised weights \(fp8: .*allowed: F64, F32, F16, BF16 weights$"):
        Checkpoint.open(folder, "model")


def test_adapter_is_one_line_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(tmp_path, "family.experts.math")
    (fault,) = caught.value.faults
    assert str(fault).startswith(
        f"family.experts.math: {tmp_path}: an adapter (adapter_config.json); allowed: "
    )
    assert "merge_and_unload()" in fault.allowed
