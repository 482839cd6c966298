from __future__ import annotations

import pytest

from longreel.reports.html import render
from longreel.reports.published import PUBLISHED, columns, published_ratio

MODEL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": [1, 2, 2], "cross_layout": "published"}


@pytest.fixture
def make_ours(make_record):
    def make(**changes):
        """A predicted record of DiT-XL/2 on 8 GPUs; `layout` and `policy` go into its configuration."""
        layout = changes.pop("layout", "published")
        values = {
            "kind": "predicted",
            "regime": "text_only",
            "model": f"DiT-XL/2 {layout}",
            "device": "H800",
            "num_devices": 8,
            "seq_len": 614_400,
            "samples_s": (),
            "interval_s": None,
        } | changes
        values["config"] = {
            "model": MODEL | {"cross_layout": layout},
            "policy": values.get("policy"),
            "strategy": values.get("strategy"),
        }
        return make_record(**values)

    return make


def test_ratios_are_those_of_the_published_tables():
    assert [round(published_ratio(row), 3) for row in PUBLISHED] == [1.0, 1.456, 1.0, 1.409, 1.114]


def test_ours_stand_beside_by_gpus_length_degree_and_strategy(make_ours):
    records = [
        make_ours(is_baseline=True, step_s=8.0),
        make_ours(strategy="fastseq", sp_degree=2, step_s=3.0, interval_s=(2.5, 4.0)),
        make_ours(strategy="fastseq", sp_degree=2, step_s=2.0, policy="none"),
        make_ours(strategy="ulysses", sp_degree=2, seq_len=819_200, status="oom"),
        # None of these is a point of the tables.
        make_ours(strategy="ulysses", sp_degree=2),
        make_ours(strategy="fastseq", sp_degree=4),
        make_ours(policy="none", step_s=1.0),
    ]
    (column,) = columns(records)
    assert column.kind == "predicted"
    assert column.title == "text attention only, text laid out as published, H800"
    zero, fastseq, zero4, ulysses4, longer = column.cells
    assert zero.ratio == 1.0
    # 4 samples in 2 s against 8 in 8 s, by the fastest policy.
    assert fastseq.ratio == pytest.approx(2.0)
    assert fastseq.record.policy == "none"
    assert zero4 is None
    assert ulysses4 is None
    assert (longer.record.status, longer.ratio) == ("oom", None)


def test_samples_taken_in_turns_decide_here_too(make_ours):
    timed = {"kind": "measured", "samples_s": (8.0,) * 5, "interval_s": (7.9, 8.1)}
    comparison = {"verdict": "FAST", "ratio": 0.8, "low": 0.75, "high": 0.9}
    records = [
        make_ours(is_baseline=True, step_s=8.0, **timed),
        make_ours(strategy="fastseq", sp_degree=2, step_s=3.0, comparison=comparison, **timed),
    ]
    ours = columns(records)[0].cells[1]
    assert ours.ratio == pytest.approx(1 / 0.8)
    assert ours.interval == (pytest.approx(1 / 0.9), pytest.approx(1 / 0.75))


def test_longer_row_is_held_against_the_reference_length(make_ours):
    records = [
        make_ours(is_baseline=True, seq_len=819_200, step_s=20.0),
        make_ours(is_baseline=True, step_s=8.0, interval_s=(7.0, 10.0)),
        make_ours(strategy="ulysses", sp_degree=2, seq_len=819_200, step_s=5.0, interval_s=(4.0, 8.0)),
    ]
    ours = columns(records)[0].cells[-1]
    assert ours.ratio == pytest.approx((4 / 5) / (8 / 8))
    assert ours.interval == (pytest.approx(4 / 8 * 7 / 8), pytest.approx(4 / 4 * 10 / 8))


def test_kinds_regimes_and_layouts_are_columns_of_their_own(make_ours):
    changes = [{}, {"kind": "emulated"}, {"regime": "full"}, {"layout": "replicated"}, {"device": "H100"}]
    found = columns([make_ours(is_baseline=True, **change) for change in changes])
    assert len(found) == 5
    assert {(c.kind, c.title) for c in found} >= {
        ("emulated", "text attention only, text laid out as published, H800"),
        ("predicted", "full self-attention, text laid out as published, H800"),
        ("predicted", "text attention only, text laid out as ours, H800"),
    }


def test_other_models_and_batches_do_not_count(make_ours, make_record):
    assert columns([make_ours(is_baseline=True, batch_per_group=2)]) == []
    assert columns([make_record(num_devices=8, seq_len=614_400, is_baseline=True)]) == []


def test_page_says_where_there_is_no_record(make_ours, report):
    assert report.count("<td>no record") == len(PUBLISHED)
    assert "bench/sweep.py --preset blog" in report
    page = render([make_ours(is_baseline=True)])
    assert page.count("<td>no record") == len(PUBLISHED) - 1
    assert "once too often" in page
