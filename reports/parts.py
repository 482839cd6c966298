"""Pages that a report holds as sections, and that stand alone too: the kernels' figures, and documents in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from longreel.reports.html import Part, page_environment
from longreel.reports.op_compare import ROOFLINE_OPS, groups
from longreel.reports.op_figures import draw_rates
from longreel.reports.op_goals import HEADINGS as GOAL_HEADINGS
from longreel.reports.op_goals import goal_rows
from longreel.reports.op_records import DIRECTIONS, OpRecord
from longreel.reports.op_summary import HEADINGS, duels
from longreel.reports.op_tuning import is_tuning
from longreel.reports.store import latest


def kernels_part(records: Sequence[OpRecord]) -> Part:
    """Goals, our kernels against the best peers, and rates against length."""
    points = latest(records)
    figures = [
        figure
        for (kind, device, op, dtype, label), found in groups([r for r in points if not is_tuning(r)]).items()
        if op not in ROOFLINE_OPS
        for direction in DIRECTIONS
        for figure in draw_rates(
            f"{op.replace('_', ' ')}, {dtype}{f' ({label})' if label else ''}: {direction} ({kind.upper()})",
            [r for r in found if r.direction == direction],
        )
    ]
    body = (
        page_environment({})
        .get_template("kernels.html.j2")
        .render(
            num_records=len(points),
            goals=goal_rows(points),
            goal_headings=GOAL_HEADINGS,
            duels=[duel.words() for duel in duels(points)],
            headings=HEADINGS,
            figures=figures,
        )
    )
    return "kernels", "Kernels", Markup(body)


def document_part(text: str, *, id: str, name: str) -> Part:
    """A document as a section that opens: its text as HTML, its headings below the section's."""
    body = document_html(text, first_heading=3)
    return id, name, Markup(f"<details><summary>{escape(name)}: show</summary>{body}</details>")


def document_page(text: str, *, title: str) -> str:
    """A document as one self-contained HTML page."""
    body = Markup(document_html(text, first_heading=2))
    return page_environment({}).get_template("document.html.j2").render(title=title, body=body)


def title_of(text: str, default: str) -> str:
    """The document's first heading."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else default


def document_html(text: str, *, first_heading: int) -> str:
    """Markdown as HTML without its title; markup and images in it stay text, and tables scroll by themselves."""
    text = re.sub(r"^# .+\n", "", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"<!-- made by: (.*?) -->", r"Made by `\1`.\n", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "autolink"])
    tokens = renderer.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + first_heading - 2)}"
        # A link leads to a file that is not here: its text stays.
        token.children = [t for t in token.children or [] if t.type not in ("link_open", "link_close")]
    html: str = renderer.renderer.render(tokens, renderer.options, {})
    frame = '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
    return html.replace("<table>", frame).replace("</table>", "</table></div>")
