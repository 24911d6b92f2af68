"""Bytes in, bytes out: headers, row blocks, digests, and every kind of bad input."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignmerge.engine.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Writer,
    all_finite,
    load_tensors,
    row_blocks,
    save_tensors,
)
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.loop import merge
from alignmerge.engine.merger import Models
from alignmerge.engine.store import Store
from alignmerge.engine.validation import read_headers

WHERE = "family.experts.math"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(7, 5, generator=generator),
        "a.weight": torch.randn(11, 3, generator=generator).bfloat16(),
        "c.bias": torch.randn(4, generator=generator).half(),
        "d.scale": torch.tensor(1.5, dtype=torch.float64),
        "e.stack": torch.randn(3, 2, 2, generator=generator),
    }


def plain_digest(tensors: dict[str, Tensor]) -> str:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    text = b""
    for name in sorted(tensors):
        tensor = tensors[name]
        text += f"{name}|{codes[tensor.dtype]}|{list(tensor.shape)}|".encode()
        text += bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    return blake3(text).hexdigest()


def model_folder(folder: Path, tensors: dict[str, Tensor] | None = None, shards: int = 1) -> Path:
    """Write what the reader takes for a model, by the reference implementation of safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = tensors if tensors is not None else some_tensors()
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def opened(folder: Path) -> Checkpoint:
    """Any tensors, whether they make a model or not."""
    specs, faults = read_headers(folder, WHERE)
    assert not faults
    return Checkpoint(folder, WHERE, {}, specs)


# --- what is written ------------------------------------------------------------------------------------


def test_written_file_is_what_the_format_says(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([1.0, -2.0]).bfloat16()}
    save_tensors(tmp_path, tensors)
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("803f00c0") + struct.pack("<2f", 1.0, 2.0)
    assert (tmp_path / SINGLE).read_bytes() == struct.pack("<Q", len(header)) + header + data
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("length", range(1, 10))
def test_data_starts_at_a_multiple_of_eight(length: int, tmp_path: Path) -> None:
    save_tensors(tmp_path, {"n" * length: torch.ones(3)})
    raw = (tmp_path / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert (8 + size) % 8 == 0
    assert len(raw) == 8 + size + 12


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors or {"w": torch.ones(1)}


@settings(deadline=None, max_examples=40)
@given(tensors=tensor_dicts(), elements=st.integers(1, 40), shard_bytes=st.integers(1, 400))
def test_round_trip_of_any_shapes_and_dtypes(
    tensors: dict[str, Tensor], elements: int, shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole, split = Path(scratch) / "whole", Path(scratch) / "split"
        whole.mkdir()
        split.mkdir()
        digest = save_tensors(whole, tensors)
        reread = load_tensors(whole)
        assert list(reread) == sorted(tensors)
        models = Models(reread, reread, {})
        if all(
            tensor.dtype != torch.float64 for tensor in tensors.values()
        ):  # arithmetic is in fp32: doubles are rounded by any merge
            copy = merge(
                lambda block: block.base, models, split, block_elements=elements, shard_bytes=shard_bytes
            )
            assert copy == digest
            assert load_tensors(split).digest == digest
        assert digest == reread.digest == plain_digest(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reread.read(name, dtype=tensor.dtype), tensor)
            parts = [reread.read(name, rows, tensor.dtype) for rows in row_blocks(tensor.shape, elements)]
            assert torch.equal(torch.cat(parts) if tensor.dim() else parts[0], tensor)


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 50), max_size=3), elements=st.integers(1, 300))
def test_row_blocks_cover_each_row_once_within_the_limit(shape: list[int], elements: int) -> None:
    blocks = row_blocks(shape, elements)
    if not shape:
        assert blocks == [slice(None)]
        return
    assert [i for rows in blocks for i in range(rows.start, rows.stop)] == list(range(shape[0]))
    row = torch.Size(shape[1:]).numel()
    assert all((rows.stop - rows.start) * row <= max(elements, row) for rows in blocks)


def test_digest_changes_with_name_dtype_shape_and_values(tmp_path: Path) -> None:
    ones = torch.ones(4)
    changed = ones.clone()
    changed[3] = -1
    variants = [{"w": ones}, {"v": ones}, {"w": ones.half()}, {"w": ones.reshape(2, 2)}, {"w": changed}]
    digests = set()
    for i, tensors in enumerate(variants):
        (tmp_path / str(i)).mkdir()
        digests.add(save_tensors(tmp_path / str(i), tensors))
    assert len(digests) == len(variants)


def test_digest_does_not_depend_on_sharding(tmp_path: Path) -> None:
    digests = {opened(model_folder(tmp_path / str(n), shards=n)).digest for n in (1, 2, 3, 5)}
    assert digests == {plain_digest(some_tensors())}


def test_reads_are_fp32_unless_asked_otherwise(tmp_path: Path) -> None:
    checkpoint = opened(model_folder(tmp_path))
    for name, tensor in some_tensors().items():
        assert torch.equal(checkpoint.read(name), tensor.float())
        assert checkpoint.read(name).dtype == torch.float32
        assert checkpoint.read(name, dtype=tensor.dtype).dtype == tensor.dtype
    assert torch.equal(checkpoint.read("b.weight", slice(2, 5)), some_tensors()["b.weight"][2:5])


def test_writer_refuses_what_overflows_in_the_stored_dtype(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {"w": ("F16", (2,))})
    writer.start("w")
    with pytest.raises(ArithmeticError, match=r"'w'.*F16"):
        writer.write(torch.tensor([1.0, 1e6]), "w")
    writer.close()


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_agrees_with_the_definition(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 99):
        tensor = torch.linspace(-6e4, 6e4, 100).to(dtype)
        assert all_finite(tensor)
        tensor[place] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0, 3, dtype=dtype))


def test_merge_refuses_a_rule_that_returns_other_rows(tmp_path: Path) -> None:
    checkpoint = opened(model_folder(tmp_path / "model"))
    models = Models(checkpoint, checkpoint, {})
    with pytest.raises(ArithmeticError, match=r"a\.weight.*shape"):
        merge(lambda block: block.base[:1], models, tmp_path)
    with pytest.raises(ArithmeticError, match=r"a\.weight.*finite"):
        merge(lambda block: block.base * float("nan"), models, tmp_path)


# --- bad input ------------------------------------------------------------------------------------------


def edit_header(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    raw = (folder / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def resharded(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    (folder / SINGLE).unlink()
    model_folder(folder, shards=2)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def rewrite(folder: Path, data: bytes) -> None:
    (folder / SINGLE).write_bytes(data)


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def dangling(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").symlink_to("nowhere")


def doubled(folder: Path) -> None:
    resharded(folder, lambda weight_map: None)
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(file), "b.weight": torch.zeros(7, 5)}, file)


def setting(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def bad_index(folder: Path, text: str) -> None:
    (folder / SINGLE).unlink()
    setting(folder, INDEX, text)


def cut(folder: Path) -> None:
    rewrite(folder, (folder / SINGLE).read_bytes()[:-3])


def absurd(folder: Path) -> None:
    rewrite(folder, struct.pack("<Q", 2**62) + (folder / SINGLE).read_bytes()[8:])


def integers(folder: Path) -> None:
    save_file({**some_tensors(), "b.weight": torch.ones(7, 5, dtype=torch.int8)}, folder / SINGLE)


def weight_map(name: str, shard: object) -> Callable[[Path], None]:
    return lambda folder: resharded(folder, lambda weights: weights.__setitem__(name, shard))


# (what is done to a good folder, file at fault, words of what was given, words of what is allowed)
Damage = Callable[[Path], object]
BAD: dict[str, tuple[Damage, str, str, str]] = {
    "truncated": (cut, SINGLE, "cannot read the header (incomplete", "complete safetensors"),
    "garbage": (lambda f: rewrite(f, os.urandom(3000)), SINGLE, "cannot read the header", "complete"),
    "zero bytes": (lambda f: rewrite(f, b""), SINGLE, "header too small", "complete safetensors"),
    "absurd header length": (absurd, SINGLE, "header too large", "complete safetensors"),
    "header is not JSON": (
        lambda f: rewrite(f, struct.pack("<Q", 8) + b"[[[[[[[["),
        SINGLE,
        "invalid JSON",
        "complete safetensors",
    ),
    "absurd shape": (
        lambda f: edit_header(f, lambda h: h["b.weight"].update(shape=[2**40, 2**40])),
        SINGLE,
        "overflow",
        "complete safetensors",
    ),
    "no tensors": (lambda f: save_file({}, f / SINGLE), "", "no tensors", "a model"),
    "integer tensor": (integers, SINGLE, "tensor 'b.weight' has dtype I8", "a float tensor"),
    "pickle": (only_pickle, "", "a pickle checkpoint (pytorch_model.bin)", "weights_only=True"),
    "pickle in disguise": (
        lambda f: rewrite(f, pickle.dumps([1] * 99)),
        SINGLE,
        "cannot read",
        "safetensors",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), "", "no weights", SINGLE),
    "remote code": (
        lambda f: setting(f, "config.json", '{"model_type": "x", "auto_map": {"AutoModel": "m.M"}}'),
        "config.json",
        "remote code (auto_map)",
        "native transformers architecture",
    ),
    "remote code in the tokenizer": (
        lambda f: setting(f, "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "t.T"}}'),
        "tokenizer_config.json",
        "remote code (auto_map)",
        "native transformers architecture",
    ),
    "config is not JSON": (
        lambda f: setting(f, "config.json", "{model_type: llama"),
        "config.json",
        "not JSON",
        "the config.json of a transformers model",
    ),
    "config is binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json",
        "not JSON",
        "config.json",
    ),
    "config is nested beyond reason": (
        lambda f: setting(f, "config.json", "[" * 200_000),
        "config.json",
        "not JSON",
        "config.json",
    ),
    "config is a list": (lambda f: setting(f, "config.json", "[1]"), "config.json", "a list", "config.json"),
    "config names no model": (
        lambda f: setting(f, "config.json", "{}"),
        "config.json",
        "model_type is None",
        "",
    ),
    "config is missing": (
        lambda f: (f / "config.json").unlink(),
        "config.json",
        "no such file",
        "config.json",
    ),
    "absolute shard": (weight_map("b.weight", "/etc/passwd"), INDEX, "'/etc/passwd' lies outside", "plain"),
    "shard in the parent": (weight_map("b.weight", "../x.safetensors"), INDEX, "lies outside", "plain"),
    "shard in a subfolder": (weight_map("b.weight", "x/y.safetensors"), INDEX, "lies outside", "plain"),
    "shard of no name": (weight_map("b.weight", ""), INDEX, "lies outside", "plain"),
    "shard with a null byte": (weight_map("b.weight", "x\0"), INDEX, "lies outside", "plain"),
    "shard is missing": (weight_map("b.weight", "no.safetensors"), INDEX, "is missing", "every shard"),
    "shard is a number": (weight_map("b.weight", 3), INDEX, "not a shard index", "weight_map"),
    "shard is a link to nothing": (
        lambda f: resharded(f, lambda w: None) or dangling(f),
        INDEX,
        "is missing",
        "every shard",
    ),
    "index is not JSON": (lambda f: bad_index(f, "{"), INDEX, "not JSON", "weight_map"),
    "index has no map": (lambda f: bad_index(f, "{}"), INDEX, "not a shard index", "weight_map"),
    "index places nothing": (
        lambda f: bad_index(f, '{"metadata": {}, "weight_map": {}}'),
        "",
        "no tensors",
        "a model",
    ),
    "index names a tensor that no shard has": (
        weight_map("z.weight", "model-00001-of-00002.safetensors"),
        INDEX,
        "no shard has tensor 'z.weight'",
        "in one of its shards",
    ),
    "tensor in two shards": (
        doubled,
        "model-00002-of-00002.safetensors",
        "tensor 'b.weight', which is also in model-00001-of-00002.safetensors",
        "each tensor in one shard",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_plain_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    damage, file, given_words, allowed = BAD[kind]
    folder = model_folder(tmp_path / "model")
    damage(folder)
    store = Store(tmp_path / "store")

    def make(out: Path) -> dict[str, str]:
        checkpoint = Checkpoint.open(folder, WHERE)
        return {"digest": merge(lambda block: block.base, Models(checkpoint, checkpoint, {}), out)}

    with pytest.raises(BadRequest) as caught:
        store.obtain("merge", {"kind": kind}, make)
    (fault,) = caught.value.faults
    assert fault.where == f"{WHERE}: {folder / file if file else folder}"
    assert given_words in fault.given
    assert allowed in fault.allowed
    assert "\n" not in str(fault) and str(fault).startswith(WHERE)
    assert [p for p in store.root.rglob("*") if p.is_file() and ".locks" not in p.parts] == []
    assert store.find("merge", {"kind": kind}) is None


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"{WHERE}: no such folder: {tmp_path / 'no'}; allowed: a Hugging"):
        Checkpoint.open(tmp_path / "no", WHERE)
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(tmp_path, WHERE)
    assert [fault.given for fault in caught.value.faults] == ["no such file", "no weights"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_found_while_streaming(value: float, dtype: str, tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors["c.bias"] = torch.tensor([0.0, value, 1.0], dtype=DTYPES[dtype])
    checkpoint = opened(model_folder(tmp_path / "model", tensors))
    store = Store(tmp_path / "store")
    with pytest.raises(BadRequest) as caught:
        models = Models(checkpoint, checkpoint, {})
        store.obtain("merge", {}, lambda out: {"digest": merge(lambda block: block.base, models, out)})
    (fault,) = caught.value.faults
    assert str(fault) == (
        f"{WHERE}: {tmp_path / 'model' / SINGLE}: tensor 'c.bias' holds values that are not finite; "
        "allowed: finite weights"
    )
    assert not (store.root / "merge").exists()
    assert list((store.root / ".staging").iterdir()) == []
    assert not (store.root / "failed").exists()


def test_many_faults_of_one_kind_are_counted(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.ones(2, dtype=torch.int32) for i in range(9)}
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(model_folder(tmp_path, tensors), WHERE)
    lines = [fault.given for fault in caught.value.faults]
    assert lines == [*(f"tensor 'w{i}' has dtype I32" for i in range(3)), "and 6 more like it"]


def test_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    model_folder(snapshot, shards=2)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.glob("*.safetensors"))):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    assert opened(snapshot).digest == plain_digest(some_tensors())
