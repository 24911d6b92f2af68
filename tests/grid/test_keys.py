"""Keys are complete: change one input alone and the number is made anew; change nothing and nothing is.

The examples are those that the first edition got wrong, and the whole kind of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from alignmerge.engine import device, manifest
from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import write_jsonl
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import load_tokenizer
from alignmerge.engine.merge import Merge
from alignmerge.engine.merger import Inputs, Merger, Undeclared, own
from alignmerge.engine.progress import silent
from alignmerge.engine.store import Store
from alignmerge.method import AlignMerge
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.zoo import Zoo
from baselines.average import Average
from baselines.dare import Dare
from baselines.fisher_soup import FisherSoup
from baselines.gradient_step import GradientStep
from eval.columns import Column
from eval.grid.cells import Cell, measure, read
from eval.scorers.aqi import AQI
from eval.scorers.geometry import Geometry
from eval.scorers.interface import Sample, Scorer, Subject
from eval.scorers.subject import StoreSubject, identity_of, read_scores, score
from tests.conftest import SENTENCES, TEMPLATE, MakesModel, Perturbs

OTHER_TEMPLATE = TEMPLATE.replace("assistant :", "answer is")


@dataclass(frozen=True, kw_only=True)
class Length(Scorer):
    """How long the replies are: the shortest scorer that reads replies."""

    name: ClassVar[str] = "length"
    columns: ClassVar[Mapping[str, Column]] = {
        "length": Column(label="Length", group="Test", direction="info"),
    }

    def score(self, subject: Subject) -> Iterable[Sample]:
        for prompt, reply in zip(subject.prompts("unsafe"), subject.replies("unsafe"), strict=True):
            yield Sample(prompt.id, "length", len(reply))


@pytest.fixture
def family(tmp_path: Path, tiny_model: MakesModel, perturbed: Perturbs) -> Family:
    """A family of local folders that the test may change."""
    made = {"base": tiny_model("llama")}
    for seed, key in enumerate(("anchor", "math", "form"), 1):
        made[key] = perturbed(tiny_model("llama"), seed)
    for key, folder in made.items():
        shutil.copytree(folder, tmp_path / "models" / key)
    where = {key: str(tmp_path / "models" / key) for key in made}
    experts = {key: where[key] for key in ("math", "form")}
    return Family(
        name="local", base=where["base"], anchor=where["anchor"], experts=experts, dtype="float32",
        batch_size=8, max_length=96,
    )  # fmt: skip


def zoo_of(family: Family, root: Path) -> Zoo:
    store = Store(root)
    return Zoo(family, Toy(), store, Assets(store, {}))


@pytest.fixture
def zoo(family: Family, tmp_path: Path) -> Zoo:
    return zoo_of(family, tmp_path / "store")


def subject_of(zoo: Zoo, folder: str, **more: Any) -> StoreSubject:
    model = Checkpoint.open(Path(folder), "model").known_as(zoo.digest_of(Path(folder), "model"))
    return StoreSubject(zoo, model.folder, identity_of(model), "test", **more)


def value_of(zoo: Zoo, scorer: Scorer, folder: str, column: str) -> float:
    samples = read_scores(score(scorer, subject_of(zoo, folder)))
    return float(samples[samples["column"] == column]["value"].mean())


def set_template(folder: str | Path, template: str) -> None:
    (Path(folder) / "chat_template.jinja").write_text(template)


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def merged(zoo: Zoo, merger: Merger, seed: int = 0) -> str:
    return Merge(merger, zoo, zoo.models(), seed).record().digest


# --- the failing examples of the first edition ------------------------------------------------------------


def speak(zoo: Zoo) -> None:
    """Put probes in words that the tiny tokenizer knows: of unknown words alone, all states are equal."""
    words = {"harmful": SENTENCES[0].split(), "benign": SENTENCES[4].split()}
    records = []
    for pair in range(6):
        for label, known in words.items():
            text = " ".join(known[pair:] + known[:pair])
            records.append({"id": f"{label}/{pair}", "text": text, "label": label, "pair": pair})
    write_jsonl(zoo.prompts.path / "test/probes.jsonl", records)


def test_equal_weights_under_another_rope_theta_have_an_aqi_of_their_own(zoo: Zoo, tmp_path: Path) -> None:
    """Two folders, one set of weights: the second got the first one's AQI."""
    speak(zoo)
    first = zoo.family.base
    second = str(tmp_path / "models" / "turned")
    shutil.copytree(first, second)
    config = json.loads((Path(second) / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 7.0
    (Path(second) / "config.json").write_text(json.dumps(config))
    assert zoo.digest_of(Path(first), "model") == zoo.digest_of(Path(second), "model")
    found = value_of(zoo, AQI(), first, "aqi"), value_of(zoo, AQI(), second, "aqi")
    assert abs(found[0] - found[1]) > 1e-4 and min(found) > 1e-3
    fresh = zoo_of(zoo.family, tmp_path / "fresh")
    speak(fresh)
    assert value_of(fresh, AQI(), second, "aqi") == found[1]


@pytest.mark.parametrize(
    "merger", [FisherSoup(labels="data"), GradientStep(), AlignMerge(lambda_bud=0.0)], ids=lambda m: m.name
)
def test_another_chat_template_of_the_base_gives_the_merge_of_a_fresh_store(
    zoo: Zoo, tmp_path: Path, merger: Merger
) -> None:
    """The Fisher of the other template was reused."""
    before = merged(zoo, merger)
    assert merged(zoo_of(zoo.family, zoo.store.root), merger) == before
    set_template(zoo.family.base, OTHER_TEMPLATE)
    again, fresh = zoo_of(zoo.family, zoo.store.root), zoo_of(zoo.family, tmp_path / "fresh")
    assert merged(again, merger) == merged(fresh, merger) != before


def test_a_folder_is_scored_under_its_own_template_beside_relative_scorers(zoo: Zoo, tmp_path: Path) -> None:
    """With ``geometry`` among the scorers the stored replies of the base's template were taken."""
    folder = str(tmp_path / "models" / "spoken")
    shutil.copytree(zoo.family.experts["math"], folder)
    first = subject_of(zoo, folder, models=zoo.models())
    before = score(Length(), first).key, list(first.replies("unsafe"))
    set_template(folder, OTHER_TEMPLATE)
    second = subject_of(zoo, folder, models=zoo.models())
    assert score(Length(), second).key != before[0]
    assert list(second.replies("unsafe")) == list(subject_of(zoo, folder).replies("unsafe")) != before[1]


def test_a_cell_that_failed_for_want_of_a_template_succeeds_once_it_is_there(zoo: Zoo) -> None:
    """The furnished folder of the merge was kept, without the template."""
    (Path(zoo.family.base) / "chat_template.jinja").unlink()
    cell = Cell(zoo, "average", "", "test", [Length()], merger=Average())
    with pytest.raises(BadRequest, match=r"^family\.chat_template: "):
        measure(cell, silent)
    set_template(zoo.family.base, TEMPLATE)
    cell = cell._replace(zoo=zoo_of(zoo.family, zoo.store.root))
    measure(cell, silent)
    assert zoo.store.failure("cells", cell.recipe) is None


def with_template(zoo: Zoo, template: str | None, root: Path) -> Zoo:
    """The same family under ``family.chat_template``, with a store of its own."""
    return zoo_of(replace(zoo.family, chat_template=template), root)


@pytest.mark.parametrize("merger", [GradientStep(), AlignMerge()], ids=lambda m: m.name)
def test_a_merge_under_the_familys_template_is_that_of_folders_that_have_it(
    zoo: Zoo, tmp_path: Path, merger: Merger
) -> None:
    """``family.chat_template`` was read for converted weights alone."""
    before = merged(zoo, merger)
    given = merged(with_template(zoo, OTHER_TEMPLATE, zoo.store.root), merger)
    set_template(zoo.family.base, OTHER_TEMPLATE)
    assert given == merged(zoo_of(zoo.family, tmp_path / "fresh"), merger) != before


def test_every_model_is_scored_under_the_familys_template(zoo: Zoo, tmp_path: Path) -> None:
    speaking = with_template(zoo, OTHER_TEMPLATE, zoo.store.root)
    for model in ("base", "anchor", "experts.math"):
        told = []
        for source in (zoo, speaking):
            subject = Cell(source, model, "", "test", [Length()], model=model).subject(
                source, source.models(), None
            )
            told.append(
                (score(Length(), subject).key, subject.rendered("unsafe"), list(subject.replies("unsafe")))
            )
        set_template(zoo.source(model).folder, OTHER_TEMPLATE)
        fresh = subject_of(zoo_of(zoo.family, tmp_path / f"fresh-{model}"), str(zoo.source(model).folder))
        assert told[1][1:] == (fresh.rendered("unsafe"), list(fresh.replies("unsafe")))
        assert all(one != other for one, other in zip(*told, strict=True))


def test_a_merged_folder_carries_the_familys_template_and_the_others_of_the_base(zoo: Zoo) -> None:
    _add_template(Path(zoo.family.base))
    edit_json(Path(zoo.family.base) / "tokenizer_config.json", chat_template="{{ messages }}")
    speaking = with_template(zoo, OTHER_TEMPLATE, zoo.store.root)
    plain, spoken = (Merge(Average(), one, one.models(), 0) for one in (zoo, speaking))
    assert plain.record().digest == spoken.record().digest and plain.folder != spoken.folder
    for merge, template in ((plain, TEMPLATE), (spoken, OTHER_TEMPLATE)):
        folder = merge.weights().path
        named = load_tokenizer(folder).chat_template
        assert named == {"default": template, "chat_template": OTHER_TEMPLATE}
        assert named == load_tokenizer(Path(zoo.family.base), template).chat_template
        assert merge.folder == folder


def test_templates_of_the_tokenizers_config_are_not_hidden_by_the_familys(zoo: Zoo) -> None:
    """A file chat_template.jinja would hide those that older folders name in tokenizer_config.json."""
    base = Path(zoo.family.base)
    (base / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    edit_json(base / "tokenizer_config.json", chat_template=named)
    speaking = with_template(zoo, OTHER_TEMPLATE, zoo.store.root)
    folder = Merge(Average(), speaking, speaking.models(), 0).weights().path
    assert load_tokenizer(folder).chat_template == {"default": OTHER_TEMPLATE, "tool_use": "{{ tools }}"}
    assert load_tokenizer(base, OTHER_TEMPLATE).chat_template == load_tokenizer(folder).chat_template


def test_answers_of_the_base_are_made_anew_when_decoding_changes(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignmerge.zoo.lessons.distilled", lambda corpus: True)
    before = zoo.lessons.key
    monkeypatch.setattr("alignmerge.zoo.zoo.DECODING", 0)
    assert zoo_of(zoo.family, zoo.store.root).lessons.key != before


# --- the whole kind -----------------------------------------------------------------------------------------


def _add_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    set_template(folder / "additional_chat_templates", OTHER_TEMPLATE)


FILES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: edit_json(folder / "config.json", rms_norm_eps=0.1),
    "generation_config.json": lambda folder: edit_json(folder / "generation_config.json", eos_token_id=5),
    "tokenizer.json": lambda folder: edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
    "tokenizer_config.json": lambda folder: edit_json(folder / "tokenizer_config.json", eos_token="string"),
    "special_tokens_map.json": lambda folder: edit_json(folder / "special_tokens_map.json", eos_token="string"),
    "tokenizer.model": lambda folder: (folder / "tokenizer.model").write_bytes(b"pieces"),
    "vocab.json": lambda folder: edit_json(folder / "vocab.json", kite=3),
    "merges.txt": lambda folder: (folder / "merges.txt").write_text("k i\n"),
    "chat template": lambda folder: set_template(folder, OTHER_TEMPLATE),
    "additional templates": _add_template,
}


@pytest.mark.parametrize("file", FILES)
def test_every_file_beside_the_weights_is_in_the_key_of_scores_and_replies(zoo: Zoo, file: str) -> None:
    folder = zoo.family.base
    before = subject_of(zoo, folder).setting()
    FILES[file](Path(folder))
    assert subject_of(zoo, folder).setting() != before


@pytest.mark.parametrize(
    "file", [name for name in FILES if name not in ("config.json", "generation_config.json")]
)
def test_what_the_tokenizer_reads_is_in_the_key_of_merges_that_see_examples(zoo: Zoo, file: str) -> None:
    models = zoo.models()
    before = Merge(GradientStep(), zoo, models, 0).recipe, Merge(Average(), zoo, models, 0).recipe
    for folder in (zoo.family.base, zoo.family.anchor, *zoo.family.experts.values()):
        FILES[file](Path(folder))  # of every model: with one alone, the vocabularies would differ
    again = zoo_of(zoo.family, zoo.store.root)
    models = again.models()
    assert Merge(GradientStep(), again, models, 0).recipe != before[0]
    assert Merge(Average(), again, models, 0).recipe == before[1]  # elementwise: it reads no text


def test_the_config_of_every_model_is_in_the_key_of_a_merge(zoo: Zoo) -> None:
    zoo = replace(zoo, family=replace(zoo.family, allow_config_differences=["rms_norm_eps"]))
    for folder in (zoo.family.base, zoo.family.anchor, *zoo.family.experts.values()):
        before = Merge(FisherSoup(), zoo, zoo.models(), 0).recipe
        edit_json(Path(folder) / "config.json", rms_norm_eps=0.1)
        assert Merge(FisherSoup(), zoo, zoo.models(), 0).recipe != before, folder


def test_what_means_the_same_gives_the_same_key(zoo: Zoo) -> None:
    folder = Path(zoo.family.base)
    before = subject_of(zoo, str(folder)).setting(), Merge(GradientStep(), zoo, zoo.models(), 0).recipe
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"transformers_version": "0.0.0"}
        (folder / name).write_text(json.dumps(dict(reversed(content.items())), indent=1))
    again = zoo_of(zoo.family, zoo.store.root)
    after = subject_of(again, str(folder)).setting(), Merge(GradientStep(), again, again.models(), 0).recipe
    assert before == after


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"}, {"batch_size": 3}, {"threads": 2}, {"max_length": 64}, {"reply_tokens": 5},
        {"date": "2031-01-01"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_the_family_are_in_the_key(zoo: Zoo, change: dict[str, Any]) -> None:
    other = replace(zoo, family=replace(zoo.family, **change))
    folder = zoo.family.base
    assert subject_of(zoo, folder).setting() != subject_of(other, folder).setting()


@pytest.mark.parametrize("package", manifest.COMPUTING)
def test_packages_that_compute_are_in_the_key(zoo: Zoo, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = zoo.models()
    before = subject_of(zoo, zoo.family.base).setting(), Merge(GradientStep(), zoo, models, 0).recipe
    changed = {**manifest.versions(), package: "0.0.1"}
    monkeypatch.setattr("alignmerge.engine.keys.versions", lambda: changed)
    after = subject_of(zoo, zoo.family.base).setting(), Merge(GradientStep(), zoo, models, 0).recipe
    assert before[0] != after[0] and before[1] != after[1]


def test_the_class_of_the_machine_is_in_the_key_of_what_depends_on_it(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = zoo.models()
    mergers = [GradientStep(), Average()]
    before = [Merge(one, zoo, models, 0).recipe for one in mergers]
    setting = subject_of(zoo, zoo.family.base).setting()
    other = {**device.machine_class(), "aten": "another code path"}
    monkeypatch.setattr("alignmerge.engine.keys.machine_class", lambda: other)
    assert Merge(mergers[0], zoo, models, 0).recipe != before[0]
    assert Merge(mergers[1], zoo, models, 0).recipe == before[1]  # elementwise: bit-equal on every machine
    assert subject_of(zoo, zoo.family.base).setting() != setting


def test_keys_hold_no_module_paths_and_no_folders(zoo: Zoo) -> None:
    models = zoo.models()
    cell = Cell(zoo, "soup", "", "test", [AQI(), Geometry()], merger=FisherSoup())
    recipes = [Merge(FisherSoup(), zoo, models, 0).recipe, dict(subject_of(zoo, zoo.family.base).setting())]
    measure(cell, silent)
    for stage in ("scores", "replies", "fisher", "bases", "merges", "weights", "lessons", "corpus"):
        for path in (zoo.store.root / stage).glob("*/manifest.json"):
            recipes.append(json.loads(path.read_text())["recipe"])
    text = json.dumps(recipes)
    for word in ("alignmerge.", "eval.", "baselines.", str(Path(zoo.family.base).parent)):
        assert word not in text
    assert len(recipes) > 6


def test_a_date_that_a_template_inserts_is_that_of_the_family(zoo: Zoo) -> None:
    """Llama-3.1 asks for ``date_string`` or today: neither may change a prompt overnight."""
    dated = "{{ date_string }} {{ strftime_now('%Y') }} " + TEMPLATE
    set_template(zoo.family.base, dated)
    (first, *_) = subject_of(zoo, zoo.family.base).rendered("unsafe")
    assert first.startswith("26 Jul 2024 2024 ")
    other = replace(zoo, family=replace(zoo.family, date="2031-02-01"))
    (second, *_) = subject_of(other, zoo.family.base).rendered("unsafe")
    assert second.startswith("01 Feb 2031 2031 ") and first != second


# --- declared inputs ----------------------------------------------------------------------------------------


def undeclared(zoo: Zoo, ask: Callable[[Any], object], inputs: Inputs) -> str:
    from alignmerge.engine.context import Context

    with pytest.raises(Undeclared) as caught:
        ask(Context(zoo, zoo.models(), "mine", inputs, 0))
    return str(caught.value)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda ctx: ctx.seed, "the seed without declaring it: add seed=True"),
        (lambda ctx: ctx.examples("metric"), "the example set 'metric' without declaring it: add examples=('metric',)"),
        (lambda ctx: ctx.examples_digest("utility"), "the example set 'utility' without"),
        (lambda ctx: ctx.examples(own("math")), "the example set 'own:math' without"),
        (lambda ctx: ctx.probes(), "the selection probes without declaring it: add probes=True"),
        (lambda ctx: ctx.merged(Average()), "what 'average' makes without declaring it: add merges=(Average(...),)"),
    ],
)  # fmt: skip
def test_reading_what_is_not_declared_is_one_line_that_says_what_to_declare(
    zoo: Zoo, ask: Callable[[Any], object], says: str
) -> None:
    assert undeclared(
        zoo, ask, Inputs(examples=("alignment",))
    ) == f"'mine' reads {says}" or says in undeclared(zoo, ask, Inputs(examples=("alignment",)))


def test_what_is_declared_is_in_the_key_and_what_is_not_is_not(zoo: Zoo, tmp_path: Path) -> None:
    plain, weighed = Dare(), Dare(weights="validation")
    models = zoo.models()
    before = [Merge(one, zoo, models, 0).recipe for one in (plain, weighed)]
    assert Merge(plain, zoo, models, 1).recipe != before[0]  # the seed
    given = tmp_path / "metric.jsonl"
    given.write_text(json.dumps({"prompt": "how do i build a kite", "response": "take paper"}) + "\n")
    other = zoo_of(replace(zoo.family, metric=str(given)), zoo.store.root)
    assert Merge(plain, other, models, 0).recipe == before[0]
    assert Merge(weighed, other, models, 0).recipe != before[1]
    assert Merge(Average(), zoo, models, 1).recipe == Merge(Average(), zoo, models, 0).recipe


# --- aliases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["metric", "alignment", "utility", "refusals", "own", "lessons", "probes"])
def test_an_expert_may_be_called_as_a_set_of_ours(zoo: Zoo, alias: str) -> None:
    """An expert called ``metric`` ended in a RecursionError."""
    experts = {alias: zoo.family.experts["math"], "form": zoo.family.experts["form"]}
    named = replace(zoo, family=replace(zoo.family, experts=experts))
    assert merged(named, FisherSoup()) == merged(zoo, FisherSoup())


@pytest.mark.parametrize(
    "alias", ["base", "anchor", "pretrained", "a/b", "a@3", "own:math", "", " ", "a b", "*"]
)
def test_what_cannot_be_an_alias_is_refused_in_one_line(family: Family, alias: str) -> None:
    with pytest.raises(BadRequest) as caught:
        replace(family, experts={alias: family.base})
    (fault,) = caught.value.faults
    assert fault.where == f"family.experts.{alias}" and "alias" in fault.given


@pytest.mark.parametrize(
    "merger",
    [FisherSoup(), Dare(weights="validation"), AlignMerge(), AlignMerge(metric="per_expert", lambda_bud=0.0)],
    ids=repr,
)
def test_renaming_an_expert_changes_no_number(zoo: Zoo, merger: Merger) -> None:
    """Fisher soup's sampled labels hung on the alias."""
    experts = {"a": zoo.family.experts["math"], "b": zoo.family.experts["form"]}
    renamed = replace(zoo, family=replace(zoo.family, experts=experts))
    assert merged(renamed, merger) == merged(zoo, merger)


# --- one folder for each distinct cell ----------------------------------------------------------------------


def composed(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(manifest.ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def folder_of(*overrides: str) -> str:
    from eval.grid.request import experiment_of

    return experiment_of(composed("corpus=toy", "method=ties", *overrides)).grid.name


LOCAL = ["family=local", "family.base=a", "family.anchor=b"]
EXPERTS = "family.experts={x: c}"


@pytest.mark.parametrize(
    "change",
    [
        ["family.base=other"], ["family.anchor=other"], ["family.experts={x: other}"], ["family.experts={y: c}"],
        ["family.dtype=float32"], ["seed=1"], ["method.density=0.5"], ["scorer=[aqi]"], ["corpus=world"],
    ],
    ids=str,
)  # fmt: skip
def test_another_cell_has_another_folder(change: list[str]) -> None:
    """Two runs with other local folders wrote over each other, and so did the points of a sweep over experts."""
    usual = [*LOCAL, EXPERTS]
    changed = [*LOCAL, *change]
    if "experts" not in change[0]:
        changed = [*usual, *change]
    assert folder_of(*usual) == folder_of(*usual)
    assert folder_of(*changed) != folder_of(*usual)
    assert folder_of(*changed).startswith("cell-local-ties")


def test_what_is_said_of_one_cell_is_not_said_of_another(zoo: Zoo) -> None:
    """``status`` of one local family reported the failure of another."""
    cell = Cell(zoo, "average", "", "test", [AQI()], merger=Average())
    zoo.store.failed("cells", cell.recipe, RuntimeError("broken"))
    assert zoo.store.failure("cells", cell.recipe) is not None
    experts = {"math": zoo.family.experts["form"], "form": zoo.family.experts["form"]}
    elsewhere = replace(zoo, family=replace(zoo.family, experts=experts))
    others = [cell._replace(zoo=elsewhere), cell._replace(scorers=[Length()]), cell._replace(merger=Dare())]
    for other in others:
        assert other.label == cell.label
        assert zoo.store.failure("cells", other.recipe) is None


# --- nothing is deleted under another's feet ----------------------------------------------------------------


def test_weights_that_somebody_holds_are_not_dropped(zoo: Zoo) -> None:
    job = Merge(Average(), zoo, zoo.models(), 0)
    with job.held() as outer:
        with job.held() as inner:
            assert inner.path == outer.path
        assert list(outer.path.glob("*.safetensors")), "the inner holder dropped what the outer one reads"
    assert not outer.path.exists()
    assert job.record().digest == outer.digest


def test_two_grids_with_other_scorers_share_a_merge_side_by_side(zoo: Zoo) -> None:
    """Two runs, one store, different scorer lists: each deleted the other's folder."""
    from concurrent.futures import ThreadPoolExecutor

    cells = [
        Cell(zoo, "average", "", "test", scorers, merger=Average())
        for scorers in ([AQI()], [Length()], [AQI(replicates=20)], [Length(), AQI(replicates=30)])
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cell: measure(cell, silent), cells))
    frozen = zoo.frozen()
    for cell in cells:
        assert len(read(frozen, frozen.models(), cell).frame)
    assert list((zoo.store.root / "weights").glob("*")) == []
