"""The report in a real browser: silent, offline, inside its window at any width, legible, inert, printable."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

import pytest

from longreel.reports import store
from longreel.reports.html import write_report
from longreel.reports.records import Record

HOSTILE = (
    '</script><img src=x onerror="window.ran=1"><script>window.ran=1</script>',
    '" onmouseover="window.ran=1" onfocus="window.ran=1" x="',
    "javascript:window.ran=1//<a href=javascript:window.ran=1>",
    '=HYPERLINK("javascript:window.ran=1")&lt;{{ 7*7 }}${window.ran=1}',
)

pytestmark = pytest.mark.browser


# Boxes of everything a reader looks at; two that do not contain each other must not share any area.
OVERLAPS = """() => {
  const looked_at = "h1, h2, h3, nav, .lead, .downloads, .card, figure, .scroll, .tools, .pager, .switch, " +
    ".about-table, .facts, .legend";
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
def test_page_is_silent_offline_and_inside_its_window(open_page, address, width, scheme):
    visit = open_page(address, width=width, color_scheme=scheme)
    page = visit.page
    inside, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inside <= client == width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(FIGURE_TEXTS) == []
    visit.assert_silent(address)


@pytest.mark.parametrize("num_lengths", [1, 2])
@pytest.mark.parametrize("width", [1280, 400])
def test_bars_leave_their_words_room(open_page, tmp_path, sweep, width, num_lengths):
    lengths = sorted({r.seq_len for r in sweep if r.kind == "predicted"})[-num_lengths:]
    few = [r for r in sweep if r.seq_len in (1024, 2048)[:num_lengths] or r.seq_len in lengths]
    page = open_page(write_report(tmp_path, few).as_uri(), width=width).page
    # Throughput, memory and traffic of both groups; of the predicted one exposed communication, degrees and parts.
    assert page.locator("figure").count() == 6 + 1 + 2 * num_lengths
    assert page.evaluate(FIGURE_TEXTS) == []


def test_tables_are_whole_at_1280(visit):
    tables = visit.page.evaluate("[...document.querySelectorAll('.scroll')].map((e) => [e.scrollWidth, e.clientWidth])")
    # The published rows, two heat maps, two tables of rows.
    assert len(tables) == 5
    assert all(whole <= shown for whole, shown in tables), tables


def test_length_and_strategy_stay_in_sight_when_a_narrow_table_is_scrolled(open_page, address):
    page = open_page(address, width=400).page
    table = page.locator("[data-table] .scroll").first
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


def test_figure_text_is_large_enough_on_a_phone(open_page, address):
    page = open_page(address, width=400).page
    sizes = page.evaluate("""[...document.querySelectorAll("figure svg")].flatMap((svg) => {
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return [...svg.querySelectorAll("text")].map((t) => parseFloat(getComputedStyle(t).fontSize) * scale);
    })""")
    assert min(sizes) >= 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(open_page, address, scheme):
    page = open_page(address, color_scheme=scheme).page
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
        # color-mix gives `color(srgb 0.1 0.2 0.3)`.
        parts = [float(c) for c in re.findall(r"[\d.]+", colour)]
        parts = parts if colour.startswith("color(") else [c / 255 for c in parts]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = {tuple(pair) for pair in page.evaluate(colours)}
    assert len(pairs) >= 3
    for ink, ground in pairs:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_print_shows_every_row_and_no_control(visit):
    visit.page.emulate_media(media="print")
    for control in ("nav", ".downloads", ".tools", ".more", ".values"):
        assert visit.page.locator(control).first.is_hidden()
    widths = visit.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1]
    assert visit.page.pdf().startswith(b"%PDF")


def test_hostile_strings_are_inert(open_page, tmp_path, sweep):
    names = ("model", "device", "strategy", "engine", "policy", "attention", "reason")
    hostile: list[Record] = [
        replace(
            r,
            **{name: f"{HOSTILE[i % len(HOSTILE)]}{getattr(r, name)}" for i, name in enumerate(names)},
            config={HOSTILE[0]: HOSTILE[1]} | dict(r.config),
            breakdown={HOSTILE[0]: 1.0} | dict(r.breakdown) if r.breakdown else {},
            traffic={HOSTILE[1]: 7} | dict(r.traffic),
            telemetry={HOSTILE[2]: HOSTILE[0]},
            comparison={"verdict": HOSTILE[0], "low": HOSTILE[1]},
            provenance=dict(r.provenance) | {"command": HOSTILE[0], "commit": HOSTILE[3], HOSTILE[0]: HOSTILE[0]},
        )
        for r in sweep
    ]
    address = write_report(tmp_path, hostile, title=HOSTILE[0]).as_uri()
    visit = open_page(address, width=400)
    page = visit.page
    # Whatever the page can show is shown: details, tips, values, filters, another baseline.
    for more in page.locator(".more").all()[:20]:
        more.press("Enter")
    for figure in page.locator("figure").all():
        figure.locator(".plot").focus()
        page.keyboard.press("ArrowRight")
        figure.locator("summary").click()
    page.locator("#denominator").select_option(index=2)
    page.locator("#filters select").nth(2).select_option(index=1)
    page.locator("#filters").get_by_role("button", name="Clear").click()
    assert page.title() == HOSTILE[0]
    assert page.evaluate("window.ran") is None
    assert page.locator("img, a[href^=javascript], [onerror], [onclick], iframe").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.evaluate(OVERLAPS) == []
    with page.expect_download() as started:
        page.get_by_role("button", name="JSONL").click()
    assert store.load(started.value.path()) == hostile
    with page.expect_download() as started:
        page.get_by_role("button", name="Download table").click()
    with open(started.value.path(), newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@") and not cell[1:2].isdigit()]
    visit.assert_silent(address)
