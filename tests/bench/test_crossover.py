"""bench/crossover.py: cells are the planner's answers, and the picture shows every one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longreel.bench.crossover import draw, main


def test_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.svg"
    size = ["--model", "dit-s-4", "--tokens", "4096", "--links", "1", "400", "--gpus", "2", "--regimes", "full"]
    assert main([*size, "--out", str(out)]) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert [(cell["tokens"], cell["link_gb_s"]) for cell in found] == [(4096, 1.0), (4096, 400.0)]
    # One sample on two GPUs has to be split; the link decides by how much one strategy is ahead of the others.
    assert all(cell["strategy"] in ("ulysses", "fastseq", "ring") and cell["ahead"] >= 0 for cell in found)
    assert found[0]["ahead"] != found[1]["ahead"]
    assert "<svg" in out.read_text()
    assert main([*size, "--out", str(tmp_path / "map.txt")]) == 2
    assert "out must be an .svg or .png file" in capsys.readouterr().err


def test_picture_has_a_cell_for_what_does_not_fit(tmp_path: Path) -> None:
    cell = {"regime": "full", "gpus": 8, "tokens": 10**8, "link_gb_s": 200}
    draw([cell | {"strategy": None, "name": "nothing fits", "policy": None, "ahead": None}], tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
