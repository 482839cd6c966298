"""python bench/sweep.py, end to end and tiny."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest

from longreel.bench import console
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.presets import small_dit
from longreel.bench.sweep import main
from longreel.reports.store import load

ARGUMENTS = [
    "--measured-lens=256",
    "--predicted-lens=614400",
    "--ranks=2",
    "--sp-degrees=2",
    "--model=dit-s-2",
    "--depth=1",
    "--hidden-size=32",
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, request):
    out = tmp_path_factory.mktemp("sweep") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        # Wide enough that no line of the summary is wrapped.
        patch.setenv("COLUMNS", "200")
        status = main([*ARGUMENTS, f"--out={out}"])
    return status, out


def test_writes_report_records_and_csv(sweep) -> None:
    status, out = sweep
    assert status == 0
    assert {"report.html", "records.jsonl", "records.csv"} <= {path.name for path in out.iterdir()}
    page = (out / "report.html").read_text()
    assert "MEASURED" in page
    assert "PREDICTED" in page
    records = load(out / "records.jsonl")
    rows = list(csv.DictReader((out / "records.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == [record.key for record in records]


def test_records_are_complete(sweep) -> None:
    _, out = sweep
    records = load(out / "records.jsonl")
    assert {r.kind for r in records} == {"measured", "predicted"}
    assert {r.regime for r in records} == {"full", "text_only"}
    for record in records:
        assert record.status in ("ok", "oom"), record.reason
        assert record.attention == "sdpa-flash"
        assert record.flops > 0
        assert record.memory
        for name in ("commit", "dirty", "versions", "environment", "command", "time"):
            assert name in record.provenance
        assert record.config["model"]["hidden_size"] == (32 if record.kind == "measured" else 384)
    measured = [r for r in records if r.kind == "measured"]
    assert [(r.strategy, r.sp_degree, r.is_baseline) for r in measured] == [
        ("local", 1, True),
        ("ulysses", 2, False),
        ("fastseq", 2, False),
    ]
    assert [(r.policy, bool(r.comparison)) for r in measured] == [("full", False), ("full", True), ("full", True)]
    for record in measured:
        assert record.status == "ok"
        assert 0 < record.memory["process_before"] < record.memory["process"]
        assert len(record.samples_s) >= 3
        assert record.error["grad"] <= record.error["tolerance"] == 1e-5
        sequence = {name: sent for name, sent in record.traffic.items() if name.startswith("sequence.")}
        assert sum(sequence.values()) == sum(record.provenance["traffic_formula"].values())
        # The counter saw what the closed form says, and most of a forward pass more, which is recomputed in the blocks.
        assert 1.25 * record.flops < record.hw_flops < 4 / 3 * record.flops
        assert record.telemetry == {"unavailable": "no NVML for device type cpu"}
    predicted = [r for r in records if r.kind == "predicted"]
    assert {r.seq_len for r in predicted} == {614_400}
    assert all(r.memory_limit == 80 * 2**30 for r in predicted)
    # Without recomputation nothing fits, so it is predicted with it as well.
    statuses = {(r.policy, r.status) for r in predicted}
    assert statuses >= {("none", "oom"), ("full", "ok")}
    assert all("GiB of" in r.reason for r in predicted if r.status == "oom")


def test_second_sweep_appends_and_the_report_takes_the_last(sweep, capsys) -> None:
    _, out = sweep
    before = load(out / "records.jsonl")
    assert main([*ARGUMENTS, "--mode=measured", "--strategies=local", f"--out={out}"]) == 0
    after = load(out / "records.jsonl")
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(before)
    said = capsys.readouterr().out
    assert str(out / "report.html") in said.replace("\n", "")
    rows = list(csv.DictReader((out / "records.csv").read_text().splitlines()))
    assert len(rows) == len(before)


@pytest.fixture
def finished(monkeypatch, tmp_path):
    """Run a sweep whose points end with the given statuses; returns its exit status and its folder."""
    strategies = ("ulysses", "fastseq")
    grid = MeasuredGrid(seq_lens=(64,), ranks=(2,), sp_degrees=(2,), strategies=strategies, model=small_dit())
    points = measured_points(grid, device="CPU")

    def run(*statuses: str):
        def records(sweep, pool, provenance, **_):
            for point, status in zip(points, statuses, strict=True):
                if status == "interrupt":
                    raise KeyboardInterrupt
                if status == "terminate":
                    os.kill(os.getpid(), signal.SIGTERM)
                outcome = {"step_s": 1.0, "error": {"grad": 0.0}} if status == "ok" else {"reason": "so it is"}
                yield point.record(status, provenance=provenance, **outcome)

        monkeypatch.setattr(console, "run_sweep", records)
        return main(["--mode=measured", f"--out={tmp_path}"]), tmp_path

    return run


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        (("ok", "wrong", "wrong"), "2 wrong"),
        (("ok", "ok", "error"), "1 error"),
        (("error", "error", "error"), "3 error"),
        (("oom", "skipped", "oom"), "no point has a figure"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_run_with_points_that_failed_is_a_failed_run_with_a_report(finished, capsys, statuses, said) -> None:
    status, out = finished(*statuses)
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert (out / "report.html").exists()


def test_points_that_do_not_fit_or_cannot_be_are_no_failure(finished, capsys) -> None:
    status, _ = finished("ok", "oom", "skipped")
    assert status == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        (("ok", "interrupt", "ok"), 130, "finished points are in"),
        (("interrupt", "ok", "ok"), 130, "no point had finished"),
        (("ok", "terminate", "ok"), 143, "finished points are in"),
    ],
)
def test_interrupt_says_what_is_kept(finished, capsys, statuses, status, said) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found, out = finished(*statuses)
    assert found == status
    assert said in capsys.readouterr().err
    assert (out / "records.jsonl").exists() == (statuses[0] == "ok")
    assert signal.getsignal(signal.SIGTERM) is before


def test_unfinished_last_line_is_a_line_on_the_terminal(finished, capsys, tmp_path) -> None:
    (tmp_path / "records.jsonl").write_text('{"kind": "mea')
    status, _ = finished("ok", "ok", "ok")
    assert status == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"warning: {tmp_path}") for line in lines)
