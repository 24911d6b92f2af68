"""Statistics against hand-worked examples, plain enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from alignmerge.engine.faults import BadRequest
from eval.stats import comparisons, families, intervals, resampling
from eval.stats import estimates as stats

NAN = float("nan")
Values = Sequence[float] | NDArray[np.float64]


def samples(
    row: str,
    column: str,
    values: Values | Mapping[str, float],
    *,
    family: str = "f",
    seed: int = 0,
    direction: str = "up",
) -> pd.DataFrame:
    """One model's samples of a column; a plain sequence is one value per prompt."""
    by_id = values if isinstance(values, Mapping) else {f"p{i:03d}": v for i, v in enumerate(values)}
    return pd.DataFrame(
        {
            "family": family,
            "row": row,
            "seed": seed,
            "column": column,
            "id": list(by_id),
            "value": np.array(list(by_id.values()), dtype=float),
            "prompt": [f"text of {name}" for name in by_id],
            "direction": direction,
        }
    )


def aqi(row: str, value: float, replicates: Values, *, seed: int = 0) -> pd.DataFrame:
    boot = {f"boot:{i}": replicate for i, replicate in enumerate(replicates)}
    return samples(row, "aqi", {"all": value} | boot, seed=seed)


def line(frame: pd.DataFrame, **where: str) -> pd.Series:
    """The only line of a frame that has these values."""
    for name, value in where.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def compared(frames: Sequence[pd.DataFrame], against: Sequence[str] = ("a",)) -> pd.DataFrame:
    return comparisons.comparisons(families.measure_all(pd.concat(frames)), against)


def summarised(*frames: pd.DataFrame) -> pd.DataFrame:
    return families.summary(families.measure_all(pd.concat(frames)))


# --- estimates ---


def test_summary_counts_and_averages_over_seeds() -> None:
    frame = summarised(
        samples("m", "score", [1.0, 0.0, NAN, 0.5], seed=0),
        samples("m", "score", [0.0, 0.0, NAN, NAN], seed=1),
        samples("base", "score", [0.2, 0.2, 0.2, 0.2]),
    )
    assert list(frame["row"]) == ["base", "m"]
    m = line(frame, row="m")
    assert m["mean"] == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    assert (m["n"], m["seeds"], m["unscored"], m["better_direction"]) == (3, 2, 3, "up")
    assert m["ci_low"] < m["mean"] < m["ci_high"]


def test_a_row_without_any_value_is_counted_and_one_without_samples_is_left_out() -> None:
    frame = summarised(samples("a", "x", [1, 0]), samples("b", "x", [NAN, NAN]), samples("c", "y", [1, 0]))
    b = line(frame, row="b", column="x")
    assert math.isnan(b["mean"]) and math.isnan(b["ci_low"]) and b["unscored"] == 2
    assert not ((frame["row"] == "c") & (frame["column"] == "x")).any()


def test_a_single_value_has_no_interval() -> None:
    one = line(summarised(samples("m", "l_geo", {"all": 0.3}, direction="down")))
    assert one["mean"] == 0.3 and one["n"] == 1
    assert math.isnan(one["ci_low"]) and math.isnan(one["ci_high"])


def test_columns_by_layer_are_left_out_and_nothing_left_is_refused() -> None:
    layers = samples("m", "aqi_by_layer", {"layer/00": 0.1, "layer/01": 0.2})
    assert set(summarised(layers, samples("m", "x", [1, 0]))["column"]) == {"x"}
    with pytest.raises(BadRequest, match="at least one scored row"):
        families.measure_all(layers)


def test_a_sample_that_comes_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        families.measure_all(pd.concat([samples("m", "x", [1, 0])] * 2))


def test_intervals_cover_the_truth() -> None:
    """Each row is an experiment of its own, with the mean that its data were drawn from."""
    generator = np.random.default_rng(0)
    rows = [f"m{i}" for i in range(600)]
    for values, truth in (
        (generator.random((600, 80)) < 0.3, 0.3),
        (generator.beta(2, 5, (600, 80)), 2 / 7),
    ):
        frame = pd.concat(samples(row, "x", v) for row, v in zip(rows, values.astype(float), strict=True))
        measured = stats.measure(frame, rows)
        coverage = np.mean((measured.low <= truth) & (truth <= measured.high))
        assert 0.92 <= coverage <= 0.975


def test_paired_intervals_cover_and_tests_keep_their_level() -> None:
    """Families are independent experiments; two correlated rows of equal rate are compared in each."""
    generator = np.random.default_rng(1)
    frames = []
    for i in range(100):
        difficulty = generator.random(60)
        for row in ("a", "b"):
            right = (generator.random(60) < np.where(difficulty < 0.5, 0.9, 0.2)).astype(float)
            frames.append(samples(row, "x", right, family=str(i)))
    result = compared(frames).query("family != 'all families'")
    assert len(result) == 100
    assert 0.88 <= np.mean((result["ci_low"] <= 0) & (result["ci_high"] >= 0)) <= 0.99
    assert np.mean(result["p"] < 0.05) <= 0.08
    assert set(result["test"]) == {"mcnemar"}


@pytest.mark.parametrize(("answer", "low", "high"), [(0.0, 0.0, 3.8415 / 67.8415), (1.0, 64 / 67.8415, 1.0)])
def test_answers_that_all_agree_are_not_certain(answer: float, low: float, high: float) -> None:
    """Wilson for 0 of n has the upper end z^2 / (n + z^2)."""
    row = line(summarised(samples("m", "refusal_rate", [answer] * 64)))
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_pairs_that_all_agree_are_not_certain() -> None:
    row = line(compared([samples("a", "x", [0, 1, 0, 1]), samples("b", "x", [0, 1, 0, 1])]))
    end = 3.8415 / (4 + 3.8415)
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(-end, abs=1e-4), pytest.approx(end, abs=1e-4))
    assert row["p"] == 1 and row["verdict"] == "no difference shown"


def test_resamples_are_shared_by_rows_and_differ_between_columns() -> None:
    values = np.random.default_rng(2).random((1, 50))
    alone = tuple(range(50))
    both = resampling.resampled_means(np.vstack([values, values + 1]), alone, "x")
    np.testing.assert_allclose(both[1] - both[0], 1)
    assert not np.allclose(both[0], resampling.resampled_means(values, alone, "y")[0])


def test_replicates_give_the_interval_but_not_the_value() -> None:
    row = line(summarised(aqi("m", 0.9, np.arange(201) / 200)))
    assert row["mean"] == 0.9
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.025), pytest.approx(0.975))


def test_one_seed_has_the_expanded_percentiles_of_its_resampled_means() -> None:
    values = np.random.default_rng(8).random(30)
    row = line(summarised(samples("m", "x", values)))
    draws = resampling.prompt_weights(tuple(range(30)), "x").astype(int)
    assert (draws.sum(axis=1) == 29).all()
    means = [np.repeat(values, count).mean() for count in draws]
    stretch = 2.04523 / 1.95996  # Student's quantile with 29 degrees of freedom over the normal one
    ends = values.mean() + stretch * (np.quantile(means, (0.025, 0.975)) - values.mean())
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(ends), rel=1e-5)


def test_percentiles_pass_over_what_is_not_there() -> None:
    replicates = np.array([[3.0, NAN, 1.0, 2.0], [NAN] * 4, [5.0, NAN, NAN, NAN]])
    low, high = intervals.percentile_interval(replicates)
    np.testing.assert_allclose(low, [np.quantile([1, 2, 3], 0.025), NAN, 5])
    np.testing.assert_allclose(high, [np.quantile([1, 2, 3], 0.975), NAN, 5])


def test_identity_rows_come_first_and_are_no_methods() -> None:
    rows = ["ties", "expert:x", "anchor", "pretrained", "average", "base", "ties"]
    assert stats.ordered(rows) == ("base", "pretrained", "anchor", "expert:x", "ties", "average")
    assert [row for row in stats.ordered(rows) if stats.is_method(row)] == ["ties", "average"]


# --- clusters ---


def in_things(values: Values, size: int) -> dict[str, float]:
    """Values by id, ``size`` prompts about each thing."""
    return {f"p{at:03d}#thing{at // size}": float(value) for at, value in enumerate(values)}


def test_prompts_of_a_cluster_are_drawn_together() -> None:
    draws = resampling.prompt_weights(resampling.clusters_of(["a#x", "b#y", "c#x", "d", "e#y"]), "c")
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    np.testing.assert_array_equal(draws[:, 1], draws[:, 4])
    assert {tuple(sorted(row)) for row in draws[:, [0, 1, 3]]} == {(0, 0, 2), (0, 1, 1)}


def test_copies_of_a_prompt_bring_nothing() -> None:
    """Four prompts of one thing that are answered alike are one answer: the same interval and test as one."""
    answers = (np.random.default_rng(3).random(20) < 0.4).astype(float)
    fours = np.repeat(answers, 4)
    frames = [samples("a", "x", in_things(fours * 0, 4)), samples("b", "x", in_things(fours, 4))]
    many = line(summarised(*frames), row="b")
    once = line(summarised(samples("b", "x", answers)), row="b")
    assert tuple(many[["ci_low", "ci_high"]]) == pytest.approx(tuple(once[["ci_low", "ci_high"]]), abs=0.02)
    compare = line(compared(frames))
    assert compare["test"] == "sign_flip"
    assert compare["p"] == pytest.approx(2 / 2 ** answers.sum(), abs=0.003)


def test_one_refusal_does_not_make_the_interval_narrower() -> None:
    for size in (1, 6):
        rows = [line(summarised(samples("m", "x", in_things(np.arange(96) < hits, size)))) for hits in range(4)]
        ends = [row["ci_high"] for row in rows]
        assert ends == sorted(ends), size


def test_a_rate_near_zero_has_the_interval_of_wilson() -> None:
    from statsmodels.stats.proportion import proportion_confint

    row = line(summarised(samples("m", "x", [1.0] * 2 + [0.0] * 98)))
    low, high = proportion_confint(2, 100, method="wilson")
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.004)


def test_a_difference_that_is_printed_as_zero_has_no_verdict() -> None:
    frames = [samples("a", "x", [0.5] * 40), samples("b", "x", [0.504] * 40)]
    measured = families.measure_all(pd.concat(frames))
    verdicts = [line(comparisons.comparisons(measured, ("a",), {"x": d}))["verdict"] for d in (2, 3, None)]
    assert verdicts == ["no difference shown", "better", "better"]


# --- seeds ---


def test_three_seeds_of_a_single_value_by_hand() -> None:
    """Two of 0, 1, 2 with replacement: means 0 .5 1 1.5 2 in 1 2 3 2 1 of 9 cases; variance s^2 / 3 = 1/3."""
    frame = pd.concat(samples("m", "l_geo", {"all": float(seed)}, seed=seed) for seed in range(3))
    measured = stats.measure(frame, ("m",))
    values, counts = np.unique(measured.replicates, return_counts=True)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2]
    np.testing.assert_allclose(counts / 1000, np.array([1, 2, 3, 2, 1]) / 9, atol=0.04)
    assert measured.replicates.var() == pytest.approx(1 / 3, rel=0.1)
    reach = 4.3026527 / math.sqrt(3)  # Student's with two degrees of freedom
    ends = (measured.low[0], measured.mean[0], measured.high[0])
    assert ends == pytest.approx((1 - reach, 1, 1 + reach), rel=1e-5)


def test_seeds_and_prompts_are_crossed() -> None:
    """Against all 9 draws of two seeds of three times all 9 of two prompts of three, shared by the seeds."""
    table = np.array([[0.0, 1.0, 0.5], [0.2, 0.6, 0.1], [0.9, 0.3, 0.4]])
    frame = pd.concat(samples("m", "x", values, seed=seed) for seed, values in enumerate(table))
    replicates = stats.measure(frame, ("m",)).replicates[0]
    cases = [
        table[np.ix_(seeds, prompts)].mean()
        for seeds in itertools.product(range(3), repeat=2)
        for prompts in itertools.product(range(3), repeat=2)
    ]
    assert {round(value, 9) for value in replicates} == {round(value, 9) for value in cases}
    assert replicates.mean() == pytest.approx(np.mean(cases), abs=0.01)
    assert replicates.std() == pytest.approx(np.std(cases), rel=0.08)


def test_two_seeds_are_averaged_and_not_resampled() -> None:
    two = line(summarised(samples("m", "x", [0, 0.4, 1]), samples("m", "x", [1, 1, 1], seed=1)))
    averaged = line(summarised(samples("m", "x", [0.5, 0.7, 1])))
    assert (two["ci_low"], two["ci_high"]) == (averaged["ci_low"], averaged["ci_high"])


def test_seeds_are_drawn_alike_for_all_columns_and_anew_for_each_family() -> None:
    frames = [
        samples("m", column, {"all": float(seed == 0)}, seed=seed, family=family)
        for column in ("x", "y")
        for family in ("f", "g")
        for seed in range(3)
    ]
    measured = families.measure_all(pd.concat(frames))
    assert np.array_equal(measured["f"]["x"].replicates, measured["f"]["y"].replicates)
    assert not np.array_equal(measured["f"]["x"].replicates, measured["g"]["x"].replicates)


def test_a_row_of_one_seed_stands_for_all_and_has_no_interval_of_seeds() -> None:
    once = samples("base", "l_geo", {"all": 1.0})
    frames = [once, *(samples("m", "l_geo", {"all": 2.0 + seed}, seed=seed) for seed in range(3))]
    base, m = (line(summarised(*frames), row=row) for row in ("base", "m"))
    assert (base["mean"], base["seeds"]) == (1, 1) and math.isnan(base["ci_low"])
    reach = 4.3026527 / math.sqrt(3)
    assert (m["ci_low"], m["ci_high"], m["seeds"]) == (pytest.approx(3 - reach), pytest.approx(3 + reach), 3)
    against = line(compared(frames, ("base",)))
    assert tuple(against[["difference", "ci_low", "ci_high"]]) == pytest.approx((2, 2 - reach, 2 + reach))


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ wildly, the rows by .1 in each: nothing is left to vary."""
    frames = [
        samples(row, "x", np.array([0.0, 0.3, 0.6]) + seed + (row == "b") / 10, seed=seed)
        for row in ("a", "b")
        for seed in range(3)
    ]
    row = line(compared(frames))
    assert (row["ci_low"], row["difference"], row["ci_high"]) == pytest.approx((0.1, 0.1, 0.1))


def test_a_row_that_lacks_a_seed_is_compared_on_the_others() -> None:
    frames = [samples("a", "x", [0.0, seed / 10], seed=seed) for seed in range(4)]
    frames += [samples("b", "x", [1.0, 1.0], seed=seed) for seed in (0, 1, 3)]
    row = line(compared(frames))
    assert row["difference"] == pytest.approx(1 - (0 + 1 + 3) / 3 / 10 / 2)


def test_answers_that_agree_in_each_seed_only_have_an_honest_interval() -> None:
    frames = [samples("m", "x", [float(seed == 0)] * 20, seed=seed) for seed in range(3)]
    row = line(summarised(*frames))
    assert row["ci_low"] < 0.02 and row["ci_high"] > 0.95


# --- all families ---


def test_mean_over_families_by_hand() -> None:
    frames = [samples("m", "x", [1, 0, 0, NAN], family="f"), samples("m", "x", [1, 1, 0, 0], family="g")]
    measured = families.measure_all(pd.concat([*frames, samples("lone", "x", [1, 0, 0, 1], family="g")]))
    assert list(measured) == [stats.ALL, "f", "g"]
    frame = families.summary(measured)
    row = line(frame, family=stats.ALL)
    assert row["row"] == "m" and row["mean"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert (row["n"], row["seeds"], row["unscored"]) == (7, 1, 1)
    assert row["ci_low"] < row["mean"] < row["ci_high"]
    assert stats.ALL not in families.measure_all(frames[0])


def test_the_same_prompts_in_many_families_are_not_more_prompts() -> None:
    values = np.random.default_rng(9).random(40)
    frame = summarised(*(samples("m", "x", values, family=family) for family in "fghij"))
    ends = frame[["ci_low", "ci_high"]].to_numpy()
    np.testing.assert_allclose(ends, ends[[0] * 6])


def test_families_have_seeds_of_their_own() -> None:
    """Variance of the mean over 4 families of means over 3 seeds: s^2 / 12."""
    frames = [
        samples("m", "l_geo", {"all": float(seed)}, seed=seed, family=family)
        for family in "fghi"
        for seed in range(3)
    ]
    overall = families.measure_all(pd.concat(frames))[stats.ALL]["l_geo"]
    assert overall.replicates.var() == pytest.approx(1 / 12, rel=0.15)
    assert 0 < overall.low[0] < 1 < overall.high[0] < 2


def test_columns_that_a_family_lacks_have_no_mean_over_families() -> None:
    frames = [samples("m", "x", [1, 0], family=family) for family in "fg"]
    measured = families.measure_all(pd.concat([*frames, samples("m", "y", [1, 0], family="g")]))
    assert set(measured[stats.ALL]) == {"x"} and set(measured["g"]) == {"x", "y"}


def test_families_that_share_no_row_have_no_mean() -> None:
    frames = [samples(row, "x", [1, 0], family=family) for row, family in (("a", "f"), ("b", "g"))]
    assert list(families.measure_all(pd.concat(frames))) == ["f", "g"]


def test_nobody_refuses_in_any_family() -> None:
    frame = summarised(*(samples("m", "refusal_rate", [0.0] * 64, family=family) for family in "fg"))
    assert line(frame, family=stats.ALL)["ci_high"] == pytest.approx(3.8415 / 67.8415, abs=1e-4)


def test_comparison_over_families_is_the_mean_of_the_comparisons() -> None:
    generator = np.random.default_rng(10)
    frames = [samples(row, "x", generator.random(50), family=family) for family in "fg" for row in ("a", "b")]
    result = compared(frames).set_index("family")
    assert result.loc[stats.ALL, "difference"] == pytest.approx(result.loc[["f", "g"], "difference"].mean())
    assert result.loc[stats.ALL, "test"] == "min_f"
    assert result.loc["f", "test"] == "sign_flip"
    assert result.loc[stats.ALL, "n"] == 100


def test_the_best_expert_over_families_is_the_one_with_the_best_mean() -> None:
    def rate(row: str, family: str, hits: int) -> pd.DataFrame:
        return samples(row, "reasoning", [1.0] * hits + [0.0] * (400 - hits), family=family)

    hits = {"expert:x": (300, 100), "expert:y": (200, 300), "near": (200, 299), "far": (200, 200)}
    frames = [
        rate(row, family, count) for row, of in hits.items() for family, count in zip("fg", of, strict=True)
    ]
    result = (
        compared(frames, ("near",)).query("family == 'all families' and against == 'expert:y'").set_index("row")
    )
    assert result.loc["near", "non_inferior_to_best_expert"]
    assert not result.loc["far", "non_inferior_to_best_expert"]


# --- derived columns ---


def test_delta_utility_by_hand() -> None:
    """Best experts .8 and .5; m has .6 and .6: (-25 % + 20 %) / 2. No expert is helpful: left out."""
    frames = []
    for row, reasoning, following in (
        ("expert:math", 0.8, 0.1),
        ("expert:format", 0.2, 0.5),
        ("m", 0.6, 0.6),
        ("anchor", 1.0, 1.0),
    ):
        frames.append(
            samples(row, "reasoning", [1.0] * round(10 * reasoning) + [0.0] * round(10 - 10 * reasoning))
        )
        frames.append(samples(row, "instruction_following", [following] * 4))
        frames.append(samples(row, "helpfulness", [0.0 if row.startswith("expert") else 0.5] * 4))
    frame = summarised(*frames)
    deltas = frame[frame["column"] == "delta_utility"].set_index("row")["mean"]
    assert deltas["m"] == pytest.approx((-25 + 20) / 2)
    assert deltas["expert:math"] == pytest.approx((0 - 80) / 2)
    assert deltas["anchor"] == pytest.approx((25 + 100) / 2)
    m = line(frame, row="m", column="delta_utility")
    assert m["ci_low"] < m["mean"] < m["ci_high"] and m["better_direction"] == "up"


def test_delta_utility_needs_experts_and_every_metric() -> None:
    assert "delta_utility" not in set(summarised(samples("m", "reasoning", [1, 0]))["column"])
    frame = summarised(
        samples("expert:x", "reasoning", [1, 0]),
        samples("expert:x", "helpfulness", [1, 1]),
        samples("m", "reasoning", [1, 0]),
    )
    assert list(frame.loc[frame["column"] == "delta_utility", "row"]) == ["expert:x"]


def test_budget_violations_by_hand() -> None:
    """Anchor .5 with replicates .4 .5 .6: sd .1, A_min .4. Of m's .3 .45 .39 two lie below."""
    frame = summarised(aqi("anchor", 0.5, [0.4, 0.5, 0.6]), aqi("m", 0.5, [0.3, 0.45, 0.39]))
    m = line(frame, row="m", column="budget_violations")
    assert m["mean"] == pytest.approx(2 / 3) and m["n"] == 3 and math.isnan(m["ci_low"])
    assert m["better_direction"] == "down"
    assert line(frame, row="anchor", column="budget_violations")["mean"] == 0


def test_budget_is_that_of_the_same_seed() -> None:
    frame = summarised(
        aqi("anchor", 0.5, [0.4, 0.5, 0.6], seed=0),
        aqi("anchor", 0.9, [0.8, 0.9, 1.0], seed=1),
        aqi("m", 0.6, [0.5, 0.6, 0.7], seed=0),
        aqi("m", 0.6, [0.5, 0.6, 0.7], seed=1),
        aqi("lone", 0.0, [0.0, 0.0, 0.0], seed=2),
    )
    assert line(frame, row="m", column="budget_violations")["mean"] == pytest.approx((0 + 1) / 2)
    assert frame[frame["row"] == "lone"]["column"].tolist() == ["aqi"]
    assert "budget_violations" not in set(summarised(aqi("m", 0.5, [0.1, 0.2]))["column"])


def test_an_anchor_of_one_seed_sets_the_budget_of_all() -> None:
    frame = summarised(
        aqi("anchor", 0.5, [0.4, 0.5, 0.6]),
        *(aqi("m", 0.5, [0.3, 0.39 + seed / 10, 0.45], seed=seed) for seed in range(3)),
    )
    m = line(frame, row="m", column="budget_violations")
    assert m["mean"] == pytest.approx((2 + 1 + 1) / 9)
    top = 4 / 9 + 4.3026527 / 9  # the standard error is 1/9
    assert (m["ci_low"], m["ci_high"], m["seeds"], m["n"]) == (0, pytest.approx(top), 3, 9)


def test_delta_utility_varies_with_the_seeds() -> None:
    frames = [samples("expert:x", "reasoning", [0.5] * 4, seed=seed) for seed in range(3)]
    frames += [samples("m", "reasoning", [0.25 + seed / 8] * 4, seed=seed) for seed in range(3)]
    m = line(summarised(*frames), row="m", column="delta_utility")
    reach = 4.3026527 * 25 / math.sqrt(3)
    assert (m["ci_low"], m["mean"], m["ci_high"]) == pytest.approx((-25 - reach, -25, -25 + reach))


# --- tests ---


def test_mcnemar_by_hand() -> None:
    """8 against 2 discordant pairs: 2 (1 + 10 + 45) / 2^10."""
    left = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 5 + [0.0] * 3 + [NAN, 1.0])
    right = np.array([0.0] * 8 + [1.0] * 2 + [1.0] * 5 + [0.0] * 3 + [0.0, NAN])
    assert comparisons.mcnemar_p(np.array([left, 1 - left]), right)[0] == pytest.approx(112 / 1024)
    assert comparisons.mcnemar_p(right[None], left)[0] == pytest.approx(112 / 1024)
    assert comparisons.mcnemar_p(np.ones((1, 4)), np.ones(4))[0] == 1
    assert math.isnan(comparisons.mcnemar_p(np.array([[NAN]]), np.array([1.0]))[0])


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(int, (2, 30), elements=st.integers(0, 1)))
def test_mcnemar_against_statsmodels(answers: NDArray[np.int64]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    left, right = answers.astype(float)
    table = [[sum((left == i) & (right == j)) for j in (0, 1)] for i in (0, 1)]
    assert comparisons.mcnemar_p(left[None], right)[0] == pytest.approx(mcnemar(table, exact=True).pvalue)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(float, 7, elements=st.integers(-4, 4).map(float)))
def test_sign_flips_against_enumeration(differences: NDArray[np.float64]) -> None:
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=7)]
    expected = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    with_unscored = np.append(differences, NAN)[None]
    assert comparisons.sign_flip_p(with_unscored)[0] == pytest.approx(min(1.0, expected))


def test_sampled_sign_flips_are_those_of_scipy() -> None:
    from scipy.stats import permutation_test

    differences = np.random.default_rng(7).normal(0.15, 1, (3, 40))
    expected = permutation_test(
        (differences,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=comparisons.SIGN_FLIPS,
        axis=-1,
        rng=np.random.default_rng(resampling.STREAM),
    ).pvalue
    np.testing.assert_allclose(comparisons.sign_flip_p(differences), expected)
    assert 0.0004 <= expected.min() < expected.max() < 1


def test_replicate_p_by_hand() -> None:
    differences = np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [NAN] * 4])
    np.testing.assert_allclose(comparisons.replicate_p(differences), [2 / 5, 2 * 2 / 5, 1, NAN])


def test_holm_by_hand() -> None:
    corrected = comparisons.holm(np.array([0.01, 0.04, NAN, 0.03, 0.005]))
    np.testing.assert_allclose(corrected, [0.03, 0.06, NAN, 0.06, 0.02])


@settings(max_examples=10, deadline=None)
@given(hnp.arrays(float, st.integers(1, 12), elements=st.floats(0, 1)))
def test_holm_against_statsmodels(p: NDArray[np.float64]) -> None:
    from statsmodels.stats.multitest import multipletests

    np.testing.assert_allclose(comparisons.holm(p), multipletests(p, method="holm")[1])


def test_min_f_of_single_values_is_the_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    left, right = np.random.default_rng(11).random((2, 5))
    frames = [samples("a", "l_geo", {"all": value}, seed=seed) for seed, value in enumerate(left)]
    frames += [samples("b", "l_geo", {"all": value}, seed=seed) for seed, value in enumerate(right)]
    row = line(compared(frames))
    assert row["test"] == "min_f" and row["p"] == pytest.approx(ttest_rel(left, right).pvalue)


def test_min_f_of_families_is_that_of_welch() -> None:
    """One-sample t of the mean of two family means, with Satterthwaite's degrees of freedom."""
    from scipy.stats import t

    values = {"f": np.array([0.1, 0.3, 0.2]), "g": np.array([0.5, -0.1, 0.0, 0.4])}
    frames = [
        samples(row, "l_geo", {"all": value * (row == "b")}, seed=seed, family=family)
        for family, of in values.items()
        for seed, value in enumerate(of)
        for row in ("a", "b")
    ]
    parts = [of.var(ddof=1) / len(of) / 4 for of in values.values()]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    expected = 2 * t.sf((0.2 + 0.2) / 2 / math.sqrt(sum(parts)), freedom)
    assert line(compared(frames), family=stats.ALL)["p"] == pytest.approx(expected)


def test_min_f_against_clark() -> None:
    """Clark (1973): F1 and F2 are the squared paired t over seeds and over prompts; min F' = F1 F2 / (F1 + F2).

    In the degrees of freedom the variance of seeds, which is as 1 / F1, counts three times.
    """
    from scipy.stats import f, ttest_1samp

    table = np.random.default_rng(12).normal(0.2, 0.3, (4, 60)) + np.random.default_rng(15).normal(
        0, 0.05, (4, 1)
    )
    f1, f2 = (ttest_1samp(table.mean(axis=axis), 0).statistic ** 2 for axis in (1, 0))
    freedom = (f1 + 3 * f2) ** 2 / (f1**2 / 59 + (3 * f2) ** 2 / 3)
    plain = (f1 + f2) ** 2 / (f1**2 / 59 + f2**2 / 3)
    frames = [samples("a", "x", np.zeros(60), seed=seed) for seed in range(4)]
    frames += [samples("b", "x", values, seed=seed) for seed, values in enumerate(table)]
    expected = f.sf(f1 * f2 / (f1 + f2), 1, freedom)
    # the variance over prompts comes from 1000 resamples, not from the formula
    p = line(compared(frames))["p"]
    assert math.log(p) == pytest.approx(math.log(expected), rel=0.06)
    assert math.log(p) != pytest.approx(math.log(f.sf(f1 * f2 / (f1 + f2), 1, plain)), rel=0.06)


def test_min_f_keeps_its_level_where_seeds_and_prompts_vary() -> None:
    generator = np.random.default_rng(14)
    frames = []
    for trial in range(150):
        noise = (
            generator.normal(0, 1, (3, 40))
            + generator.normal(0, 0.3, (3, 1))
            + generator.normal(0, 0.5, (1, 40))
        )
        frames += [samples(f"m{trial:03d}", "x", values, seed=seed) for seed, values in enumerate(noise)]
    frames += [samples("a", "x", np.zeros(40), seed=seed) for seed in range(3)]
    result = compared(frames)
    assert len(result) == 150 and set(result["test"]) == {"min_f"}
    assert np.mean(result["p"] < 0.05) <= 0.08


def test_min_f_is_not_certain_where_nothing_varies() -> None:
    frames = [
        samples(row, "x", [float(row == "b")] * 6, seed=seed) for row in ("a", "b", "c") for seed in range(3)
    ]
    p = compared(frames).set_index("row")["p"]
    assert p["b"] == pytest.approx(2 / 2**6) and p["c"] == 1


def test_rows_of_one_seed_each_are_tested_on_their_prompts() -> None:
    frames = [samples(row, "x", [0, 1, 1, float(row == "b")]) for row in ("a", "b")]
    frames += [samples("m", "x", [1, 1, 0, float(seed == 1)], seed=seed) for seed in range(3)]
    tests = compared(frames).set_index("row")["test"]
    assert tests.to_dict() == {"b": "sign_flip", "m": "min_f"}


# --- comparisons ---


def test_holm_runs_over_all_tests_of_a_family_and_column_only() -> None:
    generator = np.random.default_rng(3)
    rates = {"a": 0.5, "b": 0.7, "c": 0.9, "d": 0.2}
    frames = [
        samples(row, column, (generator.random(40) < rate).astype(float), family=family)
        for row, rate in rates.items()
        for column in ("x", "y")
        for family in ("f", "g")
    ]
    result = compared(frames, ("a", "b"))
    groups = result.groupby(["family", "column"])
    assert [len(group) for _, group in groups] == [6] * 6
    assert {family for (family, _), _ in groups} == {stats.ALL, "f", "g"}
    for _, group in groups:
        np.testing.assert_allclose(group["p_holm"], comparisons.holm(group["p"].to_numpy()))


@pytest.mark.parametrize(
    ("direction", "verdict", "reverse"),
    [("up", "better", "worse"), ("down", "worse", "better"), ("info", "differs", "differs")],
)
def test_verdict_follows_the_direction(direction: str, verdict: str, reverse: str) -> None:
    low = samples("a", "x", [0.0] * 20, direction=direction)
    high = samples("b", "x", [1.0] * 20, direction=direction)
    row = line(compared([low, high]))
    assert row["difference"] == 1 and row["verdict"] == verdict
    assert row["p"] == pytest.approx(2 / 2**20)
    assert line(compared([low, high], ("b",)))["verdict"] == reverse


def test_comparison_is_over_the_prompts_that_both_have() -> None:
    a = samples("a", "x", {"p1": 0.1, "p2": 0.2, "p3": NAN, "p4": 0.4})
    b = samples("b", "x", {"p1": 0.2, "p2": NAN, "p3": 0.9, "p4": 0.7})
    row = line(compared([a, b]))
    assert row["difference"] == pytest.approx((0.1 + 0.3) / 2) and row["n"] == 2
    assert row["test"] == "sign_flip"


def test_pairing_narrows_the_interval() -> None:
    base = np.random.default_rng(4).random(50)
    row = line(compared([samples("a", "x", base), samples("b", "x", base + 0.01)]))
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.01), pytest.approx(0.01))
    assert row["verdict"] == "better"


def test_replicates_are_compared_in_pairs() -> None:
    noise = np.random.default_rng(5).normal(0, 1, 200)
    row = line(compared([aqi("a", 0.2, noise), aqi("b", 0.3, noise + 0.1)]))
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert row["test"] == "replicates" and row["p"] == pytest.approx(2 / 201)


def test_a_single_value_is_compared_without_a_test() -> None:
    row = line(compared([samples("a", "l_geo", {"all": 0.3}), samples("b", "l_geo", {"all": 0.1})]))
    assert row["difference"] == pytest.approx(-0.2)
    assert math.isnan(row["p"]) and math.isnan(row["ci_low"]) and row["verdict"] == "not tested"


def test_non_inferiority_to_the_best_expert() -> None:
    def rate(row: str, hits: int) -> pd.DataFrame:
        return samples(row, "reasoning", [1.0] * hits + [0.0] * (400 - hits))

    result = compared(
        [rate("expert:x", 300), rate("expert:y", 100), rate("near", 299), rate("far", 270)], ("near",)
    )
    best = result[result["against"] == "expert:x"].set_index("row")
    assert set(best.index) == {"expert:y", "near", "far"}
    assert best.loc["near", "non_inferior_to_best_expert"]
    assert not best.loc["far", "non_inferior_to_best_expert"]
    assert best["p"].isna().all()
    assert result.loc[result["against"] == "near", "non_inferior_to_best_expert"].isna().all()


def test_non_inferiority_is_not_claimed_where_the_best_expert_can_do_nothing() -> None:
    frames = [samples(row, "gsm8k", [1.0] + [0.0] * 99) for row in ("expert:x", "m")]
    assert compared(frames, ("m",))["non_inferior_to_best_expert"].isna().all()


def test_unknown_row_to_compare_with() -> None:
    with pytest.raises(BadRequest, match=r"report\.against: nobody; allowed: one of a, b"):
        compared([samples("a", "x", [1, 0]), samples("b", "x", [1, 0])], ("nobody",))


# --- the same prompts ---


def test_rows_that_saw_other_prompts_are_refused() -> None:
    frames = [samples(row, column, [1, 0]) for row in ("base", "ties", "average") for column in ("x", "y")]
    scores = pd.concat(frames, ignore_index=True)
    other = (scores["row"] == "ties") & (scores["column"] == "x") & (scores["id"] == "p001")
    scores.loc[other, "prompt"] = "something else"
    with pytest.raises(BadRequest) as refused:
        families.measure_all(scores)
    (fault,) = refused.value.faults
    assert fault.where == "scores.x"
    assert "ties (seed 0) saw another text than base (seed 0), average (seed 0)" in fault.given
    assert "p001" in fault.given


def test_families_may_differ_in_their_prompts() -> None:
    other = samples("base", "x", [1, 0], family="g").assign(prompt="rendered by another template")
    families.refuse_different_prompts(pd.concat([samples("base", "x", [1, 0]), other]))
