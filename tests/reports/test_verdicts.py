from __future__ import annotations

from dataclasses import replace

import pytest

from longreel.reports.compare import Baselines
from longreel.reports.verdicts import of_interval, verdict

MANY = (2.0,) * 5


def of(make_record, *, baseline=None, **changes):
    timed = {} if "status" in (baseline or {}) else {"interval_s": (1.9, 2.1), "samples_s": MANY}
    one = make_record(is_baseline=True, num_devices=1, **(timed | (baseline or {})))
    other = make_record(policy="none", num_devices=1, **({"samples_s": MANY} | changes))
    return verdict(other, Baselines([one, other])), verdict(one, Baselines([one, other]))


@pytest.mark.parametrize(
    ("step", "interval", "expected"),
    [
        (1.0, (0.9, 1.1), "FAST"),
        (4.0, (3.9, 4.1), "SLOW"),
        (2.0, (1.8, 2.2), "AMBIGUOUS"),
        (1.0, None, None),
    ],
)
def test_verdict_from_both_intervals(make_record, step, interval, expected):
    assert of(make_record, step_s=step, interval_s=interval) == (expected, None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.992, 1.008, "SAME"), (1.001, 1.2, "FAST"), (0.8, 0.999, "SLOW"), (0.98, 1.02, "AMBIGUOUS")],
)
def test_of_interval(low, high, expected):
    assert of_interval(low, high) == expected


def test_recorded_verdict_of_samples_in_turns_counts_first(make_record):
    recorded = {"verdict": "SAME", "ratio": 1.0, "low": 0.995, "high": 1.005}
    assert of(make_record, step_s=1.0, interval_s=(0.9, 1.1), comparison=recorded)[0] == "SAME"
    forged = {"verdict": "<b>FASTEST</b>", "low": "x", "high": []}
    impossible = {"verdict": "SLOW", "ratio": 1.1, "low": 0, "high": 1.2}
    for comparison in (forged, impossible, impossible | {"low": 1.3}, impossible | {"low": 1.0, "high": float("inf")}):
        assert of(make_record, step_s=1.0, interval_s=(0.9, 1.1), comparison=comparison)[0] == "FAST"


def test_interval_of_samples_in_turns_is_the_ratios(make_record):
    one = make_record(is_baseline=True, num_devices=1, step_s=2.0)
    comparison = {"verdict": "FAST", "ratio": 0.5, "low": 0.4, "high": 0.8}
    other = make_record(policy="none", num_devices=1, step_s=1.0, interval_s=(0.1, 9.0), comparison=comparison)
    assert Baselines([one, other]).ratio_interval(other) == (pytest.approx(1.25), pytest.approx(2.5))


def test_ratio_interval_and_verdict_are_of_the_same_samples(make_record):
    """After a resumed sweep the baseline's record holds other steps than those that ran beside the candidate."""
    one = make_record(is_baseline=True, num_devices=1, step_s=2.0)
    comparison = {"verdict": "SLOW", "ratio": 1.25, "low": 1.2, "high": 1.3}
    other = make_record(policy="none", num_devices=1, step_s=1.9, comparison=comparison)
    baselines = Baselines([one, other])
    assert baselines.ratio(other) == pytest.approx(0.8)
    assert baselines.ratio_interval(other) == (pytest.approx(1 / 1.3), pytest.approx(1 / 1.2))
    assert verdict(other, baselines) == "SLOW"


@pytest.mark.parametrize("name", ["commit", "environment"])
def test_samples_in_turns_with_another_runs_baseline_are_not_of_this_one(make_record, name):
    origin = {"commit": "a", "environment": {"gpu": "one"}}
    comparison = {"verdict": "FAST", "ratio": 0.5, "low": 0.4, "high": 0.6}
    other = make_record(policy="none", num_devices=1, step_s=2.0, samples_s=MANY, interval_s=(1.9, 2.1))
    other = replace(other, comparison=comparison, provenance=origin)
    faster = {"step_s": 1.0, "interval_s": (0.9, 1.1), "samples_s": MANY, "provenance": origin | {name: "another"}}
    baselines = Baselines([other, make_record(is_baseline=True, num_devices=1, **faster)])
    assert baselines.ratio(other) == pytest.approx(0.5)
    assert baselines.ratio_interval(other) == (pytest.approx(0.9 / 2.1), pytest.approx(1.1 / 1.9))
    assert verdict(other, baselines) == "SLOW"


@pytest.mark.parametrize(
    "changes",
    [{"samples_s": MANY[:4]}, {"provenance": {"sharing": "2 ranks share 1 core"}}, {"status": "error"}],
    ids=["few-samples", "shared-cores", "failed"],
)
def test_no_verdict(make_record, changes):
    timed = {} if "status" in changes else {"step_s": 1.0, "interval_s": (0.9, 1.1)}
    assert of(make_record, **timed, **changes)[0] is None
    # Nor where it is so of the baseline.
    assert of(make_record, baseline=changes, step_s=1.0, interval_s=(0.9, 1.1))[0] is None


def test_predictions_are_judged_without_samples(make_record):
    changes = {"kind": "predicted", "samples_s": ()}
    one = make_record(is_baseline=True, num_devices=1, interval_s=(1.9, 2.1), **changes)
    other = make_record(policy="none", num_devices=1, step_s=1.0, interval_s=(0.9, 1.1), **changes)
    assert verdict(other, Baselines([one, other])) == "FAST"
