"""longreel.bench.outcome: results to records."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreel.bench.cases import Timing
from longreel.bench.gate import Verdict
from longreel.bench.grids import MeasuredGrid, TargetGrid, measured_points, target_points
from longreel.bench.measure import RankResult
from longreel.bench.outcome import measured_record, predicted_record
from longreel.bench.presets import small_dit
from longreel.parallel.predict.predict import Prediction
from longreel.reports.records import Record

PROVENANCE = {"commit": "c", "environment": {}}
GiB = 2**30
PREDICTION = Prediction(
    memory_bytes=90 * GiB,
    memory_by_phase={"forward": 90 * GiB},
    kept_bytes=1,
    host_bytes=0,
    memory_limit=80 * GiB,
    usable_bytes=73 * GiB,
    fits=False,
    flops=3.0,
    hw_flops=4.0,
    traffic={"sequence.all_to_all": 5},
    step_s=2.0,
    interval_s=(1.5, 2.5),
    mfu=0.3,
    hfu=0.4,
    breakdown={},
    hidden={},
    inputs={
        "memory_bytes": {"value": 80 * GiB, "provenance": "assumed", "source": "a sheet"},
        "link": {"value": 1.5e11, "low": 1e11, "high": 2e11, "provenance": "assumed", "source": "a guess"},
    },
)


def rank_result(**changes) -> RankResult:
    fields = {
        "verdict": Verdict(loss=1e-8, grad=2e-7, parameter="final.proj.bias"),
        "reason": None,
        "traffic": {"sequence.send": 7},
        "traffic_formula": {"all_gather": 7},
        "flops": 100,
        "samples_s": (3.0, 1.0, 2.0),
        "memory": {"process": 500, "process_before": 400},
        "memory_source": "VmHWM",
    }
    return RankResult(**(fields | changes))


@pytest.fixture
def measured():
    grid = MeasuredGrid(seq_lens=(64,), ranks=(4,), sp_degrees=(2,), model=small_dit())
    return next(p for p in measured_points(grid, device="CPU") if p.parallel.strategy == "fastseq")


def test_measured_point_keeps_every_sample_and_the_fullest_rank(measured) -> None:
    ranks = [rank_result(), rank_result(memory={"process": 900, "process_before": 300}), rank_result(), rank_result()]
    record = measured_record(measured, ranks, PROVENANCE)
    assert record.status == "ok"
    assert record.samples_s == (3.0, 1.0, 2.0)
    assert record.step_s == 2.0
    assert record.interval_s == pytest.approx((1.4, 2.6))
    assert record.memory == {"process": 900, "process_before": 300}
    assert record.error == {"loss": 1e-8, "grad": 2e-7, "tolerance": 1e-5}
    assert record.traffic == {"sequence.send": 7}
    assert record.provenance["traffic_formula"] == {"all_gather": 7}
    assert record.provenance["memory_source"] == "VmHWM"
    assert record.provenance["timing"]["min_samples"] == measured.timing.min_samples
    # SP 2 x DP 2: two groups, of which the first one's ranks were counted.
    assert record.hw_flops == 400
    assert record.tokens_per_s == 64 * 2 / 2.0
    assert Record.from_json(record.to_json()) == record


def test_fullest_rank_is_the_one_whose_step_adds_most(measured) -> None:
    ranks = [rank_result(memory={"process": 900, "process_before": 890}), *[rank_result()] * 3]
    assert measured_record(measured, ranks, PROVENANCE).memory == {"process": 500, "process_before": 400}
    whole = [rank_result(memory={"process": 300 + i}) for i in range(4)]
    assert measured_record(measured, whole, PROVENANCE).memory == {"process": 303}


@pytest.mark.parametrize(("cores", "said"), [(1, "4 ranks share 1 core"), (3, "4 ranks share 3 cores"), (4, None)])
def test_ranks_beyond_the_cores_share_them(measured, cores, said) -> None:
    record = measured_record(measured, [rank_result()] * 4, PROVENANCE | {"environment": {"cores": cores}})
    assert record.provenance.get("sharing") == said


def test_how_often_a_point_was_timed_makes_it_no_other_point(measured) -> None:
    again = replace(measured, timing=Timing(min_samples=2))
    first, second = (measured_record(p, [rank_result()] * 4, PROVENANCE) for p in (measured, again))
    assert first.key == second.key
    assert first.provenance["timing"] != second.provenance["timing"]


def test_verdict_is_of_the_rounds_that_both_sides_were_in(measured) -> None:
    """A machine that slows down while a short step is timed on says nothing about the two."""
    baseline = rank_result(samples_s=(4.0, 4.01, 4.02, 4.03))
    # Half of the baseline's samples in half of its time, then six rounds alone.
    alone = (2.2, 2.21, 2.22, 2.23, 2.24, 2.25)
    ranks = [rank_result(samples_s=(2.0, 2.005, 2.01, 2.015, *alone))] * 4
    record = measured_record(measured, ranks, PROVENANCE, baseline=baseline)
    assert len(record.samples_s) == 10
    assert record.comparison["verdict"] == "SAME"
    assert record.comparison["ratio"] == pytest.approx(1.0)
    # The longer side is cut, whichever it is.
    long = rank_result(samples_s=(*baseline.samples_s, 9.0))
    short = [rank_result(samples_s=(2.0, 2.005, 2.01, 2.015))] * 4
    found = measured_record(measured, short, PROVENANCE, baseline=long).comparison
    assert found["verdict"] == "SAME"
    assert found["baseline_samples_s"] == list(baseline.samples_s)


def test_heads_make_another_model(measured) -> None:
    grids = [MeasuredGrid(seq_lens=(64,), model=small_dit(num_heads=heads)) for heads in (2, 4)]
    assert [grid.model_name for grid in grids] == [f"DiT of depth 2, width 64, {n} heads" for n in (2, 4)]


def test_measured_points_have_one_sample_per_group(measured) -> None:
    with pytest.raises(ValueError, match="batch_per_group must be 1"):
        replace(measured, batch_per_group=2)


def test_closed_gate_leaves_no_figure(measured) -> None:
    bad = Verdict(loss=float("inf"), grad=1.0, parameter="x")
    ranks = [rank_result(verdict=bad, reason=bad.reason, samples_s=(), memory={})] * 4
    record = measured_record(measured, ranks, PROVENANCE)
    assert record.status == "wrong"
    assert record.step_s is None
    assert record.samples_s == ()
    assert "loss differs" in record.reason
    assert Record.from_json(record.to_json()) == record


def test_prediction_that_does_not_fit_is_oom_with_the_figures() -> None:
    point = target_points(TargetGrid(regime="full", seq_lens=(64,)))[0][0]
    record = predicted_record(point, PREDICTION, PROVENANCE)
    assert (record.kind, record.status, record.step_s) == ("predicted", "oom", None)
    assert record.reason == "needs 90.0 GiB of 73.0 GiB usable (80 GiB H800 less the reserve)"
    assert record.memory == {"allocated": 90 * GiB}
    assert record.memory_limit == 80 * GiB
    assert record.memory_usable == 73 * GiB
    fitting = predicted_record(point, replace(PREDICTION, fits=True), PROVENANCE)
    assert fitting.status == "ok"
    assert fitting.step_s == 2.0
    assert fitting.interval_s == (1.5, 2.5)
    assert fitting.provenance["inputs"] == {
        "memory_bytes": "80.0 GiB, assumed: a sheet",
        "link": "1.5e+11 (1e+11 to 2e+11), assumed: a guess",
    }
    assert Record.from_json(fitting.to_json()) == fitting
