"""Remote code: ignored where transformers has the architecture itself (Phi-3.5's config names some), else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakesModel
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import open_models
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_model, load_tokenizer, save_model

AUTO_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}


@pytest.fixture
def phi(tiny_model: MakesModel, copied: Callable[[Path], Path]) -> Path:
    """A model as the Hub has it: the config points to code, and the code is there (and tells if it is run)."""
    folder = copied(tiny_model("phi3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    for name in ("configuration_phi3.py", "modeling_phi3.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")
    return folder


def test_native_class_is_loaded_and_the_named_code_is_not_run(phi: Path) -> None:
    Checkpoint.open(phi, "model")
    assert type(load_model(phi)) is Phi3ForCausalLM


def test_merge_and_trained_model_no_longer_point_to_code(phi: Path, tmp_path: Path) -> None:
    models = open_models({"base": phi, "anchor": phi, "experts.x": phi})
    merged, trained = tmp_path / "merged", tmp_path / "trained"
    merged.mkdir()
    models.base.furnish(merged)
    save_model(load_model(phi), load_tokenizer(phi), trained)
    for folder in (merged, trained):
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" not in config and config["model_type"] == "phi3"
        assert not list(folder.glob("*.py"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_model(trained)(ids).logits, load_model(phi)(ids).logits)


def test_architecture_that_transformers_does_not_have_is_refused(phi: Path) -> None:
    config = json.loads((phi / "config.json").read_text())
    (phi / "config.json").write_text(json.dumps({**config, "model_type": "exotic"}))
    with pytest.raises(BadRequest, match="the config asks for remote code"):
        Checkpoint.open(phi, "model")


def test_tokenizer_that_names_code_is_refused(phi: Path) -> None:
    path = phi / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["t.T", None]}}))
    with pytest.raises(BadRequest, match="remote code"):
        Checkpoint.open(phi, "model")
