from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from longreel.reports.compare import Baselines, group_records
from longreel.reports.heatmap import build_heatmap, level
from longreel.reports.html import heat_picture


def heat_of(sweep, kind):
    group, records = next((g, found) for g, found in group_records(sweep).items() if g.kind == kind)
    return group, build_heatmap(records, Baselines(records))


def test_every_configuration_against_every_length(sweep):
    _, heat = heat_of(sweep, "measured")
    assert heat.seq_lens == (1024, 2048, 4096)
    assert [row.label for row in heat.rows] == [
        "local, SP 1, full",
        "fastseq, SP 2, full",
        "fastseq, SP 2, none",
        "local, SP 1, none",
        "ring, SP 2, none",
        "ulysses, SP 2, full",
        "ulysses, SP 2, none",
    ]
    assert [row.is_baseline for row in heat.rows] == [True] + 6 * [False]
    cells = {row.label: row.cells for row in heat.rows}
    assert [c.text for c in cells["local, SP 1, full"]] == ["1.00"] * 3
    # Half the samples in 0.4 of the time.
    assert [c.text for c in cells["ulysses, SP 2, none"]] == ["1.25"] * 3
    assert [c.text for c in cells["fastseq, SP 2, none"]] == ["wrong", "", ""]
    assert [c.text for c in cells["ring, SP 2, none"]] == ["error", "", ""]
    best = [[row.label for row in heat.rows if row.cells[i].is_best] for i in range(3)]
    assert best == [["ulysses, SP 2, none"]] * 3


def test_without_a_baseline_figure_a_cell_is_a_dash_or_its_status(sweep):
    _, heat = heat_of(sweep, "predicted")
    cells = {row.label: [c.text for c in row.cells] for row in heat.rows}
    assert cells["local, SP 1, full"] == ["1.00", "1.00", "oom", "oom"]
    assert cells["ulysses, SP 8, full"][2:] == ["–", "–"]


@pytest.mark.parametrize(
    ("ratio", "step"), [(None, 0), (1.0, 0), (2.0, 5), (0.5, -5), (9.0, 5), (0.01, -5), (1.26, 2), (0.8, -2)]
)
def test_level_is_the_same_either_way_on_a_log_scale(ratio, step):
    assert level(ratio) == step


def test_no_ratio_no_heat_map(make_record):
    records = [make_record(status="oom", is_baseline=True), make_record(policy="none")]
    assert build_heatmap(records, Baselines(records)) is None
    alone = [make_record(is_baseline=True)]
    assert build_heatmap(alone, Baselines(alone)) is None


def test_picture_has_the_cells(sweep):
    group, heat = heat_of(sweep, "predicted")
    svg = heat_picture(group, heat)
    ElementTree.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert texts.count("1.00") == 2
    assert texts.count("oom") == 2
    assert "local, SP 1, full (baseline)" in texts
    assert "Throughput relative to baseline (PREDICTED)" in texts
