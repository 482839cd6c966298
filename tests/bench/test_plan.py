"""bench/plan.py: its table, its JSON, and one line for bad questions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longreel.bench.plan import main
from longreel.bench.plan_answer import GiB, PlanConfig, parse_memory

SMALL = ["--model", "dit-s-4", "--tokens", "4096", "--gpus", "2", "--processes", "1"]


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    assert main([*SMALL, "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    for part in ("predicted, 2 x H800, 4,096 tokens, full, dit-s-4", "tokens/s (", "for a million tokens at 2.5"):
        assert part in out
    assert "train.py --strategy " in out
    # However narrow the terminal is.
    assert "…" not in out


def test_one_spread_has_no_runners_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tokens", "2k", "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "2,048 tokens" in out
    assert "best of every other" not in out


def test_json_is_stable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--target", "h100", "--memory", "24GB", "--price", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    assert found["kind"] == "predicted"
    assert set(found) == {
        "schema_version",
        "kind",
        "question",
        "target",
        "best",
        "runners_up",
        "does_not_fit",
        "cannot_run",
        "inputs",
    }
    best = found["best"]
    low, high = best["tokens_per_s_interval"]
    assert low < best["tokens_per_s"] < high
    assert best["tokens_per_s"] == pytest.approx(4096 * best["samples_per_step"] / best["step_s"])
    assert best["cost_per_million_tokens"] == pytest.approx(2 * 2 / 3600 / best["tokens_per_s"] * 1e6)
    assert found["target"]["memory_bytes"] == 24 * GiB
    assert best["memory_bytes"] <= found["target"]["usable_bytes"]
    slower = [one["slower_by"] for one in found["runners_up"]]
    assert slower == sorted(slower)
    assert {rate["provenance"] for rate in found["inputs"].values()} == {"assumed"}


def test_own_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[Tiny]\nbf16_tflops = 100\nhbm_tb_s = 1\nmemory_gib = 24\nlink_gb_s = 20\n"
        "flash_attention = [0.1, 0.08, 0.12]\ngpus_per_node = 2\n"
    )
    assert main([*SMALL, "--json", "--target", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["target"]["name"] == "TINY"
    assert main([*SMALL, "--json", "--profiles", str(file), "--target", "tiny"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["memory_byte_s"]["value"] == pytest.approx(0.8e12)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "rtx"], "unknown GPU 'rtx'; profiles are A100, H800.*write a TOML file.*bf16_tflops = 989"),
        (["--target", "none.toml"], "none.toml: no profiles of GPUs there"),
        (["--memory", "lots"], "memory: 'lots' is not a size; write 80GB"),
        (["--memory", "2.7GB", "--gpus", "1"], "plan: nothing fits"),
        (["--gpus", "12"], "num_gpus must be 1 to 8, one node of H800, or a multiple of 8, got 12"),
        (["--price", "-1"], "price must be positive"),
        (["--tokens", "0"], "'0' is not a length in tokens; write 2048 or 2k"),
        (["--tokens", "1e6"], "'1e6' is not a length in tokens; write 2048 or 2k"),
        (["--model", "dit"], "unknown model preset 'dit'"),
    ],
)
def test_bad_questions_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *args]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert not captured.out
    assert re.search(message, line), line


def test_sizes() -> None:
    assert (
        parse_memory("memory", "80GB") == parse_memory("memory", "80 GiB") == parse_memory("memory", "80") == 80 * GiB
    )
    assert parse_memory("memory", "1.5TB") == 1536 * GiB
    assert PlanConfig(tokens=8).setting.host_limit_bytes == 128 * GiB
