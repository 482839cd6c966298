from __future__ import annotations

import base64
import json
import random
import re
import zlib
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from longreel.reports import embed, export
from longreel.reports.compare import Baselines
from longreel.reports.html import render, write_report
from longreel.reports.records import Record

HOSTILE = '</script><img src=x onerror="alert(1)"><b>$&{{ 7*7 }}'
VOID = {"meta", "link", "img", "br", "input", "path", "use", "hr"}


class Page(HTMLParser):
    """The elements of a page in order, text by heading or cell, and every address it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self._into: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.addresses += [values[k] or "" for k in ("src", "href", "xlink:href", "action", "srcset") if k in values]
        if tag == "tr":
            self.rows.append([])
        self._into = None
        if tag == "h2":
            self._into = self.headings
        elif tag in ("td", "b", "small", "span") and self.rows:
            self._into = self.rows[-1]
        elif values.get("class") == "about-table":
            self._into = self.captions

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "h2", "p"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None and data.strip():
            self._into.append(data.strip())


def embedded_data(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/octet-stream" id="data">([\w+/=]*)</script>', text)
    assert match is not None
    return json.loads(zlib.decompress(base64.b64decode(match[1])))


def rows_of(text: str) -> list[list[str]]:
    """The tables' rows as text, a cell's note behind it, then status and reason."""
    data = embedded_data(text)
    rows = []
    for group in data["groups"]:
        count = len(group["records"])
        columns = zip(*(embed.unpack(column, count) for column in group["texts"]), strict=True)
        notes = zip(*(embed.unpack(column, count) for column in group["notes"]), strict=True)
        for cells, small, i in zip(columns, notes, group["records"], strict=True):
            record = Record.from_json(json.dumps(embed.unpack(data["records"], data["num_records"])[i]))
            words = [f"{cell} {note}".strip() for cell, note in zip(cells, small, strict=True)]
            rows.append([*words, record.status, record.reason or ""])
    return rows


def embedded(text: str) -> list[Record]:
    data = embedded_data(text)
    return [Record.from_json(json.dumps(row)) for row in embed.unpack(data["records"], data["num_records"])]


def test_page_has_its_sections_in_order_and_every_record(sweep):
    text = render(sweep, title="A sweep", source_files=["/somewhere/records.jsonl"])
    page = Page(text)
    sections = ["Headlines", "Published and ours", "Figures", "Ratios", "Rows", "Provenance", "What the labels mean"]
    assert page.headings == sections
    assert page.tags["figure"] == 11
    # The published rows and two heat maps; rows are written by the page's script.
    assert page.tags["table"] == 3
    assert len(rows_of(text)) == len(sweep)
    assert embedded(text) == sweep
    assert "from records.jsonl" in text
    assert "/somewhere" not in text


def test_table_names_its_baseline_and_marks_it_once_per_length(report):
    for devices in (2, 8):
        words = f"Baseline: ZeRO-2, SP 1, DP {devices}, local, policy full. Ratios compare with it at the same length."
        assert report.count(words) == 1
    data = embedded_data(report)
    marked = [
        row[0]
        for row, is_marked in zip(rows_of(report), [m for g in data["groups"] for m in g["is_baseline"]], strict=True)
        if is_marked
    ]
    assert marked == ["1,024", "2,048", "4,096", "8,192", "131,072", "614,400", "819,200"]


def test_failing_row_shows_its_reason_and_no_speed(report):
    rows = rows_of(report)
    (wrong,) = (row for row in rows if "wrong" in row)
    assert wrong[0] == "1,024"
    assert wrong[-1] == "grad off by 3"
    assert wrong.count("–") == 4  # step time, tokens/s, ratio, verdict
    assert any("needs 85 GiB of 80 GiB" in row for row in rows)


def test_labels_name_the_kind_of_every_group(report):
    for label, figures in (("MEASURED", 3), ("PREDICTED", 8)):
        # Headline, figures, ratios, table and environment of the one group of each kind; the legend; every figure.
        assert report.count(f">{label}</span>") == 6
        assert len(re.findall(rf"<text[^>]*>[^<]*\({label}\)</text>", report)) == figures
    assert report.count(">EMULATED</span>") == 1


def test_heat_map_has_a_row_per_configuration_and_its_figures_point_at_records(report, sweep):
    assert report.count('<th scope="row">local, SP 1, full<span class="mark">baseline</span>') == 2
    data = embedded_data(report)
    known = [Record.from_json(json.dumps(row)) for row in embed.unpack(data["records"], len(sweep))]
    for i, text in re.findall(r'<td data-i="(\d+)"[^>]*>(\d\.\d\d)\n', report):
        assert f"{Baselines(known).ratio(known[int(i)]):.2f}" == text
    marks = re.findall(r'data-marks="([^"]+)" data-name="g2-throughput"', report)[0].split()
    assert [known[int(m.split(",")[2])].kind for m in marks] == ["predicted"] * 14


def test_page_refers_to_nothing_outside_itself(report):
    assert all(a.startswith("#") or a == "data:," for a in Page(report).addresses)
    outside = set(re.findall(r"https?://[^\"' )<]+", report))
    assert outside == {"http://www.w3.org/2000/svg"}
    assert "@import" not in report
    assert "fetch(" not in report


def test_hostile_strings_stay_text(sweep, report):
    clean = Page(report).tags
    text = ("model", "device", "strategy", "engine", "policy", "attention", "reason")
    hostile = [
        replace(
            r,
            **{name: f"{getattr(r, name)}{HOSTILE}" for name in text},
            config={HOSTILE: HOSTILE} | dict(r.config),
            breakdown={HOSTILE: 1.0} | dict(r.breakdown) if r.breakdown else {},
            telemetry={HOSTILE: HOSTILE},
            comparison={"verdict": HOSTILE},
            traffic={HOSTILE: 7},
            provenance=dict(r.provenance) | {"command": HOSTILE, "commit": HOSTILE, HOSTILE: HOSTILE},
        )
        for r in sweep
    ]
    page = render(hostile, title=HOSTILE, source_files=[HOSTILE.replace("/", "")])
    tags = Page(page).tags
    assert tags["img"] == 0
    assert tags["script"] == clean["script"] == 2
    # Lines of the legend, wrapped titles: markup of ours may differ in number, the reader's rows may not.
    assert tags["tr"] == clean["tr"]
    assert embedded(page) == hostile


def test_only_the_last_record_of_a_point_is_shown(make_record):
    failed, again = make_record(status="error", reason="worker died"), make_record()
    text = render([failed, again])
    assert len(rows_of(text)) == 1
    assert "1 earlier records of the same points are left out" in text
    assert "worker died" not in text


def test_thousand_records_stay_under_a_megabyte(sweep):
    noise = random.Random(0)

    def another(r: Record, i: int) -> Record:
        """The same point of another seed, with figures that cannot be packed."""
        if r.step_s is None:
            return replace(r, config=dict(r.config) | {"seed": i})
        step = r.step_s * noise.uniform(1, 2)
        samples = tuple(step * noise.uniform(0.9, 1.1) for _ in r.samples_s)
        parts = {name: noise.random() for name in r.breakdown}
        return replace(r, config=dict(r.config) | {"seed": i}, step_s=step, samples_s=samples, breakdown=parts)

    records = [another(r, i) for i in range(1000 // len(sweep) + 1) for r in sweep]
    assert len(render(records[:1000]).encode()) < 1_000_000


@pytest.mark.parametrize("status", ["oom", "error", "skipped"])
def test_group_without_any_figure_still_makes_a_page(make_record, status):
    text = render([make_record(status=status, is_baseline=True, memory={}, traffic={}, provenance={}, error={})])
    assert "No configuration has a figure." in text
    assert Page(text).tags["figure"] == 0


def test_no_records_is_an_error():
    with pytest.raises(ValueError, match="no records"):
        render([])


def test_write_report_writes_page_csv_and_figures(tmp_path, sweep):
    page = write_report(tmp_path / "out", sweep, title="A sweep")
    assert page == tmp_path / "out" / "report.html"
    assert page.read_text(encoding="utf-8") == render(sweep, title="A sweep")
    assert (tmp_path / "out" / "records.csv").read_text(encoding="utf-8") == export.csv_text(sweep)
    figures = sorted(p.name for p in (tmp_path / "out" / "figures").iterdir())
    # Eleven figures of the page with their points, and both heat maps.
    assert Counter(name.rpartition(".")[2] for name in figures) == {"svg": 13, "csv": 11}
    assert "1-measured-full-2x-cpu-process-throughput.svg" in figures
    assert "var(" not in (tmp_path / "out" / "figures" / figures[-1]).read_text()


def test_png_and_page_only_are_options(tmp_path, make_record):
    records = [make_record(is_baseline=True), make_record(policy="none", step_s=1.0)]
    write_report(tmp_path / "all", records, png=True)
    figures = [path.suffix for path in (tmp_path / "all" / "figures").iterdir()]
    assert Counter(figures) == {".svg": 4, ".png": 3, ".csv": 3}
    write_report(tmp_path / "page", records, page_only=True)
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["report.html"]


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path, sweep):
    write_report(tmp_path, sweep)
    (tmp_path / "figures" / "mine-throughput.svg").write_text("")
    measured = [r for r in sweep if r.kind == "measured"]
    write_report(tmp_path, measured)
    names = sorted(path.stem for path in (tmp_path / "figures").glob("*.svg"))
    assert names == [
        *(f"1-measured-full-2x-cpu-process-{n}" for n in ("memory", "ratio", "throughput", "traffic")),
        "mine-throughput",
    ]


@pytest.mark.parametrize("name", ["report.html", "records.csv", "figures"])
def test_foreign_files_are_not_replaced(tmp_path, sweep, name):
    (tmp_path / name).write_text("<html>mine</html>")
    with pytest.raises(ValueError, match=name):
        write_report(tmp_path, sweep)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "<html>mine</html>"


def test_page_that_is_a_folder_is_an_error(tmp_path, sweep):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ValueError, match=r"report\.html is in the way"):
        write_report(tmp_path, sweep)


def test_memory_of_a_process_is_shown_as_the_step_and_the_whole(make_record):
    text = render([make_record(is_baseline=True)])
    names = [(c["name"], c["unit"]) for c in embedded_data(text)["groups"][0]["columns"]]
    assert ("Step memory", "MiB of process") in names
    assert rows_of(text)[0][names.index(("Step memory", "MiB of process"))] == "40.0 of 713"
    assert "40.0 MiB step memory" in text
    allocated = embedded_data(render([make_record(memory={"allocated": 2**30})]))
    assert "Step memory" not in [c["name"] for c in allocated["groups"][0]["columns"]]


def test_group_whose_ranks_share_cores_says_so(make_record):
    text = render([make_record(provenance={"sharing": "2 ranks share 1 core"})])
    assert text.count("2 ranks share 1 core: throughput here is no measure of speed.") == 2


def test_ratio_without_a_verdict_is_no_headline(make_record):
    records = [make_record(is_baseline=True), make_record(policy="none", step_s=1.0)]
    assert "the baseline’s tokens/s at" not in render(records)
    enough = [replace(r, samples_s=(2.0,) * 5) for r in records]
    assert "2.00×</span> the baseline’s tokens/s at" in render(enough)


def test_several_samples_per_group_stand_beside_the_length(make_record):
    text = render([make_record(), make_record(batch_per_group=4)])
    assert [row[:2] for row in rows_of(text)] == [["1,024", "local"], ["1,024 × 4", "local"]]
