"""bench/validate.py on records made of a prediction with a known error, and on what it cannot compare."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from longreel.bench.validate import main
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.predict import PredictionCase, predict_step
from longreel.reports import store
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record

MODEL = DiTConfig(depth=4, hidden_size=256, num_heads=4)
PARALLEL = ParallelConfig(strategy="ulysses", sp_degree=2, precision="bf16", policy="full")


def step(*, memory: float = 1.0, time: float = 1.0, **changes: Any) -> Record:
    """A step that needed so many times what is predicted."""
    found = predict_step(PredictionCase(model=MODEL, parallel=PARALLEL, num_gpus=2, target="H200", seq_len=8192))
    given: dict[str, Any] = {
        "kind": "measured",
        "regime": "full",
        "status": "ok",
        "model": "small",
        "device": "NVIDIA H200",
        "strategy": "ulysses",
        "sp_degree": 2,
        "dp_degree": 1,
        "num_devices": 2,
        "engine": "fsdp2-zero2",
        "policy": "full",
        "attention": "sdpa-flash",
        "seq_len": 8192,
        "batch_per_group": 1,
        "step_s": found.step_s * time,
        "memory": {"allocated": round(found.memory_bytes * memory)},
        "config": {"model": asdict(MODEL), "parallel": asdict(PARALLEL), "seed": 0},
    }
    return Record(**(given | changes))


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *records: Record | OpRecord) -> str:
    for record in records:
        store.append(folder / ("ops" if isinstance(record, OpRecord) else "steps") / "records.jsonl", record)
    assert main(["--records", str(folder)]) == 0
    return capsys.readouterr().out


def test_errors_are_those_put_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    off = step(memory=1 / 1.02, time=1 / 4, seq_len=8192, provenance={"commit": "other"})
    out = printed(tmp_path, capsys, step(), off, step(kind="emulated"))
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines() if line.startswith(("measured", "emu"))}
    assert set(rows) == {
        f"{kind}, {part}" for kind in ("measured", "emulated") for part in ("all", "full", "ulysses", "policy full")
    }
    # Steps; median, 90 % and largest of memory, then of time.
    assert rows["measured, all"][0] == "2"
    assert rows["measured, all"][1:7] == ["1.0", "%,", "2.0", "%,", "2.0", "%"]
    assert rows["measured, all"][7:13] == ["150.0", "%,", "300.0", "%,", "300.0", "%"]
    assert rows["measured, all"][-3:] == ["1", "of", "2"]
    assert rows["emulated, all"][-3:] == ["1", "of", "1"]
    assert "No op record to calibrate on" in out


def test_an_emulated_rank_computes_as_the_gpu_that_it_ran_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An H200 in place of an H800 moves memory 1.4 times as fast, and its exchanges take the H800's time."""
    case = PredictionCase(model=MODEL, parallel=PARALLEL, num_gpus=2, target="H800", seq_len=8192, computes_on="H200")
    found, as_target, on_device = (
        predict_step(one) for one in (case, replace(case, computes_on=None), replace(case, target="H200"))
    )
    assert on_device.step_s < found.step_s < as_target.step_s
    assert found.memory_limit == 80 * 2**30
    assert found.breakdown["memory"] == on_device.breakdown["memory"] < as_target.breakdown["memory"]
    config = {"model": asdict(MODEL), "parallel": asdict(PARALLEL), "seed": 0, "target": "H800"}
    device, ran_on = "H800 (one rank on NVIDIA H200)", {"ran_on": "NVIDIA H200"}
    record = step(kind="emulated", device=device, config=config, provenance=ran_on, step_s=found.step_s)
    out = printed(tmp_path, capsys, record)
    (row,) = (line for line in out.splitlines() if line.startswith("emulated, all"))
    assert row[32:].split()[7:13] == ["0.0", "%,", "0.0", "%,", "0.0", "%"]


def test_of_a_point_that_was_run_again_the_last_record_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(tmp_path, capsys, step(time=9.0), step(time=9.0), step())
    (row,) = (line for line in out.splitlines() if line.startswith("measured, all"))
    assert row[32:].split()[0] == "1" and row[32:].split()[7:9] == ["0.0", "%,"]


def test_calibrates_on_ops_and_leaves_out_what_it_cannot_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matmul = OpRecord(
        kind="measured",
        status="ok",
        op="matmul",
        direction="forward",
        provider="eager",
        dtype="bf16",
        device="NVIDIA H200",
        shape={"seq_len": 8192, "hidden_size": 1152},
        run="one",
        median_s=1.0,
        flops=7e14,
    )
    failed = step(status="oom", reason="too large", step_s=None)
    fp32 = step(config={"model": asdict(MODEL), "parallel": asdict(replace(PARALLEL, precision="fp32")), "seed": 0})
    out = printed(tmp_path, capsys, matmul, failed, step(), step(device="CPU process on 2 cores"), fp32)
    assert "Calibrated on op records of NVIDIA H200, which no step below had a part in." in out
    assert "1 steps left out: no profile of CPU process on 2 cores" in out
    assert "1 steps left out: cannot be predicted: precision 'fp32' cannot be predicted" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("measured, all")] == ["1"]


def test_says_so_when_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "nothing is validated yet" in printed(folder, capsys)
    (tmp_path / "bad.jsonl").write_text('{"schema_version": 99}\n{"schema_version": 99}\n')
    assert main(["--records", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
