"""What transformers makes of a model: its settings with all defaults, and the stored tensor behind each weight.

The model is built on torch's meta device, from its config alone: no weight is read or held.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from alignmerge.engine.faults import Fault, first_few
from alignmerge.engine.validation import Specs, TensorSpec

SILENT = frozenset((
    "_name_or_path", "architectures", "dtype", "transformers_version", "model_type",  # who wrote it, what it is
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "chunk_size_feed_forward",  # how it is called
    "id2label", "label2id", "problem_type",  # other tasks
    "attention_dropout", "embd_pdrop", "resid_pdrop", "initializer_range", "pretraining_tp",  # training
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings",  # the tensors tell
    "use_sliding_window", "max_window_layers",  # sliding_window and layer_types follow from them
    "rope_parameters.type",  # an older name of rope_type
))  # fmt: skip
"""Settings that change no number of a model with given tensors, or that are compared by those."""
LENGTHS = frozenset(("max_position_embeddings", "original_max_position_embeddings"))
LENGTH_MATTERS = frozenset(("dynamic", "longrope", "yarn"))
"""The kinds of rotary embeddings that go by ``LENGTHS``; with others they are only told."""


class Native(NamedTuple):
    """A causal language model of transformers, without its weights."""

    kind: Any
    """Its class, e.g. ``LlamaForCausalLM``."""
    config: Any
    """Its ``PreTrainedConfig``: what config.json says, completed by the defaults of the architecture."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name -> shape of every weight."""
    tied: Mapping[str, str]
    """Name of a weight that is a copy (``lm_head.weight``) -> name of the weight that it shares."""

    def name(self, stored: str) -> str | None:
        """Return the weight that is loaded from the tensor ``stored``, or None.

        Transformers adds the prefix of the bare model (``model.``) where a file lacks it, and removes it
        where it is too much.
        """
        prefix = f"{self.kind.base_model_prefix}."
        for name in (stored, stored.removeprefix(prefix), prefix + stored):
            if name in self.shapes:
                return name
        return None

    def settings(self) -> dict[str, Any]:
        """Return what decides, beside the tensors, which function the model is: defaults included, nested as ``a.b``.

        Keys of config.json that the architecture does not have are not among them: transformers ignores them.
        """
        content, known = self.config.to_dict(), type(self.config)().to_dict()
        found = _flat({key: value for key, value in content.items() if key in known})
        ignored = SILENT if found.get("rope_parameters.rope_type") in LENGTH_MATTERS else SILENT | LENGTHS
        if "sliding_attention" not in (found.get("layer_types") or ["sliding_attention"]):
            ignored |= {"sliding_window"}
        return {key.removeprefix("rope_parameters."): found[key] for key in found.keys() - ignored}


def native(config: Mapping[str, Any]) -> Native:
    """Build the model that the content of a config.json describes.

    Raises ValueError, in one line, where transformers has no causal language model of this type or does not take
    the settings.
    """
    return _built(json.dumps(config, sort_keys=True))


def as_loaded(model: Native, specs: Specs, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    """Return weight -> the tensor that transformers loads it from, and why it would not load the model cleanly.

    A tied weight that is stored alone stands for the one that it shares. Tensors that transformers passes over
    in silence (``rotary_emb.inv_freq`` of old checkpoints) are left out.
    """
    found: dict[str, TensorSpec] = {}
    faults: list[Fault] = []
    for stored, spec in sorted(specs.items()):
        name = model.name(stored)
        if name in found:
            given = f"tensors '{found[name].key}' and '{stored}' are one weight"
            faults.append(Fault(f"{where}: {spec.file}", given, "every weight once"))
        elif name is not None:
            found[name] = spec
    if any(model.name(stored) is None for stored in specs):
        faults += _unexpected(model, specs, where)
    for copy, shared in model.tied.items():
        if copy in found and shared not in found:
            found[shared] = found.pop(copy)
    faults += [*_misshapen(model, found, where), *_missing(model, found, specs, where)]
    return found, faults


@cache
def _built(text: str) -> Native:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    stated = json.loads(text)
    try:
        config = CONFIG_MAPPING[stated["model_type"]].from_dict(stated)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(f"no causal language model of transformers is a '{stated['model_type']}'") from None
    except Exception as error:  # each check of a setting has a kind of its own
        raise ValueError(_one_line(error)) from None
    try:
        with torch.device("meta"), _silent():
            model = kind(config)
    except Exception as error:
        raise ValueError(_one_line(error)) from None
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return Native(kind, config, shapes, dict(model.all_tied_weights_keys))


def _flat(content: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{parent}{key}.") if isinstance(value, dict) else {f"{parent}{key}": value}
    return found


def _one_line(error: Exception) -> str:
    return f"transformers does not take it ({type(error).__name__}: {' '.join(str(error).split())})"


def _unexpected(model: Native, specs: Specs, where: str) -> list[Fault]:
    """Let transformers load tensors without content, and return those that it has no place for."""
    empty = {name: torch.empty(spec.shape, device="meta") for name, spec in specs.items()}
    options = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _silent():
        _, info = model.kind.from_pretrained(None, config=model.config, state_dict=empty, **options)
    allowed = f"only weights of {model.kind.__name__} as config.json describes it"
    faults = []
    for name in sorted(info["unexpected_keys"]):
        file = specs[name].file if name in specs else next(iter(specs.values())).file.parent
        faults.append(Fault(f"{where}: {file}", f"tensor '{name}' has no place in the model", allowed))
    return first_few(faults)


def _misshapen(model: Native, found: Specs, where: str) -> list[Fault]:
    faults = []
    for name, spec in found.items():
        wanted = list(model.shapes[name])
        if list(spec.shape) != wanted:
            given = f"tensor '{spec.key}' has shape {list(spec.shape)}"
            faults.append(Fault(f"{where}: {spec.file}", given, f"{wanted}, as config.json describes it"))
    return first_few(faults)


def _missing(model: Native, found: Specs, specs: Specs, where: str) -> list[Fault]:
    folder = next(iter(specs.values())).file.parent
    faults = []
    for name in sorted(model.shapes.keys() - found.keys() - model.tied.keys()):
        allowed = f"every weight of {model.kind.__name__} as config.json describes it"
        if name in (model.kind._tied_weights_keys or ()):
            allowed += " (or tie_word_embeddings: true)"
        faults.append(Fault(f"{where}: {folder}", f"tensor '{name}' is missing", allowed))
    return first_few(faults)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' own report of what it loads off the terminal."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
