"""bench.op_estimate: seconds from rates, measured before assumed, and what a case loses when it takes too long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreel.bench.op_estimate import LEAST_SAMPLES, Rates, fit
from longreel.bench.ops import OpCase, work_of
from longreel.bench.timing import TimingRule
from longreel.reports.op_records import OpRecord

RULE = TimingRule(min_samples=5, max_samples=50, budget_s=0.2, wall_cap_s=60.0, warm_up_s=0.05)
DIRECTIONS = ("forward", "backward")
NAMES = ("triton", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient")


def case_of(seq_len: int) -> OpCase:
    return OpCase(op="attention", dtype="bf16", seq_len=seq_len, num_heads=2, head_dim=72)


def measured(case: OpCase, provider: str, direction: str, seconds: float, **changes: object) -> OpRecord:
    values = {
        "kind": "measured",
        "status": "ok",
        "op": case.op,
        "direction": direction,
        "provider": provider,
        "dtype": case.dtype,
        "device": "a GPU",
        "shape": case.shape(),
        "run": "r1",
        "median_s": seconds,
        **work_of(case, direction),
    }
    return OpRecord(**(values | changes))


def test_time_grows_with_the_square_of_the_length_from_the_nearest_one_measured():
    records = [measured(case_of(4096), "triton", "forward", 9.0), measured(case_of(32_768), "triton", "forward", 1e-3)]
    rates = Rates(records, "a GPU", assume=False)
    assert rates.seconds(case_of(65_536), "triton", "forward") == pytest.approx(4e-3)
    assert rates.seconds(case_of(8192), "triton", "forward") == pytest.approx(36.0)
    # The backward of it, another provider and another device are not known.
    assert rates.seconds(case_of(65_536), "triton", "backward") is None
    assert rates.seconds(case_of(65_536), "triton", "both") is None
    assert rates.seconds(case_of(65_536), "sdpa-flash", "forward") is None
    assert Rates(records, "another GPU", assume=False).seconds(case_of(65_536), "triton", "forward") is None


def test_candidates_of_tuning_say_nothing_about_a_provider():
    record = measured(case_of(4096), "triton", "forward", 1.0, config={"label": "tune forward 80 long"})
    assert Rates([record], "a GPU", assume=False).seconds(case_of(4096), "triton", "forward") is None


def test_what_is_taken_over_from_another_provider_takes_as_long():
    record = measured(case_of(4096), "triton", "forward", 2.0)
    rates = Rates([record], "a GPU", assume=False)
    assert rates.seconds(case_of(4096), "triton-atomic", "forward") == pytest.approx(2.0)
    # And is not timed again.
    assert rates.timing_seconds(case_of(4096), "triton-atomic", "forward", RULE, 5) == 0.0


def test_assumed_rates_only_where_nothing_was_measured():
    rates = Rates([measured(case_of(4096), "triton", "forward", 7.0)], "a GPU", assume=True)
    assert rates.seconds(case_of(4096), "triton", "forward") == pytest.approx(7.0)
    flash = rates.seconds(case_of(819_200), "sdpa-flash", "forward")
    assert 1.0 < flash < 2.5


def test_a_sample_of_a_backward_runs_the_forward_before_it():
    case = case_of(4096)
    records = [measured(case, "triton", "forward", 0.5), measured(case, "triton", "backward", 1.0)]
    rates = Rates(records, "a GPU", assume=False)
    assert rates.timing_seconds(case, "triton", "forward", RULE, 5) == pytest.approx(6 * 0.5)
    assert rates.timing_seconds(case, "triton", "backward", RULE, 5) == pytest.approx(6 * 1.5)
    assert rates.gate_seconds(case, "triton") == pytest.approx(2 * 1.5)
    # What takes seconds is run once at the gate and not to warm up.
    records = [measured(case, "triton", "forward", 1.0), measured(case, "triton", "backward", 2.0)]
    long = Rates(records, "a GPU", assume=False)
    assert long.is_long(case, "triton")
    assert not rates.is_long(case, "triton")
    assert long.timing_seconds(case, "triton", "backward", RULE, 5) == pytest.approx(5 * 3.0)
    assert long.gate_seconds(case, "triton") == pytest.approx(3.0)
    # Short calls are repeated until the budget is spent.
    quick = Rates([measured(case, "triton", "forward", 0.01)], "a GPU", assume=False)
    assert quick.timing_seconds(case, "triton", "forward", RULE, 5) == pytest.approx(0.05 + 20 * 0.01)


def test_a_provider_that_is_not_installed_takes_no_time():
    gone = measured(case_of(4096), "flash-attn-4", "forward", 1.0, status="skipped", reason="it is not installed (x)")
    gone = replace(gone, median_s=None)
    assert Rates([gone], "a GPU", assume=True).gate_seconds(case_of(819_200), "flash-attn-4") == 0.0
    assert Rates([], "a GPU", assume=True).gate_seconds(case_of(819_200), "flash-attn-4") > 1.0


def test_a_case_that_fits_is_not_cut():
    rates = Rates([], "a GPU", assume=True)
    found = fit(case_of(32_768), NAMES, DIRECTIONS, RULE, rates, case_s=60.0)
    assert (found.samples, dict(found.left_out)) == (RULE.min_samples, {})
    assert found.seconds < 60.0


def test_a_long_case_gets_fewer_samples_then_fewer_peers_and_keeps_ours_and_the_fastest():
    rates = Rates([], "a GPU", assume=True)
    long = case_of(819_200)
    whole = fit(long, NAMES, DIRECTIONS, RULE, rates, case_s=None)
    assert (whole.samples, whole.left_out) == (5, {})
    fewer = fit(long, NAMES, DIRECTIONS, RULE, rates, case_s=0.9 * whole.seconds)
    assert fewer.samples < 5
    assert not fewer.left_out
    assert fewer.seconds <= 0.9 * whole.seconds
    few = replace(RULE, min_samples=LEAST_SAMPLES)
    without_slowest = fit(long, NAMES[:-1], DIRECTIONS, few, rates, case_s=None).seconds
    cut = fit(long, NAMES, DIRECTIONS, RULE, rates, case_s=without_slowest + 0.01)
    assert cut.samples == LEAST_SAMPLES
    assert cut.seconds == pytest.approx(without_slowest)
    assert list(cut.left_out) == ["sdpa-efficient"]
    assert f"of the {without_slowest + 0.01:g} s it may take" in cut.left_out["sdpa-efficient"]
    least = fit(long, NAMES, DIRECTIONS, RULE, rates, case_s=1.0)
    assert list(least.left_out) == ["sdpa-efficient", "sdpa-flash"]
    assert least.seconds > 1.0
