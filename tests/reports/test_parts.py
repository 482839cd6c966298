from __future__ import annotations

from pathlib import Path

import pytest

from longreel.reports.html import render
from longreel.reports.parts import document_html, document_page, document_part, kernels_part, title_of

CODEGEN = Path(__file__).parents[2] / "docs" / "codegen.md"


def test_codegen_document_becomes_tables():
    text = CODEGEN.read_text(encoding="utf-8")
    html = document_html(text, first_heading=2)
    assert html.count("<table>") == html.count("</table></div>") == text.count("| --- |\n")
    assert "<h1" not in html
    assert html.count("<h2>") == text.count("\n## ")
    assert "Made by <code>python bench/codegen.py</code>." in html
    assert "<!--" not in html


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "![x](http://example.com/x.png)",
        "[x](javascript:alert(1))",
        "<img src=x onerror=y>",
    ],
)
def test_document_is_text_and_refers_to_nothing(hostile):
    html = document_html(f"# Title\n\nSome {hostile} text.\n\n| a |\n| --- |\n| {hostile} |\n", first_heading=2)
    for markup in ("<script", "<img", "href", "src="):
        assert markup not in html.replace("&lt;script", "").replace("&lt;img src=", "")


def test_document_page_stands_alone():
    page = document_page("# A title\n\n## Part\n\ntext", title=title_of("x\n# A title\n", "else"))
    assert "<title>A title</title>" in page
    assert "<h2>Part</h2>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert title_of("no heading", "else") == "else"


def test_parts_are_sections_of_the_page(sweep):
    few = [r for r in sweep if r.kind == "measured" and r.seq_len == 1024]
    part = document_part("# T\n\n## Part <b>\n\nwords", id="codegen", name="Generated code")
    page = render(few, parts=[part])
    assert '<a href="#codegen">Generated code</a>' in page
    assert '<h2 id="codegen">Generated code</h2>' in page
    assert "<h3>Part &lt;b&gt;</h3>" in page


def test_kernels_have_their_duels_and_figures(make_op):
    hostile = "<script>alert(1)</script>"
    points = (("triton", 2e-3), ("sdpa-cudnn", 4e-3), (hostile, 5e-3))
    records = [make_op(name, n, seconds) for name, seconds in points for n in (4096, 8192)]
    id, name, body = kernels_part(records)
    assert (id, name) == ("kernels", "Kernels")
    assert "Ours against the best peer" in body
    assert body.count("<figure>") == 1
    assert body.count("2.00×") == 4
    assert "<script" not in body
