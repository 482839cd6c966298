from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from longreel.reports import publish
from longreel.reports.crossover import crossover_part, load_cells
from longreel.reports.html import render

HOSTILE = "<script>alert(1)</script>"


def cell(link: float, tokens: int, **changes: object) -> dict[str, object]:
    given = {"target": "H800", "model": "dit-xl-2", "samples": 1, "regime": "full", "gpus": 8, "tokens": tokens}
    given |= {"link_gb_s": link, "strategy": "ulysses", "name": "ulysses SP 8", "policy": "none", "ahead": 0.25}
    return given | changes


CELLS = [cell(link, tokens) for link, tokens in product((25.0, 450.0), (8192, 819_200))]


def test_a_table_for_each_regime_and_number_of_gpus_with_a_cell_each() -> None:
    few = cell(25.0, 8192, gpus=2, strategy="ring", name="ring SP 2", ahead=0.002)
    none = cell(450.0, 8192, gpus=2, strategy=None, name="nothing fits", policy=None, ahead=None)
    name, _, body = crossover_part([*CELLS, few, none])
    assert name == "crossover"
    assert body.count("<table") == 2 and body.index("2 GPUs, full") < body.index("8 GPUs, full")
    assert body.count("ulysses SP 8<small>none (+25.0 %)") == 4
    # Near another strategy, and not run at 819,200 tokens.
    assert "#2ca02c 12%" in body and "#1f77b4 40%" in body
    assert "nothing fits" in body and body.count("<td>–") == 2
    assert "PREDICTED" in body


def test_the_page_holds_it_and_hostile_names_are_inert(make_record) -> None:
    page = render([make_record()], parts=[crossover_part([cell(25.0, 8192, name=HOSTILE, target=HOSTILE)])])
    assert '<a href="#crossover">Which strategy wins</a>' in page
    assert HOSTILE not in page and "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    "text", ["[", "{}", "[]", '[{"regime": "full"}]', json.dumps([cell(25.0, 8192, gpus="many")]), '["x"]']
)
def test_what_is_no_map_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"map.json: not a map of bench/crossover.py"):
        load_cells(file)


def test_the_published_report_has_it(make_record, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(CELLS))
    (tmp_path / "records.jsonl").write_text(make_record().to_json() + "\n")
    arguments = [str(tmp_path / "records.jsonl"), "--out", str(tmp_path), "--crossover", str(tmp_path / "map.json")]
    assert publish.main(arguments) == 0
    assert "Which strategy wins" in (tmp_path / "report.html").read_text()
