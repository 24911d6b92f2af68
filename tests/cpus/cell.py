"""One small but complete cell of each architecture, in one process: prints digests that must not depend on the CPU.

``python -m tests.cpus.cell [FAMILY ...]`` trains every model of a tiny family for a few steps, merges them by
every method, generates replies and scores them, and prints a line for each. ``make test-cpus`` runs it on this CPU
and on emulated ones and compares what they print.
"""

from alignmerge.engine.kernels import fix

fix()

import hashlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from alignmerge.engine.assets import Assets
from alignmerge.engine.configuration import build
from alignmerge.engine.family import Family
from alignmerge.engine.language import threads
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merge import Merge
from alignmerge.engine.merger import Merger
from alignmerge.engine.store import Store
from alignmerge.zoo.world import World
from alignmerge.zoo.zoo import Zoo
from eval.scorers.aqi import AQI
from eval.scorers.geometry import Geometry
from eval.scorers.subject import StoreSubject, identity_of, read_scores, score
from eval.scorers.subspaces import Subspaces

FAMILIES = ("llama3", "mistral", "qwen2", "phi3", "gemma2")
STEPS = 2
CONF = ROOT / "conf"
SIZES = {"pretrain": 400, "instruct": 120, "requests_train": 48, "requests_dev": 8, "requests_test": 16}
SIZES |= {"tasks_train": 80, "tasks_dev": 8, "tasks_test": 8}


def short(family: Family) -> Family:
    """Return the family with trainings of a few steps."""
    recipes = {}
    for name, recipe in family.recipes.items():
        if name == "pretrained":
            recipes[name] = replace(recipe, training=replace(recipe.training, steps=STEPS))
        else:
            recipes[name] = replace(recipe, steps=STEPS, keep=())
    return replace(family, recipes=recipes, batch_size=16)


def lines(name: str, root: Path) -> Iterator[str]:
    """Yield what a family comes to: a digest for each model, merge, set of replies and score."""
    family = short(build(yaml.safe_load((CONF / f"family/tiny/{name}.yaml").read_text()), "family", Family))
    store = Store(root / name)
    zoo = Zoo(family, World(**SIZES), store, Assets(store, {}))
    models = zoo.models()
    for key, model in zip(["base", *models.aliases], [models.base, *models.pool], strict=True):
        yield f"{name} model {key} {model.digest[:12]}"
    for path in sorted((CONF / "method").glob("*.yaml")):
        merger: Merger = build(yaml.safe_load(path.read_text()), "method", Merger)
        job = Merge(merger, zoo, models, 0)
        yield f"{name} merge {merger.name} {job.record().digest[:12]}"
    subject = StoreSubject(zoo, models.anchor.folder, identity_of(models.anchor), "test", models)
    replies = subject.replies("probes")
    yield f"{name} replies {digest(replies)}"
    for scorer in (AQI(), Geometry(), Subspaces()):
        values = read_scores(score(scorer, subject))["value"]
        yield f"{name} scores {scorer.name} {digest(list(map(repr, values)))}"


def digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def main() -> None:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as root, threads(1):
        torch.manual_seed(0)
        for name in sys.argv[1:] or FAMILIES:
            for line in lines(name, Path(root)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
