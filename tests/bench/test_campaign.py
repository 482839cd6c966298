"""The GPU campaign, rehearsed on a CPU end to end, and its parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longreel.bench import campaign, campaign_steps
from longreel.bench.campaign import main
from longreel.bench.campaign_plans import AFTER, BEFORE, hopper
from longreel.bench.campaign_steps import BUDGETS, STEPS
from longreel.bench.micro_sweep import load
from longreel.bench.tiles import candidates, listed_width, read_tiles, tiles_row, use_tiles
from longreel.kernels import triton_attention_tuning as tuning


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Two runs into one folder. In processes of their own: kernels imported to be interpreted can no longer compile."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("campaign")
    script = Path(campaign.__file__).resolve().parent / "campaign.py"
    command = [sys.executable, str(script), "--rehearse", f"--out={out}"]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=240) for _ in range(2))
    return first, again, out


def test_every_step_is_done_and_not_done_twice(rehearsed):
    first, again, out = rehearsed
    assert first.returncode == 0, first.stdout + first.stderr
    assert again.returncode == 0, again.stdout + again.stderr
    steps = json.loads((out / "campaign.json").read_text())["steps"]
    assert list(steps) == sorted(STEPS)
    assert {step["status"] for step in steps.values()} == {"done"}
    records = load(out / "records.jsonl")
    assert len({r.key for r in records}) == len(records)


def test_records_are_those_of_a_campaign(rehearsed):
    *_, out = rehearsed
    records = load(out / "records.jsonl")
    assert {r.status for r in records} == {"ok"}
    assert all(r.kind == "measured" and "Triton interpreted" in r.device for r in records)
    labels = {r.config["label"] for r in records}
    assert {BEFORE, AFTER, "burst", "sustained"} <= labels
    assert any(label.startswith("tune forward") for label in labels)
    ours = {r.op for r in records if r.provider == "triton" and r.config["label"] == BEFORE}
    assert ours == {r.op for r in records} - {"clone", "matmul"}
    after = [r for r in records if r.config["label"] == AFTER]
    assert all(r.config["tiles"] for r in after)
    assert len({(r.provenance["commit"], r.provenance["source"]) for r in records}) == 1
    assert {"report.html", "ops.csv", "tuning.json"} <= {path.name for path in out.iterdir()}


def test_tuning_result_can_be_read_back(rehearsed):
    *_, out = rehearsed
    rows = read_tiles(out / "tuning.json")
    assert [row[0] for row in rows] == ["forward", "dkdv"]
    keys = {r.key for r in load(out / "records.jsonl")}
    for row in rows:
        chosen = json.loads(row[3])
        assert chosen["evidence"] == "measured"
        assert chosen["record"] in keys
    with use_tiles(rows):
        used = tuning.attention_tiles("forward", rows[0][1], campaign.torch.bfloat16, 100)
        assert used.evidence == "measured"
    assert not tuning.MEASURED


def test_steps_fit_into_nine_minutes():
    assert list(BUDGETS) == list(STEPS)
    assert sum(BUDGETS.values()) <= 9 * 60


def test_hopper_plan_measures_what_matters_first():
    plan = hopper((), device="cuda")
    first = plan.micro[0]
    assert {case.head_dim for case in first.cases} == {72}
    assert {"triton", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"} <= set(first.providers_for("attention"))
    attention = {c.seq_len for p in plan.micro for c in p.cases if c.op == "attention" and c.head_dim == 72}
    assert {4096, 819_200} <= attention
    ops = {case.op for p in plan.micro for case in p.cases}
    assert {"adaln_modulate", "bias_gelu", "sp_pack_heads", "attention_packed"} <= ops
    assert any("flex" in p.providers for p in plan.micro)


def test_validation_runs_every_file_with_gpu_tests():
    *quick, large = campaign._validation()
    assert all("not 31" in part for part in quick)
    names = [part[0] for part in quick]
    assert "tests/kernels/test_triton_attention_gpu.py" in names
    assert set(names) < set(large)


def test_a_failing_test_fails_the_step(tmp_path):
    test = tmp_path / "test_red.py"
    test.write_text("def test_red():\n    assert False\n\ndef test_green():\n    pass\n")
    part = campaign_steps._pytest((str(test), "-c", "/dev/null", "--rootdir", str(tmp_path)), tmp_path / "log", 60.0)
    assert part["status"] == "failed"
    assert (part["passed"], part["failed"]) == (1, 1)
    assert part["failures"][0].endswith("::test_red")


def test_constants_in_use_are_not_their_own_rival():
    for kernel in ("forward", "dkdv", "dq", "hopper"):
        width = listed_width(kernel, 72)
        own, *others = candidates(kernel, width, "long")
        assert others
        assert own not in others
    assert tiles_row("hopper", listed_width("hopper", 72), "long", own)[:3] == ("hopper", 72, "long")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "there is no CUDA device here; --rehearse"),
        (["--out=x", "--rehearse", "--step=micro3"], "step: unknown 'micro3'; there are validate, ceilings"),
        (["--out=x", "--rehearse", "--minutes=0"], "minutes must be positive, got 0.0"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
