"""`--target FILE.toml`: a GPU of the user's own, in sweeps and in every other command that takes a target."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreel.bench import crossover, emulation_check
from longreel.bench.cases import Point
from longreel.bench.console import parse
from longreel.bench.emulated_run import Emulator
from longreel.bench.grids import target_points
from longreel.bench.options import SweepConfig
from longreel.bench.outcome import predicted_record
from longreel.bench.plan import main as plan
from longreel.bench.predictor import case_of
from longreel.bench.reproduce import reproduce
from longreel.parallel.predict.predict import predict_step
from longreel.reports.compare import Group
from longreel.reports.records import Record

PROVENANCE = {"commit": "0" * 40, "environment": {"cores": 2}}
# As H800 but for its memory and its name.
FIGURES = "bf16_tflops = 989\nhbm_tb_s = 3.35\nlink_gb_s = 200\nflash_attention = [1.0, 0.8, 1.1]\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpus.toml").write_text(f"[H800]\n{FIGURES}memory_gib = 12\n[Other]\n{FIGURES}memory_gib = 141\n")
    return Path("gpus.toml")


def points(target: str) -> list[Point]:
    axes = {"seq_lens": "65536", "strategies": "ulysses", "sp_degrees": "8", "policies": "none", "regimes": "full"}
    sweep = SweepConfig(preset="point", mode="predicted", gpus=8, baseline=False, target=target, **axes).resolve()
    (grid,) = sweep.targets
    (group,) = target_points(grid)
    return group


def predicted(point: Point) -> Record:
    return predicted_record(point, predict_step(case_of(point)), PROVENANCE)


def test_a_sweep_predicts_the_gpu_of_the_file(file: Path) -> None:
    (own,), (other,), (named,) = points(f"{file}:h800"), points(f"{file}:other"), points("h800")
    assert (own.device, other.device, named.device) == ("H800 (gpus.toml)", "OTHER (gpus.toml)", "H800")
    small, large, usual = predicted(own), predicted(other), predicted(named)
    assert [r.memory_limit for r in (small, large, usual)] == [12 * 2**30, 141 * 2**30, 80 * 2**30]
    # The same rates give the same time, and no table or figure takes one for the other.
    assert large.step_s == usual.step_s
    assert len({Group.of(r) for r in (small, large, usual)}) == 3
    assert small.status == "oom" and "12 GiB H800 (gpus.toml)" in (small.reason or "")
    assert large.provenance["inputs"]["peak_flop_s"].endswith("as gpus.toml says")
    assert Record.from_json(large.to_json()) == large


def test_a_record_holds_the_figures_and_the_command_that_makes_it_again(file: Path) -> None:
    (own,) = points(str(file) + ":other")
    target = own.config()["target"]
    assert (target["name"], target["memory_bytes"], target["flash_scale"]["low"]) == ("OTHER", 141 * 2**30, 0.8)
    again = parse(shlex.split(reproduce(own))[2:])
    (grid,) = again.resolve().targets
    assert [one for group in target_points(grid) for one in group] == [own]
    assert points("H800")[0].config()["target"] == "H800"


def test_another_file_of_the_same_name_is_another_point(file: Path, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "gpus.toml").write_text(f"[Other]\n{FIGURES}memory_gib = 100\n")
    (one,), (two,) = points(f"{file}:other"), points("else/gpus.toml")
    assert one.device == two.device
    assert one.key(PROVENANCE) != two.key(PROVENANCE)


def test_a_path_of_this_machine_stays_out_of_records(file: Path, tmp_path: Path) -> None:
    (own,) = points(f"{file.resolve()}:other")
    record = predicted(own)
    assert str(tmp_path) not in record.to_json()
    assert "--target=gpus.toml:OTHER" in record.provenance["reproduce"]


def test_an_emulated_rank_stands_for_it(file: Path) -> None:
    (own,) = points(f"{file}:other")
    asked = replace(own, kind="emulated")
    made = Emulator(device="cpu", name="a GPU").point(asked)
    assert made.device == "OTHER (gpus.toml) (one rank on a GPU)"


def test_the_planner_and_the_map_take_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "dit-s-4", "--tokens", "4096", "--gpus", "2"]
    assert plan([*small, "--processes", "1", "--json", "--target", f"{file}:other"]) == 0
    assert json.loads(capsys.readouterr().out)["target"]["memory_bytes"] == 141 * 2**30
    axes = ["--links", "50", "--regimes", "full", "--out", "map.svg"]
    assert crossover.main([*small, *axes, "--target", f"{file}:other"]) == 0
    assert json.loads(Path("map.json").read_text())[0]["strategy"] is not None


@pytest.mark.parametrize("target", ["H9000", "none.toml"])
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (plan, ["--tokens", "4096", "--gpus", "2", "--processes", "1"]),
        (crossover.main, ["--tokens", "4096"]),
        (emulation_check.main, []),
    ],
    ids=["plan", "crossover", "emulation_check"],
)
def test_an_unknown_one_is_one_line_with_a_template(
    main: Any,
    arguments: list[str],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--target", target]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert target in said and "[MYGPU]; bf16_tflops = 989" in said
