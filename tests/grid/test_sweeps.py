"""Swept rows: what they are called, that all are reported and none is selected, and what their figures show."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_report
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from test_configs import composed
from test_report import COLUMNS, DECLARED, NOTES, ROWS, Truth, renderer, scored

from alignmerge.engine.configuration import build
from alignmerge.engine.faults import BadRequest
from eval.grid.cells import Cell
from eval.grid.experiment import Experiment
from eval.grid.grid import Grid, Point, Row
from eval.grid.modes import experiment_of, plan, status
from eval.grid.selection import choose
from eval.grid.work import jobs_of
from eval.report import canvas, figures, sweeps
from eval.report.supplement import Supplement
from eval.report.write import write
from eval.stats import estimates as stats
from eval.stats import families

INF, NAN = math.inf, math.nan
LAMBDAS = [0.0, 0.1, 1.0, 10.0, INF]
SWEPT = {
    "alignmerge": Row(
        method="alignmerge", fixed={}, settings=[{"lambda_align": v} for v in LAMBDAS], swept=True
    ),
    "alignmerge/samples": Row(
        method="alignmerge", fixed={}, settings=[{"lambda_align": v} for v in LAMBDAS[1:4]], swept=True
    ),
    "ties": Row(method="ties", fixed={}, settings=[{"density": 0.2}, {"density": 0.5}], swept=True),
}
POINTS = [point for name, row in SWEPT.items() for point in row.points(name)]
FAMILIES = ("tiny/llama3", "tiny/phi3")
STYLES = canvas.row_styles(list(SWEPT))


# --- names and grid ------------------------------------------------------------------------------------------------


def test_a_swept_row_reports_every_setting_under_a_name_that_is_safe_everywhere() -> None:
    row = Row(method="alignmerge", fixed={}, settings=[{"rank": 1}, {"rank": 32}, {"rank": None}], swept=True)
    assert row.points("alignmerge/random") == [
        Point("alignmerge/random@rank=1", "alignmerge/random", "rank", 1),
        Point("alignmerge/random@rank=32", "alignmerge/random", "rank", 32),
        Point("alignmerge/random@rank=null", "alignmerge/random", "rank", None),
    ]
    assert [point.row for point in POINTS] == [
        "alignmerge@lambda_align=0",
        "alignmerge@lambda_align=0.1",
        "alignmerge@lambda_align=1",
        "alignmerge@lambda_align=10",
        "alignmerge@lambda_align=inf",
        "alignmerge/samples@lambda_align=0.1",
        "alignmerge/samples@lambda_align=1",
        "alignmerge/samples@lambda_align=10",
        "ties@density=0.2",
        "ties@density=0.5",
    ]
    assert not set("".join(point.row for point in POINTS)) & set(" ,;|[]{}<>&$#%\\\"'")
    assert Row(method="ties", fixed={}, settings=[{"density": 0.2}]).points("ties") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": []}, "settings: no settings; allowed: one field, the same in every setting"),
        ({"settings": [{"density": 0.2}, {"scale": 1.0}]}, "settings: density; scale; allowed: one field"),
        ({"settings": [{"density": 0.2, "scale": 1.0}]}, "settings: density, scale; allowed: one field"),
        ({"settings": [{"density": 0.2}, {"density": 0.20}]}, "settings: 0.2, 0.2; allowed: each value once"),
        ({"settings": [{"variant": "global"}]}, "settings: 'global'; allowed: a number or null"),
        ({"settings": [{"density": True}]}, "settings: True; allowed: a number or null"),
        ({"settings": [{"density": NAN}]}, "settings: nan; allowed: a number or null"),
        ({"matched": True}, "matched: true; allowed: false"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    node = copy.deepcopy(composed("experiment=smoke")["grid"])
    node["rows"]["ties"] |= {"swept": True, **changes}
    with pytest.raises(BadRequest) as caught:
        build(node, "grid", Grid)
    assert [str(fault) for fault in caught.value.faults if said in str(fault)], caught.value
    assert {fault.where.rpartition(".")[0] for fault in caught.value.faults} == {"grid.rows.ties"}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """The smoke grid, whose tuned rows have two settings, with two rows swept over three and one value."""
    return experiment_of(request(tmp_path))


def request(folder: Path) -> dict[str, Any]:
    config = copy.deepcopy(composed("experiment=smoke"))
    rows = config["grid"]["rows"]
    rows["ties"] |= {"settings": [{"density": d} for d in (0.1, 0.2, 0.5)], "swept": True}
    rows["alignmerge/kronecker"] |= {"settings": [{"rank": None}], "swept": True}
    return {**config, "store": str(folder / "store"), "results": str(folder / "results")}


REPORTED = ["ties@density=0.1", "ties@density=0.2", "ties@density=0.5", "alignmerge/kronecker@rank=null"]


def places(cells: list[Cell]) -> list[tuple[str, str]]:
    return [(cell.row, cell.setting) for cell in cells]


def test_swept_settings_stand_in_the_place_of_their_row_and_are_not_tried_on_dev(
    experiment: Experiment,
) -> None:
    names, grid = experiment.grid.row_names(), experiment.grid
    before = build(composed("experiment=smoke")["grid"], "grid", Grid).row_names()
    at = names.index("ties@density=0.1")
    assert (
        names[at : at + 3] == REPORTED[:3]
        and names[at - 1] == "fisher_soup"
        and names[at + 3] == "ties/per_tensor"
    )
    assert set(names) ^ set(before) == {*REPORTED, "ties", "alignmerge/kronecker"}
    assert [point.row for point in grid.points()] == REPORTED
    tried = {row for row, _ in places(experiment.dev_cells())}
    readings = {"alignmerge/reference_base", "alignmerge/reference_anchor"}
    assert tried == {"task_arithmetic", "interpolate", *readings} and len(experiment.dev_cells()) == 6


def test_every_swept_setting_is_measured_on_test_with_its_own_method(experiment: Experiment) -> None:
    experiment.check()
    cells = {cell.row: cell for cell in experiment.test_cells(experiment.provisional())}
    assert list(cells) == experiment.grid.row_names()
    assert {cell.split for cell in cells.values()} == {"test"} and {
        cell.setting for cell in cells.values()
    } == {""}
    assert [getattr(cells[f"ties@density={d}"].merger, "density", None) for d in (0.1, 0.2, 0.5)] == [
        0.1,
        0.2,
        0.5,
    ]
    kronecker: Any = cells["alignmerge/kronecker@rank=null"].merger
    assert (kronecker.estimator, kronecker.rank) == ("kronecker", None)
    (job,) = jobs_of(experiment)
    assert [cell.row for cell in job.cells if cell.split == "test" and cell.merger is not None] == list(cells)


class Dev:
    """A cell as measured on the dev split, refusals alone telling the settings apart."""

    merge = None

    def __init__(self, cell: Cell, refusals: float) -> None:
        self.cell = cell
        values = {
            "refusal_rate": refusals,
            "over_refusal_rate": 0.0,
            "instruction_following": 0.5,
            "reasoning": 0.5,
        }
        self.values = pd.DataFrame({"column": list(values), "value": list(values.values())})


def test_selection_of_the_other_rows_of_the_grid_stays_as_it_is(experiment: Experiment) -> None:
    measured: list[Any] = [
        Dev(cell, 0.9 if "3" in cell.setting else 0.55) for cell in experiment.choice_cells()
    ]
    choice = choose(experiment, measured)
    mergers = choice.mergers["smoke"]
    unreached = {"alignmerge/matched"}  # both of its settings refuse .9, wanted .6
    assert set(mergers) == set(experiment.grid.row_names()) - unreached
    assert choice.points is not None and set(choice.points["row"]).isdisjoint({"ties", "alignmerge/kronecker"})
    selected: Any = mergers["task_arithmetic"]
    near: Any = mergers["interpolate/matched"]
    assert (selected.scale, near.t) == (0.3, 0.6)
    assert [getattr(mergers[row], "density", None) for row in REPORTED[:3]] == [0.1, 0.2, 0.5]


def test_a_grid_of_swept_rows_alone_needs_no_dev_split(tmp_path: Path) -> None:
    config = request(tmp_path)
    rows = config["grid"]["rows"]
    config["grid"] |= {
        "rows": {name: rows[name] for name in ("average", "ties")},
        "against": ["ties@density=0.2"],
    }
    experiment = experiment_of(config)
    assert experiment.dev_cells() == []
    choice = choose(experiment, [])
    assert choice.points is None and list(choice.mergers["smoke"]) == ["average", *REPORTED[:3]]
    with pytest.raises(BadRequest, match=r"grid\.against: ties; allowed: a row: average, ties@density=0\.1, "):
        build({**config["grid"], "against": ["ties"]}, "grid", Grid)


def test_plan_and_status_count_every_swept_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = request(tmp_path)
    assert plan(config) == 0
    # 4 models, 16 rows that are not swept, 2 of them matched too, and 3 + 1 swept settings
    assert "6 settings on the dev split, then 26 rows on the test split" in capsys.readouterr().out
    rows = config["grid"]["rows"]
    config["grid"] |= {"rows": {name: rows[name] for name in ("average", "ties")}}
    assert plan(config) == 0
    assert "0 settings on the dev split, then 8 rows on the test split" in capsys.readouterr().out
    assert status(config) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "0 done, 0 failed, 8 missing"
    assert all(row in said for row in REPORTED[:3])


# --- figures -------------------------------------------------------------------------------------------------------


def frame(points: list[Point]) -> pd.DataFrame:
    return pd.DataFrame([point._asdict() for point in points]).astype({"value": float})


def scores(families: tuple[str, ...], seeds: int = 1) -> pd.DataFrame:
    """From the average towards something that refuses more and can less, in equal steps."""
    rows = {row: ROWS[row] for row in ("base", "anchor", "expert:arithmetic", "expert:format", "average")}
    goal = {
        "alignmerge": ROWS["alignmerge"],
        "alignmerge/samples": ROWS["alignmerge/fisher"],
        "ties": ROWS["anchor"],
    }
    for sweep, of in itertools.groupby(POINTS, key=lambda point: point.sweep):
        points = list(of)
        for i, point in enumerate(points):
            share = (i + 1) / len(points)
            rows[point.row] = Truth(
                *(a + share * (b - a) for a, b in zip(ROWS["average"], goal[sweep], strict=True))
            )
    frames = [
        scored(row, truth, f"{family} {seed}").assign(family=family, seed=seed)
        for family in families
        for seed in range(seeds)
        for row, truth in rows.items()
    ]
    found = pd.concat(frames, ignore_index=True)
    shown = [*sweeps.EFFECTS, "instruction_following", "reasoning", "aqi_by_layer"]
    return found[found["column"].isin(shown)]


def styles(found: pd.DataFrame) -> canvas.RowStyles:
    return canvas.row_styles([row for row in found["row"].unique() if "@" not in row])


@pytest.fixture(scope="module")
def one() -> dict[str, Figure]:
    found = scores(("smollm2",))
    measured = families.measure_all(found)["smollm2"]
    return figures.draw(scene(measured, found, "smollm2. " + NOTES[0]))


def scene(
    measured: dict[str, stats.Estimate], found: pd.DataFrame, caption: str, **fields: Any
) -> figures.Scene:
    sweeps = Supplement(sweeps=frame(POINTS))
    shared: dict[str, Any] = {"columns": DECLARED, "styles": styles(found), "supplement": sweeps}
    return figures.Scene(measured=measured, scores=found, caption=caption, **shared, **fields)


@pytest.fixture(scope="module")
def columns() -> dict[str, stats.Estimate]:
    return families.measure_all(scores(FAMILIES, 3))[stats.ALL]


@pytest.fixture(scope="module")
def several(columns: dict[str, stats.Estimate]) -> dict[str, Figure]:
    return figures.draw(scene(columns, scores(FAMILIES, 3), "all families", families=FAMILIES))


def test_settings_of_a_sweep_are_one_line_in_the_order_of_the_grid() -> None:
    rows = [
        "base",
        "ties@density=0.5",
        "alignmerge@lambda_align=inf",
        "ties@density=0.2",
        "alignmerge@lambda_align=0",
    ]
    first, second = sweeps.lines_of(frame(POINTS), rows)
    assert (first.sweep, first.field, list(first.values), list(first.at)) == (
        "alignmerge", "lambda_align", [0.0, INF], [4, 2],
    )  # fmt: skip
    assert (second.sweep, list(second.values), list(second.at)) == ("ties", [0.2, 0.5], [3, 1])
    assert sweeps.lines_of(frame(POINTS), ["base", "average"]) == []


def test_values_that_span_decades_stand_in_logarithms_with_the_others_beside_them() -> None:
    ruler = sweeps.ruler(np.array([0.1, 1.0, NAN, 10.0, 0.0, 1.0, INF, 0.1]))
    assert ruler.labels == ["0", "0.1", "1", "10", "∞", "null"]
    # two decades from -1 to 1; a margin is 0.16 of them
    np.testing.assert_allclose(ruler.places, [-1.32, -1, 0, 1, 1.32, 1.64])
    np.testing.assert_allclose(ruler.breaks, [-1.16, 1.16])
    assert list(ruler.place(np.array([0.0, 10.0, INF, NAN]))) == pytest.approx([-1.32, 1, 1.32, 1.64])


@pytest.mark.parametrize(
    ("values", "labels", "at", "breaks"),
    [
        ([0.0, 0.25, 1.0], ["0", "0.25", "1"], [0, 0.25, 1], []),
        ([0.2, 0.5, NAN], ["0.2", "0.5", "null"], [0.2, 0.5, 0.548], [0.524]),
        ([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"], np.log10([1, 2, 4, 8, 16, 32]), []),
        ([-1.0, 1.0, 100.0], ["-1", "1", "100"], [-1, 1, 100], []),
        ([0.0, 5.0], ["0", "5"], [0, 5], []),
        ([3.0, INF], ["3", "∞"], [3, 4], [3.5]),
        ([INF, NAN], ["∞", "null"], [0, 1], []),
    ],
)
def test_other_values_stand_as_they_are(values: Any, labels: list[str], at: Any, breaks: list[float]) -> None:
    ruler = sweeps.ruler(np.array(values, dtype=float))
    assert ruler.labels == labels
    np.testing.assert_allclose(ruler.places, at)
    np.testing.assert_allclose(ruler.breaks, breaks)


def lines(figure: Figure, panel: int, style: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
    """Return x and y of the lines of a row, but for the handles of legends."""
    found = [line for line in figure.axes[panel].lines if line.get_color() == style["color"]]
    pairs = [(list(np.asarray(line.get_xdata())), list(np.asarray(line.get_ydata()))) for line in found]
    return [(x, y) for x, y in pairs if x]


def test_fronts_run_through_the_settings_with_refusals_and_aqi_over_utility(one: dict[str, Figure]) -> None:
    found = scores(("smollm2",))
    means = found[~found["id"].str.startswith("boot:")].groupby(["row", "column"])["value"].mean().unstack()
    utility = (means["instruction_following"] + means["reasoning"]) / 2
    figure, of = one["sweep_fronts"], STYLES
    for panel, column in enumerate(("refusal_rate", "aqi")):
        for sweep in SWEPT:
            rows = [point.row for point in POINTS if point.sweep == sweep]
            (drawn,) = lines(figure, panel, of[sweep])
            np.testing.assert_allclose(drawn, [utility[rows], means.loc[rows, column]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "alignmerge\nlambda_align 0 … ∞",
        "alignmerge/samples\nlambda_align 0.1 … 10",
        "ties\ndensity 0.2 … 0.5",
        "rows that are not swept",
    ]


def test_other_rows_are_labelled_points_of_the_fronts(one: dict[str, Figure]) -> None:
    for axes in one["sweep_fronts"].axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
        assert {label.get_text() for label in labels} == {
            "base", "anchor", "expert:arithmetic", "expert:format", "average",
        }  # fmt: skip
        boxes = [Text.get_window_extent(label, renderer(one["sweep_fronts"])) for label in labels]
        assert not [1 for left, right in itertools.combinations(boxes, 2) if left.overlaps(right)]


def test_effects_have_a_line_of_panels_for_each_field(
    several: dict[str, Figure], columns: dict[str, stats.Estimate]
) -> None:
    figure = several["sweep_effects"]
    panels = [axes.get_title(loc="left") for axes in figure.axes]
    assert panels[:5] == [
        "refusal rate ↑",
        "over-refusal rate ↓",
        "AQI ↑",
        "mean utility ↑",
        "drift from anchor ↓",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["lambda_align"] * 5 + ["density"] * 5
    ticks = [[label.get_text() for label in figure.axes[i].get_xticklabels()] for i in (0, 5)]
    assert ticks == [["0", "0.1", "1", "10", "∞"], ["0.2", "0.5"]]
    rows = [point.row for point in POINTS if point.sweep == "alignmerge/samples"]
    places = [columns["aqi"].rows.index(row) for row in rows]
    of_families = [part.mean[places] for part in columns["aqi"].parts]
    drawn = lines(figure, 2, STYLES["alignmerge/samples"])
    assert [x for x, _ in drawn] == [pytest.approx([-1, 0, 1])] * 3  # two families and their mean
    np.testing.assert_allclose([y for _, y in drawn], [*of_families, np.mean(of_families, axis=0)])
    band = next(band for band in figure.axes[2].collections if len(band.get_paths()[0].vertices) == 2 * 3 + 3)
    low, high = columns["aqi"].low[places], columns["aqi"].high[places]
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((low.min(), high.max()))


def test_utility_over_families_has_the_utility_of_each(
    several: dict[str, Figure], columns: dict[str, stats.Estimate]
) -> None:
    places = [columns["aqi"].rows.index(point.row) for point in POINTS if point.sweep == "ties"]
    both = (columns["instruction_following"], columns["reasoning"])
    pairs = zip(*(column.parts for column in both), strict=True)
    each = [(follows.mean + reasons.mean)[places] / 2 for follows, reasons in pairs]
    drawn = lines(several["sweep_effects"], 8, STYLES["ties"])
    np.testing.assert_allclose([y for _, y in drawn], [*each, (both[0].mean + both[1].mean)[places] / 2])


def test_variants_of_one_method_have_hues_of_their_own() -> None:
    of = canvas.row_styles(["alignmerge", "alignmerge/random", "alignmerge/samples", "ties"])
    assert (
        len({style["color"] for style in of.values()}) == 4 and of["alignmerge"]["color"] == canvas.OURS_COLOUR
    )
    assert of["alignmerge"]["ls"] == of["ties"]["ls"] == "-" != of["alignmerge/random"]["ls"]


def test_a_sweep_draws_its_own_figures_alone(one: dict[str, Figure]) -> None:
    """The other rows are those of the main experiment, which draws them."""
    assert set(one) == {"sweep_fronts", "sweep_effects", "heatmap"}


def test_sweeps_fit_on_their_sheets(one: dict[str, Figure], several: dict[str, Figure]) -> None:
    wanted = ("sweep_fronts", "sweep_effects")
    drawn = {f"{i}/{name}": made[name] for i, made in enumerate((one, several)) for name in wanted}
    test_report.test_all_text_is_inside_the_canvas(drawn)
    test_report.test_titles_and_legends_do_not_cover_each_other(drawn, {})
    assert all("smollm2. " + NOTES[0] in one[name].get_supxlabel().replace("\n", " ") for name in wanted)
    for figure in drawn.values():
        for axes in figure.axes:
            boxes = [
                label.get_window_extent(renderer(figure))
                for label in axes.get_xticklabels()
                if label.get_text()
            ]
            assert not [1 for left, right in itertools.pairwise(boxes) if left.overlaps(right)]


def test_a_report_has_the_sweeps_and_their_figures(tmp_path: Path) -> None:
    found = scores(("smollm2",))
    given = frame([*POINTS, *Row(method="x", fixed={}, settings=[{"rank": None}], swept=True).points("x")])
    write(
        tmp_path,
        found,
        columns=COLUMNS,
        title="Sweep",
        notes=NOTES,
        against=["ties@density=0.2"],
        supplement=Supplement(sweeps=given),
    )
    assert (tmp_path / "sweeps.csv").read_text().splitlines() == [
        "row,sweep,field,value",
        *(f"{point.row},{point.sweep},{point.field},{point.value:g}" for point in POINTS),
        "x@rank=null,x,rank,",
    ]
    page = (tmp_path / "report.html").read_text()
    for name, title in (
        ("sweep_fronts", "Fronts of the swept rows"),
        ("sweep_effects", "What a swept value does: lambda_align, density"),
    ):
        assert (tmp_path / "figures" / f"{name}.svg").is_file()
        assert f'alt="{title}, smollm2"' in page and f"(figures/{name}.png)" in page
    for text in (
        page,
        (tmp_path / "table.tex").read_text().replace("\\", ""),
        (tmp_path / "summary.csv").read_text(),
    ):
        assert all(point.row in text for point in POINTS)
    compared = pd.read_csv(tmp_path / "comparisons.csv")
    assert set(compared.loc[compared["test"].notna(), "against"]) == {"ties@density=0.2"}


def test_without_utility_or_swept_rows_there_is_nothing_to_draw() -> None:
    found = scores(("smollm2",))
    measured = families.measure_all(found[found["column"].isin(["aqi", "refusal_rate"])])["smollm2"]
    assert sweeps.sweep_fronts(measured, frame(POINTS), "") is None
    effects = sweeps.sweep_effects(measured, DECLARED, frame(POINTS), "")
    assert effects is not None
    assert [axes.get_title(loc="left") for axes in effects.axes[:2]] == ["refusal rate ↑", "AQI ↑"]
    gone = frame([point._replace(row="other") for point in POINTS])
    assert sweeps.sweep_effects(measured, DECLARED, gone, "") is None
