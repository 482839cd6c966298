"""The report in a real browser, used: sorted, filtered, compared with another baseline, pointed at, downloaded."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest

from longreel.reports import export, formatting, store
from longreel.reports.compare import Baselines
from longreel.reports.html import write_report
from longreel.reports.verdicts import verdict

pytestmark = pytest.mark.browser


def column(visit: Any, name: str, table: int = 0) -> list[str]:
    """The first words of a column's cells, as shown."""
    panel = visit.page.locator(f"[data-table] >> nth={table}")
    heads = [text.split("\n")[0] for text in panel.locator("th button").all_inner_texts()]
    cells = panel.locator(f"tbody tr:not(.opened) td:nth-child({heads.index(name) + 1})").all_text_contents()
    return [text.split()[0] for text in cells]


def test_click_and_keyboard_sort_by_value_with_missing_figures_last(visit, address):
    table = visit.page.locator("[data-table]").first
    head = table.get_by_role("columnheader", name="Tokens/s")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(text.replace(",", "")) for text in column(visit, "Tokens/s") if text != "–"]
    assert len(values) == 15
    assert values == sorted(values)
    assert column(visit, "Tokens/s")[-2:] == ["–", "–"]
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(text.replace(",", "")) for text in column(visit, "Tokens/s")[:15]] == sorted(values, reverse=True)
    assert column(visit, "Tokens/s")[-2:] == ["–", "–"]
    table.get_by_role("columnheader", name="Strategy").get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    names = [text.removesuffix("baseline") for text in column(visit, "Strategy")]
    assert names == sorted(names)
    visit.assert_silent(address)


def test_filters_keep_rows_of_every_choice_and_every_word(visit, address):
    form, first = visit.page.locator("#filters"), visit.page.locator("[data-table]").first
    form.get_by_role("searchbox").fill("ULYSSES 2,048")
    assert column(visit, "Length") == ["2,048", "2,048"]
    assert form.locator("output").text_content() == "2 of 33 rows"
    # A group without a row goes, heading and all.
    assert visit.page.locator("[data-table] >> nth=1").is_hidden()
    form.get_by_role("searchbox").fill("worker died")
    assert column(visit, "Strategy") == ["ring"]
    form.get_by_role("button", name="Clear").click()
    visit.page.wait_for_function("document.querySelector('#filters output').value === '33 rows'")
    form.get_by_label("Kind").select_option("predicted")
    assert first.is_hidden()
    form.get_by_label("Status").select_option("oom")
    form.get_by_label("Strategy").select_option("local")
    assert column(visit, "Length", 1) == ["614,400", "819,200"]
    assert form.locator("output").text_content() == "2 of 33 rows"
    visit.assert_silent(address)


def test_another_baseline_changes_ratios_verdicts_and_heat_map_and_back(visit, address, sweep):
    choice = visit.page.get_by_label("Ratios to")
    heat = "() => [...document.querySelectorAll('.heat td[data-i]')].map((c) => [c.textContent.trim(), c.className])"
    before, ratios, verdicts = visit.page.evaluate(heat), column(visit, "Ratio"), column(visit, "Verdict")
    choice.select_option(label="ulysses, SP 2, full")
    lengths, strategies = column(visit, "Length"), column(visit, "Strategy")
    policies, shown = column(visit, "Policy"), column(visit, "Ratio")
    speed = {(f"{r.seq_len:,}", r.strategy, r.policy): r.tokens_per_s for r in sweep if r.kind == "measured"}
    for where, text in zip(zip(lengths, strategies, policies, strict=True), shown, strict=True):
        name = where[0], where[1].removesuffix("baseline"), where[2]
        if text != "–":
            assert float(text) == pytest.approx(speed[name] / speed[where[0], "ulysses", "full"], abs=0.0051)
    # The predicted group has that configuration, too, at more lengths than the baseline.
    row = visit.page.locator(".heat >> nth=1").get_by_role("row", name="ulysses, SP 2, full")
    assert row.locator("td").all_inner_texts() == ["1.00"] * 4
    assert (
        visit.page.locator(".ratio-note:visible").first.text_content().startswith("Ratios and verdicts are to ulysses")
    )
    assert visit.page.locator(".card .big").first.text_content() != ""
    choice.select_option(label="the baseline")
    # What the script writes is what Python wrote.
    assert visit.page.evaluate(heat) == before
    assert (column(visit, "Ratio"), column(visit, "Verdict")) == (ratios, verdicts)
    visit.assert_silent(address)


def test_another_baseline_judges_measured_rows_as_python_does(tmp_path, open_page, make_record):
    shifts = {"full": 1.0, "none": 0.8, "keep_attention": 0.97, "offload": 1.3}
    records = [
        make_record(
            policy=policy,
            is_baseline=policy == "full",
            step_s=shift,
            # What an interval leaves out depends on both numbers of samples.
            samples_s=tuple(shift + 0.01 * i for i in range(7 if policy == "none" else 5)),
        )
        for policy, shift in shifts.items()
    ]
    visit = open_page(write_report(tmp_path, records).as_uri())
    visit.page.get_by_label("Ratios to").select_option(label="local, SP 1, none")
    baselines = Baselines([replace(r, is_baseline=r.policy == "none") for r in records])
    expected = {r.policy: verdict(replace(r, is_baseline=False), baselines) for r in records if r.policy != "none"}
    assert set(expected.values()) == {"SLOW"}
    shown = dict(zip(column(visit, "Policy"), column(visit, "Verdict"), strict=True))
    assert {policy: shown[policy] for policy in expected} == expected
    visit.page.get_by_role("button", name="Details of local, SP 1, full at 1,024 tokens").click()
    low, high = baselines.ratio_interval(replace(records[0], is_baseline=False))
    interval = f"({formatting.number(low)}–{formatting.number(high)})"
    assert interval in visit.page.locator("tr.opened").inner_text()


def test_details_name_error_verdict_and_command(visit, address):
    more = visit.page.get_by_role("button", name="Details of ulysses, SP 2, none at 1,024 tokens")
    more.focus()
    visit.page.keyboard.press("Enter")
    assert more.get_attribute("aria-expanded") == "true"
    words = visit.page.locator("tr.opened").inner_text()
    for part in ("python bench/sweep.py", "grad 3.0e-7", "1.25 × the baseline", "all_to_all 1,000 B", "c0ffee"):
        assert part in words
    visit.page.keyboard.press("Enter")
    assert visit.page.locator("tr.opened").count() == 0
    visit.assert_silent(address)


def test_figures_tell_their_values_to_pointer_and_keyboard(visit, address):
    figure = visit.page.locator("figure >> nth=3")
    plot, tip = figure.locator(".plot"), figure.locator(".tip")
    plot.focus()
    visit.page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("local, SP 1, full (baseline)\n8,192 tokens, 8 devices, predicted\n")
    assert "tokens/s" in figure.locator("[aria-live]").text_content()
    x, y = figure.get_attribute("data-marks").split()[1].split(",")[:2]
    scale = plot.evaluate("(e) => e.clientWidth / e.querySelector('svg').viewBox.baseVal.width")
    plot.hover(position={"x": float(x) * scale + 2, "y": float(y) * scale + 2})
    assert "131,072 tokens" in tip.inner_text()
    visit.page.mouse.move(0, 0)
    assert tip.is_hidden()
    figure.locator("summary").click()
    # The browser tells the page of an opened part after the click.
    figure.locator("tbody tr").first.wait_for()
    assert figure.locator("tbody tr").count() == len(figure.get_attribute("data-marks").split())
    with visit.page.expect_download() as started:
        figure.get_by_role("button", name="PNG").click()
    assert started.value.path().read_bytes()[:4] == b"\x89PNG"
    visit.assert_silent(address)


def test_ten_thousand_rows_come_a_page_at_a_time(open_page, tmp_path, make_record):
    records = [
        make_record(is_baseline=i == 0, step_s=1 + i / 1e4, config={"seed": i}, status="ok" if i % 7 else "oom")
        for i in range(10_000)
    ]
    visit = open_page(write_report(tmp_path, records, page_only=True).as_uri())
    page = visit.page
    panel = page.locator("[data-table]")
    assert panel.locator("tbody tr").count() == 100
    assert panel.locator("output").text_content() == "Rows 1–100 of 10000 rows"
    assert panel.locator("table").get_attribute("aria-rowcount") == "10001"
    panel.get_by_role("button", name="Next").click()
    assert panel.locator("tbody tr").first.get_attribute("aria-rowindex") == "102"
    seconds = page.evaluate("""() => {
      const start = performance.now();
      document.querySelector("th button").click();
      for (let y = 0; y < document.body.scrollHeight; y += 400) { scrollTo(0, y); document.body.offsetHeight; }
      return (performance.now() - start) / 1000;
    }""")
    # Not a measurement: a page that held all rows would take many times as long.
    assert seconds < 5


def test_downloads_hold_the_records_and_the_csv(visit, sweep):
    with visit.page.expect_download() as started:
        visit.page.get_by_role("button", name="JSONL").click()
    assert store.load(started.value.path()) == sweep
    with visit.page.expect_download() as started:
        visit.page.get_by_role("button", name="CSV").click()
    with open(started.value.path(), newline="", encoding="utf-8") as file:
        saved = list(csv.reader(file))
    written = list(csv.reader(io.StringIO(export.csv_text(sweep))))
    assert saved[0] == written[0]
    for ours, theirs in zip(written[1:], saved[1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-8)
