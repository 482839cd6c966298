"""longreel.bench.options and the command line: what a user gets wrong is one line, exit status 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longreel.bench.grids import DEFAULT_POLICIES, MeasuredGrid, measured_points, target_points
from longreel.bench.options import SweepConfig, parse_lengths
from longreel.bench.presets import small_dit
from longreel.bench.sweep import main

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "slow"], ["'slow'", "quick", "thorough"]),
        (["--mode", "guessed"], ["'guessed'", "auto", "measured", "predicted"]),
        (["--strategies", "local,ringo"], ["'ringo'", "local", "ulysses", "fastseq", "ring", "usp"]),
        (["--policies", "half"], ["'half'", "none", "full"]),
        (["--regimes", "video"], ["'video'", "full", "text_only"]),
        (["--num-heads", "2", "--sp-degrees", "4"], ["num_heads 2", "sp_degree 4", "1, 2"]),
        (["--num-heads", "3"], ["hidden_size 64", "num_heads 3"]),
        (["--mode", "predicted", "--model", "dit-s-2", "--sp-degrees", "4"], ["num_heads 6", "1, 2, 3, 6"]),
        (["--ranks", "3"], ["ranks: 3", "2, 4", "1, 3"]),
        (["--ranks", "6", "--sp-degrees", "4"], ["ranks: 6", "1, 2, 3, 6"]),
        (["--gpus", "6", "--sp-degrees", "4", "--mode", "predicted"], ["gpus: 6", "1, 2, 3, 6"]),
        (["--gpus", "9"], ["gpus", "1 to 8", "9"]),
        (["--gpus", "0"], ["gpus", "1 to 8", "0"]),
        (["--depth", "0"], ["depth", "0"]),
        (["--hidden-size", "0"], ["hidden_size", "0"]),
        (["--num-heads", "0"], ["num_heads", "0"]),
        (["--ranks", "65"], ["ranks: 65", "at most 64"]),
        (["--ranks", "1", "--strategies", "ulysses"], ["strategies: ulysses", "ranks 1"]),
        (["--ranks", "2", "--strategies", "usp"], ["strategies: usp", "ranks 2", "sp_degrees"]),
        (["--preset", "smoke", "--mode", "predicted", "--regimes", "text_only"], ["smoke has no text_only points"]),
        (["--preset", "smoke", "--regimes", "full,text_only"], ["smoke has no text_only points; it has full"]),
        (["--max-len", "nonsense", "--seq-lens", "1k"], ["max_len", "'nonsense'"]),
        (["--max-len", "2k", "--seq-lens", "1k"], ["max_len", "seq_lens"]),
        (["--max-len", "2k", "--measured-lens", "1k"], ["max_len", "measured_lens"]),
        (["--point-timeout", "inf"], ["point_timeout", "inf", "at most"]),
        (["--point-timeout", "nan"], ["point_timeout", "nan"]),
        (["--out", "~no-such-user-here/x"], ["out", "no-such-user-here"]),
        (["--sp-degrees", "2,3"], ["sp_degrees: 3", "1, 2, 4"]),
        (["--sp-degrees", "2,x"], ["sp_degrees", "'x'"]),
        (["--ranks", "0"], ["ranks", "'0'"]),
        (["--seq-lens", "1k,2x"], ["seq_lens", "'2x'", "2k"]),
        (["--seq-lens", ""], ["seq_lens", "''"]),
        (["--measured-lens", "0"], ["measured_lens", "'0'"]),
        (["--max-len", "many"], ["max_len", "'many'"]),
        (["--model", "dit-xxl"], ["'dit-xxl'", "dit-xl-2"]),
        (["--target", "H9000"], ["'H9000'", "H800", "bf16_tflops = 989"]),
        (["--target", "none.toml"], ["none.toml", "no profiles of GPUs there", "bf16_tflops = 989"]),
        (["--point-timeout", "-1"], ["point_timeout", "-1"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--gpus", "eight"], ["--gpus", "eight"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for words in said:
        assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(capsys, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    assert main(["--out", str(file)]) == 2
    assert "taken" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(capsys, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_folder_below_a_file_and_a_folder_that_takes_no_files(capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["--out", "/proc/self"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_broken_records_in_the_folder_are_named_before_any_work(capsys, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("{}\n")
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "records.jsonl:1" in error
    assert error.count("\n") == 1
    assert (tmp_path / "records.jsonl").read_text() == "{}\n"


def test_script_runs_without_an_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "bench" / "sweep.py"), "--preset", "nope"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"PYTHONPATH": str(REPOSITORY / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    presets = "quick, smoke, thorough, blog, h800, compare, headline, point"
    assert done.stderr == f"error: unknown preset 'nope'; there are {presets}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("1k,2k,8192", (1024, 2048, 8192)), ("8192, 1K", (1024, 8192)), ("300", (300,)), ("1k,1024", (1024,))],
)
def test_lengths(text, lengths) -> None:
    assert parse_lengths("seq_lens", text) == lengths


def test_quick_measures_every_strategy_next_to_its_baseline() -> None:
    (grid,) = SweepConfig().resolve().measured
    points = measured_points(grid, device="CPU")
    seen = {(p.seq_len, p.num_devices, p.parallel.strategy, p.parallel.sp_degree) for p in points}
    assert len(seen) == len(points)
    for seq_len in (1024, 2048, 4096, 8192):
        for ranks in (1, 2, 4):
            assert (seq_len, ranks, "local", 1) in seen
        for degree in (2, 4):
            for strategy in ("ulysses", "fastseq"):
                assert (seq_len, degree, strategy, degree) in seen
    assert all(p.is_baseline == (p.parallel.strategy == "local") for p in points)
    # Points of one length and one number of ranks run one after the other, the baseline first.
    places = [(p.seq_len, p.num_devices) for p in points]
    assert places == sorted(places)
    assert all(p.parallel.attention_provider == "sdpa-flash" for p in points)


def test_quick_predicts_both_regimes_at_the_published_lengths() -> None:
    full, text_only = SweepConfig().resolve().targets
    assert len(full.seq_lens) == 7
    assert {614_400, 819_200} <= set(full.seq_lens) & set(text_only.seq_lens)
    for grid in (full, text_only):
        points = [point for group in target_points(grid) for point in group]
        spreads = {(p.parallel.strategy, p.parallel.sp_degree) for p in points}
        assert spreads == {("local", 1), *((s, d) for s in grid.strategies if s != "local" for d in (2, 4, 8))}
        assert {p.regime for p in points} == {grid.regime}
        assert {p.num_devices for p in points} == {8}
    assert text_only.dit.cross_layout == "published"
    assert text_only.dit.max_text_tokens == 20


def test_max_len_goes_on_in_powers_of_two_or_cuts_off() -> None:
    assert SweepConfig(max_len="16k").resolve().measured[0].seq_lens == (1024, 2048, 4096, 8192, 16_384)
    assert SweepConfig(max_len="2k").resolve().measured[0].seq_lens == (1024, 2048)


def test_degree_that_some_heads_forbid_becomes_points_with_a_reason() -> None:
    (grid,) = SweepConfig(num_heads=2, mode="measured").resolve().measured
    points = measured_points(grid, device="CPU")
    impossible = [p for p in points if p.impossible]
    assert {p.parallel.sp_degree for p in impossible} == {4}
    assert "degrees that work: 1, 2" in impossible[0].impossible


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "dit-s-4", "sp_degrees": "2", "head_chunks": "1,2"}, "head_chunks 2 does not divide the 3 heads"),
        ({"sp_degrees": "2,8", "predicted_lens": "4"}, "sp_degree 8 is more ranks than the sequence has tokens"),
    ],
    ids=["chunks", "tokens"],
)
def test_chunks_and_lengths_that_a_rank_cannot_have_become_points_with_a_reason(options, words) -> None:
    given = {"preset": "point", "mode": "predicted", "regimes": "full", "strategies": "ulysses", "policies": "full"}
    sweep = SweepConfig(**given, **options).resolve()
    points = [p for grid in sweep.targets for group in target_points(grid) for p in group]
    (impossible,) = [p for p in points if p.impossible]
    assert words in impossible.impossible


def test_policies_of_other_points_than_the_presets_are_all_of_them() -> None:
    (text_only,) = SweepConfig(regimes="text_only").resolve().targets
    assert text_only.policies == ("full",)
    for other in (
        {"predicted_lens": "8k"},
        {"seq_lens": "8k"},
        {"model": "dit-s-2", "sp_degrees": "2"},
        {"target": "B200"},
        {"gpus": 4},
        {"strategies": "local"},
    ):
        (grid,) = SweepConfig(regimes="text_only", mode="predicted", **other).resolve().targets
        assert grid.policies == DEFAULT_POLICIES, other
    (asked,) = (
        SweepConfig(regimes="text_only", mode="predicted", predicted_lens="8k", policies="full").resolve().targets
    )
    assert asked.policies == ("full",)


def test_one_rank_measures_the_baseline_alone() -> None:
    (grid,) = SweepConfig(ranks="1").resolve().measured
    assert {p.parallel.strategy for p in measured_points(grid, device="CPU")} == {"local"}


def test_degrees_that_were_not_asked_for_may_be_too_large() -> None:
    (grid,) = SweepConfig(gpus=4, mode="predicted", regimes="full").resolve().targets
    points = [point for group in target_points(grid) for point in group]
    assert {p.parallel.sp_degree for p in points} == {1, 2, 4}


@pytest.mark.parametrize(
    ("num_heads", "expected"), [(16, {4: 2, 8: 4}), (2, {4: 2, 8: 2}), (3, {}), (1, {})], ids=lambda value: str(value)
)
def test_usp_takes_the_largest_ulysses_degree_that_leaves_a_ring(num_heads, expected) -> None:
    model = small_dit(hidden_size=48 * num_heads, num_heads=num_heads)
    grid = MeasuredGrid(
        seq_lens=(64,), ranks=(8,), strategies=("local", "ring", "usp"), sp_degrees=(2, 4, 8), model=model
    )
    points = measured_points(grid, device="CPU")
    usp = {p.parallel.sp_degree: p.parallel.ulysses_degree for p in points if p.parallel.strategy == "usp"}
    assert usp == expected
    assert [p.parallel.sp_degree for p in points if p.parallel.strategy == "ring"] == [2, 4, 8]
    assert not any(p.impossible for p in points)
    for point in points:
        assert point.config()["parallel"]["ulysses_degree"] == expected.get(
            point.parallel.sp_degree if point.parallel.strategy == "usp" else 0
        )


def test_home_folder_is_resolved_once(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert SweepConfig(out=Path("~/x")).folder == tmp_path / "home" / "x"


@pytest.mark.parametrize("name", ["report.html", "records.csv", "records.jsonl", "figures"])
def test_foreign_files_stay_and_stop_the_sweep_before_any_work(capsys, tmp_path: Path, name) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_page_that_is_a_folder_stops_the_sweep_before_any_work(capsys, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    assert main(["--out", str(tmp_path)]) == 2
    assert "report.html is in the way" in capsys.readouterr().err
