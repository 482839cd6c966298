from __future__ import annotations

import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from longreel.reports.compare import group_records
from longreel.reports.figures import draw_group, log_ticks, thin
from longreel.reports.formatting import length, number
from longreel.reports.series import build_series
from longreel.reports.svg import standalone

HOSTILE = '</svg><script>alert(1)</script> $\\frac{ & "quoted" \x07 模型'


def group_of(sweep, kind):
    return next((g, found) for g, found in group_records(sweep).items() if g.kind == kind)


def test_series_take_the_best_policy_at_each_length_and_the_baseline(sweep):
    _, records = group_of(sweep, "measured")
    lines = {line.slug: line for line in build_series(records)}
    assert list(lines) == ["baseline", "fastseq-sp-2", "local-sp-1", "ulysses-sp-2"]
    assert [p.seq_len for p in lines["ulysses-sp-2"].points] == [1024, 2048, 4096]
    assert {p.policy for p in lines["ulysses-sp-2"].points} == {"none"}
    assert {p.policy for p in lines["baseline"].points} == {"full"}
    # A wrong record is faster than nothing, but not a point.
    assert {p.policy for p in lines["fastseq-sp-2"].points} == {"full"}


def test_line_that_only_repeats_the_baseline_is_not_drawn_twice(sweep):
    _, records = group_of(sweep, "predicted")
    assert [line.slug for line in build_series(records)] == ["baseline", "fastseq-sp-8", "ulysses-sp-2", "ulysses-sp-8"]


def test_series_end_at_the_first_length_out_of_memory(sweep):
    _, records = group_of(sweep, "predicted")
    lines = {line.slug: line for line in build_series(records)}
    assert lines["baseline"].out_of_memory.seq_len == 614400
    assert lines["ulysses-sp-8"].out_of_memory is None


def test_figures_have_the_intended_series_and_labels(sweep):
    group, records = group_of(sweep, "predicted")
    drawings = {d.name: d for d in draw_group(group, records)}
    assert set(drawings) == {"throughput", "memory", "ratio"}
    lines = {"series-baseline", "series-fastseq-sp-8", "series-ulysses-sp-2", "series-ulysses-sp-8"}
    for name, drawing in drawings.items():
        ids = {i.split("-", 2)[2] for i in re.findall(r'id="([^"]+)"', drawing.svg) if "series-" in i}
        marks = {"series-limit", "series-oom-baseline"} if name == "memory" else set()
        assert ids == lines | marks
        texts = [e.text for e in ElementTree.fromstring(drawing.svg).iter("{http://www.w3.org/2000/svg}text")]
        assert any("(PREDICTED)" in text for text in texts)
        assert {"8K", "128K", "ulysses, SP 8", "baseline: ZeRO-2, SP 1"} <= set(texts)
    assert "819,200" in drawings["memory"].svg
    assert "limit, 80.0 GiB" in drawings["memory"].svg


def test_points_lie_where_their_values_are(sweep):
    """Reads a line back from the SVG: on log-log axes, tokens/s that halve per doubling lie on a straight line."""
    group, records = group_of(sweep, "measured")
    flat = [replace(r, step_s=r.seq_len**2 / 1e6 * r.dp_degree, interval_s=None) for r in records]
    throughput = draw_group(group, flat)[0]
    path = re.search(r'id="\S+series-ulysses-sp-2">\s*<path d="([^"]+)"', throughput.svg)
    assert path is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p) for p in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1]))
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.05)
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.05)
    assert y1 > y0


def test_figures_of_a_page_share_no_id_and_refer_to_ids_that_exist(sweep):
    svgs = [d.svg for group, found in group_records(sweep).items() for d in draw_group(group, found)]
    ids = [i for svg in svgs for i in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in svgs:
        for name in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg):
            assert f'id="{name[0] or name[1]}"' in svg


def test_figures_take_the_colours_of_the_page(sweep):
    group, records = group_of(sweep, "measured")
    for drawing in draw_group(group, records):
        assert "currentColor" in drawing.svg
        assert set(re.findall(r"(?:fill|stroke): #\w+", drawing.svg)) == set()
        assert "<style" not in drawing.svg
        assert "var(--series-0,#0072b2)" in drawing.svg


def test_same_records_give_the_same_figure_and_change_no_setting(sweep):
    group, records = group_of(sweep, "measured")
    before = dict(mpl.rcParams)
    assert draw_group(group, records) == draw_group(group, records)
    assert dict(mpl.rcParams) == before


def test_hostile_names_are_text_and_the_file_is_valid_xml(sweep):
    _, records = group_of(sweep, "measured")
    hostile = [replace(r, device=HOSTILE, model=HOSTILE, strategy=r.strategy + HOSTILE) for r in records]
    ((group, found),) = group_records(hostile).items()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawings = draw_group(group, found)
    assert len(drawings) == 3
    for drawing in drawings:
        root = ElementTree.fromstring(standalone(drawing.svg))
        assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
        assert HOSTILE.replace("\x07", "\ufffd") in root.attrib["aria-label"]


def test_group_without_a_figure_draws_nothing(make_record):
    records = [make_record(status="oom"), make_record(status="error", policy="none")]
    ((group, found),) = group_records(records).items()
    assert draw_group(group, found) == []


@pytest.mark.parametrize("interval", [None, (1.9, 2.2)])
def test_single_point_is_drawn(make_record, interval):
    ((group, found),) = group_records([make_record(is_baseline=True, interval_s=interval)]).items()
    assert [d.name for d in draw_group(group, found)] == ["throughput", "memory"]


@pytest.mark.parametrize(
    ("tokens", "label"), [(1024, "1K"), (131072, "128K"), (2**20, "1M"), (819200, "819,200"), (1000, "1,000")]
)
def test_length_label(tokens, label):
    assert length(tokens) == label


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.01234, "0.0123"), (1.5, "1.50"), (999.7, "1,000"), (123456.7, "123,457")]
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.5), (0.2, 1.9), (900, 700000), (5000, 6000), (1e-3, 1e9)])
@pytest.mark.parametrize("binary", [False, True])
def test_log_ticks_are_a_handful_inside_the_axis(low, high, binary):
    ticks = log_ticks(low, high, binary=binary)
    assert 3 <= len(ticks) <= 13
    assert ticks == sorted(ticks)
    assert low <= ticks[0] < ticks[-1] <= high


def test_thin_keeps_the_largest_and_drops_labels_that_would_overlap():
    lengths = [8192, 262144, 524288, 614400, 819200]
    assert thin(lengths, [5, 6, 6, 9, 9], 50, 8192, 819200) == [8192, 262144, 819200]
