"""Synthetic records: a measured group on a CPU and a predicted one on eight GPUs, with every status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from longreel.reports.records import Record

GIB = 2**30

MakeRecord = Callable[..., Record]


def build_record(**changes: Any) -> Record:
    """A valid measured record with some fields changed; the configuration follows them, so that keys differ."""
    values: dict[str, Any] = {
        "kind": "measured",
        "regime": "full",
        "status": "ok",
        "model": "dit_tiny",
        "device": "CPU process",
        "strategy": "local",
        "sp_degree": 1,
        "num_devices": 2,
        "engine": "fsdp2-zero2",
        "policy": "full",
        "attention": "sdpa-math",
        "seq_len": 1024,
        "batch_per_group": 1,
        "samples_s": (1.9, 2.0, 2.2),
        "step_s": 2.0,
        "interval_s": (1.9, 2.2),
        "memory": {"process": 713 * 2**20, "process_before": 673 * 2**20},
        "traffic": {"all_to_all": 1000, "reduce_scatter": 500},
        "error": {"loss": 1e-7, "grad": 3e-7, "tolerance": 1e-5},
        "provenance": {
            "commit": "c0ffee",
            "time": "2026-11-22T10:00:00Z",
            "command": "python bench/sweep.py",
            "versions": {"torch": "2.13.0"},
            "environment": {"cpu": "a CPU"},
        },
    } | changes
    values.setdefault("dp_degree", values["num_devices"] // values["sp_degree"])
    if values["status"] not in ("ok", "wrong") and "step_s" not in changes:
        values |= {"step_s": None, "interval_s": None, "samples_s": ()}
    if values["status"] != "ok":
        values.setdefault("reason", f"it was {values['status']}")
    values.setdefault("config", {k: values[k] for k in ("strategy", "sp_degree", "policy", "seq_len", "engine")})
    return Record(**values)


def build_sweep() -> list[Record]:
    records = []
    for i, seq_len in enumerate((1024, 2048, 4096)):
        base = 2.0 * 2**i
        for strategy, sp_degree, policy, step in (
            ("local", 1, "full", base),
            ("local", 1, "none", base * 0.9),
            ("ulysses", 2, "full", base * 0.45),
            ("ulysses", 2, "none", base * 0.4),
            ("fastseq", 2, "full", base * 0.6),
        ):
            records.append(
                build_record(
                    strategy=strategy,
                    sp_degree=sp_degree,
                    policy=policy,
                    seq_len=seq_len,
                    is_baseline=strategy == "local" and policy == "full",
                    step_s=step,
                    interval_s=(step * 0.95, step * 1.1),
                    samples_s=(step * 0.95, step, step * 1.1),
                )
            )
    records.append(build_record(strategy="fastseq", sp_degree=2, policy="none", status="wrong", reason="grad off by 3"))
    records.append(build_record(strategy="ring", sp_degree=2, policy="none", status="error", reason="worker died"))
    for seq_len in (8192, 131072, 614400, 819200):
        for strategy, sp_degree in (("local", 1), ("ulysses", 2), ("ulysses", 8), ("fastseq", 8)):
            used = int((10 + 75 * seq_len / 614400 / sp_degree) * GIB)
            fits = used < 80 * GIB
            step = seq_len / 1e5 / sp_degree**0.9
            outcome: dict[str, Any] = {"step_s": step, "interval_s": (step * 0.8, step * 1.3)}
            if not fits:
                outcome = {"status": "oom", "reason": f"needs {used / GIB:.0f} GiB of 80 GiB"}
            records.append(
                build_record(
                    kind="predicted",
                    model="dit_xl_2",
                    device="H800 SXM 80GB",
                    num_devices=8,
                    strategy=strategy,
                    sp_degree=sp_degree,
                    seq_len=seq_len,
                    is_baseline=strategy == "local",
                    memory={"allocated": used},
                    memory_limit=80 * GIB,
                    samples_s=(),
                    error={},
                    **outcome,
                )
            )
    return records


@pytest.fixture
def make_record() -> MakeRecord:
    return build_record


@pytest.fixture(scope="session")
def sweep() -> list[Record]:
    """15 measured `ok` points, a wrong and a failed one on 2 processes; 16 predicted points on 8 GPUs, some oom."""
    return build_sweep()
