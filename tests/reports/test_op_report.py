"""Op records: written, read, compared with their rooflines and peers, and shown on a page."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from longreel.reports import store
from longreel.reports.op_compare import Peers, Rooflines
from longreel.reports.op_gaps import gaps
from longreel.reports.op_records import OpRecord
from longreel.reports.op_report import csv_text, write_op_report
from longreel.reports.op_summary import summary_lines
from longreel.reports.op_tuning import tuning_rows


def op_record(**changes: Any) -> OpRecord:
    values: dict[str, Any] = {
        "kind": "measured",
        "status": "ok",
        "op": "attention",
        "direction": "forward",
        "provider": "triton",
        "is_ours": True,
        "dtype": "bf16",
        "device": "a GPU",
        "shape": {"batch": 1, "seq_len": 4096, "num_heads": 2, "head_dim": 72},
        "run": "r1",
        "samples_s": (1e-3, 2e-3, 3e-3),
        "median_s": 2e-3,
        "interval_s": (1.4e-3, 2.6e-3),
        "flops": 1e12,
        "error": {"out": 1e-3},
        "allowed": {"out": 4e-3},
        "readings": {"sm_clock_mhz": [1900, 1980, 1980], "throttle": ["SwPowerCap"]},
        "provenance": {"commit": "c0ffee", "source": "abc", "environment": {"device": "a GPU"}},
    } | changes
    if values["status"] != "ok":
        values |= {"median_s": None, "interval_s": None, "samples_s": (), "reason": f"it was {values['status']}"}
    return OpRecord(**values)


def some_records() -> list[OpRecord]:
    roof = {
        "op": "matmul",
        "provider": "eager",
        "is_ours": False,
        "shape": {"batch": 1, "seq_len": 8192, "hidden_size": 8192},
    }
    long = {"batch": 1, "seq_len": 8192, "num_heads": 2, "head_dim": 72}
    return [
        op_record(**roof, median_s=1e-3),
        op_record(),
        op_record(provider="sdpa-cudnn", is_ours=False, median_s=4e-3),
        op_record(provider="sdpa-flash", is_ours=False, median_s=5e-3),
        op_record(provider="flex", is_ours=False, status="error"),
        op_record(shape=long, flops=4e12, median_s=5e-3),
        op_record(provider="sdpa-cudnn", is_ours=False, shape=long, flops=4e12, median_s=9e-3),
        # Of another run: no peer of the first.
        op_record(provider="sdpa-efficient", is_ours=False, run="r2", median_s=1e-3),
    ]


def test_a_record_survives_its_line(tmp_path):
    file = tmp_path / "records.jsonl"
    records = [*some_records(), op_record(status="wrong", error={"out": float("inf")})]
    for record in records:
        store.append(file, record)
    assert store.load_lines(file, OpRecord.from_json) == records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "sideways"}, "direction must be one of forward, backward, both; got 'sideways'"),
        ({"median_s": None}, "'ok' needs a positive median_s"),
        ({"bytes_moved": 1.0}, "flops or bytes_moved, one of them"),
        ({"flops": None}, "flops or bytes_moved, one of them"),
    ],
)
def test_an_impossible_record_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        op_record(**changes)


def test_key_follows_source_and_configuration_not_time_or_outcome():
    first = op_record()
    assert first.key == op_record(median_s=1.0, run="r9").key
    for changes in (
        {"provider": "sdpa-flash"},
        {"config": {"label": "after"}},
        {"provenance": {"commit": "c0ffee", "source": "xyz", "environment": {"device": "a GPU"}}},
    ):
        assert op_record(**changes).key != first.key


def test_speed_up_and_roofline_are_of_the_same_run():
    records = some_records()
    ours = records[1]
    assert Peers(records).speedup(ours) == pytest.approx(2.0)
    assert Peers(records).best(ours).provider == "sdpa-cudnn"
    assert Rooflines(records).fraction(ours) == pytest.approx(0.5)
    # No matrix product in its run: held against the best of all runs there.
    assert Rooflines(records).fraction(records[-1]) == pytest.approx(1.0)
    copies = op_record(op="adaln_modulate", flops=None, bytes_moved=1e9)
    assert Rooflines(records).fraction(copies) is None


def test_summary_sets_our_best_against_the_best_peer():
    records = [*some_records(), op_record(provider="triton-hopper", median_s=1.6e-3)]
    records.append(op_record(provider="triton-hopper", median_s=1e-4, config={"label": "tune forward 80 long"}))
    lines = summary_lines(records)
    assert lines[3] == ""
    assert lines[4] == "Goals for one H200, measured on a GPU:"
    head = re.split(r"  +", lines[0])
    first = dict(zip(head, re.split(r"  +", lines[1]), strict=True))
    assert (first["Over sdpa-flash"], first["Over sdpa-cudnn"], first["Speed-up"]) == ("3.12×", "2.50×", "2.50×")
    second = dict(zip(head, re.split(r"  +", lines[2]), strict=True))
    assert (second["Over sdpa-flash"], second["Over sdpa-cudnn"]) == ("–", "1.80×")
    assert "triton-hopper" in lines[1]
    assert "2.50×" in lines[1]
    assert lines[1].endswith("sdpa-cudnn  measured, a GPU")
    assert "62 %" in lines[1]
    assert summary_lines([r for r in records if not r.is_ours]) == []


def test_gaps_are_one_line_per_provider_and_reason():
    lengths = [{"batch": 1, "seq_len": n, "num_heads": 2, "head_dim": 72} for n in (4096, 8192)]
    records = [op_record(shape=shape, direction=d) for shape in lengths for d in ("forward", "backward")]
    missing = {"provider": "flash-attn-4", "is_ours": False, "status": "skipped"}
    records += [op_record(shape=shape, direction=d, **missing) for shape in lengths for d in ("forward", "backward")]
    records.append(op_record(shape=lengths[1], direction="backward", provider="flex", is_ours=False, status="oom"))
    records.append(op_record(shape=lengths[0], provider="triton-hopper", status="wrong"))
    assert [(g.provider, g.status, g.where, g.reason) for g in gaps(records)] == [
        ("triton-hopper", "wrong", "4,096 tokens; forward", "it was wrong"),
        ("flex", "oom", "8,192 tokens; backward", "it was oom"),
        ("flash-attn-4", "skipped", "every length", "it was skipped"),
    ]
    assert gaps(records[:4]) == []


def test_candidates_of_tuning_are_rows_of_their_own_table(tmp_path):
    constants = '{"evidence": "assumed", "max_chunk": 64, "num_warps": null, "per_warp": 640, "record": null}'
    tiles = [["forward", 80, "long", "{}"], ["adaln_bwd", 0, "long", constants]]
    compared = {"provider": "constants in use", "verdict": "FAST", "ratio": 0.9, "low": 0.88, "high": 0.93}
    tried = op_record(
        config={"label": "tune adaln_bwd 0 long", "tiles": tiles},
        op="adaln_modulate",
        direction="backward",
        comparison=compared,
    )
    decided = op_record(config={"label": "tuned adaln_bwd 0 long", "tiles": tiles}, status="error")
    first, last = tuning_rows([*some_records(), tried, decided])
    assert first[:5] == ("adaln_bwd", "every", "long", "adaln modulate backward", "max chunk 64, per warp 640")
    assert first[5:] == ("2.00", "0.900 (0.880–0.930)", "FAST")
    assert last[3].endswith(", again")
    assert last[-1] == "error: it was error"
    page = write_op_report(tmp_path, [*some_records(), tried, decided]).read_text()
    assert '<h2 id="tuning">' in page
    assert "(tune adaln_bwd" not in page.split('<script type="application/json"')[0]


def test_page_and_csv(tmp_path):
    page = write_op_report(tmp_path, some_records(), source_files=["records.jsonl"]).read_text()
    assert "<b>error</b> at 4,096 tokens: it was error" in page
    assert page.count('role="img"') == 1
    # Against cuDNN by name and as the best peer among the duels, and in the table of all.
    assert page.count("2.00×") == 3
    assert "Goals for one H200, measured on a GPU" in page
    assert "<td>attention backward, deterministic</td>" in page
    assert "SwPowerCap" in page
    rows = list(csv.DictReader(io.StringIO(csv_text(some_records()))))
    assert [float(row["speedup"]) for row in rows if row["provider"] == "triton"] == pytest.approx([2.0, 1.8])
    assert [float(row["speedup_sdpa_flash"] or 0) for row in rows if row["provider"] == "triton"] == [2.5, 0]
    assert rows[1]["sm_clock_mhz"] == "1980"
    assert float(rows[1]["error_of_allowed"]) == pytest.approx(0.25)
