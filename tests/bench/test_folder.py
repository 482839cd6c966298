"""longreel.bench.folder: one sweep per folder, every point once, records whole whatever happens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from longreel.bench import console, provenance, run
from longreel.bench.folder import LOCK, Records, only_sweep
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.presets import small_dit
from longreel.bench.sweep import main
from longreel.reports import store
from longreel.reports.records import Record
from longreel.reports.store import load

GRID = MeasuredGrid(seq_lens=(64, 128), ranks=(2,), sp_degrees=(2,), strategies=("ulysses",), model=small_dit())
POINTS = measured_points(GRID, device="CPU")
ORIGIN = {"commit": "c", "environment": {"cores": 2}}


def record(place: int, origin=ORIGIN, **changes) -> Record:
    return POINTS[place].record("ok", step_s=1.0, provenance=dict(origin), **changes)


def test_a_point_is_written_once(tmp_path) -> None:
    records = Records(tmp_path, ORIGIN, resume=False)
    assert records.add(record(0))
    assert not records.add(record(0))
    assert records.done(POINTS[0].key(ORIGIN))
    assert not records.done(POINTS[1].key(ORIGIN))
    assert len(load(records.path)) == 1


def test_resuming_keeps_what_this_commit_has_made_on_this_machine(tmp_path) -> None:
    first = Records(tmp_path, ORIGIN, resume=False)
    first.add(record(0))
    Records(tmp_path, ORIGIN | {"commit": "older"}, resume=False).add(record(1, ORIGIN | {"commit": "older"}))
    again = Records(tmp_path, ORIGIN, resume=True)
    assert [again.done(point.key(ORIGIN)) for point in POINTS] == [True, False, False, False]
    assert not again.add(record(0))
    assert again.saved(POINTS[0].key(ORIGIN)) == load(again.path)[0]
    # Without --resume the point is run again, and its last word counts.
    assert Records(tmp_path, ORIGIN, resume=False).add(record(0))


@pytest.mark.parametrize(("status", "again"), [("error", True), ("skipped", True), ("oom", False), ("wrong", False)])
def test_points_that_may_go_another_way_today_run_again(tmp_path, status, again) -> None:
    there = POINTS[0].record(status, reason="no such luck", provenance=dict(ORIGIN))
    Records(tmp_path, ORIGIN, resume=False).add(there)
    resumed = Records(tmp_path, ORIGIN, resume=True)
    assert resumed.done(there.key) is not again
    assert resumed.add(record(0)) is again
    assert [r.status for r in resumed.of_sweep()] == ["ok" if again else status]
    # It counts from then on.
    assert Records(tmp_path, ORIGIN, resume=True).done(there.key)


def test_point_that_is_skipped_again_is_not_written_again(tmp_path) -> None:
    for reason, lines in (("no package", 1), ("no package", 1), ("no GPU", 2)):
        records = Records(tmp_path, ORIGIN, resume=True)
        assert records.add(POINTS[0].record("skipped", reason=reason, provenance=dict(ORIGIN)))
        assert len(load(records.path)) == lines


def test_more_steps_take_the_place_of_fewer(tmp_path) -> None:
    Records(tmp_path, ORIGIN, resume=False).add(record(0, samples_s=(1.0,) * 2))
    records = Records(tmp_path, ORIGIN, resume=True)
    assert not records.add(record(0, samples_s=(1.0,) * 2))
    assert records.add(record(0, samples_s=(1.0,) * 5))
    assert len(records.saved(record(0).key).samples_s) == 5


def test_failures_of_another_sweep_in_the_folder_are_not_this_ones(tmp_path, monkeypatch) -> None:
    origin = provenance.gather(["x"])
    other = replace(POINTS[0], seed=1).record("wrong", reason="gate", provenance=origin)
    small_sweep(monkeypatch)
    Records(tmp_path, origin, resume=False).add(other)
    assert main(["--mode=measured", f"--out={tmp_path}", "--resume"]) == 0
    # Its own count, also where they were there before.
    own = POINTS[0].record("wrong", reason="gate", provenance=origin)
    Records(tmp_path, origin, resume=False).add(own)
    small_sweep(monkeypatch)
    assert main(["--mode=measured", f"--out={tmp_path}", "--resume"]) == 1


def test_answer_to_another_point_counts_for_the_one_that_was_asked_for(tmp_path) -> None:
    records = Records(tmp_path, ORIGIN, resume=False)
    records.add(record(0, ORIGIN | {"asked": {"key": "asked-for", "policy": "auto"}}))
    assert Records(tmp_path, ORIGIN, resume=True).done("asked-for")


def test_second_sweep_is_told_at_once_and_nothing_is_written(tmp_path, capsys) -> None:
    with only_sweep(tmp_path, "python bench/sweep.py --preset h800"):
        assert main(["--preset=smoke", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"process {os.getpid()} (python bench/sweep.py --preset h800)" in error
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    # And the next one is not.
    with only_sweep(tmp_path, "next"):
        assert json.loads((tmp_path / LOCK).read_text())["command"] == "next"


def test_lock_goes_with_a_process_that_is_killed(tmp_path) -> None:
    held = (
        "import sys, time; from pathlib import Path; from longreel.bench.folder import only_sweep\n"
        "with only_sweep(Path(sys.argv[1]), 'held'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {process.pid} \(held\)"), only_sweep(tmp_path, "mine"):
            pass
        process.kill()
    with only_sweep(tmp_path, "mine"):
        pass


class Stopped(BaseException):
    """The process ends here."""


def small_sweep(monkeypatch, *, stop_at: int | None = None, error: BaseException | None = None) -> None:
    """Sweeps of POINTS without workers; the stop_at-th point that would run raises instead."""
    ran = iter(range(len(POINTS) + 1))

    def records(sweep, pool, origin, *, done, **_):
        for point in POINTS:
            if done(point.key(origin)):
                continue
            if next(ran) == stop_at:
                assert error is not None
                raise error
            yield point.record("ok", step_s=1.0, error={"grad": 0.0}, provenance=origin)

    monkeypatch.setattr(console, "run_sweep", records)


@pytest.mark.parametrize("stop_at", range(len(POINTS)))
def test_sweep_that_stops_at_any_point_resumes_there(tmp_path, monkeypatch, stop_at) -> None:
    small_sweep(monkeypatch, stop_at=stop_at, error=Stopped())
    with pytest.raises(Stopped):
        main(["--mode=measured", f"--out={tmp_path}"])
    before = (tmp_path / "records.jsonl").read_bytes() if stop_at else b""
    assert before.count(b"\n") == stop_at
    small_sweep(monkeypatch)
    assert main(["--mode=measured", f"--out={tmp_path}", "--resume"]) == 0
    assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
    origin = provenance.gather(["x"])
    assert [r.key for r in load(tmp_path / "records.jsonl")] == [point.key(origin) for point in POINTS]
    # Nothing is left to do.
    whole = (tmp_path / "records.jsonl").read_bytes()
    small_sweep(monkeypatch)
    assert main(["--mode=measured", f"--out={tmp_path}", "--resume"]) == 0
    assert (tmp_path / "records.jsonl").read_bytes() == whole


def test_full_disk_leaves_whole_records_and_one_line(tmp_path, monkeypatch, capsys) -> None:
    small_sweep(monkeypatch)
    append = store.append

    def until_full(path, new):
        if Path(path).exists() and len(load(path)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, new)

    monkeypatch.setattr(store, "append", until_full)
    assert main(["--mode=measured", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert "--resume" in error
    assert len(load(tmp_path / "records.jsonl")) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_record_that_the_disk_does_not_take_is_an_error_that_names_the_file(tmp_path) -> None:
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    records = Records(tmp_path, ORIGIN, resume=False)
    with pytest.raises(OSError, match=r"records.jsonl: .*whole"):
        records.add(record(0))
    assert not records.done(POINTS[0].key(ORIGIN))


def test_newer_schema_is_one_line_before_any_work(tmp_path, capsys) -> None:
    line = json.loads(record(0).to_json()) | {"schema_version": 99}
    (tmp_path / "records.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["--preset=smoke", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "schema version 99" in error


def test_key_before_a_point_runs_is_the_key_of_its_record() -> None:
    assert POINTS[0].key(ORIGIN) == record(0).key
    assert len({point.key(ORIGIN) for point in POINTS}) == len(POINTS)
    assert replace(POINTS[0], seed=1).key(ORIGIN) != POINTS[0].key(ORIGIN)


def test_measured_ranks_of_gpus_talk_by_nccl() -> None:
    sweep = console.SweepConfig(preset="point", mode="measured").resolve()
    assert run.backend(sweep) == "gloo"
    on_gpus = replace(sweep, measured=tuple(replace(grid, device_type="cuda") for grid in sweep.measured))
    assert "nccl" in run.backend(on_gpus)
