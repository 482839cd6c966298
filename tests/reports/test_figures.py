from __future__ import annotations

import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from longreel.reports.compare import group_records
from longreel.reports.figures import draw_group
from longreel.reports.formatting import length, number
from longreel.reports.scaling import draw_devices
from longreel.reports.series import build_series
from longreel.reports.svg import standalone
from longreel.reports.ticks import log_ticks, thin

BARS = re.compile(r'id="\S+?series-(\S+-at-\d+)">\s*<path d="[^"]+"[^>]*style="([^"]*)"')
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
    parts = {"parts-8192", "parts-819200"}
    assert set(drawings) == {"throughput", "memory", "traffic", "exposed", "degrees-8192", "degrees-819200"} | parts
    lines = {"series-baseline", "series-fastseq-sp-8", "series-ulysses-sp-2", "series-ulysses-sp-8"}
    for name in ("throughput", "memory", "exposed"):
        drawing = drawings[name]
        ids = {i.split("-", 2)[2] for i in re.findall(r'id="([^"]+)"', drawing.svg) if "series-" in i}
        ends = {"series-oom-baseline"} if name != "exposed" else set()
        assert ids == lines | ends | ({"series-limit"} if name == "memory" else set())
        texts = [e.text for e in ElementTree.fromstring(drawing.svg).iter("{http://www.w3.org/2000/svg}text")]
        assert any("(PREDICTED)" in text for text in texts)
        assert {"8K", "128K", "fastseq, SP 8", "baseline: ZeRO-2, SP 1"} <= set(texts)
        # FastSeq's values at SP 8 again: one line in two colours.
        assert "ulysses = fastseq, SP 8" in texts
        assert "ulysses, SP 8" not in texts
    assert "819,200" in drawings["memory"].svg
    assert "limit, 80.0 GiB" in drawings["memory"].svg


def test_line_of_other_values_is_named_alone(sweep):
    group, records = group_of(sweep, "predicted")
    slower = [replace(r, step_s=1.01 * r.step_s) if r.strategy == "ulysses" and r.step_s else r for r in records]
    throughput, memory = draw_group(group, slower)[:2]
    assert ">ulysses, SP 8<" in throughput.svg
    assert ">ulysses = fastseq, SP 8<" in memory.svg


def test_memory_line_is_what_decides_what_fits_and_names_the_whole(sweep):
    group, records = group_of(sweep, "predicted")
    gib = 2**30
    limited = [replace(r, memory_limit=80 * gib, memory_usable=int(73.5 * gib)) for r in records]
    heights = {}
    for name, found in (("whole", records), ("usable", limited)):
        memory = next(d for d in draw_group(group, found) if d.name == "memory")
        path = re.search(r'id="\S+series-limit">\s*<path d="M [\d.]+ ([\d.]+)', memory.svg)
        assert path is not None
        heights[name] = float(path[1])
        assert ("usable, 73.5 GiB of 80.0 GiB" in memory.svg) == (name == "usable")
    assert heights["usable"] > heights["whole"] + 1  # SVG counts from the top


def test_crosses_at_one_place_stand_beside_each_other(sweep):
    group, records = group_of(sweep, "predicted")
    more = [replace(r, strategy="ring", is_baseline=False) for r in records if r.is_baseline]
    other = [replace(r, step_s=r.step_s * 2) if r.step_s else r for r in more]
    memory = next(d for d in draw_group(group, records + other) if d.name == "memory")
    places = re.findall(r'id="\S+series-oom-(\S+)">.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', memory.svg, re.DOTALL)
    assert [name for name, _, _ in places] == ["baseline", "ring-sp-1"]
    (_, x0, y0), (_, x1, y1) = places
    assert y0 == y1
    assert float(x1) - float(x0) == pytest.approx(9, abs=0.1)


def test_memory_of_processes_is_the_steps_own(sweep):
    group, records = group_of(sweep, "measured")
    drawings = {d.name: d for d in draw_group(group, records)}
    assert "Memory of a step (MEASURED)" in drawings["memory"].svg
    assert "what a step adds to its process" in drawings["memory"].svg
    assert "MiB</text>" in drawings["memory"].svg
    assert ">700 MiB<" not in drawings["memory"].svg
    whole = [replace(r, memory={"process": 713 * 2**20}) for r in records]
    assert "Peak memory (MEASURED)" in {d.name: d for d in draw_group(group, whole)}["memory"].svg


@pytest.mark.parametrize("lengths", [(1024,), (1024, 2048)], ids=len)
def test_one_or_two_lengths_are_bars_as_long_as_their_values(sweep, lengths):
    group, records = group_of(sweep, "measured")
    drawings = {d.name: d for d in draw_group(group, [r for r in records if r.seq_len in lengths])}
    assert set(drawings) == {"throughput", "memory", "traffic"}
    svg = drawings["throughput"].svg
    widths = {}
    for slug, d in re.findall(r'id="\S+?series-(\S+)">\s*<path d="([^"]+)"', svg):
        xs = [float(x) for x, _ in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)]
        widths[slug] = max(xs) - min(xs)
    at = lengths[-1]
    assert len(widths) == 4 * len(lengths)
    # 2,048 tokens/s over both ranks in 2 s; Ulysses: 1,024 in 0.8 s.
    assert widths[f"ulysses-sp-2-at-{at}"] / widths[f"baseline-at-{at}"] == pytest.approx(1.25, rel=0.01)
    assert "1,280" in svg
    assert [f">{n:,} tokens<" in svg for n in (1024, 2048)] == [True, len(lengths) == 2]


def test_bars_say_what_did_not_fit(sweep):
    group, records = group_of(sweep, "predicted")
    drawings = {d.name: d for d in draw_group(group, [r for r in records if r.seq_len in (131072, 614400)])}
    assert drawings["throughput"].svg.count(">did not fit<") == 1
    memory = drawings["memory"].svg
    assert ">85 GiB<" in memory
    assert "hollow: did not fit" in memory
    assert "dotted: limit, 80.0 GiB" in memory
    filled = {slug: "fill: none" not in style for slug, style in BARS.findall(memory)}
    assert [slug for slug, is_filled in filled.items() if not is_filled] == ["baseline-at-614400"]
    assert len(filled) == 8


def test_marks_lie_on_their_lines(sweep):
    group, records = group_of(sweep, "predicted")
    for drawing in draw_group(group, records)[:2]:
        marks = [m for m in drawing.marks if m.record.strategy == "ulysses" and m.record.sp_degree == 8]
        path = re.search(r'id="\S+series-ulysses-sp-8">\s*<path d="([^"]+)"', drawing.svg)
        places = [tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1])]
        assert len(marks) == len(places) == 4
        for mark, place in zip(marks, places, strict=True):
            assert (mark.x, mark.y) == pytest.approx(place, abs=0.02)
    assert [m.value for m in marks] == [m.record.peak_memory for m in marks]


def test_lines_end_in_a_cross_behind_their_last_point(sweep):
    group, records = group_of(sweep, "predicted")
    throughput = draw_group(group, records)[0]
    cross = re.search(r'series-oom-baseline">.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', throughput.svg, re.DOTALL)
    (last,) = (m for m in throughput.marks if m.record.is_baseline and m.record.seq_len == 131072)
    assert (float(cross[1]), float(cross[2])) == (pytest.approx(last.x + 11, abs=0.1), pytest.approx(last.y, abs=0.1))


def test_parts_of_a_step_are_stacked_to_its_time_per_sample(sweep):
    """Reads the bars back: their widths are those of the parts, each over the samples of a step."""
    group, records = group_of(sweep, "predicted")
    parts = next(d for d in draw_group(group, records) if d.name == "parts-8192")
    # Communication is hatched: filled by a pattern.
    fill = r"fill: (?:var\(--series-(\d)|url)"
    bars = re.findall(rf'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) [^"]*" [^>]*style="{fill}', parts.svg)
    widths = {}
    for left, up, right, colour in bars:
        widths[colour, float(up)] = float(right) - float(left)
    by_colour = {c: [w for (colour, _), w in sorted(widths.items()) if colour == c] for c in ("0", "4", "")}
    rows = [m.record for m in parts.marks]
    assert [m.value for m in parts.marks] == [r.step_s / r.dp_degree for r in rows]
    assert len(rows) == 4
    scale = by_colour["0"][0] / (rows[0].breakdown["attention"] / rows[0].dp_degree)
    for colour, name in (("0", "attention"), ("4", "matmul"), ("", "sequence")):
        expected = [scale * r.breakdown[name] / r.dp_degree for r in rows]
        assert by_colour[colour][: len(rows)] == pytest.approx(expected, abs=0.03), name


def test_scaling_over_degrees_and_devices(sweep, make_record):
    group, records = group_of(sweep, "predicted")
    degrees = next(d for d in draw_group(group, records) if d.name == "degrees-8192")
    assert [(m.record.strategy, m.record.sp_degree) for m in degrees.marks] == [
        ("fastseq", 8),
        ("ulysses", 2),
        ("ulysses", 8),
    ]
    more = [make_record(num_devices=n, strategy="ulysses", sp_degree=n, step_s=2 / n) for n in (2, 4)]
    more += [make_record(num_devices=n, is_baseline=True) for n in (2, 4)]
    ((family, drawing),) = draw_devices(group_records(more), png=False)
    assert family.num_devices == 4
    assert "2, 4 × CPU process" in drawing.svg
    assert [(m.record.is_baseline, m.record.num_devices) for m in drawing.marks] == [
        (True, 2),
        (True, 4),
        (False, 2),
        (False, 4),
    ]
    assert draw_devices(group_records(sweep), png=False) == []


def test_png_is_a_picture_of_the_same_figure(make_record):
    ((group, found),) = group_records([make_record(is_baseline=True)]).items()
    assert draw_group(group, found)[0].png is None
    png = draw_group(group, found, png=True)[0].png
    assert png[:8] == b"\x89PNG\r\n\x1a\n"


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
    assert [d.name for d in draw_group(group, found)] == ["throughput", "memory", "traffic"]


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
