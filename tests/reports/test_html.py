from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from longreel.reports import embed, store
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


def embedded(text: str) -> list[Record]:
    match = re.search(r'<script type="application/json" id="records">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    data = json.loads(match[1])
    return [Record.from_json(json.dumps(row)) for row in embed.unpack(data["records"], data["num_records"])]


def test_page_has_its_sections_in_order_and_every_record(sweep):
    text = render(sweep, title="A sweep", source_files=["/somewhere/records.jsonl"])
    page = Page(text)
    assert page.headings == ["Headlines", "Figures", "Tables", "Environment", "What the labels mean"]
    assert page.tags["figure"] == 6
    assert page.tags["table"] == 2
    assert len(page.rows) == len(sweep) + 2
    assert embedded(text) == sweep
    assert "from records.jsonl" in text
    assert "/somewhere" not in text


def test_table_names_its_baseline_and_marks_it_once_per_length(sweep):
    page = Page(render(sweep))
    assert page.captions == [
        "Baseline: ZeRO-2, SP 1, DP 2, local, policy full. Ratios compare with it at the same length.",
        "Baseline: ZeRO-2, SP 1, DP 8, local, policy full. Ratios compare with it at the same length.",
    ]
    marked = [row for row in page.rows if "baseline" in row]
    assert [row[0] for row in marked] == ["1,024", "2,048", "4,096", "8,192", "131,072", "614,400", "819,200"]


def test_failing_row_shows_its_reason_and_no_speed(sweep):
    page = Page(render(sweep))
    (wrong,) = (row for row in page.rows if "wrong" in row)
    assert wrong[-1] == "grad off by 3"
    assert "1,024" in wrong
    assert wrong.count("–") == 4  # step time, tokens/s, samples/s, ratio
    assert any("needs 85 GiB of 80 GiB" in row for row in page.rows)


def test_labels_name_the_kind_of_every_group(sweep):
    text = render(sweep)
    for label in ("MEASURED", "PREDICTED"):
        # Headline, figures, table and environment of the one group of each kind; the legend; the title of each figure.
        assert text.count(f">{label}</span>") == 5
        assert len(re.findall(rf"<text[^>]*>[^<]*\({label}\)</text>", text)) == 3
    assert text.count(">EMULATED</span>") == 1


def test_page_refers_to_nothing_outside_itself(sweep):
    text = render(sweep)
    assert all(a.startswith("#") or a == "data:," for a in Page(text).addresses)
    outside = set(re.findall(r"https?://[^\"' )<]+", text))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert "fetch(" not in text


def test_hostile_strings_stay_text(sweep):
    clean = Page(render(sweep)).tags
    text = ("model", "device", "strategy", "engine", "policy", "attention", "reason")
    hostile = [
        replace(
            r,
            **{name: f"{getattr(r, name)}{HOSTILE}" for name in text},
            config={HOSTILE: HOSTILE} | dict(r.config),
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
    assert len(Page(text).rows) == 2
    assert "1 earlier records of the same points are left out" in text
    assert "worker died" not in text


def test_thousand_records_stay_under_a_megabyte(sweep):
    records = [replace(r, config=dict(r.config) | {"seed": i}) for i in range(1000 // len(sweep) + 1) for r in sweep]
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
    assert (tmp_path / "out" / "records.csv").read_text(encoding="utf-8") == store.csv_text(sweep)
    figures = sorted(p.name for p in (tmp_path / "out" / "figures").iterdir())
    assert len(figures) == 6
    assert "1-measured-full-2x-cpu-process-throughput.svg" in figures


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path, sweep):
    write_report(tmp_path, sweep)
    (tmp_path / "figures" / "mine-throughput.svg").write_text("")
    measured = [r for r in sweep if r.kind == "measured"]
    write_report(tmp_path, measured)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        *(f"1-measured-full-2x-cpu-process-{n}.svg" for n in ("memory", "ratio", "throughput")),
        *names[3:],
    ]
    assert names[3:] == ["mine-throughput.svg"]


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
    assert "Step memory<small>MiB of process</small>" in text
    assert "<td>40.0 <small>of 713</small>" in text
    assert "40.0 MiB step memory" in text
    assert "Step memory" not in render([make_record(memory={"allocated": 2**30})])


def test_group_whose_ranks_share_cores_says_so(make_record):
    text = render([make_record(provenance={"sharing": "2 ranks share 1 core"})])
    assert text.count("2 ranks share 1 core: throughput here is no measure of speed.") == 2


def test_ratio_without_a_verdict_is_no_headline(make_record):
    records = [make_record(is_baseline=True), make_record(policy="none", step_s=1.0)]
    assert "the baseline’s tokens/s at" not in render(records)
    enough = [replace(r, samples_s=(2.0,) * 5) for r in records]
    assert "2.00×</span> the baseline’s tokens/s at" in render(enough)


def test_several_samples_per_group_stand_beside_the_length(make_record):
    page = Page(render([make_record(), make_record(batch_per_group=4)]))
    assert [row[:2] for row in page.rows[1:]] == [["1,024", "local"], ["1,024", "× 4"]]
