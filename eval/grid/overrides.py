"""What the command line leaves unsaid, and a plain line for each override that Hydra cannot use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignmerge.engine.configuration import choices, nearest
from alignmerge.engine.family import ALIAS, ALIASES
from alignmerge.engine.faults import Fault, missing_package
from eval.grid.quoting import EXPERTS, for_the_shell, quoted
from eval.grid.usage import CONF, MODES

FIRST = "first"
"""The family that conf/config.yaml chooses."""
SCORED_AS = "smollm2"
ALONE = ("--hydra-help", "-sc", "--shell-completion")
"""Flags of Hydra that stand without overrides."""
UNUSABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)
"""What Hydra raises where it cannot make a config, or a folder that the config names."""
NOT_THERE = re.compile(r"Could not (?:override|delete from config\.) '(?P<key>[^']+)'")


def with_corpus(arguments: Sequence[str]) -> list[str]:
    """Add the corpus that the chosen families are made from, and how it is measured, if none is chosen.

    A folder that is scored stands by itself: on real prompts, with the settings of a family that has
    them.
    """
    chosen = dict(map(_split, arguments))
    if not {"corpus", "experiment", *ALONE}.isdisjoint(chosen):
        return list(arguments)
    if "family" not in chosen and chosen.get("mode") == "score":
        added = [f"family={SCORED_AS}"]
        if "family.chat_template" not in chosen:
            added.append("family.chat_template=null")  # the folder keeps its own
        return [*arguments, *added]
    files = choices(CONF / "family")
    names = set(chosen.get("family", FIRST).split(",")).intersection(files)
    corpora = {yaml.safe_load(files[name].read_text()).get("corpus") for name in names} - {None}
    if len(corpora) != 1:
        return list(arguments)
    brought = [f"corpus={corpora.pop()}"]
    if brought == ["corpus=world"] and "scorer" not in chosen:
        brought.append("experiment=_world")  # no grid, only how its experiments measure
    return [*arguments, *brought]


def composition_faults(first: Exception) -> list[Fault]:
    """Return one fault for each override that Hydra cannot use; Hydra itself stops at the first.

    The overrides are added one by one, choices of files before values. One that cannot be added is left
    out, and with it what is set inside the file that it should have chosen.
    """
    if isinstance(first, OSError) and not isinstance(first, HydraException):
        where, reason = str(first.filename or "config"), first.strerror or str(first)
        return [Fault(where, reason, "a place that can be read and written")]
    if isinstance(first, yaml.YAMLError):
        return [Fault("config", str(first), "valid YAML")]
    arguments = get_args_parser().parse_args()
    used = [f"hydra.searchpath=[{arguments.config_dir or ''}]"]
    config, error = _composed(used)
    if arguments.multirun or error is not None:
        guilty_one = str(getattr(first, "override", None) or "config")
        return [_fault(first, guilty_one, OmegaConf.create())]
    guilty: dict[str, Exception] = {}
    inside: tuple[str, ...] = ()
    for override in sorted(arguments.overrides, key=lambda one: "." in _split(one)[0]):
        key, _ = _split(override)
        if key.startswith(inside):
            continue
        composed, error = _composed([*used, override])
        if error is None:
            config = composed
            used.append(override)
        else:
            guilty[override] = error
            inside += (f"{key}.".replace("experiment.", "grid."),)  # which an experiment sets
    guilty = guilty or {"config": first}
    return [_fault(error, override, config) for override, error in guilty.items()]


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _composed(overrides: Sequence[str]) -> tuple[DictConfig, Exception | None]:
    """Return the config, or an empty one and why Hydra cannot compose it."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", list(overrides)), None
    except UNUSABLE as error:
        return OmegaConf.create(), error


def _fault(error: Exception, guilty: str, config: DictConfig) -> Fault:
    key, value = _split(guilty)
    if key.startswith(f"{EXPERTS}.") and ALIAS.fullmatch(key.removeprefix(f"{EXPERTS}.")) is None:
        return Fault(key, "not an alias", ALIASES)
    if isinstance(error, MissingConfigException):
        return _no_choice(error, key)
    if isinstance(error, OverrideParseException) or not key:
        return Fault(guilty or "''", "not understood", _readable(guilty, value))
    if "Ambiguous value" in str(error):
        return Fault(key, value, "one value; [a,b] for a list; with -m, a sweep over a,b")
    named = NOT_THERE.search(str(error))
    if named is None:
        return Fault(key, str(error), "what `python run.py --help` lists")
    return _not_there(named["key"], value, config)


def _not_there(key: str, value: str, config: DictConfig) -> Fault:
    """Return the fault of a key that the config lacks, or that cannot take such a value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent)
    if parent == "grid" and node is None:
        return Fault(key, "there is no grid", "an experiment beside it, e.g. experiment=tiny")
    known: set[str] = set()
    if isinstance(node, DictConfig):
        known.update(map(str, node))
    if name in known:
        return Fault(key, value, f"a value such as {node[name]}")
    return Fault(key, "unknown key", nearest(name, known) or "a key that `run.py --cfg job` shows")


def _readable(guilty: str, value: str) -> str:
    """Return what could stand for an override that Hydra cannot read."""
    meant = difflib.get_close_matches(guilty, MODES, 1)
    if meant:
        return f"mode={meant[0]}"
    key = guilty.partition("=")[0]
    try:
        OverridesParser.create().parse_override(f"{key}={quoted(value)}")
    except HydraException:
        value = ""  # it is the key that cannot be read
    if not value or not value.isprintable() or value.startswith(("[", "{")):
        return "key=value, with quotes around a value that holds any of ,:[]{}()"
    return for_the_shell(key, value)


def _no_choice(error: MissingConfigException, key: str) -> Fault:
    missing = str(error.missing_cfg_file)
    if "submitit" in missing:  # a group that its package brings
        return missing_package(ModuleNotFoundError(name="hydra_plugins")).faults[0]
    group = missing.rpartition("/")[0]
    if missing.startswith(f"{key}/"):
        group = key
    name = missing.removeprefix(f"{group}/")
    known = {*choices(CONF / group), *(error.options or ())}
    return Fault(group or "config", f"no such choice: {name}", nearest(name, known))
