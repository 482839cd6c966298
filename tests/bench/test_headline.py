"""longreel.bench.headline: the table, what was continued, and the longest length that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longreel.bench import headline
from longreel.reports import store
from longreel.reports.records import Record

GiB = 2**30


def record(seq_len: int, gib: float, step_s: float | None = 1.0, **fields: Any) -> Record:
    given: dict[str, Any] = {
        "kind": "emulated",
        "regime": "full",
        "status": "oom" if step_s is None else "ok",
        "reason": "needs more" if step_s is None else None,
        "model": "DiT-XL/2",
        "device": "H800 (one rank on a GPU)",
        "strategy": "ulysses",
        "sp_degree": 8,
        "dp_degree": 1,
        "num_devices": 8,
        "engine": "fsdp2-zero2",
        "policy": "keep_attention",
        "attention": "triton",
        "seq_len": seq_len,
        "batch_per_group": 1,
        "step_s": step_s,
        "interval_s": None if step_s is None else (0.9 * step_s, 1.2 * step_s),
        "memory": {"allocated": int(gib * GiB)},
        "memory_usable": 77 * GiB,
    }
    return Record(**(given | fields))


def baseline(seq_len: int, gib: float, step_s: float | None, **fields: Any) -> Record:
    spread = {"strategy": "local", "sp_degree": 1, "dp_degree": 8, "policy": "full", "attention": "sdpa-flash"}
    return record(seq_len, gib, step_s, is_baseline=True, **spread, **fields)


def test_rows_hold_the_baseline_and_the_best() -> None:
    lines = headline.table(
        [
            baseline(1000, 40, 10.0),
            record(1000, 10, 1.0),
            record(1000, 12, 2.0, strategy="ring"),
            baseline(2000, 90, None),
            record(2000, 20, 4.0),
            record(2000, 1, 0.1, kind="predicted"),
        ]
    )
    assert lines[0] == "Emulated: 8 × H800 (one rank on a GPU), DiT-XL/2, full self-attention."
    # 9 to 12 s against 0.9 to 1.2 s.
    ulysses = "ulysses, SP 8, keep_attention, triton |"
    assert lines[4] == f"| 1,000 | 800 | 40.0 GiB | 1,000 | 10.0 GiB | 1.25 (0.938–1.67) | {ulysses}"
    assert lines[5] == f"| 2,000 | out of memory | 90.0 GiB | 500 | 20.0 GiB | - | {ulysses}"


def test_the_baseline_alone_has_no_interval() -> None:
    lines = headline.table([baseline(1000, 40, 10.0)])
    assert lines[4] == "| 1,000 | 800 | 40.0 GiB | 800 | 40.0 GiB | 1.00 | local, SP 1, full, sdpa-flash |"


def test_numbers_of_gpus_and_models_have_tables_of_their_own() -> None:
    four = {"num_devices": 4, "sp_degree": 4}
    lines = headline.table(
        [
            baseline(1000, 40, 10.0),
            record(1000, 10, 1.0),
            record(2000, 20, 1.0),
            record(1000, 10, 0.1, **four),
            record(2000, 30, 0.1, **four),
            record(1000, 5, 0.5, model="DiT-S/2"),
        ]
    )
    titles = [line for line in lines if line.startswith("Emulated: ")]
    assert len(titles) == 3
    at = lines.index("Emulated: 8 × H800 (one rank on a GPU), DiT-XL/2, full self-attention.")
    assert lines[at + 4].startswith("| 1,000 | 800 | 40.0 GiB | 1,000 | 10.0 GiB | 1.25 ")
    assert any(line.startswith("| 1,000 | not run |  | 10,000 |") for line in lines)
    # 10 GiB a thousand tokens on eight, 20 on four.
    assert [line.rsplit(": ", 1)[1] for line in lines if "extrapolated" in line] == [
        "4,350 tokens, extrapolated from 2,000",
        "7,700 tokens, extrapolated from 2,000",
    ]


def test_the_newest_commit_counts_not_the_fastest() -> None:
    old, new = ({"provenance": {"commit": commit}} for commit in "ab")
    lines = headline.table(
        [
            baseline(1000, 40, 8.0, **old),
            record(1000, 10, 0.5, **old),
            record(1000, 10, 1.0, **new),
            baseline(1000, 40, 10.0, **new),
        ]
    )
    assert lines[4].startswith("| 1,000 | 800 | 40.0 GiB | 1,000 | 10.0 GiB | 1.25 ")


def test_the_longest_length_is_on_the_line_of_the_two_longest() -> None:
    rows = [record(1000, 50), record(2000, 20), record(3000, 25), baseline(3000, 60, 1.0)]
    # 5 GiB a thousand tokens from 25 GiB at 3,000 on; the third and shortest length does not count.
    (found,) = headline.lines_of_memory(rows)
    assert (found.longest, found.fits, found.at(4000)) == (rows[2], 3000 + 52_000 // 5, 30 * GiB)
    line = "- ulysses, SP 8, keep_attention, triton: 13,400 tokens, extrapolated from 3,000"
    assert line in headline.table(rows)


def test_a_baseline_that_was_not_run_is_out_of_memory_where_its_line_says_so() -> None:
    known = [baseline(1000, 20, 1.0), baseline(2000, 40, 2.0)]
    cells = [line.split(" | ")[1:3] for line in headline.table([*known, record(3000, 10), record(4000, 10)])[4:8]]
    # 20 GiB a thousand tokens, 77 to use.
    assert cells == [
        ["8,000", "20.0 GiB"],
        ["8,000", "40.0 GiB"],
        ["not run", ""],
        ["out of memory, by the line", "80.0 GiB"],
    ]
    # One length has no line, and what was run is told as it was.
    assert headline.table([known[0], record(4000, 10)])[5].startswith("| 4,000 | not run |")
    ran = headline.table([*known, baseline(4000, 70, 9.0), record(4000, 10)])
    assert ran[6].startswith("| 4,000 | 3,556 | 70.0 GiB |")


def test_configurations_that_differ_in_attention_or_batch_have_lines_of_their_own() -> None:
    rows = [
        record(seq_len, gib * seq_len / 1000, attention=attention, batch_per_group=batch)
        for attention, batch, gib in (("triton", 1, 10), ("sdpa-flash", 1, 20), ("triton", 2, 30))
        for seq_len in (1000, 2000)
    ]
    assert [line.fits for line in headline.lines_of_memory(rows)] == [7700, 3850, 2566]
    lines = headline.table(rows)
    assert "- ulysses, SP 8, keep_attention, triton, batch 2: 2,566 tokens, extrapolated from 2,000" in lines


def test_the_line_of_depths_is_told() -> None:
    told = {"emulation": {"linearity": {"depth": 28.0, "step_s": 1.02, "allocated": 0.99}}}
    lines = headline.table([record(1024, 1, provenance=told)])
    assert "- 1,024, ulysses, SP 8, keep_attention, triton: step_s +2.0 %, allocated -1.0 %" in lines


def test_the_command_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for made in (record(1000, 10, 2.0), record(1000, 10, 1.0)):
        store.append(tmp_path / "records.jsonl", made)
    assert headline.main([str(tmp_path)]) == 0
    # The newer of two records of one point.
    assert "| 1,000 | not run |  | 1,000 |" in capsys.readouterr().out
    assert headline.main([]) == 2
    assert headline.main([str(tmp_path / "none")]) == 2
    other = tmp_path / "other"
    other.mkdir()
    store.append(other / "records.jsonl", record(1, 1, regime="text_only"))
    assert headline.main([str(other)]) == 2
    assert "no emulated records" in capsys.readouterr().err
