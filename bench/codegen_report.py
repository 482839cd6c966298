"""The code generation report: compiles every kernel for a GPU that is not there and tables what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longreel.bench.codegen_bandwidth import BandwidthFacts, bandwidth_table, predict_bandwidth
from longreel.bench.codegen_device import CLOCK, PROCESSORS, REACHED
from longreel.bench.codegen_goals import goal_tables
from longreel.bench.kernel_list import KernelCase
from longreel.bench.sass import inner_loop, load_widths, product_shapes
from longreel.bench.tuning_table import tuning_table


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelFacts:
    """One row: what the compiled kernel takes, and what that predicts. Absent predictions are None.

    Cycles are one multiprocessor's for one pass of the inner loop by all its resident warpgroups. The bounds are useful
    TFLOP/s: serial with nothing overlapped, overlapped with everything, both at the share of the datasheet's clock that
    a large matrix product reached. mix counts the instructions of a pass by what they are for, needed_products the
    matrix products per score. A program owns owned_rows and reads streamed_rows of the other side in a pass.
    """

    op: str
    provider: str
    kernel: str
    form: str
    arch: int
    head_dim: int
    num_warps: int
    registers: int
    local_bytes: int
    spills: int
    shared_bytes: int
    programs_per_sm: int
    planned_programs: int
    products: list[str]
    loads: dict[str, int]
    loop_spills: int | None = None
    exponentials_per_score: float | None = None
    useful_share: float | None = None
    tensor_cycles: float | None = None
    exponential_cycles: float | None = None
    issue_cycles: float | None = None
    predicted_serial: float | None = None
    predicted_overlapped: float | None = None
    mix: dict[str, int] | None = None
    needed_products: int = 0
    groups: int = 0
    block_n: int = 0
    owned_rows: int = 0
    streamed_rows: int = 0
    streamed_bytes: int = 0
    bandwidth: BandwidthFacts | None = None


def compile_case(case: KernelCase, arch: int) -> KernelFacts:
    """Compile one kernel for one compute capability (90 is 9.0) and read it."""
    from longreel.kernels.triton_aot import compile_kernel

    launch = case.launch
    kernel = compile_kernel(
        launch.kernel,
        launch.arguments,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        options=launch.options,
        capability=arch,
    )
    programs = kernel.programs_per_sm()
    return KernelFacts(
        op=case.op,
        provider=case.provider,
        kernel=case.name,
        form=case.form,
        arch=arch,
        head_dim=case.head_dim,
        num_warps=kernel.num_warps,
        registers=kernel.registers,
        local_bytes=kernel.local_bytes,
        spills=kernel.spills,
        shared_bytes=kernel.shared_bytes,
        programs_per_sm=programs,
        planned_programs=case.planned_programs,
        products=product_shapes(kernel.ptx),
        loads=load_widths(kernel.ptx),
        bandwidth=predict_bandwidth(case, kernel.sass, programs) if arch == 90 and case.traffic else None,
        **(_predict(case, kernel.sass, programs) if arch == 90 and case.products else {}),
    )


def _predict(case: KernelCase, sass: str, programs: int) -> dict[str, Any]:
    loop = inner_loop(sass)
    if loop is None:
        raise ValueError(f"kernel {case.name} has no loop with wgmma and exponentials; it cannot be predicted")
    scores = case.block_m * case.block_n / case.groups
    # A program for dk and dv (four products, five with dq's) owns keys, the others queries.
    of_keys = case.products >= 4
    useful = 2.0 * case.products * scores * case.head_dim
    groups = programs * case.groups
    tensor, exponential, issue = (
        groups * cycles for cycles in (loop.tensor_cycles, loop.exponential_cycles, loop.issue_cycles)
    )
    rate = groups * useful * PROCESSORS * CLOCK * REACHED / 1e12
    return {
        "loop_spills": loop.spills,
        "exponentials_per_score": loop.exponentials * 128 / scores,
        "useful_share": useful / loop.computed_flops,
        "tensor_cycles": tensor,
        "exponential_cycles": exponential,
        "issue_cycles": issue,
        "predicted_serial": rate / (tensor + max(exponential, issue)),
        "predicted_overlapped": rate / max(tensor, exponential, issue),
        "mix": loop.mix,
        "needed_products": case.products,
        "groups": case.groups,
        "block_n": case.block_n,
        "owned_rows": case.block_n if of_keys else case.block_m,
        "streamed_rows": case.block_m if of_keys else case.block_n,
        "streamed_bytes": case.streamed_bytes,
    }


def compile_all(cases: Sequence[KernelCase], archs: Iterable[int]) -> Iterable[KernelFacts]:
    """Rows as they are compiled, about a second each; kernels for Hopper alone only for 90."""
    for arch in archs:
        for case in cases:
            if arch == 90 or case.provider != "triton-hopper":
                yield compile_case(case, arch)


def to_markdown(rows: Sequence[KernelFacts], versions: dict[str, str]) -> str:
    """What is read off; for sm_90 what that predicts, for which goal, and the tuning constants with their evidence."""
    lines = ["Compiled by " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    head = "op | provider | kernel | inputs | sm | head_dim | warps | registers | spills (in the loop) | stack B"
    lines += [f"| {head} | shared KB | programs per SM (planned) | wgmma | loads: bytes x count |", "|" + " --- |" * 14]
    for row in rows:
        loads = ", ".join(f"{width} x {count}" for width, count in row.loads.items())
        inside = "" if row.loop_spills is None else f" ({row.loop_spills})"
        lines.append(
            f"| {row.op} | {row.provider} | {row.kernel} | {row.form or '-'} | {row.arch} | {row.head_dim or '-'} "
            f"| {row.num_warps} | {row.registers} | {row.spills}{inside} | {row.local_bytes} "
            f"| {row.shared_bytes / 1024:.1f} | {row.programs_per_sm} ({row.planned_programs}) "
            f"| {', '.join(row.products) or '-'} | {loads} |"
        )
    predicted = [row for row in rows if row.tensor_cycles is not None]
    if predicted:
        lines += ["", "Predicted for one pass of the inner loop by all warpgroups of a multiprocessor, sm_90:", ""]
        lines += _predictions(predicted)
    sections = {
        "": goal_tables(rows),
        "Memory-bound kernels, one pass of all resident programs:": bandwidth_table(rows),
    }
    if any(row.arch == 90 for row in rows):
        sections["Constants in use:"] = tuning_table()
    for title, table in sections.items():
        if table:
            lines += ["", *([title, ""] if title else []), *table]
    return "\n".join(lines) + "\n"


def _predictions(rows: Sequence[KernelFacts]) -> Iterable[str]:
    head = "op | provider | kernel | inputs | head_dim | useful share | exp2 per score | tensor cycles"
    yield f"| {head} | exponential cycles | issue cycles | predicted TFLOP/s, serial to overlapped |"
    yield "|" + " --- |" * 11
    for row in rows:
        yield (
            f"| {row.op} | {row.provider} | {row.kernel} | {row.form} | {row.head_dim} | {row.useful_share:.0%} "
            f"| {row.exponentials_per_score:.2f} | {row.tensor_cycles:.0f} | {row.exponential_cycles:.0f} "
            f"| {row.issue_cycles:.0f} | {row.predicted_serial:.0f} to {row.predicted_overlapped:.0f} |"
        )


def write_report(folder: Path, rows: Sequence[KernelFacts], versions: dict[str, str]) -> tuple[Path, Path]:
    """codegen.md and codegen.json in folder; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "codegen.md", folder / "codegen.json"
    page.write_text(to_markdown(rows, versions))
    record: dict[str, Any] = {"kind": "predicted", "versions": versions, "kernels": [asdict(row) for row in rows]}
    data.write_text(json.dumps(record, indent=1) + "\n")
    return page, data
