"""python bench/sweep.py, end to end and tiny."""

from __future__ import annotations

import csv
import json

import pytest

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
    for record in measured:
        assert record.status == "ok"
        assert len(record.samples_s) >= 3
        assert record.error["grad"] <= record.error["tolerance"] == 1e-5
        sequence = {name: sent for name, sent in record.traffic.items() if name.startswith("sequence.")}
        assert sum(sequence.values()) == sum(record.provenance["traffic_formula"].values())
        # The counter saw what the closed form says, but for recomputation and padding, which these points have not.
        assert record.hw_flops == pytest.approx(record.flops, rel=0.02)
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
