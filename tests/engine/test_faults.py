"""What a user reads of a fault: one line, of characters that print, whatever a file calls its tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest, Fault

CLEARS_THE_SCREEN = "\x1b[2J\x1b[1;1H"


def test_a_plain_fault_reads_as_it_was_written() -> None:
    fault = Fault("family.base", "Größe \N{MULTIPLICATION SIGN} 2,\n\t 'x' \\ y", "a number")
    assert str(fault) == "family.base: Größe \N{MULTIPLICATION SIGN} 2, 'x' \\ y; allowed: a number"


def test_what_does_not_print_is_escaped() -> None:
    fault = Fault("f", f"{CLEARS_THE_SCREEN}\x07 \u202egnp.exe \u200b \ud800 \x7f", "a")
    assert str(fault) == r"f: \x1b[2J\x1b[1;1H\x07 \u202egnp.exe \u200b \ud800 \x7f; allowed: a"


@settings(deadline=None)
@given(given=st.text(st.characters(exclude_categories=[])))
@example("\r\n\x85\u2028\x1c")
def test_any_fault_is_one_line_that_prints(given: str) -> None:
    line = str(Fault("key", given, "b"))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()  # lone surrogates would not
    assert BadRequest.of("key", given, "b").args == (line,)


@pytest.mark.parametrize("dtype", ["I32", "F32"])
def test_names_in_headers_cannot_steer_the_terminal(tmp_path: Path, dtype: str) -> None:
    """A tensor of the wrong kind, or one that a broken index does not place."""
    name = f"w{CLEARS_THE_SCREEN}"
    header = json.dumps({name: {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = "model-00001-of-00001.safetensors" if dtype == "F32" else "model.safetensors"
    (tmp_path / file).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if dtype == "F32":
        index = {"metadata": {}, "weight_map": {f"{name}\x1b]0;title\x07": file}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequest) as caught:
        Checkpoint.open(tmp_path, "family.base")
    assert r"w\x1b[2J\x1b[1;1H" in str(caught.value)
    assert "\x1b" not in str(caught.value)
