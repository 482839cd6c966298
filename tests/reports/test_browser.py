"""The report in a real browser: silent, offline, inside its window at any width, sortable, filterable, inert."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from longreel.reports import store
from longreel.reports.html import write_report
from longreel.reports.records import Record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '</script><img src=x onerror="document.title=1"><script>document.title=1</script>'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]


@dataclass
class Visit:
    """An open page and what it did that a report must not do."""

    page: Any
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, address: str) -> None:
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def assert_silent(self, address: str) -> None:
        assert self.console == []
        assert self.errors == []
        assert self.requests == [address]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, sweep) -> str:
    return write_report(tmp_path_factory.mktemp("report"), sweep).as_uri()


@pytest.fixture
def visit(browser, address) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    visit = Visit(page)
    visit.open(address)
    yield visit
    page.close()


# Boxes of everything a reader looks at; two that do not contain each other must not share any area.
OVERLAPS = """() => {
  const looked_at = "h1, h2, h3, nav, .lead, .downloads, .card, figure, .scroll, .tools, .about-table, .facts, .legend";
  const all = [...document.querySelectorAll(looked_at)];
  const found = [];
  all.forEach((a, i) => all.slice(i + 1).forEach((b) => {
    if (a.contains(b) || b.contains(a)) return;
    const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
    const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (width > 1 && height > 1) found.push(`${a.outerHTML.slice(0, 60)} / ${b.outerHTML.slice(0, 60)}`);
  }));
  return found;
}"""

# Texts of a figure must neither overlap nor leave it.
FIGURE_TEXTS = """() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect(), found = [];
  const texts = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  texts.forEach(([name, p], i) => {
    const inside = p.left > frame.left - 1 && p.right < frame.right + 1 && p.bottom < frame.bottom + 1;
    if (!inside) found.push(`${name} leaves`);
    texts.slice(i + 1).forEach(([other, q]) => {
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (width > 1 && height > 3) found.push(`${name} / ${other}`);
    });
  });
  return found;
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_silent_offline_and_inside_its_window(browser, address, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit = Visit(page)
    visit.open(address)
    inside, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inside <= client == width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(FIGURE_TEXTS) == []
    visit.assert_silent(address)
    page.close()


@pytest.mark.parametrize("num_lengths", [1, 2])
@pytest.mark.parametrize("width", [1280, 400])
def test_bars_leave_their_words_room(browser, tmp_path, sweep, width, num_lengths):
    lengths = sorted({r.seq_len for r in sweep if r.kind == "predicted"})[-num_lengths:]
    few = [r for r in sweep if r.seq_len in (1024, 2048)[:num_lengths] or r.seq_len in lengths]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report(tmp_path, few).as_uri())
    assert page.locator("figure").count() == (4 if num_lengths == 1 else 5)
    assert page.evaluate(FIGURE_TEXTS) == []
    page.close()


def test_tables_are_whole_at_1280(visit):
    tables = visit.page.evaluate("[...document.querySelectorAll('.scroll')].map((e) => [e.scrollWidth, e.clientWidth])")
    assert len(tables) == 2
    assert all(whole <= shown for whole, shown in tables), tables


def test_length_and_strategy_stay_in_sight_when_a_narrow_table_is_scrolled(browser, address):
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto(address)
    table = page.locator(".scroll").first
    assert table.evaluate("(e) => e.scrollWidth > 2 * e.clientWidth")
    table.evaluate("(e) => { e.scrollLeft = 400; }")
    frame = table.bounding_box()
    for row in ("thead tr", "tbody tr >> nth=1"):
        cells = [box.bounding_box() for box in table.locator(f"{row} >> th, td").all()[:2]]
        first, second = cells
        assert first["x"] == pytest.approx(frame["x"] + 1, abs=1)
        assert second["x"] == pytest.approx(first["x"] + first["width"], abs=1)
        assert second["x"] + second["width"] < frame["x"] + 0.6 * frame["width"]
    # What scrolls by does not show through.
    grounds = "(e) => [...e.cells].slice(0, 2).map((c) => getComputedStyle(c).backgroundColor)"
    for row in table.locator("tr").all():
        assert not any(ground.startswith("rgba") for ground in row.evaluate(grounds))
    baseline = table.locator("tr.b").first
    assert baseline.evaluate("(e) => new Set([...e.cells].map((c) => getComputedStyle(c).backgroundColor)).size") == 1
    page.close()


def test_figure_text_is_large_enough_on_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto(address)
    sizes = page.evaluate("""[...document.querySelectorAll("figure svg")].flatMap((svg) => {
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return [...svg.querySelectorAll("text")].map((t) => parseFloat(getComputedStyle(t).fontSize) * scale);
    })""")
    assert min(sizes) >= 10
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, address, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    colours = """() => {
      const shown = [document.body, ...document.querySelectorAll("h2, .lead, td, td small, figure text")];
      return shown.map((e) => {
        const ground = (at) => getComputedStyle(at).backgroundColor;
        let at = e;
        while (at.parentElement && ground(at) === "rgba(0, 0, 0, 0)") at = at.parentElement;
        return [getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"], ground(at)];
      });
    }"""

    def luminance(colour: str) -> float:
        parts = [int(c) / 255 for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = {tuple(pair) for pair in page.evaluate(colours)}
    assert len(pairs) >= 3
    for ink, ground in pairs:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
    page.close()


def column(visit: Visit, number: int) -> list[str]:
    cells = visit.page.locator(f"[data-table] >> nth=0 >> tbody tr:not([hidden]) td:nth-child({number})")
    return [text.split()[0] for text in cells.all_text_contents()]


def test_click_and_keyboard_sort_by_value_with_missing_figures_last(visit, address):
    table = visit.page.locator("[data-table]").first
    head = table.get_by_role("columnheader", name="Tokens/s")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(text.replace(",", "")) for text in column(visit, 9) if text != "–"]
    assert len(values) == 15
    assert values == sorted(values)
    assert column(visit, 9)[-2:] == ["–", "–"]
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(text.replace(",", "")) for text in column(visit, 9)[:15]] == sorted(values, reverse=True)
    assert column(visit, 9)[-2:] == ["–", "–"]
    table.get_by_role("columnheader", name="Strategy").get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert column(visit, 2) == sorted(column(visit, 2))
    visit.assert_silent(address)


def test_filter_keeps_rows_with_every_word(visit, address):
    panel = visit.page.locator("[data-table]").first
    panel.get_by_role("searchbox").fill("ULYSSES 2,048")
    assert column(visit, 1) == ["2,048", "2,048"]
    assert panel.locator("output").text_content() == "2 of 17 rows"
    panel.get_by_role("searchbox").fill("worker died")
    assert column(visit, 2) == ["ring"]
    panel.get_by_role("searchbox").fill("")
    assert len(column(visit, 1)) == 17
    visit.assert_silent(address)


def test_downloads_hold_the_records_and_the_csv(visit, sweep):
    with visit.page.expect_download() as started:
        visit.page.get_by_role("button", name="JSONL").click()
    assert store.load(started.value.path()) == sweep
    with visit.page.expect_download() as started:
        visit.page.get_by_role("button", name="CSV").click()
    with open(started.value.path(), newline="", encoding="utf-8") as file:
        saved = list(csv.reader(file))
    written = list(csv.reader(io.StringIO(store.csv_text(sweep))))
    assert saved[0] == written[0]
    for ours, theirs in zip(written[1:], saved[1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-8)
    assert [url for url in visit.requests if not url.startswith(("file:", "blob:"))] == []


def test_hostile_strings_are_inert(browser, tmp_path, sweep):
    names = ("model", "device", "strategy", "engine", "policy", "attention", "reason")
    hostile: list[Record] = [
        replace(
            r,
            **{name: f"{getattr(r, name)}{HOSTILE}" for name in names},
            config={HOSTILE: HOSTILE} | dict(r.config),
            provenance=dict(r.provenance) | {"command": HOSTILE, HOSTILE: HOSTILE},
        )
        for r in sweep
    ]
    address = write_report(tmp_path, hostile, title=HOSTILE).as_uri()
    page = browser.new_page(viewport={"width": 400, "height": 900})
    visit = Visit(page)
    visit.open(address)
    assert page.title() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.evaluate(OVERLAPS) == []
    with page.expect_download() as started:
        page.get_by_role("button", name="JSONL").click()
    assert store.load(started.value.path()) == hostile
    visit.requests = [url for url in visit.requests if not url.startswith("blob:")]
    visit.assert_silent(address)
    page.close()
