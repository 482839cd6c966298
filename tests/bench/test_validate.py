"""bench/validate.py on records made of a prediction with a known error, and on what it cannot compare."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from longreel.bench.validate import main
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.calibration import calibrate_each
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
    assert "No op record of a GPU to calibrate on" in out


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
    out = printed(tmp_path, capsys, matmul, failed, step(), step(device="TPU"), fp32)
    assert "Calibrated on op records of NVIDIA H200 (bf16), which no step below had a part in." in out
    assert "1 steps left out: no profile of TPU" in out
    assert "1 steps left out: cannot be predicted: precision 'fp32' cannot be predicted" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("measured, all")] == ["1"]


CPU = {"environment": {"cpu": "a CPU", "cores": 2}}


def cpu_op(op: str, work: float, **changes: Any) -> OpRecord:
    """Of one second."""
    is_flops = op != "clone"
    given = {"kind": "measured", "status": "ok", "op": op, "direction": "forward", "provider": "eager", "dtype": "fp32"}
    given |= {"device": "CPU with 2 cores", "shape": {"seq_len": 1024, "hidden_size": 256}, "run": "one"}
    given |= {"flops": work if is_flops else None, "bytes_moved": None if is_flops else work, "provenance": CPU}
    return OpRecord(**(given | {"median_s": 1.0} | changes))


def cpu_ops(speed: float = 1.0) -> list[OpRecord]:
    """Products at 50 GFLOP/s, copies at 20 GB/s, attention at 40 and 30 GFLOP/s, times speed."""
    shape = {"shape": {"seq_len": 1024, "head_dim": 64}, "provider": "sdpa-flash"}
    return [
        cpu_op("matmul", 50e9 * speed),
        cpu_op("clone", 20e9 * speed),
        cpu_op("attention", 40e9 * speed, **shape),
        cpu_op("attention", 30e9 * speed, direction="backward", **shape),
    ]


def cpu_step(step_s: float, **changes: Any) -> Record:
    parallel = ParallelConfig(attention_provider="sdpa-flash", policy="none")
    given = {"device": "CPU process on 2 cores", "strategy": "local", "sp_degree": 1, "num_devices": 1}
    given |= {"policy": "none", "seq_len": 2048, "step_s": step_s, "memory": {"process": 2**30}, "provenance": CPU}
    given |= {"config": {"model": asdict(MODEL), "parallel": asdict(parallel), "seed": 0}}
    return replace(step(), **(given | changes))


def test_steps_of_a_processor_are_predicted_by_its_own_ops_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rates,) = calibrate_each(cpu_ops())
    parallel = ParallelConfig(attention_provider="sdpa-flash", policy="none")
    case = PredictionCase(
        model=MODEL,
        parallel=parallel,
        num_gpus=1,
        target=rates.device,
        seq_len=2048,
        rates=rates,
        fused_pointwise=False,
    )
    found = predict_step(case)
    # 24 S C^2 a block and 4 S^2 C, by hand: three times at 50 GFLOP/s; once at 40 and 2.5 times at 30.
    linear, scores = 4 * 24 * 2048 * 256**2, 4 * 4 * 2048**2 * 256
    assert found.breakdown["attention"] == pytest.approx(scores * (1 / 40e9 + 2.5 / 30e9), rel=1e-6)
    assert found.breakdown["matmul"] == pytest.approx(3 * linear / 50e9, rel=0.05)
    used = ("matmul_flop_s", "memory_byte_s", "attention_forward_flop_s", "attention_backward_flop_s", "peak_flop_s")
    assert {found.inputs[name]["provenance"] for name in used} == {"measured"}
    other = {"environment": {"cpu": "another CPU", "cores": 2}}
    records = [*cpu_ops(), cpu_step(found.step_s), cpu_step(1.0, provenance=other)]
    out = printed(tmp_path, capsys, *records)
    assert "Calibrated on op records of CPU with 2 cores (fp32), which no step below had a part in." in out
    (row,) = (line for line in out.splitlines() if line.startswith("measured, all"))
    assert row[32:].split()[0] == "1" and row.split()[5:11] == ["0.0", "%,", "0.0", "%,", "0.0", "%"]
    assert "1 steps left out: no op records of CPU process on 2 cores (another CPU)" in out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_devices": 2, "dp_degree": 2}, "num_gpus must be 1 to 1, one node of CPU with 2 cores"),
        ({"attention": "torch"}, "attention_provider 'torch' cannot be predicted: there are rates for sdpa-flash only"),
    ],
)
def test_steps_that_a_processors_ops_say_nothing_of_are_left_out(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"1 steps left out: cannot be predicted: {reason}" in printed(
        tmp_path, capsys, *cpu_ops(), cpu_step(1.0, **changes)
    )


def test_a_processor_without_copies_measured_predicts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ops = [op for op in cpu_ops() if op.op != "clone"]
    assert "nothing measured memory on CPU with 2 cores" in printed(tmp_path, capsys, *ops, cpu_step(1.0))


def test_says_so_when_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "nothing is validated yet" in printed(folder, capsys)
    (tmp_path / "bad.jsonl").write_text('{"schema_version": 99}\n{"schema_version": 99}\n')
    assert main(["--records", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
