"""The report of a made-up experiment: structure of its files, and what must not mislead a reader."""

from __future__ import annotations

import base64
import itertools
import math
import re
import shutil
import zlib
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray

from alignmerge.engine.faults import BadRequest
from eval.columns import Column
from eval.report import canvas, figures, fronts, heatmap, layout, main_table, profiles, tables
from eval.report.ledger import Ledger, Number, read_ledger
from eval.report.results_page import results_page
from eval.report.supplement import Supplement
from eval.report.write import write
from eval.scorers.aqi import AQI
from eval.scorers.geometry import Geometry
from eval.scorers.interface import Sample, Scorer, Subject
from eval.scorers.judge import Judge
from eval.scorers.subspaces import Subspaces
from eval.scorers.toxicity import Toxicity
from eval.scorers.utility import Utility
from eval.stats import derived, families
from eval.stats import estimates as stats
from eval.stats.claims import Bound, Claim
from eval.stats.fronts import Fronts
from eval.stats.fronts import fronts as fronts_of

Array = NDArray[Any]
README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parents[2] / "results" / "reference"
SCORERS: tuple[type[Scorer], ...] = (AQI, Geometry, Judge, Subspaces, Toxicity, Utility)
COLUMNS = {name: column for scorer in SCORERS for name, column in scorer.columns.items()}
DECLARED = layout.in_order({**COLUMNS, **derived.DERIVED})


class Truth(NamedTuple):
    refusal: float
    over_refusal: float
    following: float
    reasoning: float
    aqi: float


ROWS = {
    "average": Truth(0.03, 0.00, 0.52, 0.51, 0.186),
    "base": Truth(0.02, 0.00, 0.00, 0.04, 0.233),
    "anchor": Truth(0.89, 0.11, 0.00, 0.07, 0.275),
    "expert:arithmetic": Truth(0.00, 0.00, 0.00, 0.76, 0.169),
    "expert:format": Truth(0.00, 0.00, 0.64, 0.01, 0.152),
    "task_arithmetic": Truth(0.02, 0.00, 0.41, 0.66, 0.177),
    "fisher_soup": Truth(0.31, 0.01, 0.50, 0.63, 0.203),
    "ties": Truth(0.00, 0.00, 0.52, 0.71, 0.179),
    "ties/per_tensor": Truth(0.00, 0.00, 0.50, 0.70, 0.180),
    "safemerge": Truth(0.00, 0.00, 0.44, 0.54, 0.186),
    "mergealign": Truth(0.29, 0.02, 0.50, 0.50, 0.190),
    "mergealign/thakkar": Truth(0.34, 0.03, 0.48, 0.47, 0.195),
    "alignmerge": Truth(0.66, 0.06, 0.55, 0.39, 0.222),
    "alignmerge/samples": Truth(0.41, 0.08, 0.53, 0.48, 0.213),
    "alignmerge/barycentre": Truth(0.62, 0.07, 0.63, 0.49, 0.198),
    "alignmerge/fisher": Truth(0.77, 0.08, 0.50, 0.45, 0.239),
    "interpolate": Truth(0.59, 0.04, 0.32, 0.32, 0.228),
    "gradient_step": Truth(0.62, 0.06, 0.61, 0.50, 0.201),
}
NASTY = r"ev|il_*`<b>$x$ & 100% #1 {\input}"
NOTES = [
    "Weights are dequantised 4-bit ones, not the published ones",
    f"A note with {NASTY}\nand a second line",
]


def scored(row: str, truth: Truth, family: str) -> pd.DataFrame:
    """One model: 0/1 columns, a graded one with gaps, AQI with replicates, single values, layers."""
    generator = np.random.default_rng(zlib.crc32((family + row).encode()))
    columns: dict[str, tuple[str, Array]] = {
        "refusal_rate": ("up", generator.random(64) < truth.refusal),
        "over_refusal_rate": ("down", generator.random(102) < truth.over_refusal),
        "gibberish_rate": ("down", generator.random(64) < 0.03),
        "instruction_following": ("up", generator.random(100) < truth.following),
        "reasoning": ("up", generator.random(100) < truth.reasoning),
        "judge_score": ("up", np.where(generator.random(64) < 0.05, np.nan, generator.beta(2, 2, 64))),
        "toxicity_mean": ("down", generator.beta(0.3, 4, 64)),
        "tau_gap": ("info", generator.normal(0, 0.1, 1)),
        "drift_anchor": ("down", np.array([0.0 if row == "anchor" else 3 - 2 * truth.refusal])),
    }
    layers = np.arange(30)
    drift = columns["drift_anchor"][1] * np.exp(generator.normal(0, 0.1, 30)) / 30
    by_layer = {
        "drift_anchor_by_layer": drift,
        "drift_base_by_layer": np.zeros(30) if row == "base" else drift[::-1] + 0.1,
        "aqi_by_layer": truth.aqi * (0.4 + 0.9 / (1 + np.exp(4 - layers / 3))),
    }
    frames = [
        pd.DataFrame(
            {"column": name, "id": [f"p{i}" for i in range(len(values))], "value": values, "direction": way}
        )
        for name, (way, values) in columns.items()
    ]
    frames += [
        pd.DataFrame(
            {"column": name, "id": [f"layer/{i:02d}" for i in layers], "value": values, "direction": "up"}
        )
        for name, values in by_layer.items()
    ]
    replicates = truth.aqi + generator.normal(0, 0.02, 50)
    ids = ["all", *(f"boot:{i}" for i in range(50))]
    frames.append(
        pd.DataFrame({"column": "aqi", "id": ids, "value": [truth.aqi, *replicates], "direction": "up"})
    )
    frame = pd.concat(frames, ignore_index=True).assign(family=family, row=row, seed=0)
    return frame.assign(value=frame["value"].astype(float), prompt=frame["column"] + frame["id"])


def experiment(rows: dict[str, Truth], families: tuple[str, ...] = ("smollm2",)) -> pd.DataFrame:
    return pd.concat(
        [scored(row, truth, family) for family in families for row, truth in rows.items()], ignore_index=True
    )


def settings_tried() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": row,
            "setting": f"scale={scale}, reference=anchor, at=barycentre, damping=0.1",
            "selected": scale == 1.0,
            "refusal_rate": min(1.0, truth.refusal * scale),
            "over_refusal_rate": truth.over_refusal * scale,
            "instruction_following": truth.following * (1.2 - 0.2 * scale),
            "reasoning": truth.reasoning,
        }
        for row, truth in ROWS.items()
        if stats.is_method(row)
        for scale in (0.5, 1.0, 1.5)
    )


def tried_on_dev(families: tuple[str, ...] = ("smollm2",)) -> pd.DataFrame:
    """The samples of three settings of each method and of the experts: refusals rise, utility falls with the scale."""
    frames = []
    for family, (row, truth), scale in itertools.product(families, ROWS.items(), (0.5, 1.0, 1.5)):
        if not stats.is_method(row) and not (row.startswith("expert:") and scale == 1.0):
            continue
        setting = f"scale={scale}, reference=anchor, at=barycentre, damping=0.1" if stats.is_method(row) else ""
        weak = 1.2 - 0.2 * scale if setting else 1.0
        shown = Truth(
            min(1, truth.refusal * scale), truth.over_refusal, truth.following * weak, truth.reasoning, 0.2
        )
        frame = scored(row, shown, family)
        wanted = ["refusal_rate", "over_refusal_rate", "instruction_following", "reasoning"]
        frames.append(frame[frame["column"].isin(wanted)].assign(setting=setting))
    return pd.concat(frames, ignore_index=True)


SMALL = {
    "base": ROWS["base"],
    "expert:x": ROWS["ties"],
    "average": ROWS["average"],
    NASTY: ROWS["alignmerge"],
}


def two_families() -> pd.DataFrame:
    scores = experiment(SMALL, ("tiny/a", "tiny/b"))
    return scores[~scores["column"].isin(["drift_base_by_layer", "aqi_by_layer"])]


FAMILIES = ("tiny/llama3", "tiny/phi3")
WORLD = {
    row: ROWS[row]
    for row in ("base", "anchor", "expert:format", "average", "fisher_soup", "ties", "alignmerge")
}


def whole_world() -> pd.DataFrame:
    """Two families of three seeds, whose prompts are the same; ``ties`` failed in one family; tau by layer."""
    frames = []
    for family, row, seed in itertools.product(FAMILIES, [*WORLD, "pretrained"], range(3)):
        if (family, row) == ("tiny/phi3", "ties"):
            continue
        truth = WORLD.get(row, ROWS["base"])
        frame = scored(row, truth, f"{family} {seed}").assign(family=family, seed=seed)
        layers = np.arange(1, 7)
        gap = 5 * truth.aqi * np.exp(-((layers - 4) ** 2) / 4) + seed / 50
        for column, values in (("tau", gap), ("tau_safe", 0.6 * gap), ("tau_unsafe", -0.4 * gap)):
            of_layer = pd.DataFrame({"id": [f"layer/{i:02d}" for i in layers], "value": values, "prompt": ""})
            same = {
                "column": f"{column}_by_layer",
                "direction": "info",
                "family": family,
                "row": row,
                "seed": seed,
            }
            frames.append(of_layer.assign(**same))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def along_training() -> pd.DataFrame:
    lines = [
        {
            "family": family,
            "model": model,
            "seed": seed,
            "step": step,
            "share": step / 40,
            "column": column,
            "id": name,
            "value": value,
        }
        for family, model, seed, step in itertools.product(
            FAMILIES, ("anchor", "expert:format"), range(3), (0, 10, 40)
        )
        for column, name, value in (
            ("aqi", "all", 0.5 + step / 100 + seed / 50),
            ("aqi", "boot:0", 0.5),
            ("aqi_by_layer", "layer/01", 0.3),
            ("aqi_by_layer", "layer/02", 0.4 + step / 100),
            ("tau_gap", "all", 1 + step / 40),
        )
    ]
    return pd.DataFrame(lines)


LEDGER = Ledger(
    paper="a paper",
    sources={"figure": "figure"},
    models={"Mistral 7B": "paper/mistral"},
    claims={"safer": Claim(says="safer", source="figure", tests=[Bound(column="aqi", against="average")])},
    numbers={
        "aqi": Number(
            says="AQI of AlignMerge", value=0.75, decimals=2, model="Mistral 7B", source="figure",
            row="alignmerge", column="aqi", tolerance=0.03, claim="safer",
        )
    },
)  # fmt: skip
GATES = pd.DataFrame(
    {
        "family": ["tiny/llama3", "tiny/phi3"],
        "seed": 0,
        "gate": ["the anchor refuses", NASTY],
        "measured": [0.95, 0.2],
        "met": [True, False],
    }
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "smollm2"
    tried = settings_tried()
    write(
        folder,
        experiment(ROWS),
        columns=COLUMNS,
        title="SmolLM2",
        notes=NOTES,
        against=["alignmerge", "average"],
        supplement=Supplement(selection=tried, tried=tried_on_dev()),
    )
    return folder


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "nasty"
    write(folder, two_families(), columns=COLUMNS, title=NASTY, notes=NOTES, against=["average"])
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "results" / "tiny"
    tried = pd.concat([settings_tried().assign(family=family) for family in FAMILIES], ignore_index=True)
    write(
        folder,
        whole_world(),
        columns=COLUMNS,
        title="Tiny",
        notes=NOTES,
        against=["average", "alignmerge"],
        supplement=Supplement(
            selection=tried[tried["row"].isin(WORLD)],
            trajectory=along_training(),
            tried=tried_on_dev(FAMILIES)[lambda frame: frame["row"].isin(WORLD)],
            gates=GATES,
            marks={"tiny/phi3": "gates missed: seed 0"},
            unreached={"tiny/phi3": ["ties/matched"]},
            remarks={"tiny/llama3": ["ties is the better on dev"]},
            ledger=LEDGER,
        ),
    )
    return folder


def dev_fronts(tried: pd.DataFrame) -> Fronts | None:
    return fronts_of(tried, {name: column.direction for name, column in COLUMNS.items()})


def draw(
    scores: pd.DataFrame, family: str, selection: pd.DataFrame | None, caption: str = ""
) -> dict[str, Figure]:
    """The figures of one family, with the styles of all its rows."""
    found = (
        None if selection is None else dev_fronts(tried_on_dev()[lambda one: one["row"].isin(scores["row"])])
    )
    tried = [] if selection is None else list(selection["row"])
    scene = figures.Scene(
        measured=families.measure_all(scores)[family],
        scores=scores[scores["family"] == family],
        columns=DECLARED,
        styles=canvas.row_styles(stats.ordered([*scores["row"], *tried])),
        caption=caption,
        supplement=Supplement(selection=selection, fronts=found),
    )
    return figures.draw(scene)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return draw(experiment(ROWS), "smollm2", settings_tried(), "smollm2. " + NOTES[0])


@pytest.fixture(scope="module")
def drawn_world() -> dict[str, Figure]:
    """The figures over two families, and those of one of them that a single family of the fixture lacks."""
    scores, trajectory = whole_world(), along_training()
    measured = families.measure_all(scores)
    styles = canvas.row_styles(stats.ordered(scores["row"]))
    caption = "all families. " + NOTES[0]
    beside = Supplement(trajectory=trajectory)
    shared: dict[str, Any] = {"columns": DECLARED, "styles": styles, "caption": caption}
    over = figures.draw(
        figures.Scene(
            measured=measured[stats.ALL], scores=scores, families=FAMILIES, supplement=beside, **shared
        )
    )
    first = FAMILIES[0]
    own = scores[scores["family"] == first]
    one = figures.draw(
        figures.Scene(measured=measured[first], scores=own, supplement=beside.of(first), **shared)
    )
    return over | {f"{FAMILIES[0]}/{name}": one[name] for name in ("tau_by_layer", "training")}


# --- files ---


def test_every_file_is_there(report: Path) -> None:
    drawings = ("front", "heatmap", "drift_by_layer", "aqi_by_layer", "dev_front")
    expected = {f"figures/{name}.{kind}" for name in drawings for kind in ("png", "svg")}
    expected |= {
        "columns.csv",
        "summary.csv",
        "comparisons.csv",
        "claims.csv",
        "selection.csv",
        "fronts.csv",
        "table.md",
        "table.tex",
        "report.html",
    }
    assert {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()} == expected
    for path in report.glob("figures/*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_summary_has_one_line_for_each_row_and_column(report: Path) -> None:
    summary = pd.read_csv(report / "summary.csv")
    assert not summary.duplicated(["family", "row", "column"]).any()
    assert set(summary["row"]) == set(ROWS)
    assert list(summary["row"].unique()[:5]) == [
        "base",
        "anchor",
        "expert:arithmetic",
        "expert:format",
        "average",
    ]
    assert not summary["column"].str.endswith("by_layer").any()
    assert {"delta_utility", "budget_violations", "aqi"} <= set(summary["column"])
    numbers = re.findall(r"(?<=,)-?\d+\.(\d+)(?=,)", (report / "summary.csv").read_text())
    assert max(map(len, numbers)) >= 5


def test_comparisons_name_both_rows(report: Path) -> None:
    compared = pd.read_csv(report / "comparisons.csv")
    judged = compared[compared["column"] == "refusal_rate"]
    assert set(judged["against"]) == {"alignmerge", "average"}
    of_anchor = judged[(judged["row"] == "anchor") & (judged["against"] == "average")].iloc[0]
    assert of_anchor["verdict"] == "better" and of_anchor["ci_low"] > 0.5


def test_several_families_have_a_folder_each_beside_the_figures_over_all(world: Path) -> None:
    over = {"overview", "front", "dev_front", "heatmap", "tau_by_layer", "training"}
    each = {"front", "heatmap", "drift_by_layer", "aqi_by_layer", "tau_by_layer", "training", "dev_front"}
    expected = {f"{name}.{kind}" for name in over for kind in ("png", "svg")}
    for family in FAMILIES:
        expected |= {f"{family.replace('/', '-')}/{name}.{kind}" for name in each for kind in ("png", "svg")}
    figures_there = world / "figures"
    assert {str(path.relative_to(figures_there)) for path in figures_there.rglob("*.*")} == expected
    trajectory = pd.read_csv(world / "trajectory.csv")
    assert list(trajectory.columns) == ["family", "model", "seed", "step", "share", "column", "id", "value"]
    assert not trajectory["id"].str.startswith("boot:").any() and len(trajectory) == 2 * 2 * 3 * 3 * 4


def test_summary_of_several_families_begins_with_their_mean(world: Path) -> None:
    summary = pd.read_csv(world / "summary.csv")
    assert list(summary["family"].unique()) == [stats.ALL, *FAMILIES]
    means = summary[summary["column"] == "reasoning"].pivot(index="row", columns="family", values="mean")
    assert "ties" not in set(summary.loc[summary["family"] == stats.ALL, "row"])
    lacking = means.loc["ties"].drop(FAMILIES[1])
    assert math.isnan(lacking[stats.ALL]) and lacking.drop(stats.ALL).notna().all()
    whole = means.drop("ties")
    np.testing.assert_allclose(whole[stats.ALL], whole[list(FAMILIES)].mean(axis=1), rtol=1e-5)
    compared = pd.read_csv(world / "comparisons.csv")
    assert set(compared["family"]) == {stats.ALL, *FAMILIES}


def test_nothing_is_written_for_a_refused_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest):
        write(tmp_path / "r", experiment(SMALL), columns=COLUMNS, title="", notes=[], against=["nobody"])
    assert not (tmp_path / "r").exists()


def test_the_same_scores_give_the_same_bytes(nasty: Path, tmp_path: Path) -> None:
    write(tmp_path, two_families(), columns=COLUMNS, title=NASTY, notes=NOTES, against=["average"])
    written = {path.relative_to(nasty): path.read_bytes() for path in nasty.rglob("*") if path.is_file()}
    assert {Path(f"figures/tiny-{family}/heatmap.svg") for family in "ab"} <= set(written)
    assert written == {
        path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }


# --- declared columns ---


class Humour(Scorer):
    """A scorer that nothing knows: two columns in a group of their own, one of them main."""

    columns: ClassVar[Mapping[str, Column]] = {
        "jokes_per_reply": Column("jokes & puns", "Humour", "up", 1, main=9),
        "groans": Column("groans", "Humour", "down", None),
        "groans_by_layer": Column("groans", "Humour", "down", by_layer=True),
    }

    def score(self, subject: Subject) -> list[Sample]:
        return [
            Sample(f"p{i}", name, i / 8 + len(name)) for name in ("jokes_per_reply", "groans") for i in range(8)
        ]


def with_humour() -> pd.DataFrame:
    """The small experiment with a scorer more; by layer it has what no mean could be taken of."""
    scores = experiment(SMALL)
    samples: list[Sample] = list(Humour().score(None))  # type: ignore[arg-type]
    samples.append(Sample("layer/01", "groans_by_layer", 1e9))
    frames = [pd.DataFrame(samples).drop(columns="detail").assign(row=row) for row in SMALL]
    more = pd.concat(frames, ignore_index=True).assign(family="smollm2", seed=0)
    return pd.concat([scores, more], ignore_index=True)


def test_columns_of_a_new_scorer_are_shown_wherever_columns_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {**COLUMNS, **Humour.columns}
    write(tmp_path, with_humour(), columns=columns, title="Fun", notes=NOTES, against=["average"])
    main_table.show(tmp_path)
    printed = capsys.readouterr().out
    # a narrow terminal cuts the heading short
    assert "jokes" in printed and "groans" not in printed
    text = (tmp_path / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("### ")][-2:] == [
        "### Geometry",
        "### Humour",
    ]
    header = text.split("### Humour")[1].split("\n\n")[1].splitlines()[0]
    assert split(header) == ["row", "jokes \\& puns ↑", "groans ↓"]
    tex = (tmp_path / "table.tex").read_text()
    assert r"& jokes \& puns $\uparrow$ & groans $\downarrow$ \\" in tex and ", humour}" in tex
    page = (tmp_path / "report.html").read_text()
    assert page.count(">jokes &amp; puns ↑</th>") == 2  # among the numbers and the comparisons
    assert "jokes & puns ↑" in main_table.block(tmp_path).replace("\\", "")
    described = layout.read_columns(tmp_path)
    assert list(described)[-2:] == ["jokes_per_reply", "groans"]
    assert (described["jokes_per_reply"].main, described["groans"].decimals) == (9, None)


def test_a_column_that_nobody_declares_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scorer declares: groans, groans_by_layer, jokes_per_reply"):
        write(tmp_path / "r", with_humour(), columns=COLUMNS, title="Fun", notes=NOTES, against=["average"])
    assert not (tmp_path / "r").exists()


def test_scorers_agree_on_columns_that_several_declare_and_main_ones_have_a_place_each() -> None:
    for scorer in SCORERS:
        assert {name: COLUMNS[name] for name in scorer.columns} == scorer.columns
    places = [column.main for column in DECLARED.values() if column.main]
    assert sorted(places) == list(range(1, len(places) + 1))


def test_the_declared_direction_holds_whatever_the_scores_say(tmp_path: Path) -> None:
    scores = experiment(SMALL).assign(direction="info")
    write(tmp_path, scores, columns=COLUMNS, title="", notes=NOTES, against=["average"])
    summary = pd.read_csv(tmp_path / "summary.csv")
    expected = summary["column"].map({name: column.direction for name, column in DECLARED.items()})
    assert summary["better_direction"].tolist() == expected.tolist()


# --- tables ---


def split(line: str) -> list[str]:
    """The cells of a line of a GitHub table, whose own bars are escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_tables_are_rectangular_and_bold_only_the_best_methods(report: Path) -> None:
    text = (report / "table.md").read_text()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### Alignment",
        "### Utility",
        "### Geometry",
    ]
    assert len(blocks) == 3
    for header, rule, *body in blocks:
        widths = {len(split(line)) for line in (header, rule, *body)}
        assert len(widths) == 1 and len(body) == len(ROWS)
        names = [split(line)[0].replace("\\", "") for line in body]
        for line, name in zip(body, names, strict=True):
            assert stats.is_method(name) or "**" not in line
    header, _, *body = blocks[0]
    place = split(header).index("refusal rate ↑")
    refusals = {split(line)[0]: split(line)[place] for line in body}
    assert [row for row, cell in refusals.items() if "**" in cell] == ["alignmerge/fisher"]
    assert re.fullmatch(r"\*\*0\.\d\d\*\* \[0\.\d\d, 0\.\d\d\]", refusals["alignmerge/fisher"])
    assert "judge\\_score unscored: base " in text


def test_columns_that_lack_as_many_samples_share_a_line() -> None:
    counts = [
        ("toxicity_mean", "a", 2),
        ("toxicity_mean", "b", 1),
        ("toxicity_rate", "a", 2),
        ("toxicity_rate", "b", 1),
    ]
    counts += [("judge_score", "a", 2), ("judge_score", "b", 0), ("aqi", "a", 0)]
    frame = pd.DataFrame(counts, columns=["column", "row", "unscored"])
    assert tables.unscored(frame) == [
        "toxicity_mean, toxicity_rate unscored: a 2, b 1",
        "judge_score unscored: a 2",
    ]


def test_a_column_without_direction_has_neither_arrow_nor_bold(report: Path) -> None:
    geometry = (report / "table.md").read_text().split("### Geometry")[1].split("\n\n")[1].splitlines()
    place = split(geometry[0]).index("τ gap")
    assert all("**" not in split(line)[place] and "[" not in split(line)[place] for line in geometry[2:])


def test_best_methods_ties_and_nothing_to_win() -> None:
    means = pd.Series({"base": 1.0, "a": 0.5, "b": 0.5, "c": 0.1})
    assert tables.best_methods(means, "up") == {"a", "b"}
    assert tables.best_methods(means, "down") == {"c"}
    assert tables.best_methods(means, "info") == set()
    assert tables.best_methods(means[["base", "a", "b"]], "up") == set()


@pytest.mark.parametrize(
    ("value", "decimals", "shown"),
    [
        (0.617, 2, "0.62"),
        (-0.001, 2, "0.00"),
        (0.0123456, None, "0.0123"),
        (1.0, None, "1.00"),
        (1234.5, None, "1234"),
        (3.2e-7, None, "3.20e-07"),
        (0.0, None, "0.00"),
    ],
)
def test_numbers(value: float, decimals: int | None, shown: str) -> None:
    assert tables.number(value, decimals) == shown


def test_what_others_wrote_is_escaped_in_markdown(nasty: Path) -> None:
    text = (nasty / "table.md").read_text()
    assert r"ev\|il\_\*\`\<b\>\$x\$ \& 100% \#1 {\\input}" in text
    assert "<b>" not in text and "and a second line" in text
    lines = [line for line in text.splitlines() if line.startswith("| ev")]
    assert len(lines) == 9 and all(split(line) for line in lines)
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == ["## all families", "## tiny/a", "## tiny/b", "## Notes"]


def test_rows_without_a_mean_over_families_are_named(world: Path) -> None:
    assert "- No mean over families: ties (not in tiny/phi3)\n" in (world / "table.md").read_text()
    assert "No mean over families: ties (not in tiny/phi3)" in (world / "table.tex").read_text()


def test_the_legend_says_what_the_intervals_vary(report: Path, world: Path) -> None:
    one, several = (folder.joinpath("table.md").read_text().split("## Notes")[1] for folder in (report, world))
    assert "resamples of the prompts, shared by all rows; seeds are averaged first" in one
    assert (
        "of both the prompts and the seeds of a family" in several and "plain mean over the families" in several
    )
    assert "plain mean over the families" not in one


def test_what_others_wrote_is_escaped_in_latex(nasty: Path) -> None:
    text = (nasty / "table.tex").read_text()
    shown = r"ev\textbar{}il\_*`\textless{}b\textgreater{}\$x\$ \& 100\% \#1 \{\textbackslash{}input\}"
    assert shown in text
    assert r"\input" not in text.replace(r"\textbackslash{}input", "")


def test_latex_tables_are_rectangular(report: Path) -> None:
    text = (report / "table.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    plain = re.sub(r"\\[\\{}]", "", text)
    assert plain.count("{") == plain.count("}")
    for body in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.S):
        columns = int(re.findall(r"\*\{(\d+)\}", body)[0])
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 1 + len(ROWS)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns}


# --- figures ---


def renderer(figure: Figure) -> RendererBase:
    canvas: Any = FigureCanvasAgg(figure)
    made: RendererBase = canvas.get_renderer()
    return made


def test_all_text_is_inside_the_canvas(drawn: dict[str, Figure]) -> None:
    assert drawn
    for name, figure in drawn.items():
        box = figure.get_tightbbox(renderer(figure))
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.01, name
        assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, name


def test_a_long_legend_is_inside_the_canvas() -> None:
    """Thirty rows, the most that an ablation has."""
    many = {f"alignmerge/{i}": truth for i, truth in enumerate([*ROWS.values(), *ROWS.values()][:30])}
    scores = experiment(many)
    scores = scores[scores["column"].str.endswith(("drift_anchor_by_layer", "aqi"))]
    drawing = draw(scores, "smollm2", None)
    assert set(drawing) == {"heatmap", "drift_by_layer"}
    test_all_text_is_inside_the_canvas(drawing)


def test_all_text_of_several_families_is_inside_the_canvas(drawn_world: dict[str, Figure]) -> None:
    assert len(drawn_world) == 7
    test_all_text_is_inside_the_canvas(drawn_world)


def test_titles_and_legends_do_not_cover_each_other(
    drawn: dict[str, Figure], drawn_world: dict[str, Figure]
) -> None:
    for name, figure in (drawn | drawn_world).items():
        (title,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
        box = title.get_window_extent(renderer(figure))
        for legend in figure.legends:
            assert not box.overlaps(legend.get_window_extent(renderer(figure))), name


def captions(drawing: dict[str, Figure]) -> list[str]:
    return [
        " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))
        for figure in drawing.values()
    ]


def test_provenance_stands_below_every_figure(drawn: dict[str, Figure], drawn_world: dict[str, Figure]) -> None:
    assert all("smollm2. " + NOTES[0] in text for text in captions(drawn))
    assert all("all families. " + NOTES[0] in text for text in captions(drawn_world))


def test_labels_of_the_front_do_not_cover_each_other(drawn: dict[str, Figure]) -> None:
    figure = drawn["front"]
    labels = [text for text in figure.findobj(Annotation) if text.get_text()]
    assert {label.get_text() for label in labels} == set(ROWS)
    boxes = [Text.get_window_extent(label, renderer(figure)) for label in labels]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_heatmap_shows_every_number_and_greys_what_has_no_direction(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["heatmap"].axes
    columns = [label.get_text() for label in axes.get_xticklabels()]
    cells = [text for text in axes.texts if text.get_text() not in layout.grouped(DECLARED)]
    assert len(cells) == len(columns) * len(ROWS)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(stats.ordered(ROWS))
    geometry = np.asarray(axes.collections[-1].get_array())
    np.testing.assert_allclose(geometry[:, columns.index("τ gap") - len(columns)], 0.92)


def test_heatmap_is_darkest_for_the_best_row() -> None:
    def shades(direction: str) -> Array:
        frame = pd.concat(scored(row, ROWS[row], "f") for row in ("average", "ties", "alignmerge"))
        column = stats.measure(
            frame[frame["column"] == "aqi"].assign(direction=direction), ("average", "ties", "alignmerge")
        )
        return np.asarray(heatmap.shades(column).sum(axis=1))

    assert np.argsort(shades("up")).tolist() == [2, 0, 1]
    assert np.argsort(shades("down")).tolist() == [1, 0, 2]


def test_rows_keep_their_style_in_both_panels(drawn: dict[str, Figure]) -> None:
    left, right = (
        {str(line.get_label()): (line.get_color(), line.get_linestyle()) for line in axes.lines}
        for axes in drawn["drift_by_layer"].axes
    )
    assert set(ROWS) - set(left) == {"anchor"} and set(ROWS) - set(right) == {"base"}
    shared = set(left) & set(right)
    assert {row: left[row] for row in shared} == {row: right[row] for row in shared}
    methods = [style for row, style in (left | right).items() if stats.is_method(row)]
    assert len(set(methods)) == len(methods)


def test_figures_whose_columns_are_missing_are_left_out() -> None:
    scores = experiment(SMALL)
    scores = scores[scores["column"].isin(["aqi", "reasoning"])]
    assert set(draw(scores, "smollm2", None)) == {"heatmap"}


def test_no_two_rows_have_the_same_colour_and_a_method_has_one_in_every_figure(
    drawn: dict[str, Figure],
) -> None:
    rows = [*ROWS, "pretrained", *(f"alignmerge/{i}" for i in range(5)), *(f"method{i}" for i in range(3))]
    styles = canvas.row_styles(rows)
    assert list(styles) == rows
    assert len({to_hex(style["color"]) for style in styles.values()}) == len(rows)
    by_layer = {
        str(line.get_label()): to_hex(line.get_color()) for line in drawn["drift_by_layer"].axes[0].lines
    }
    swept = {str(line.get_label()): to_hex(line.get_color()) for line in drawn["dev_front"].axes[0].lines}
    shared = set(by_layer) & set(swept)
    assert {row for row in ROWS if stats.is_method(row)} <= shared
    assert {row: by_layer[row] for row in shared} == {row: swept[row] for row in shared}


def test_overview_has_the_mean_and_every_family(drawn_world: dict[str, Figure]) -> None:
    measured = families.measure_all(whole_world())
    rows = measured[stats.ALL]["reasoning"].rows
    (panel,) = (axes for axes in drawn_world["overview"].axes if axes.get_title(loc="left") == "reasoning ↑")
    names = drawn_world["overview"].axes[0].get_yticklabels()
    assert [label.get_text() for label in names] == list(rows) and "ties" not in rows
    dots = [line.get_xdata() for line in panel.lines if len(np.atleast_1d(line.get_ydata())) == len(rows)]
    np.testing.assert_allclose(dots, [part.mean for part in measured[stats.ALL]["reasoning"].parts])
    points = {
        float(line.get_ydata()[0]): line.get_xdata()[0]
        for line in panel.lines
        if line.get_marker() == "o" and len(line.get_ydata()) == 1
    }
    np.testing.assert_allclose([points[i] for i in range(len(rows))], measured[stats.ALL]["reasoning"].mean)


def test_training_runs_from_the_base_to_the_anchor(drawn_world: dict[str, Figure]) -> None:
    left, right, of_expert, _ = drawn_world["training"].axes
    assert [axes.get_title(loc="left") for axes in (left, of_expert)] == ["anchor", "expert:format"]
    assert [line.get_label() for line in left.lines] == list(FAMILIES)
    for line in left.lines:
        np.testing.assert_allclose(line.get_xdata(), [0, 0.25, 1])
        np.testing.assert_allclose(line.get_ydata(), np.array([0.5, 0.6, 0.9]) + 1 / 50)
    bands = [np.asarray(band.get_paths()[0].vertices)[:, 1] for band in left.collections]
    assert all((band.min(), band.max()) == pytest.approx((0.5, 0.94)) for band in bands)
    assert right.get_ylabel() == "τ gap, pooled sd"
    one = drawn_world[f"{FAMILIES[0]}/training"]
    assert [len(axes.lines) for axes in one.axes] == [2, 2, 3, 0]
    assert [line.get_label() for line in one.axes[0].lines] == ["anchor", "expert:format"]


def test_tau_is_drawn_for_the_rows_of_the_paper(drawn_world: dict[str, Figure]) -> None:
    over, one = drawn_world["tau_by_layer"], drawn_world[f"{FAMILIES[0]}/tau_by_layer"]
    rows = ["base", "anchor", "average", "fisher_soup", "alignmerge"]
    panels = [axes for axes in over.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == list(FAMILIES)
    assert all([line.get_label() for line in axes.lines] == rows for axes in panels)
    assert [axes.get_title(loc="left") for axes in one.axes] == ["gap, benign less harmful", *rows]
    for axes, row in zip(one.axes[1:], rows, strict=True):
        safe, unsafe = (np.asarray(line.get_ydata()) for line in axes.lines[:2])
        gap = next(line for line in one.axes[0].lines if line.get_label() == row)
        np.testing.assert_allclose(safe - unsafe, gap.get_ydata())


def test_colours_hang_on_names_alone() -> None:
    """Not on which rows stand beside them, nor on their order."""
    alone = {row: canvas.row_styles([row])[row] for row in ROWS}
    assert canvas.row_styles(list(reversed(ROWS))) == dict(reversed(alone.items()))
    assert canvas.row_styles(["alignmerge"])["alignmerge"]["color"] == canvas.OURS_COLOUR


def test_layers_are_counted_from_one_whatever_scorers_call_the_first(drawn: dict[str, Figure]) -> None:
    named = pd.DataFrame({"column": "drift", "id": ["layer/00", "layer/01"], "value": 0.5})
    assert profiles.with_layers(named, "drift")["layer"].tolist() == [1, 2]
    assert profiles.with_layers(named.iloc[1:], "drift")["layer"].tolist() == [1]
    for name in ("drift_by_layer", "aqi_by_layer"):
        assert {min(line.get_xdata()) for axes in drawn[name].axes for line in axes.lines} == {1}


def test_dev_fronts_mark_what_was_selected_and_order_methods_by_their_area(drawn: dict[str, Figure]) -> None:
    left, right = drawn["dev_front"].axes
    areas = dev_fronts(tried_on_dev())
    assert areas is not None
    ranked = areas.areas.sort_values("area", ascending=False, kind="stable")
    assert [label.get_text() for label in right.get_yticklabels()] == ranked["row"].tolist()
    selected = areas.points[areas.points["setting"].str.startswith("scale=1.0")]
    (large,) = [marks for marks in left.collections if len(marks.get_offsets()) == len(selected)]
    np.testing.assert_allclose(np.sort(np.asarray(large.get_offsets())[:, 0]), np.sort(selected["utility"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_by_definition(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=float).T
    expected = {
        i for i, p in enumerate(points) if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)
    }
    front = fronts.pareto(x, y)
    assert set(front.tolist()) == expected
    assert np.all(np.diff(x[front]) >= 0)


# --- page ---


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text; scripts apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(world: Path) -> None:
    page = Page((world / "report.html").read_text())
    assert page.open == []
    targets = [link["href"] for link in page.all("a")] + [image["src"] for image in page.all("img")]
    files = {target for target in targets if target and not target.startswith(("#", "data:image/png;base64,"))}
    beside = {path.name for path in world.iterdir() if path.is_file()}
    assert files == beside - {"report.html"} | {"manifest.json"}  # which whoever publishes the folder adds
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all("src" not in script for script in page.all("script"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(target)[1:] for target in targets if str(target).startswith("#")} <= ids


def test_a_missed_gate_marks_its_family_in_every_table(world: Path) -> None:
    for name in ("table.md", "table.tex", "report.html"):
        text = (world / name).read_text()
        assert "tiny/phi3 (gates missed: seed 0)" in text, name
        assert "tiny/llama3 (gates" not in text, name
    assert "## all families; tiny/phi3: gates missed: seed 0" in (world / "table.md").read_text()


def test_page_shows_all_figures_families_gates_and_settings(world: Path) -> None:
    page = Page((world / "report.html").read_text())
    inside = {base64.b64decode(str(image["src"]).partition(",")[2]) for image in page.all("img")}
    assert inside == {path.read_bytes() for path in world.rglob("*.png")}
    text = " ".join("".join(page.text).split())
    for expected in (
        stats.ALL,
        *FAMILIES,
        "1 of 2 met.",
        "the anchor refuses",
        "scale=1.0",
        "less average",
        "Notes",
    ):
        assert expected in text
    assert "No mean over families: ties (not in tiny/phi3)" in text


def test_page_marks_the_best_method_and_what_the_tests_show(world: Path) -> None:
    text = (world / "report.html").read_text()
    overall = text[text.index('<section id="f1">') : text.index('<section id="f2">')]
    of_column = "family == 'all families' and column == 'refusal_rate'"
    summary = pd.read_csv(world / "summary.csv").query(of_column).set_index("row")["mean"]
    methods = summary[[row for row in summary.index if stats.is_method(row)]]
    assert f'data-v="{methods["alignmerge"]:.6g}" class=best>' in overall and methods.idxmax() == "alignmerge"
    assert f'data-v="{summary["anchor"]:.6g}">' in overall and summary["anchor"] > methods.max()
    compared = (
        pd.read_csv(world / "comparisons.csv").query(f"{of_column} and against == 'average'").set_index("row")
    )
    assert compared.loc["alignmerge", "verdict"] == "better"
    assert f'data-v="{compared.loc["alignmerge", "difference"]:.6g}" class="better"' in overall


def test_what_others_wrote_is_escaped_on_the_page(nasty: Path, world: Path) -> None:
    for folder in (nasty, world):
        text = (folder / "report.html").read_text()
        assert "<b>" not in text and "ev|il_*`&lt;b&gt;$x$ &amp; 100%" in text
    assert NASTY in Page((nasty / "report.html").read_text()).text


# --- README ---


def marked(block: str) -> str:
    return f"# Title\n\n<!-- results:smollm2 -->\n{block}\n<!-- /results:smollm2 -->\n\nThe end.\n"


def stale(readme: Path, results_root: Path) -> list[str]:
    """Return the names of the blocks that are not what ``results_root/NAME`` says, or have no such folder."""
    text, found = readme.read_text(encoding="utf-8"), []
    for name in main_table.names(text):
        folder = results_root / name
        if (
            not (folder / "columns.csv").is_file()
            or main_table.splice(text, name, main_table.block(folder)) != text
        ):
            found.append(name)
    return found


def test_readme_block_has_ten_rows_with_intervals_and_the_numbers_of_the_table(report: Path) -> None:
    block = main_table.block(report)
    header, _, *body = [line for line in block.splitlines() if line.startswith("|")]
    shown = [
        "refusal rate ↑",
        "over-refusal rate ↓",
        "reasoning ↑",
        "instruction following ↑",
        "AQI ↑",
        "gibberish rate ↓",
    ]
    assert split(header) == ["row", *shown]
    names = [split(line)[0].replace("\\", "") for line in body]
    assert names == [row for row in stats.ordered(ROWS) if row in main_table.IN_SHORT] and len(body) <= 10
    assert all(re.search(r"\d(\*\*)? \[-?\d", cell) for line in body for cell in split(line)[1:])
    full = (report / "table.md").read_text()
    assert all(cell in full for line in body for cell in split(line))  # digits and bold alike


@settings(max_examples=200, deadline=None)
@given(st.floats(-1, 1), st.sampled_from([1, 2, 3, None]))
def test_a_number_has_the_same_digits_from_memory_and_from_the_csv(value: float, decimals: int | None) -> None:
    assert tables.number(value, decimals) == tables.number(float(f"{value:.6g}"), decimals)


def test_splice_replaces_one_block_and_nothing_else() -> None:
    other = "<!-- results:tiny -->\nkeep\n<!-- /results:tiny -->\n"
    assert (
        main_table.splice(marked("old | \\1 text") + other, "smollm2", r"new \g<0>")
        == marked(r"new \g<0>") + other
    )
    with pytest.raises(BadRequest, match="no block paper"):
        main_table.splice(marked("old"), "paper", "new")


def test_readme_block_of_several_families_is_their_mean_with_figures(world: Path, tmp_path: Path) -> None:
    block = main_table.block(world)
    assert block.startswith("- claims that hold here (1 of 1; all families") and block.count("\n- claims ") == 2
    assert "\n**all families** (mean over tiny/llama3, tiny/phi3)\n" in block
    body = [line for line in block.splitlines() if line.startswith("|")][2:]
    assert [split(line)[0].replace("\\", "") for line in body] == [
        "base",
        "anchor",
        "average",
        "fisher_soup",
        "alignmerge",
    ]
    assert re.findall(r"\]\((.*?)\)", block) == [
        "results/reference/tiny/figures/front.png",
        "docs/results.md",
        "results/reference/tiny/report.html",
    ]
    page = tmp_path / "README.md"
    page.write_text(f"<!-- results:tiny -->\n{block}\n<!-- /results:tiny -->\n", encoding="utf-8")
    assert stale(page, world.parent) == []


def test_stale_blocks_are_named(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(main_table.splice(marked("old"), "smollm2", main_table.block(report)), encoding="utf-8")
    assert stale(page, report.parent) == []
    page.write_text(page.read_text(encoding="utf-8").replace("0.", "0.9", 1), encoding="utf-8")
    assert stale(page, report.parent) == ["smollm2"]
    page.write_text(marked("") + "<!-- results:gone -->\n<!-- /results:gone -->\n", encoding="utf-8")
    assert stale(page, report.parent) == ["smollm2", "gone"]


def test_readme_and_results_of_this_project_are_fresh() -> None:
    """Once README.md has results markers, each block must be what its results folder says."""
    assert stale(README, RESULTS) == [] and main_table.names(README.read_text()) == ["tiny"]
    assert (README.parent / "docs" / "results.md").read_text() == results_page(RESULTS, read_ledger())


def test_results_page_has_all_rows_claims_and_the_ledger(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(world, folder)
    text = results_page(tmp_path, LEDGER)
    assert "| AQI of AlignMerge | figure | 0.75 | 0." in text and text.count(" not run ") == 2  # smollm2, paper
    assert "| safer | " in text and "AQI: alignmerge less average +0.0" in text
    for row in ("fisher\\_soup", "expert:format", "alignmerge"):
        assert f"| {row}" in text
    assert "[claims.csv](../results/reference/tiny/claims.csv)" in text


def test_the_page_shows_claims_and_ledger_and_what_stands_below_tables(world: Path) -> None:
    text = " ".join("".join(Page((world / "report.html").read_text()).text).split())
    assert "Ledger: the paper's numbers and ours" in text and "reproduced" in text
    assert "safer" in text and "AQI: alignmerge less average +0.0" in text
    for name in ("table.md", "report.html", "table.tex"):
        assert "ties is the better on dev" in (world / name).read_text()
    table = (world / "table.md").read_text()
    rows = [split(line) for line in table.splitlines() if line.startswith("| ties/matched")]
    assert rows and all(set(row[1:]) == {"not reached"} for row in rows)
