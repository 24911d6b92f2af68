"""The forecast of a run: hand-worked examples of counts and of the time left."""

from __future__ import annotations

import pytest

from alignmerge.engine.forecast import ENOUGH, LEAST_SECONDS, PRIOR_SECONDS, Forecast, Stage, spelt


def forecast(*, recorded: bool, workers: int = 2, after: float = 0.0) -> Forecast:
    """Four trainings of 10 s and twenty cells of 1 s are expected."""
    stages = [Stage("training", 4, 10.0), Stage("cells", 20, 1.0)]
    return Forecast(stages, workers, recorded=recorded, after=after, now=100.0)


def test_before_anything_is_done_recorded_times_tell_what_is_left() -> None:
    assert forecast(recorded=True).left(100.0) == pytest.approx((4 * 10 + 20 * 1) / 2)
    assert forecast(recorded=True, after=7.0).left(100.0) == pytest.approx(37.0)
    assert forecast(recorded=True, workers=8).left(100.0) == pytest.approx(4 * 10 / 4 + 20 / 8)
    assert forecast(recorded=False).left(100.0) is None


def test_pace_of_this_run_covers_the_stages_to_come() -> None:
    run = forecast(recorded=False)
    run.begin("training", 4)
    run.report("a", 0.0, 100.0)
    assert run.left(110.0) is None  # begun, but no step is over
    run.report("a", 0.5, 110.0)  # half of what was expected to take 10 s took 10: twice as long
    assert run.left(110.0) == pytest.approx((3.5 * 20 + 20 * 2) / 2)
    run.finish("a", 120.0)
    assert run.left(120.0) == pytest.approx((3 * 20 + 20 * 2) / 2)
    assert (run.done, run.total) == (1, 24)


def test_recorded_times_give_way_to_the_pace_of_the_run() -> None:
    run = forecast(recorded=True)
    run.begin("training", 4)
    run.report("a", 0.0, 100.0)
    run.finish("a", 140.0)  # four times as long as expected
    pace = (PRIOR_SECONDS + 40) / (PRIOR_SECONDS + 10)
    assert run.left(140.0) == pytest.approx(pace * (3 * 10 + 20) / 2)


def test_mean_of_what_is_done_replaces_what_was_expected() -> None:
    run = forecast(recorded=False, workers=1)
    run.begin("training", 0)
    run.begin("cells", 20)
    for number in range(ENOUGH):
        run.report(str(number), 0.0, 100.0 + 3 * number)
        run.finish(str(number), 103.0 + 3 * number)
    assert run.left(109.0) == pytest.approx(3.0 * (20 - ENOUGH))
    assert run.total == 20  # the stage without tasks is left out


def test_counts_end_at_their_total_and_late_reports_change_nothing() -> None:
    run = forecast(recorded=False)
    for stage, tasks in (("training", 4), ("cells", 18)):  # fewer cells than were expected
        run.begin(stage, tasks)
        for number in range(tasks):
            run.report(str(number), 0.3, 101.0)
            run.finish(str(number), 102.0)
            run.report(str(number), 0.9, 103.0)
            assert run.done <= run.total
    assert run.done == run.total == 22 and run.left(104.0) == 0.0
    assert run.line(160.0) == "cells 18/18; whole run 22/22; 60 s gone, left: about 0 s"


def test_share_of_a_task_never_falls() -> None:
    run = forecast(recorded=False, workers=1)
    run.begin("training", 1)
    run.report("a", 0.0, 100.0)
    run.report("a", 0.5, 110.0)
    before = run.left(110.0)
    run.report("a", 0.1, 110.0)  # of another part of the same task
    assert run.left(110.0) == before


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7100, "118 min"), (9000, "2.5 h")]
)
def test_durations_for_people(seconds: float, words: str) -> None:
    assert spelt(seconds) == words


def of_two_kinds(*, recorded: bool) -> Forecast:
    """Four trainings of 10 s, twenty cells of 1 s and 16 s of report are expected."""
    stages = [Stage("training", 4, 10.0, "training"), Stage("cells", 20, 1.0, "measuring")]
    return Forecast(stages, 2, recorded=recorded, after=16.0, now=100.0)


def test_what_training_took_tells_half_of_what_measuring_will_take() -> None:
    run = of_two_kinds(recorded=False)
    run.begin("training", 4)
    run.report("a", 0.0, 100.0)
    run.finish("a", 190.0)  # nine times as long as expected: cells and report are expected to take three times
    assert run.left(190.0) == pytest.approx(3 * 10 * 9 / 2 + 20 * 1 * 3 / 2 + 16 * 3)


def test_a_kind_that_was_measured_goes_by_its_own_pace() -> None:
    run = of_two_kinds(recorded=False)
    for stage, tasks, seconds in (("training", 4, 90.0), ("cells", 20, 2.0)):
        run.begin(stage, tasks)
        for number in range(min(tasks, 4) - (stage == "cells") * 2):  # all trainings, and two cells
            run.report(str(number), 0.0, 100.0)
            run.finish(str(number), 100.0 + seconds)
    whole = (4 * 90 + 2 * 2) / (4 * 10 + 2 * 1)
    taken = 4.0  # of the cells: less than tells anything by itself
    assert taken < LEAST_SECONDS
    assert run.left(500.0) == pytest.approx(18 * 1 * whole**0.5 / 2 + 16 * whole**0.5)


def test_nothing_is_said_before_a_few_seconds_are_measured() -> None:
    run = of_two_kinds(recorded=False)
    run.begin("training", 4)
    run.report("a", 0.0, 100.0)
    run.report("a", 0.001, 100.0 + LEAST_SECONDS / 2)  # which would be 2500 s each
    assert run.left(100.0 + LEAST_SECONDS / 2) is None
