"""The code generation report: what holds of every kernel compiled for sm_90 at production arguments, and its tables."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from longreel.bench import codegen_goals as goals
from longreel.bench.codegen import main
from longreel.bench.codegen_bandwidth import BACKWARD_GOAL, FORWARD_GOAL, BandwidthFacts, predict_bandwidth
from longreel.bench.codegen_device import COPY_BYTES, LATENCY, PROCESSORS
from longreel.bench.codegen_report import KernelFacts, compile_all, to_markdown
from longreel.bench.kernel_list import FORMS, kernel_cases
from longreel.bench.sass import inner_loop, row_pass
from longreel.bench.tuning_table import tuning_table

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
    for facts in record["kernels"]:
        facts["bandwidth"] = facts["bandwidth"] and BandwidthFacts(**facts["bandwidth"])
    return [KernelFacts(**facts) for facts in record["kernels"]]


@pytest.fixture(
    scope="module",
    params=[
        "installed",
        pytest.param((72,), id="3.6.0-72", marks=pytest.mark.slow),
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
    loop = inner_loop(listing(lines))
    assert loop is not None
    assert (loop.instructions, loop.exponentials, loop.products) == (4, 1, {64: 1})
    # A conversion of single values takes the units of the exponentials.
    assert (loop.tensor_cycles, loop.exponential_cycles) == (32, 16)
    assert loop.mix == dict.fromkeys(loop.mix, 0) | {"matrix": 1, "exponentials": 1, "conversions": 1, "other": 1}
    assert inner_loop("        /*0000*/   MUFU.EX2 R1, R2 ;") is None


def test_pass_of_a_memory_bound_kernel_is_the_loop_that_loads_and_stores():
    search = ["LDG.E R1, desc[UR4][R2.64]", "@P0 BRA 0x0000"]
    body = ["LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R1, R2", "FADD R1, R1, R2", "STG.E.128 desc[UR4][R2.64], R4"]
    assert row_pass(listing([*search, *body, "@!P1 BRA 0x0020", "EXIT"])).instructions == 5
    # A load after an exchange between threads is not in flight with the first.
    late = [body[0], "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", *body]
    found = row_pass(listing([*late, "@!P1 BRA 0x0000"]))
    assert (found.special, found.loads_first) == (1, False)
    assert row_pass(listing([*body, "@!P1 BRA 0x0000"])).loads_first
    # Without a loop all of the program counts, up to its last way out.
    whole = row_pass(listing(["@P0 EXIT", *body, "EXIT", "BRA 0x0060", "NOP"]))
    assert (whole.instructions, whole.loads_first) == (6, True)


def listing(lines: list[str]) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))


def test_bandwidth_is_that_of_the_arithmetic():
    (case,) = (c for c in kernel_cases(()) if c.op == "adaLN backward" and c.form == "" and c.traffic)
    body = ["LDG.E.128 R4, desc[UR4][R2.64]", *["FADD R1, R1, R2"] * 97, "MUFU.RSQ R1, R2", "STG.E R4, R2"]
    facts = predict_bandwidth(case, listing([*body, "@P0 BRA 0x0000"]), programs=6)
    row, warps, launched = 1152 * 2, case.launch.num_warps, case.launch.num_programs
    assert (warps, facts.instructions) == (2, 101)
    assert facts.in_flight == 6 * 2 * row
    # Two of three bytes moved are read.
    assert facts.needed == pytest.approx(COPY_BYTES * 2 / 3 * LATENCY)
    assert facts.memory_cycles == pytest.approx(6 * 3 * row / COPY_BYTES)
    assert facts.issue_cycles == 101 * 6 * warps / 4
    assert facts.special_cycles == 6 * warps * 32 / 16
    whole = 819_200 / 6 / PROCESSORS * facts.memory_cycles
    last = 819_200 / launched * (LATENCY + 101)
    assert facts.last_program == pytest.approx(last / whole)
    # Two sums, of as many slots as there are chunks, and one more, 128 at a time.
    stage = 2 * -(-(launched + 1) // 128) * LATENCY
    assert facts.second_stage == pytest.approx(stage / whole)
    slow = 819_200 / 6 / PROCESSORS * (facts.memory_cycles + facts.issue_cycles)
    assert facts.one_by_one == pytest.approx(whole / (slow + last + stage))
    assert facts.together == 1
    # More instructions than the bytes of a pass take to move.
    bound = predict_bandwidth(case, listing([*body * 10, "@P0 BRA 0x0000"]), programs=6)
    assert bound.together == pytest.approx(bound.memory_cycles / bound.issue_cycles) and bound.together < 1


def test_memory_bound_kernels_have_bytes_in_flight_and_issue_to_spare(rows):
    predicted = [r for r in rows if r.bandwidth is not None]
    assert len(predicted) == 6 + 6 + 9
    for row in predicted:
        facts = row.bandwidth
        assert facts.in_flight > 2 * facts.needed, row
        assert max(facts.issue_cycles, facts.special_cycles) < 0.9 * facts.memory_cycles, row
        assert facts.together == 1, row
        # The fifth of the time for which a program of 256 rows ran alone.
        if "backward" not in row.op:
            assert facts.last_program < 0.05, row


def test_goals_of_attention_are_those_of_the_arithmetic(installed):
    dkdv, dq = (of(installed, "triton", kernel, 72) for kernel in ("attention_dkdv", "attention_dq"))
    # Seven products are computed, five are useful.
    serial, overlapped = goals.DETERMINISTIC.bounds(installed)
    assert serial == pytest.approx(5 / (4 / dkdv.predicted_serial + 3 / dq.predicted_serial))
    assert overlapped == pytest.approx(5 / (4 / dkdv.predicted_overlapped + 3 / dq.predicted_overlapped))
    hopper = of(installed, "triton-hopper", "attention_fwd_hopper", 72)
    assert goals.HOPPER.bounds(installed) == pytest.approx((hopper.predicted_serial, hopper.predicted_overlapped))
    # As fast forward as backward is as fast in both.
    assert goals.both(300, 300) == pytest.approx(300)
    assert goals.both(450, 340) == pytest.approx(7 / (2 / 450 + 5 / 340))
    assert goals.wanted("SDPA flash", 1.5) == pytest.approx(1.5 * 7 / (2 / 265 + 5 / 233))
    for row in (dkdv, dq, hopper):
        assert sum(row.mix.values()) * row.groups * row.programs_per_sm == row.issue_cycles
    assert (dkdv.owned_rows, dkdv.streamed_rows, dkdv.streamed_bytes) == (64, 64, 64 * (4 * 72 + 8))
    assert (dq.owned_rows, dq.streamed_rows, dq.streamed_bytes) == (64, 64, 64 * 4 * 72)
    lines = [line for line in goals.goal_tables(installed) if line.startswith("| attention_fwd_hopper")]
    (_, short, long) = lines
    # 2 x 512 tiles on 132 processors, 2 x 6400 on as many; 4 S^2 D FLOP per head at 450 TFLOP/s.
    assert f"| 65,536 | {1024 / 132 / 8:.1%} |" in short and f"| 819,200 | {12800 / 132 / 97:.1%} |" in long
    assert long.endswith(f"| {2 * 4 * 819_200**2 * 72 / 450e12:.2g} |")
    # Nothing shared: 128 queries of 2 heads each read all keys and values.
    assert f" to {2 * 6400 * 819_200 * 288 / (8 * 819_200**2 * 72 / 450e12) / 1e12:.1f} |" in long


# What a constant that no table lists is instead of a choice.
NOT_TUNED = {
    "LOG2_E": "mathematics",
    "LN_2": "mathematics",
    "PACK": "values that one piece of assembly takes",
    "SPLITS": "what swizzled copies allow",
    "_PROCESSORS": "the device",
    "_GROUP_ROWS": "wgmma's rows",
    "_MAX_ROWS": "32-bit coordinates",
    "_ALIGN": "the unit of strides",
    "MIN_DOT": "least size of a product",
    "_CHUNKED": "names of kernels",
    "_SHAPES": "candidates",
    "_POINTERS": "names of types",
}
TABLES = {"TILES", "HOPPER_TILES", "MEASURED", "MEASURED_HOPPER", "TILES_FP32", "DELTA_WARPS", "ROW_TILES"}


def test_every_constant_of_the_kernels_is_tabled_with_its_evidence():
    table = "\n".join(tuning_table())
    seen = set()
    for path in sorted((ROOT / "kernels").glob("triton_*.py")):
        source = path.read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for name in (t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"_?[A-Z][A-Z_0-9]+", t.id)):
                seen.add(name)
                if name in NOT_TUNED or name in TABLES or name == "MEASURED_ROWS":
                    continue
                values = re.escape(ast.get_source_segment(source, node.value).replace("_", ""))
                assert re.search(rf"{name} {values}\b|{name} {values} ", table), f"{path.name}: {name} is not tabled"
                above = [line for line in lines[max(0, node.lineno - 4) : node.lineno - 1] if line.startswith("#")]
                assert any("ssumed" in line for line in above), f"{path.name}: {name} does not say that it is assumed"
    assert seen >= {"MAX_WARPS", "TILE_COLUMNS", "VECTOR", "MIN_PROGRAMS", "SUM_SLOTS", "LONG"}


GENERATED = "<!-- made by: python bench/codegen.py{} -->"


def documented(options: str) -> str:
    """What stands in the page between the marks around the output of the command with these options."""
    page = (ROOT / "docs" / "codegen.md").read_text()
    before, after = GENERATED.format(options), "<!-- end -->"
    assert page.count(before) == 1
    return page.split(before)[1].split(after)[0].strip()


def check_documented(rows: list[KernelFacts], options: str) -> None:
    import triton

    if triton.__version__ != "3.7.1":
        pytest.skip("the documented tables are of triton 3.7.1")
    made = to_markdown(rows, {"triton": "3.7.1"}).strip().splitlines()
    found = documented(options).splitlines()
    changed = [line for line in made if line not in found] + [f"gone: {line}" for line in found if line not in made]
    assert made == found, f"run python bench/codegen.py{options} and paste what it writes:\n" + "\n".join(changed)


def test_documented_tables_are_what_the_command_makes(installed):
    check_documented(installed, "")


@pytest.mark.slow
def test_documented_table_of_other_gpus_is_what_the_command_makes():
    check_documented(list(compile_all(kernel_cases((72,)), [80, 100])), " --arch 80 100 --head-dim 72")


def test_prose_of_the_page_repeats_no_figure_of_the_tables():
    page = (ROOT / "docs" / "codegen.md").read_text()
    section = page.split("## What it says")[1].split("## What was done")[0]
    prose = re.sub(r"<!-- made by.*?<!-- end -->", "", section, flags=re.DOTALL)
    assert "|" not in prose
    # Goals, lengths, shapes of tiles and what others published; everything else stands in a table that is made.
    known = {*map(str, (*goals.FORWARD_GOAL, *goals.BACKWARD_GOAL, *goals.ATOMIC_GOAL)), "65,536", "819,200"}
    known |= {*map(str, (*FORWARD_GOAL, *BACKWARD_GOAL)), *(f"{times:g}" for _, times in goals.GOALS)}
    known |= {"72", "80", "64", "128", "16", "32", "497", "62", "798"}
    figures = re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", prose)
    assert not {figure for figure in figures if len(figure) > 1} - known


@pytest.mark.slow
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
