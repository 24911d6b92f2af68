"""What the command line leaves unsaid, and which override Hydra cannot use: its errors as plain lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignmerge.engine.configuration import choices, nearest
from alignmerge.engine.faults import Fault
from alignmerge.engine.manifest import ROOT

CONF = str(ROOT / "conf")
WORLD = ("scorer.judge.relevance=null", "scorer.utility.tasks=[format,arithmetic,factual,helpful]")
"""How the tiny world is measured; ``conf/experiment/_tiny.yaml`` says the same."""
NOT_THERE = re.compile(r"Could not (?:override|delete from config\.) '(?P<key>[^']+)'")


def with_corpus(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, and the corpus that the chosen families are made from where they choose none.

    With it come the settings of the usual scorers that its prompt sets ask for.
    """
    chosen = {key: value for key, _, value in (one.partition("=") for one in arguments)}
    if "family" not in chosen or not {"corpus", "experiment"}.isdisjoint(key.lstrip("+") for key in chosen):
        return list(arguments)
    files = choices(Path(CONF, "family"))
    families = [
        yaml.safe_load(files[name].read_text()) for name in chosen["family"].split(",") if name in files
    ]
    corpora = {family.get("corpus") for family in families} - {None}
    brought = [f"corpus={corpus}" for corpus in corpora if len(corpora) == 1]
    if "corpus=world" in brought and "scorer" not in chosen:
        brought += [one for one in WORLD if one.partition("=")[0] not in chosen]
    return [*arguments, *brought]


def composition_faults(first: Exception) -> list[Fault]:
    """Return one fault for each override that Hydra cannot use; Hydra itself stops at the first."""
    arguments = get_args_parser().parse_args()
    overrides: list[str] = list(arguments.overrides)
    if arguments.config_dir is not None:
        overrides.append(f"hydra.searchpath=[{arguments.config_dir}]")
    found: list[tuple[Exception, str]] = []
    config, error = _composed(overrides)
    while error is not None and not arguments.multirun:
        places = range(len(overrides))
        others = (str(_composed([*overrides[:i], *overrides[i + 1 :]])[1]) for i in places)
        named = NOT_THERE.search(str(error))
        guilty = next(
            (one for one in overrides if named and one.lstrip("+~").partition("=")[0] == named["key"]), None
        )
        if guilty is None:
            guilty = next(
                (overrides[i] for i, other in zip(places, others, strict=False) if other != str(error)), None
            )
        if guilty is None:
            break
        found.append((error, guilty))
        overrides = _without(overrides, guilty)
        config, error = _composed(overrides)
    return [_fault(error, guilty, config) for error, guilty in found or [(first, "config")]]


def _composed(overrides: Sequence[str]) -> tuple[DictConfig, Exception | None]:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return hydra.compose("config", list(overrides)), None
    except (HydraException, OmegaConfBaseException) as error:
        return OmegaConf.create(), error


def _without(overrides: Sequence[str], guilty: str) -> list[str]:
    """Return the overrides without the guilty one and without what is set inside the group that it chooses."""
    group = guilty.lstrip("+~").partition("=")[0]
    inside = "grid." if group == "experiment" else f"{group}."
    return [one for one in overrides if one != guilty and not one.lstrip("+~").startswith(inside)]


def _fault(error: Exception, guilty: str, config: DictConfig) -> Fault:
    key, _, value = guilty.lstrip("+~").partition("=")
    if isinstance(error, MissingConfigException):
        missing_file = str(error.missing_cfg_file)
        group = key if missing_file.startswith(f"{key}/") else missing_file.rpartition("/")[0]
        name, listed = (
            missing_file.removeprefix(f"{group}/"),
            [one for one in error.options or () if one[0] != "_"],
        )
        known = {*choices(Path(CONF, group)), *listed}
        return Fault(group or "config", f"no such choice: {name}", nearest(name, known))
    if isinstance(error, OverrideParseException):
        return Fault(
            guilty, "not understood", "key=value, with quotes around a value that holds any of ,:[]{}()"
        )
    if "Ambiguous value" in str(error):
        return Fault(key, value, "one value; [a,b] for a list; with -m, a sweep over a,b")
    if missing := NOT_THERE.search(str(error)):
        parent, _, name = missing["key"].rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        known = (
            {str(key) for key in node if not str(key).startswith("_")}
            if isinstance(node, DictConfig)
            else set()
        )
        if name not in known:
            return Fault(
                missing["key"], "unknown key", nearest(name, known) or "a key that `run.py --cfg job` shows"
            )
        return Fault(key, value, f"a value such as {node[name]}")
    return Fault(key, str(error), "what `python run.py --help` lists")
