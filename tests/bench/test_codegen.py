"""The code generation report: what holds of every kernel compiled for sm_90 at production arguments, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from longreel.bench.codegen import main
from longreel.bench.codegen_report import KernelFacts, compile_all, to_markdown
from longreel.bench.kernel_list import FORMS, kernel_cases
from longreel.bench.sass import inner_loop

ROOT = Path(__file__).parents[2]


TRITON36 = Path(sys.prefix) / "triton-3.6.0"


@pytest.fixture(scope="module")
def installed() -> list[KernelFacts]:
    """Every kernel, compiled by the installed Triton."""
    return list(compile_all(kernel_cases(), [90]))


def by_triton_36(folder: Path, head_dims: tuple[int, ...]) -> list[KernelFacts]:
    """What the command makes in a process that finds triton 3.6.0 first."""
    if not (TRITON36 / ".installed").exists():
        pytest.skip("triton 3.6.0 is not set up: make setup-triton36")
    command = [sys.executable, ROOT / "bench/codegen.py", "--out", folder, "--head-dim", *map(str, head_dims)]
    environment = os.environ | {"PYTHONPATH": str(TRITON36)}
    subprocess.run(command, check=True, env=environment, timeout=280, capture_output=True)
    record = json.loads((folder / "codegen.json").read_text())
    assert record["versions"] == {"triton": "3.6.0"}
    return [KernelFacts(**facts) for facts in record["kernels"]]


@pytest.fixture(
    scope="module",
    params=[
        "installed",
        pytest.param((72,), id="3.6.0-72"),
        pytest.param((64, 128), id="3.6.0-64-128", marks=pytest.mark.slow),
    ],
)
def rows(request, tmp_path_factory) -> list[KernelFacts]:
    """Facts by the installed Triton, then by 3.6.0: at the DiT's head_dim, the others among the slow tests."""
    if request.param == "installed":
        found: list[KernelFacts] = request.getfixturevalue("installed")
        return found
    return by_triton_36(tmp_path_factory.mktemp("triton36"), request.param)


def of(rows: list[KernelFacts], provider: str, kernel: str, head_dim: int, form: str = "qkv") -> KernelFacts:
    (row,) = (r for r in rows if (r.provider, r.kernel, r.head_dim, r.form) == (provider, kernel, head_dim, form))
    return row


def test_every_production_form_is_there(rows):
    kernels = {
        ("triton", "attention_fwd"),
        ("triton-hopper", "attention_fwd_hopper"),
        ("triton", "attention_delta"),
        ("triton", "attention_dkdv"),
        ("triton", "attention_dq"),
        ("triton-atomic", "attention_dkdv"),
    }
    found = {(r.provider, r.kernel, r.head_dim, r.form) for r in rows}
    for head_dim in {r.head_dim for r in rows} - {0}:
        forms = FORMS if head_dim == 72 else ("qkv", "qkv, cu_seqlens")
        for form in forms:
            assert {(*kernel, head_dim, form) for kernel in kernels} <= found
    modulated = {"adaln_fwd", "adaln_bwd", "gated_residual_fwd", "gated_residual_bwd", "sum_slots"}
    for form in ("", "cu_seqlens"):
        assert {("triton", kernel, 0, form) for kernel in modulated} <= found


def test_no_kernel_spills_or_uses_local_memory(rows):
    found = [(r.provider, r.kernel, r.head_dim, r.form) for r in rows if r.spills or r.local_bytes or r.loop_spills]
    assert not found


def test_planned_programs_fit_and_two_where_planned(rows):
    assert all(r.programs_per_sm >= r.planned_programs for r in rows)
    two = [r for r in rows if r.planned_programs == 2]
    # Forward, dkdv and dq of the portable provider at 64 and 72, in every form.
    planned = {(r.kernel, r.head_dim, r.form) for r in two}
    widths = {r.head_dim for r in rows} & {64, 72}
    assert {(kernel, head_dim) for kernel, head_dim, _ in planned} == {
        (kernel, head_dim) for kernel in ("attention_fwd", "attention_dkdv", "attention_dq") for head_dim in widths
    }
    assert len(planned) == 3 * sum(len(FORMS) if head_dim == 72 else 2 for head_dim in widths)


def test_attention_multiplies_with_wgmma_and_loads_16_bytes_or_by_tma(rows):
    attention = [r for r in rows if r.op.startswith("attention") and r.kernel != "attention_delta"]
    assert attention
    for row in attention:
        assert row.products, row
        if row.provider == "triton-hopper":
            # Besides, the offsets of packed sequences.
            assert set(row.loads) - {"TMA"} == ({"4"} if "cu_seqlens" in row.form else set())
            continue
        # What is narrower are offsets, the tail of 72 columns, and values per row, of which the kernels of dk and dv
        # read many in their ragged tile; tests/kernels/test_triton_attention_codegen.py looks at their loop.
        least = 0.35 if row.kernel == "attention_dkdv" else 0.75
        sizes = {int(width): int(width) * count for width, count in row.loads.items()}
        assert min(sizes) >= 4, row
        assert sizes.get(16, 0) >= least * sum(sizes.values()), row


def test_memory_bound_kernels_load_16_bytes(rows):
    others = [r for r in rows if not r.op.startswith("attention")]
    assert {r.kernel for r in others} >= {"adaln_fwd", "adaln_bwd", "bias_gelu_fwd", "gated_residual_bwd", "pack_heads"}
    for row in others:
        sizes = {int(width): int(width) * count for width, count in row.loads.items()}
        # Vectors per sample, offsets and values per row may be narrower.
        assert sizes.get(16, 0) >= 0.6 * sum(sizes.values()), row


def test_exponentials_per_score(rows):
    for row in rows:
        if row.exponentials_per_score is None:
            continue
        # One for a score and 2 for what a row decays by; of the Hopper kernel's some are polynomials.
        assert row.exponentials_per_score < (0.95 if row.provider == "triton-hopper" else 1.07), row
        assert row.exponentials_per_score >= (0.75 if row.provider == "triton-hopper" else 1.0), row


def test_predictions_are_those_of_the_arithmetic(installed):
    rows = installed
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
    assert len(predicted) == 5 * (2 + len(FORMS) + 2)
    assert all(0.89 < r.useful_share <= 1 for r in predicted), [
        (r.kernel, r.head_dim, r.useful_share) for r in predicted
    ]


def test_inner_loop_is_the_shortest_with_products_and_exponentials():
    lines = [
        "FADD R1, R1, R2",
        "MUFU.EX2 R1, R2",
        "HGMMA.64x128x16.F32.BF16 R24",
        "HGMMA.64x16x16.F32.BF16 R24",
        "@P0 BRA 0x0000",
    ]
    lines += ["MUFU.EX2 R1, R2", "HGMMA.64x64x16.F32.BF16 R24", "F2F.BF16.F32 R1, R1", "@!P1 BRA 0x0050", "BRA 0x0000"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    loop = inner_loop(sass)
    assert loop is not None
    assert (loop.instructions, loop.exponentials, loop.products) == (4, 1, {64: 1})
    # A conversion of single values takes the units of the exponentials.
    assert (loop.tensor_cycles, loop.exponential_cycles) == (32, 16)
    assert inner_loop("        /*0000*/   MUFU.EX2 R1, R2 ;") is None


def check_documented(rows: list[KernelFacts]) -> None:
    page = (ROOT / "docs" / "codegen.md").read_text()
    assert "python bench/codegen.py" in page
    table = to_markdown(rows, {"triton": "3.7.1"}).splitlines()
    import triton

    if triton.__version__ != "3.7.1":
        pytest.skip("the documented table is of triton 3.7.1")
    documented = set(page.splitlines())
    changed = [line for line in table if line and line not in documented]
    assert not changed, "run the commands in docs/codegen.md and paste their tables:\n" + "\n".join(changed)


def test_documented_table_is_what_the_command_makes(installed):
    check_documented(installed)


@pytest.mark.slow
def test_documented_table_of_other_gpus_is_what_the_command_makes():
    check_documented(list(compile_all(kernel_cases((72,)), [80, 100])))


def test_command_writes_both_files(tmp_path, capsys):
    assert main(["--head-dim", "72", "--arch", "80", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "codegen.json").read_text())
    assert record["kind"] == "predicted"
    assert {k["arch"] for k in record["kernels"]} == {80}
    # The kernel for Hopper has no form for other GPUs.
    assert {k["provider"] for k in record["kernels"]} == {"triton", "triton-atomic"}
    assert "| attention | triton | attention_fwd | qkv | 80 | 72 |" in (tmp_path / "codegen.md").read_text()


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
