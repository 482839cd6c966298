"""longreel.bench.emulated_plans: how points are run, and that the headline table stays within its minutes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreel.bench.cases import Point
from longreel.bench.console import REPORT_S
from longreel.bench.emulated_plans import (
    START_S,
    Estimates,
    block_seconds,
    memory_line,
    memory_share,
    plan_of,
    plan_seconds,
)
from longreel.bench.emulated_result import Plan
from longreel.bench.grids import TargetGrid, target_points
from longreel.bench.presets import headline
from longreel.parallel.predict.hardware import get_profile
from longreel.parallel.predict.predict import PredictionCase, predict_step


def points(grid: TargetGrid) -> list[Point]:
    return [point for group in target_points(replace(grid, kind="emulated")) for point in group]


def grid(**axes: object) -> TargetGrid:
    given = {"regime": "full", "seq_lens": (614_400,), "strategies": ("ulysses",), "sp_degrees": (8,)}
    return TargetGrid(**(given | {"policies": ("keep_attention",), "baseline": False} | axes))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_headline_table_stays_within_its_minutes() -> None:
    sweep = headline()
    assert sweep.minutes == 9.0
    budget = 60 * sweep.minutes - REPORT_S
    rows: dict[int, set[str]] = {}
    planned = slow = START_S
    # The first four grids are the table: ours at every length, and a baseline at those where it fits.
    for target in sweep.targets[:4]:
        for point in points(target):
            block = block_seconds(point)
            planned += plan_seconds(plan_of(point, block), block)
            # Of the rates that a step leans on, attention's reach furthest down.
            low = block / slowest(point)
            slow += plan_seconds(plan_of(point, low), low)
            rows.setdefault(point.seq_len, set()).add("baseline" if point.is_baseline else point.strategy)
    both = {"baseline", "ulysses"}
    assert rows == {65_536: both, 262_144: both, 614_400: both, 819_200: {"ulysses"}}
    assert planned < 0.7 * budget
    assert slow < 0.9 * budget
    # By the assumed rates there is time for the baseline to run out of memory, too.
    (last,) = points(sweep.targets[4])
    assert (last.seq_len, last.is_baseline) == (819_200, True)
    plan = plan_of(last, block_seconds(last))
    assert plan.memory_share > 1
    assert planned + plan_seconds(plan, block_seconds(last)) < budget


def slowest(point: Point) -> float:
    """The low end of attention's rate over its value."""
    assert point.target is not None
    rate = get_profile(point.target).attention(point.model.head_dim, backward=True)
    return rate.low / rate.value


def test_long_steps_are_continued_from_two_depths_of_two_samples() -> None:
    for point in (p for target in headline().targets[:5] for p in points(target)):
        block = block_seconds(point)
        plan = plan_of(point, block)
        if 28 * block > 10:
            assert plan.depths == (1, 2) and plan.samples >= 2
        else:
            # Short enough for the whole depth, which shows how straight the line is.
            assert plan.depths == (1, 2, 28) and plan.whole_samples >= 2


def test_the_whole_depth_runs_where_it_is_asked_for() -> None:
    (point,) = points(grid())
    assert plan_of(point, 3.2).depths == (1, 2)
    plan = plan_of(point, 3.2, whole_depth=True)
    assert (plan.depths, plan.whole_samples) == ((1, 2, 28), 1)
    assert plan_seconds(plan, 3.2) - plan_seconds(plan_of(point, 3.2), 3.2) == pytest.approx(28 * 3.2, abs=2.0)


def test_memory_that_is_not_on_the_line_is_run_for() -> None:
    """At 32,768 tokens on eight ranks one block peaks elsewhere: a line from it is a third too high."""
    (short,), (long,) = (points(grid(seq_lens=(seq_len,))) for seq_len in (32_768, 262_144))
    assert memory_line(short) > 1.3
    assert memory_line(long) == pytest.approx(1, abs=0.01)
    # On a slow GPU that step is not short either, and its depth is run once, for its memory.
    plan = plan_of(short, 1.0)
    assert (plan.depths, plan.whole_samples) == ((1, 2, 28), 1)
    assert plan_of(long, 1.0).depths == (1, 2)
    # What does not fit anyway is found out by two depths.
    (large,) = points(grid(seq_lens=(65_536,), strategies=("local",), policies=("none",)))
    assert plan_of(large, 1.0).memory_share > 1 and plan_of(large, 1.0).depths == (1, 2)


@pytest.mark.parametrize(
    "axes",
    [
        {"strategies": ("local",), "policies": ("full",)},
        {"sp_degrees": (2,), "policies": ("none",)},
        {},
        {"seq_lens": (65_536,)},
        {"regime": "text_only", "layout": "replicated", "strategies": ("local",), "policies": ("full",)},
    ],
    ids=["baseline", "sp2-none", "sp8-keep", "short", "text-only"],
)
def test_estimates_are_near_the_predicted_computation(axes: dict[str, object]) -> None:
    (point,) = points(grid(**axes))
    steps = []
    for depth in (2, 3):
        model = replace(point.model, depth=depth)
        case = PredictionCase(model=model, parallel=point.parallel, num_gpus=8, target="H800", seq_len=point.seq_len)
        parts = predict_step(case).breakdown
        steps.append(parts["matmul"] + parts["attention"])
    assert block_seconds(point) == pytest.approx(steps[1] - steps[0], rel=0.12)


def test_memory_decides_the_order_of_samples() -> None:
    fits, large = (
        points(grid(seq_lens=(n,), strategies=("local",), policies=("full",)))[0] for n in (262_144, 819_200)
    )
    assert memory_share(fits) < 0.5 and memory_share(large) > 1.1
    doubtful = plan_of(large, 56.0)
    assert doubtful.is_doubtful and not plan_of(fits, 6.0).is_doubtful
    # One sample of depths 1 and 2 shows that it does not fit.
    assert plan_seconds(doubtful, 56.0) == pytest.approx(3 * 56.0, abs=10)
    assert plan_seconds(replace(doubtful, memory_share=0.95), 56.0) == pytest.approx(6 * 56.0, abs=10)


def test_estimates_follow_what_was_timed() -> None:
    estimates = Estimates()
    short, long = points(grid(seq_lens=(65_536, 819_200)))
    before = estimates.block_s(long)
    estimates.saw(short, 2 * block_seconds(short))
    assert estimates.block_s(long) == pytest.approx(2 * before)
    # The longest length timed counts.
    estimates.saw(long, 3 * before)
    estimates.saw(short, block_seconds(short))
    assert estimates.block_s(short) == pytest.approx(3 * block_seconds(short))
    other = replace(long, parallel=replace(long.parallel, attention_provider="triton"))
    assert estimates.block_s(other) == pytest.approx(before)


@pytest.mark.parametrize("depths", [(2, 3), (1, 3), (1, 2, 3, 4), ()])
def test_depths_that_make_no_line_are_refused(depths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="depths must be one depth, 1 and 2, or 1, 2 and the model's"):
        Plan(depths=depths, samples=2)
