from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from longreel.bench.cases import Timing
from longreel.reports.compare import Baselines, Group, headline
from longreel.reports.turns import CONFIDENCE, compare, quantile
from longreel.reports.verdicts import of_interval, verdict


def between(low, high):
    return tuple(low + (high - low) * i / 4 for i in range(5))


MANY = between(1.9, 2.1)


def of(make_record, *, baseline=None, **changes):
    timed = {} if "status" in (baseline or {}) else {"interval_s": (1.9, 2.1), "samples_s": MANY}
    one = make_record(is_baseline=True, num_devices=1, **(timed | (baseline or {})))
    samples = {"samples_s": between(*changes.get("interval_s") or (1.9, 2.1))}
    other = make_record(policy="none", num_devices=1, **(samples | changes))
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
def test_verdict_from_both_samples(make_record, step, interval, expected):
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
    timed = {"step_s": 1.0, "interval_s": (0.9, 1.1), "samples_s": between(0.9, 1.1)}
    faster = timed | {"provenance": origin | {name: "another"}}
    baselines = Baselines([other, make_record(is_baseline=True, num_devices=1, **faster)])
    assert baselines.ratio(other) == pytest.approx(0.5)
    found = compare(MANY, between(0.9, 1.1))
    assert baselines.ratio_interval(other) == (pytest.approx(1 / found.high), pytest.approx(1 / found.low))
    assert verdict(other, baselines) == "SLOW"


@pytest.mark.parametrize(
    "changes",
    [{"samples_s": MANY[:3]}, {"provenance": {"sharing": "2 ranks share 1 core"}}, {"status": "error"}],
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


def test_equal_records_timed_apart_are_called_different_at_most_one_time_in_twenty(make_record):
    """By the 20th and 80th percentiles of five steps it would be one time in ten."""
    source, draws, different = random.Random(0), 800, 0
    for _ in range(draws):
        pair = []
        for policy in ("full", "none"):
            samples = tuple(1 + 0.05 * source.gauss(0, 1) for _ in range(5))
            bounds = quantile(samples, 0.2), quantile(samples, 0.8)
            timed = {"samples_s": samples, "step_s": statistics.median(samples), "interval_s": bounds}
            pair.append(make_record(policy=policy, is_baseline=policy == "full", num_devices=1, **timed))
        different += verdict(pair[1], Baselines(pair)) in ("FAST", "SLOW")
    assert different / draws <= 1 - CONFIDENCE + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_headline_and_row_agree_on_the_fewest_samples_in_turns(make_record):
    """The least that a sweep times by default decides in both, or in neither."""
    samples = between(0.9, 1.0)[:4]
    one = make_record(is_baseline=True, num_devices=1, samples_s=tuple(2 * s for s in samples), step_s=2.0)
    found = compare(samples, one.samples_s)
    turns = {"verdict": found.verdict, "ratio": found.ratio, "low": found.low, "high": found.high}
    other = make_record(policy="none", num_devices=1, samples_s=samples, step_s=1.0, comparison=turns)
    assert Timing().min_samples == len(samples)
    assert verdict(other, Baselines([one, other])) == "FAST"
    line = headline(Group.of(one), [one, other], Baselines([one, other]))
    assert line.is_conclusive
    assert line.verdict.startswith("Faster than the baseline over the whole interval.")
