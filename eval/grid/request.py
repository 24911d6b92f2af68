"""From a composed config to typed objects, with all faults at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from alignmerge.engine.assets import Assets
from alignmerge.engine.configuration import TARGET, build, choices, nearest
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest, Fault, missing_package, refuse
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from alignmerge.engine.store import Store
from alignmerge.zoo.corpus import Packaged
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.world import World
from alignmerge.zoo.zoo import Zoo
from eval.grid.experiment import Experiment
from eval.grid.grid import Grid, Row
from eval.grid.usage import GROUPS
from eval.scorers.interface import Scorer

Config = Mapping[str, Any]
CONF = ROOT / "conf"
TELLING = ("family", "corpus", "method", "scorer", "seed")
"""Keys of a config that tell one cell from another."""


def check_parts(config: Config) -> None:
    """Build every part of a config, whatever the mode needs of it.

    Raises:
        BadRequest: with the faults of all parts.
    """
    makers: dict[str, Callable[[], Any]] = {
        "family": partial(build, config.get("family", {}), "family", Family),
        "corpus": partial(_corpus, config),
        "method": partial(build, config.get("method", {}), "method", Merger),
        "scorers": partial(_scorers, config),
    }
    makers["keys"] = partial(_check_keys, config)
    makers["places"] = partial(_check_places, config)
    if config.get("grid") is not None:
        makers["grid"] = partial(build, config["grid"], "grid", Grid)
    BadRequest.gathered(makers)


def _check_keys(config: Config) -> None:
    """Refuse what was added with ``+`` beside the keys that there are."""
    usual = yaml.safe_load((CONF / "config.yaml").read_text())
    plain = {key for key, value in usual.items() if not isinstance(value, (dict, list))}  # not Hydra's
    known = plain.union(GROUPS) - {"experiment"}  # which leaves its parts
    refuse([Fault(key, "unknown key", nearest(key, known)) for key in sorted(set(config) - known)])


def _check_places(config: Config) -> None:
    """Refuse a place inside of what is a file."""
    faults = []
    for key in ("store", "results", "out"):
        place = config.get(key)
        if not isinstance(place, str):
            continue  # said elsewhere, as is an ``out`` that exists
        above = [*Path(place).parents]
        if key != "out":
            above.append(Path(place))
        files = list(filter(Path.is_file, above))
        faults += [Fault(key, f"{path} is a file", "a folder, which may be new") for path in files]
    refuse(faults)


def zoo_of(config: Config) -> Zoo:
    """Build family, corpus, store and assets; raises BadRequest with the faults of all of them."""
    makers = {"family": partial(build, config["family"], "family", Family), "corpus": partial(_corpus, config)}
    store = Store(Path(config["store"]))
    assets = Assets(store, yaml.safe_load((CONF / "assets.yaml").read_text()))
    return Zoo(**BadRequest.gathered(makers), store=store, assets=assets, seed=config["seed"])


def scorers_of(config: Config) -> list[Scorer]:
    """Build the chosen scorers, sorted by name."""
    scorers = _scorers(config)
    if not scorers:
        raise BadRequest.of("scorer", "none", "one or more files of conf/scorer, e.g. scorer=[aqi,judge]")
    return scorers


def experiment_of(config: Config) -> Experiment:
    """Build the grid that the config names, or a grid of one row for a single cell."""
    files = choices(CONF / "method")
    methods = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
    makers: dict[str, Callable[[], Any]] = {
        "zoo": partial(zoo_of, config), "scorers": partial(scorers_of, config), "grid": partial(_grid, config, methods)
    }  # fmt: skip
    zoo, scorers, grid = BadRequest.gathered(makers).values()
    if config["grid"] is None:
        methods = {"method": config["method"]}
    makers = {name: partial(_family, name) for name in grid.families}
    families = list(BadRequest.gathered(makers).values()) or [zoo.family]
    zoos = []
    for offset in range(grid.seeds):
        zoos += [replace(zoo, family=family, seed=zoo.seed + offset) for family in families]
    return Experiment(grid, zoos, methods, scorers)


def _corpus(config: Config) -> Any:
    return build(config.get("corpus", {}), "corpus", Packaged, Toy, World)


def _scorers(config: Config) -> list[Scorer]:
    known = choices(CONF / "scorer")
    makers = {}
    for name, node in sorted((config.get("scorer") or {}).items()):
        # An experiment sets fields of scorers that nobody may have chosen.
        left_out = name in known and isinstance(node, Mapping) and TARGET not in node
        if not left_out:
            makers[name] = partial(build, node, f"scorer.{name}", Scorer)
    scorers: list[Scorer] = list(BadRequest.gathered(makers).values())
    _check_packages(scorers)
    return scorers


def _check_packages(scorers: Sequence[Scorer]) -> None:
    """Refuse a scorer whose package is not installed, before anything is made that it would look at."""
    faults: list[Fault] = []
    for name in dict.fromkeys(name for scorer in scorers for name in scorer.packages):
        try:
            metadata.version(name)
        except ModuleNotFoundError as error:
            faults += missing_package(error).faults
    refuse(faults)


def _family(name: str) -> Any:
    known = choices(CONF / "family")
    if name not in known:
        raise BadRequest.of("grid.families", f"no such choice: {name}", nearest(name, set(known)))
    return build(yaml.safe_load(known[name].read_text()), f"family {name}", Family)


def _grid(config: Config, methods: Mapping[str, Config]) -> Any:
    if config["grid"] is not None:
        return build(config["grid"], "grid", Grid)
    method = build(config["method"], "method", Merger).name
    title = f"One cell: {method} on {config['family'].get('name')}"
    name = _cell_folder(config, method, methods)
    return Grid(name=name, title=title, rows={method: Row(method="method")}, dev_scorers={})


def _cell_folder(config: Config, method: str, methods: Mapping[str, Config]) -> str:
    """Return the name of a cell's results: what was changed, and a digest of what tells cells apart.

    So neither the points of a sweep nor two local families write over each other.
    """
    given = config["method"]
    usual = next((one for one in methods.values() if one[TARGET] == given[TARGET]), {})
    changed = [f"{key}={value}" for key, value in given.items() if value != usual.get(key)]
    told = json.dumps({key: config.get(key) for key in TELLING}, sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    return "-".join(["cell", str(config["family"].get("name")), method, *changed, digest]).replace("/", "-")
