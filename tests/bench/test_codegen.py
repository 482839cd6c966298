"""The code generation report: what holds of every kernel compiled for sm_90 at production arguments, and its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from longreel.bench.codegen import main
from longreel.bench.codegen_report import KernelFacts, compile_all, to_markdown
from longreel.bench.kernel_list import kernel_cases
from longreel.bench.sass import inner_loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> list[KernelFacts]:
    return list(compile_all(kernel_cases(), [90]))


def of(rows: list[KernelFacts], provider: str, kernel: str, head_dim: int) -> KernelFacts:
    (row,) = (r for r in rows if (r.provider, r.kernel, r.head_dim) == (provider, kernel, head_dim))
    return row


def test_no_kernel_spills_or_uses_local_memory(rows):
    found = {(r.provider, r.kernel, r.head_dim): r.local_bytes for r in rows if r.spills or r.local_bytes}
    # The one exception keeps a few registers in local memory while its loop runs: 8 at 72; with triton 3.6 12, and 6 at
    # head_dim 128.
    assert {provider for provider, *_ in found} <= {"triton-atomic"}
    assert max(found.values(), default=0) <= 48
    assert not any(r.loop_spills for r in rows)


def test_planned_programs_fit_and_two_where_planned(rows):
    assert all(r.programs_per_sm >= r.planned_programs for r in rows)
    for kernel in ("attention_fwd", "attention_dkdv", "attention_dq"):
        for head_dim in (64, 72):
            assert of(rows, "triton", kernel, head_dim).programs_per_sm >= 2


def test_attention_multiplies_with_wgmma_and_loads_16_bytes_or_by_tma(rows):
    attention = [r for r in rows if r.op.startswith("attention") and r.kernel != "attention_delta"]
    assert len(attention) == 15
    for row in attention:
        assert row.products, row
        if row.provider == "triton-hopper":
            assert set(row.loads) == {"TMA"}
            continue
        # What is narrower are values per row, and the tail of 72 columns.
        sizes = {int(width): int(width) * count for width, count in row.loads.items()}
        assert sizes[16] >= 0.4 * sum(sizes.values()), row


def test_memory_bound_kernels_load_16_bytes(rows):
    others = [r for r in rows if not r.op.startswith("attention")]
    assert {r.kernel for r in others} >= {"adaln_fwd", "adaln_bwd", "bias_gelu_fwd", "gated_residual_bwd", "pack_heads"}
    assert all("16" in r.loads for r in others)


def test_predictions_are_those_of_the_arithmetic(rows):
    # 128 x 128 scores: 5 + 8 steps of 64 cycles for two warpgroups of 64 rows, 8 of 32, 8 tails of at least 16.
    row = of(rows, "triton-hopper", "attention_fwd_hopper", 72)
    assert row.tensor_cycles == 2 * (5 * 64 + 8 * 32 + 8 * 16)
    assert row.useful_share == pytest.approx(72 / 80)
    # Three quarters of 64 exponentials a thread, and two that decay what came before.
    assert row.exponentials_per_score == pytest.approx(0.75 + 2 / 64)
    assert row.predicted_serial < row.predicted_overlapped < 989 * 0.9
    for head_dim in (64, 128):
        assert of(rows, "triton", "attention_fwd", head_dim).useful_share == 1
    # Padding to 80 is all that is wasted; no predicted kernel computes fewer products than it needs.
    predicted = [r for r in rows if r.useful_share is not None]
    assert len(predicted) == 15
    assert all(0.89 < r.useful_share <= 1 for r in predicted), [
        (r.kernel, r.head_dim, r.useful_share) for r in predicted
    ]


def test_inner_loop_is_the_shortest_with_products_and_exponentials():
    lines = ["MUFU.EX2 R1, R2", "HGMMA.64x128x16.F32.BF16 R24", "HGMMA.64x16x16.F32.BF16 R24", "@P0 BRA 0x0000"]
    lines += ["MUFU.EX2 R1, R2", "HGMMA.64x64x16.F32.BF16 R24", "@!P1 BRA 0x0040", "BRA 0x0000"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    loop = inner_loop(sass)
    assert loop is not None
    assert (loop.instructions, loop.exponentials, loop.products) == (3, 1, {64: 1})
    assert (loop.tensor_cycles, loop.exponential_cycles) == (32, 8)
    assert inner_loop("        /*0000*/   MUFU.EX2 R1, R2 ;") is None


def test_documented_table_is_what_the_command_makes(rows):
    page = (ROOT / "docs" / "codegen.md").read_text()
    assert "python bench/codegen.py" in page
    table = to_markdown(rows, {"triton": "3.7.1"}).splitlines()
    import triton

    if triton.__version__ != "3.7.1":
        pytest.skip("the documented table is of triton 3.7.1")
    documented = set(page.splitlines())
    changed = [line for line in table if line and line not in documented]
    assert not changed, "run the command in docs/codegen.md and paste its tables:\n" + "\n".join(changed)


def test_command_writes_both_files(tmp_path, capsys):
    assert main(["--head-dim", "72", "--arch", "80", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "codegen.json").read_text())
    assert record["kind"] == "predicted"
    assert {k["arch"] for k in record["kernels"]} == {80}
    # The kernel for Hopper has no form for other GPUs.
    assert {k["provider"] for k in record["kernels"]} == {"triton", "triton-atomic"}
    assert "| attention | triton | attention_fwd | 80 | 72 |" in (tmp_path / "codegen.md").read_text()


def test_bad_command_is_one_line(capsys):
    assert main(["--arch", "70"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "arch is (70,); it must be of [80, 86, 89, 90" in line


def test_help_needs_no_triton():
    found = subprocess.run([sys.executable, ROOT / "bench/codegen.py", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "--arch" in found.stdout
