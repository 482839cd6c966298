from __future__ import annotations

import random
from dataclasses import replace

import pytest

from longreel.reports.runs import Thresholds, compare_runs
from longreel.reports.runs_report import lines, page
from longreel.reports.summary import summary_lines

LIMITS = Thresholds()
SAMPLES = tuple(2.0 + 0.01 * i for i in range(8))


def scaled(record, factor):
    samples = tuple(factor * s for s in record.samples_s)
    return replace(record, step_s=factor * record.step_s, samples_s=samples)


def only(make_record, factor, **changes):
    old = make_record(samples_s=changes.pop("samples_s", SAMPLES), **changes)
    return compare_runs([old], [scaled(old, factor)], LIMITS)


@pytest.mark.parametrize(
    ("factor", "outcome"), [(1.2, "regression"), (0.8, "improvement"), (1.04, None), (0.97, None), (1.0, None)]
)
def test_step_time_must_change_by_the_size(make_record, factor, outcome):
    changes = only(make_record, factor).changes
    assert [c.outcome for c in changes] == ([outcome] if outcome else [])


def test_noisy_change_is_undecided(make_record):
    noisy = tuple(2.0 * f for f in (0.6, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0))
    (change,) = only(make_record, 1.1, samples_s=noisy).changes
    assert change.outcome == "undecided"
    assert change.interval[0] < 1 < change.interval[1]


@pytest.mark.parametrize(("count", "outcome"), [(3, "undecided"), (4, "regression"), (0, "undecided")])
def test_few_samples_decide_only_where_chance_is_small(make_record, count, outcome):
    (change,) = only(make_record, 1.5, samples_s=SAMPLES[:count]).changes
    assert change.outcome == outcome
    assert bool(change.why) == (outcome == "undecided")


def test_size_and_confidence_are_options(make_record):
    old = make_record(samples_s=SAMPLES)
    new = scaled(old, 1.04)
    assert compare_runs([old], [new], Thresholds(size=0.05)).changes == ()
    assert len(compare_runs([old], [new], Thresholds(size=0.03)).of("regression")) == 1
    four = [replace(r, samples_s=r.samples_s[:4]) for r in (old, scaled(old, 1.5))]
    assert len(compare_runs(four[:1], four[1:], Thresholds(confidence=0.95)).of("regression")) == 1
    assert len(compare_runs(four[:1], four[1:], Thresholds(confidence=0.99)).of("undecided")) == 1
    for bad in ({"size": 0}, {"size": 5}, {"confidence": 1}, {"confidence": 95}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Thresholds(**bad)


def test_predictions_have_no_noise(make_record):
    (change,) = only(make_record, 1.2, kind="predicted", samples_s=(), interval_s=(0.1, 99.0)).changes
    assert (change.outcome, change.interval) == ("regression", None)


def test_equal_runs_are_rarely_called_different(make_record):
    """Two runs of one distribution: no more often than 1 - confidence, half of it as slower."""
    source = random.Random(0)
    wrong = 0
    for _ in range(400):
        sides = [tuple(source.lognormvariate(0, 0.1) for _ in range(10)) for _ in range(2)]
        old, new = (make_record(samples_s=s, step_s=sorted(s)[5]) for s in sides)
        wrong += bool(compare_runs([old], [new], Thresholds(size=0.001)).of("regression"))
    assert wrong <= 18


def test_what_broke_comes_first_and_memory_and_traffic_count(make_record):
    old = [
        make_record(samples_s=SAMPLES),
        make_record(policy="none", samples_s=SAMPLES, memory={"allocated": 2**30}),
        make_record(policy="offload", status="oom"),
        make_record(policy="auto", status="oom"),
    ]
    new = [
        scaled(old[0], 1.3),
        replace(old[1], memory={"allocated": 2**31}, traffic={"all_to_all": 100}),
        make_record(policy="offload"),
        make_record(policy="auto", status="error"),
    ]
    broken = make_record(policy="keep_attention", status="error", reason="worker died")
    old.append(make_record(policy="keep_attention"))
    found = compare_runs(old, [*new, broken], LIMITS)
    assert [(c.quantity, c.label) for c in found.of("regression")] == [
        ("status", "local, SP 1, keep_attention"),
        ("memory", "local, SP 1, none"),
        ("step time", "local, SP 1, full"),
    ]
    assert [c.quantity for c in found.of("improvement")] == ["status", "traffic"]
    assert [(c.before, c.after) for c in found.of("other")] == [("oom", "error")]


@pytest.mark.parametrize(("before", "after", "outcome"), [({}, 100, "regression"), (100, {}, "improvement")])
def test_exchanges_that_came_or_went_are_changes(make_record, before, after, outcome):
    old, new = (make_record(traffic={"all_to_all": sent} if sent else {}) for sent in (before, after))
    (change,) = compare_runs([old], [new], LIMITS).changes
    assert (change.quantity, change.outcome, change.ratio) == ("traffic", outcome, None)
    assert "100 B" in "\n".join(lines(compare_runs([old], [new], LIMITS), ("old", "new")))


def test_records_do_not_move_the_cursor_of_a_terminal(make_record):
    hostile = {"device": "a\x1b[2Jdevice\nof", "strategy": "s\x9b31m", "samples_s": SAMPLES}
    old = [make_record(**hostile), make_record(**hostile, seq_len=2048)]
    new = [make_record(**hostile, status="error", reason="died\x1b]0;title\x07\nhere")]
    text = lines(compare_runs(old, new, LIMITS), ("old", "new"))
    assert any("died" in line for line in text) and any("2,048" in line for line in text)
    assert all(line.isprintable() for line in [*text, *summary_lines([*old, *new])])


def test_memory_of_a_process_is_noise(make_record):
    old = make_record()
    new = replace(old, memory={"process": 900 * 2**20, "process_before": 673 * 2**20})
    assert compare_runs([old], [new], LIMITS).changes == ()


def test_points_match_across_commits_and_lonely_ones_are_listed(make_record):
    old = [make_record(provenance={"commit": "a"}), make_record(seq_len=2048)]
    new = [make_record(provenance={"commit": "b"}), make_record(seq_len=4096, status="oom")]
    found = compare_runs(old, new, LIMITS)
    assert (found.num_common, found.changes) == (1, ())
    assert [p.seq_len for p in found.only_old] == [2048]
    assert [(p.seq_len, p.status) for p in found.only_new] == [(4096, "oom")]


def test_points_whose_configuration_gained_a_field_are_compared_and_named(make_record):
    old = make_record(samples_s=SAMPLES)
    new = replace(scaled(old, 2.0), config=dict(old.config) | {"new_option": None})
    found = compare_runs([old], [new], LIMITS)
    assert len(found.of("regression")) == 1
    assert found.reconfigured == ("local, SP 1, full at 1,024 tokens",)


def test_nothing_in_common_is_an_error(make_record):
    with pytest.raises(ValueError, match="no point in common"):
        compare_runs([make_record()], [make_record(seq_len=2048)], LIMITS)
    with pytest.raises(ValueError, match="old run has no records"):
        compare_runs([], [make_record()], LIMITS)


def test_words_and_page_put_regressions_first_and_escape(make_record):
    hostile = "</td><script>alert(1)</script>"
    old = [make_record(samples_s=SAMPLES, device=hostile), make_record(seq_len=2048, device=hostile)]
    new = [scaled(old[0], 1.5), make_record(seq_len=4096, device=hostile)]
    found = compare_runs(old, new, LIMITS)
    text = "\n".join(lines(found, ("old.jsonl", "new.jsonl")))
    assert text.index("Regressions: 1") < text.index("Only in old.jsonl: 1") < text.index("Only in new.jsonl: 1")
    assert "2.00 s -> 3.00 s  +50.0 %" in text
    html = page(found, (hostile, "new.jsonl"))
    assert "<script" not in html
    assert html.index("Regressions: 1") < html.index("Only in new.jsonl")
