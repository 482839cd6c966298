"""bench/crossover.py: cells are the planner's answers, and the picture shows every one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longreel.bench import crossover
from longreel.bench.crossover import CrossoverConfig, draw, main
from longreel.parallel.config import ParallelConfig
from longreel.reports.crossover import load_cells


def test_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.svg"
    size = [
        "--model",
        "dit-s-4",
        "--processes",
        "1",
        "--tokens",
        "4096",
        "--links",
        "1",
        "400",
        "--gpus",
        "2",
        "--regimes",
        "full",
    ]
    assert main([*size, "--out", str(out)]) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert [(cell["tokens"], cell["link_gb_s"]) for cell in found] == [(4096, 1.0), (4096, 400.0)]
    # One sample on two GPUs has to be split; the link decides by how much one strategy is ahead of the others.
    assert all(cell["strategy"] in ("ulysses", "fastseq", "ring") and cell["ahead"] >= 0 for cell in found)
    assert found[0]["ahead"] != found[1]["ahead"]
    assert "<svg" in out.read_text()
    assert main([*size, "--out", str(tmp_path / "map.txt")]) == 2
    assert "out must be an .svg or .png file" in capsys.readouterr().err
    assert load_cells(out.with_suffix(".json")) == found
    # The same cells make the same picture.
    draw(found, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--tokens", "0"], "tokens must be positive, got 0"),
        (["--links", "25", "-1"], "links must be positive, got 25.0, -1.0"),
        (["--gpus", "9"], "num_gpus must be 1 to 8"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--model", "dit-xxl"], "dit-xxl"),
    ],
)
def test_bad_input_is_one_line(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*option, "--processes", "1"]) == 2
    assert said in capsys.readouterr().err


def test_processes_change_nothing(tmp_path: Path) -> None:
    axes = {"model": "dit-s-4", "tokens": (1024, 4096), "links": (50,), "gpus": (2,), "regimes": ("full", "text_only")}
    one, two = (CrossoverConfig(**axes, processes=processes) for processes in (1, 2))
    assert crossover.cells(one) == crossover.cells(two)


def test_ahead_is_how_much_faster_the_best_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as fast as the best of another strategy is 100 % ahead, whatever its own other degrees do."""

    def answered(setting: Any) -> Any:
        needs = [
            SimpleNamespace(parallel=ParallelConfig(strategy=name, sp_degree=2), policy="full", speed=speed)
            for name, speed in (("ulysses", 30.0), ("ulysses", 29.0), ("ring", 15.0), ("fastseq", 10.0))
        ]
        return SimpleNamespace(best=needs[0], runners_up=needs[1:], tokens_per_s=lambda need: (need.speed, 0.0, 99.0))

    monkeypatch.setattr(crossover, "plan", answered)
    (cell,) = crossover.cells(CrossoverConfig(tokens=(8192,), links=(50,), gpus=(2,), regimes=("full",), processes=1))
    assert (cell["strategy"], cell["ahead"]) == ("ulysses", 1.0)


def test_picture_has_a_cell_for_what_does_not_fit(tmp_path: Path) -> None:
    cell = {"regime": "full", "gpus": 8, "tokens": 10**8, "link_gb_s": 200}
    draw([cell | {"strategy": None, "name": "nothing fits", "policy": None, "ahead": None}], tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
