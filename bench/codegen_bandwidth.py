"""What the machine code of a memory-bound kernel lets one expect of its bandwidth, as a share of a copy's.

Cycles are one multiprocessor's for one pass (a tile of every resident program). Bytes moved take as long as in a
measured copy. Beside that stand the issue of instructions, the special function units, and the pass of one program,
which waits for its loads once and then issues what it has; `together` takes the slowest of the four alone. `one by one`
starts issuing when all bytes of the pass have come, and adds the last program, which runs alone, and the second stage
of gradient sums, whose few programs wait for one load after another. Predicted, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreel.bench.codegen_device import (
    COPY_BYTES,
    LATENCY,
    PROCESSORS,
    SCHEDULERS,
    SPECIAL_PER_CYCLE,
)
from longreel.bench.sass import row_pass

if TYPE_CHECKING:
    from longreel.bench.codegen_report import KernelFacts
    from longreel.bench.kernel_list import KernelCase

ELEMENT_SIZE = 2
THREADS = 32
# Per cent of clone's bandwidth: goal and beyond.
FORWARD_GOAL = (95, 98)
BACKWARD_GOAL = (88, 92)


@dataclass(frozen=True, kw_only=True, slots=True)
class BandwidthFacts:
    """One memory-bound kernel.

    instructions are a warp's for one tile. in_flight are the bytes that all resident programs load in a pass, in one go
    where loads_first; needed are those that a copy's bandwidth takes at the assumed latency. last_program is the time
    of one program alone, second_stage that of the sums, as shares of the whole. The bounds are shares of a copy's
    bandwidth.
    """

    instructions: int
    loads_first: bool
    in_flight: int
    needed: float
    memory_cycles: float
    issue_cycles: float
    special_cycles: float
    alone_cycles: float
    last_program: float
    second_stage: float
    one_by_one: float
    together: float


def predict_bandwidth(case: KernelCase, sass: str, programs: int) -> BandwidthFacts:
    """Of a kernel with traffic, compiled to sass, of which so many programs fit on a multiprocessor."""
    traffic, warps = case.traffic, case.launch.num_warps
    assert traffic is not None
    code = row_pass(sass)
    tile = traffic.tile_elements * ELEMENT_SIZE
    moved = programs * (traffic.reads + traffic.writes) * tile
    memory = moved / COPY_BYTES
    issue = code.instructions * warps * programs / SCHEDULERS
    special = code.special * warps * programs * THREADS / SPECIAL_PER_CYCLE
    alone = LATENCY + code.instructions * max(1.0, warps / SCHEDULERS)
    # All multiprocessors' passes over all tiles.
    passes = traffic.elements / traffic.tile_elements / programs / PROCESSORS
    copied = passes * memory
    last = traffic.elements / traffic.tile_elements / case.launch.num_programs * alone
    stage = traffic.second_stages * traffic.stage_passes * LATENCY
    return BandwidthFacts(
        instructions=code.instructions,
        loads_first=code.loads_first,
        in_flight=programs * traffic.reads * tile,
        needed=COPY_BYTES * traffic.reads / (traffic.reads + traffic.writes) * LATENCY,
        memory_cycles=memory,
        issue_cycles=issue,
        special_cycles=special,
        alone_cycles=alone,
        last_program=last / copied,
        second_stage=stage / copied,
        one_by_one=copied / (passes * (max(memory, LATENCY) + max(issue, special)) + last + stage),
        together=memory / max(memory, issue, special, alone),
    )


def bandwidth_table(rows: Sequence[KernelFacts]) -> list[str]:
    """Lines of Markdown, none where no row has a prediction."""
    rows = [row for row in rows if row.bandwidth is not None]
    if not rows:
        return []
    head = "op | inputs | instructions | KB in flight (needed) | memory cycles | issue cycles | special function cycles"
    lines = [f"| {head} | one program's cycles | last program | second stage "]
    lines[0] += "| % of a copy, one by one to together | goal / beyond |"
    lines += ["|" + " --- |" * 12]
    for row in rows:
        facts = row.bandwidth
        assert facts is not None
        goal, beyond = BACKWARD_GOAL if row.op.endswith("backward") else FORWARD_GOAL
        pieces = "" if facts.loads_first else " in pieces"
        stage = f"{facts.second_stage:.1%}" if facts.second_stage else "-"
        lines.append(
            f"| {row.op} | {row.form or '-'} | {facts.instructions} | {facts.in_flight / 1024:.1f}{pieces} "
            f"({facts.needed / 1024:.1f}) | {facts.memory_cycles:.0f} | {facts.issue_cycles:.0f} "
            f"| {facts.special_cycles:.0f} | {facts.alone_cycles:.0f} | {facts.last_program:.1%} | {stage} "
            f"| {facts.one_by_one:.0%} to {facts.together:.0%} | {goal} / {beyond} |"
        )
    return lines
