"""The README's table of kernels: what a GPU measured, or a line that says that none has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from longreel.reports import op_table, store
from longreel.reports.op_table import BEGIN, END, LEAST_TOKENS, NOTHING, main, markdown

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("op_records_of_tests", Path(__file__).with_name("test_op_report.py"))
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
op_record = _MODULE.op_record

LONG = {"batch": 1, "seq_len": LEAST_TOKENS, "num_heads": 2, "head_dim": 72}
ORIGIN = {"commit": "c0ffee", "source": "abc", "environment": {}, "command": "bench/campaign.py --out out/h200"}


def some_records():
    rows = {"batch": 1, "hidden_size": 1152}
    copies = {"op": "bias_gelu", "flops": None, "bytes_moved": 4e9, "provenance": ORIGIN}
    return [
        op_record(op="matmul", provider="eager", is_ours=False, shape={**rows, "seq_len": 8192}, median_s=1e-3),
        # Short, and of an earlier run: not in the table.
        op_record(provenance=ORIGIN),
        op_record(shape=LONG, median_s=4e-3, provenance=ORIGIN),
        op_record(shape=LONG, median_s=2e-3, run="r2", config={"label": "after"}, provenance=ORIGIN),
        op_record(
            shape=LONG,
            median_s=3e-3,
            run="r2",
            config={"label": "after"},
            provider="sdpa-cudnn",
            is_ours=False,
            provenance=ORIGIN,
        ),
        op_record(**copies, shape={**rows, "seq_len": 1024}),
        op_record(**copies, shape={**rows, "seq_len": 4096}),
    ]


def test_without_measurements_it_says_so():
    interpreted = op_record(device="CPU with 2 cores, Triton interpreted")
    predicted = op_record(kind="predicted")
    failed = op_record(status="error")
    assert markdown([interpreted, predicted, failed]) == [NOTHING]
    assert "No GPU" in NOTHING


def test_last_measurement_of_each_point_with_its_command():
    head, blank, *table = markdown(some_records())
    assert head == "Measured on one a GPU (commit c0ffee, `bench/campaign.py --out out/h200`):"
    assert blank == ""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[:4] for row in rows] == [
        ["attention", "forward", "32,768", "2 x 72"],
        ["bias gelu", "forward", "4,096", "1,152"],
    ]
    # Of the later run: 1e12 FLOP in 2 ms, half of the matrix product's rate, 1.5 times cuDNN's.
    assert rows[0][4:] == ["500 TFLOP/s (triton)", "50 %", "1.50× sdpa-cudnn", "25 %"]
    assert rows[1][4] == "2.00 TB/s (triton)"
    assert rows[1][6] == "no peer ran"


def test_writes_between_the_marks_only(tmp_path, capsys):
    for record in some_records():
        store.append(tmp_path / "h200" / "ops.jsonl", record)
    (tmp_path / "h200" / "steps.jsonl").write_text('{"model": "of another kind"}\n')
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(tmp_path), f"--write={document}"]) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\nMeasured on one a GPU")
    assert text.endswith(f" |\n{END}\nafter\n")
    assert "old" not in text
    assert main([str(tmp_path), f"--write={document}"]) == 0
    assert document.read_text() == text
    document.write_text("no marks")
    assert main([str(tmp_path), f"--write={document}"]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2
    assert "no such file or folder" in errors


def test_table_in_the_readme_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert op_table.replaced(Path("README.md").read_text(), [printed]) == Path("README.md").read_text()


@pytest.mark.parametrize("device", ["CPU with 2 cores", "CPU with 2 cores, Triton interpreted"])
def test_no_cpu_is_a_gpu(device):
    assert markdown([op_record(device=device)]) == [NOTHING]
