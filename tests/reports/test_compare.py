from __future__ import annotations

import pytest

from longreel.reports.compare import (
    Baselines,
    Group,
    group_records,
    headline,
    sharing,
    throughput_interval,
)


def test_groups_never_mix_kind_regime_model_device_or_count(make_record):
    records = [
        make_record(),
        make_record(kind="predicted"),
        make_record(kind="emulated"),
        make_record(regime="text_only"),
        make_record(model="dit_s_2"),
        make_record(device="another CPU"),
        make_record(num_devices=4),
    ]
    groups = group_records(reversed(records))
    assert all(len(found) == 1 for found in groups.values())
    assert [g.kind for g in groups] == ["measured"] * 5 + ["emulated", "predicted"]


def test_ratio_is_tokens_per_second_over_the_baseline_at_the_same_length(make_record):
    baseline = make_record(is_baseline=True, step_s=3.0)
    longer = make_record(is_baseline=True, step_s=99.0, seq_len=2048)
    elsewhere = make_record(is_baseline=True, step_s=0.1, kind="predicted")
    record = make_record(strategy="ulysses", sp_degree=2, step_s=1.0)
    baselines = Baselines([longer, elsewhere, baseline, record])
    assert baselines.ratio(record) == pytest.approx(1.5)  # half the samples in a third of the time
    assert baselines.ratio(baseline) == 1.0
    assert baselines.ratio(make_record(seq_len=4096)) is None


def test_no_ratio_without_two_valid_figures(make_record):
    baseline = make_record(is_baseline=True, status="oom")
    record = make_record(strategy="ulysses", sp_degree=2)
    assert Baselines([baseline, record]).ratio(record) is None
    wrong = make_record(strategy="ulysses", sp_degree=2, status="wrong", step_s=0.01)
    assert Baselines([make_record(is_baseline=True), wrong]).ratio(wrong) is None


def test_of_several_marked_baselines_the_fastest_that_ran_counts(make_record):
    slow, fast = make_record(is_baseline=True, step_s=4.0), make_record(is_baseline=True, step_s=2.0, policy="none")
    failed = make_record(is_baseline=True, status="oom", policy="offload")
    baselines = Baselines([slow, fast, failed])
    assert baselines.of(slow) is fast
    assert baselines.ratio(slow) == pytest.approx(0.5)


def test_ratio_interval_combines_both_intervals_at_their_worst(make_record):
    baseline = make_record(kind="predicted", is_baseline=True, num_devices=1, step_s=4.0, interval_s=(3.0, 5.0))
    record = make_record(kind="predicted", policy="none", num_devices=1, step_s=2.0, interval_s=(1.0, 2.5))
    low, high = Baselines([baseline, record]).ratio_interval(record)
    assert (low, high) == (pytest.approx(3.0 / 2.5), pytest.approx(5.0 / 1.0))
    assert throughput_interval(record) == (pytest.approx(1024 / 2.5), pytest.approx(1024 / 1.0))
    assert throughput_interval(make_record(interval_s=(0.0, 2.5))) is None


def test_headline_compares_at_the_longest_length_of_the_baseline(sweep):
    predicted = [r for r in sweep if r.kind == "predicted"]
    line = headline(Group.of(predicted[0]), predicted, Baselines(predicted))
    assert line.best is not None
    assert line.baseline is not None
    assert line.longest is not None
    assert line.best.seq_len == line.baseline.seq_len == 131072
    assert line.longest.seq_len == 819200
    assert line.ratio == pytest.approx(line.best.tokens_per_s / line.baseline.tokens_per_s)


@pytest.mark.parametrize(
    ("step", "interval", "verdict"),
    [
        (1.0, (0.9, 1.1), "Faster than the baseline over the whole interval."),
        (1.9, (1.0, 3.0), "The interval includes 1"),
        (1.9, None, "no interval was recorded"),
        (9.0, (8.0, 10.0), "Nothing beats the baseline"),
    ],
    ids=["clear", "unclear", "no-interval", "slower"],
)
def test_headline_verdict(make_record, step, interval, verdict):
    low, high = interval or (step, step)
    samples = tuple(low + (high - low) * i / 4 for i in range(5))
    records = [
        make_record(is_baseline=True, num_devices=1, samples_s=(1.9, 2.0, 2.0, 2.1, 2.2)),
        make_record(policy="none", num_devices=1, step_s=step, interval_s=interval, samples_s=samples),
    ]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert verdict in line.verdict
    assert line.is_conclusive


@pytest.mark.parametrize("step", [1.0, 9.0], ids=["faster", "slower"])
@pytest.mark.parametrize("samples", [(3, 9), (9, 3)], ids=["baseline-short", "candidate-short"])
def test_below_four_samples_a_side_there_is_no_verdict(make_record, step, samples):
    records = [
        make_record(is_baseline=True, num_devices=1, samples_s=(2.0,) * samples[0]),
        make_record(policy="none", num_devices=1, step_s=step, interval_s=(step, step), samples_s=(step,) * samples[1]),
    ]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.verdict == "No verdict: too few samples, 3 timed steps where at least 4 are needed."
    assert not line.is_conclusive


def test_ranks_that_share_cores_have_no_verdict(make_record):
    shared = {"provenance": {"sharing": "2 ranks share 1 core"}, "samples_s": (2.0,) * 9}
    records = [make_record(is_baseline=True, **shared), make_record(policy="none", step_s=0.1, **shared)]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.verdict == "No verdict: 2 ranks share 1 core, so this checks correctness, not speed."
    assert not line.is_conclusive
    assert sharing(records) == "2 ranks share 1 core"
    assert sharing([make_record()]) is None


def test_predictions_need_no_samples(make_record):
    records = [
        make_record(kind="predicted", samples_s=(), is_baseline=True),
        make_record(kind="predicted", samples_s=(), policy="none", step_s=1.0, interval_s=(0.9, 1.1)),
    ]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.verdict == "Faster than the baseline over the whole interval."
    assert line.is_conclusive


def test_a_predicted_interval_with_1_in_it_says_how_it_was_made(make_record):
    shared = {"kind": "predicted", "samples_s": ()}
    records = [
        make_record(is_baseline=True, interval_s=(1.5, 2.5), **shared),
        make_record(policy="none", step_s=1.6, interval_s=(1.2, 2.0), **shared),
    ]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.verdict.startswith("The interval includes 1. It is wider than the model's doubt")
    assert "not distinguishable" not in line.verdict


def test_long_emulated_steps_have_a_ratio_and_say_how_few_they_are(make_record):
    def pair(kind):
        timed = {"kind": kind, "num_devices": 1, "samples_s": (2.0, 2.1), "step_s": 2.0, "interval_s": (2.0, 2.1)}
        faster = timed | {"samples_s": (1.0, 1.1), "step_s": 1.0, "interval_s": (1.0, 1.1)}
        return [make_record(is_baseline=True, **timed), make_record(policy="none", **faster)]

    records = pair("emulated")
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.is_conclusive
    assert line.ratio == pytest.approx(2.0)
    assert line.ratio_interval == (pytest.approx(2.0 / 1.1), pytest.approx(2.1))
    assert line.verdict == (
        "Faster than the baseline over the whole interval. It is what the extremes of 2 timed steps of each allow."
    )
    measured = pair("measured")
    assert not headline(Group.of(measured[0]), measured, Baselines(measured)).is_conclusive


def test_headline_of_a_group_without_any_figure(make_record):
    records = [make_record(status="oom", is_baseline=True)]
    line = headline(Group.of(records[0]), records, Baselines(records))
    assert line.best is None
    assert line.verdict == "No configuration has a figure."
