"""What the predictions of attention at head_dim 72 say of the goals: kernels, forward + backward, and 819,200 tokens.

Useful TFLOP/s on one H200, bf16, non-causal. All of it is predicted; peers' figures are published or estimated ones,
none of them ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreel.bench.codegen_device import CLOCK, L2_BYTES, L2_SIZE, PROCESSORS
from longreel.bench.sass import MIX

if TYPE_CHECKING:
    from longreel.bench.codegen_report import KernelFacts

HEAD_DIM = 72
FORM = "qkv"
# Goal and beyond; only the deterministic backward has no beyond.
FORWARD_GOAL = (450, 500)
BACKWARD_GOAL = (340,)
ATOMIC_GOAL = (400,)
# Forward and backward of peers at head_dim 72, scaled from what is published at 64 and 128 on H100 and H200 (16K to 32K
# tokens) by the columns they compute: FlashAttention-2, which SDPA flash is, pads to 96; cuDNN as if it pads to 128.
PEERS = {"SDPA flash": (265.0, 233.0), "SDPA cuDNN": (390.0, 330.0)}
# Peer, and what forward + backward is to be as a multiple of it.
GOALS = (("SDPA flash", 1.5), ("SDPA cuDNN", 1.05), ("SDPA cuDNN", 1.2))
LENGTHS = (65_536, 819_200)
HEADS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """A direction of attention by one provider: the kernels that it takes and its goals, (goal, beyond) or (goal,)."""

    label: str
    kernels: tuple[tuple[str, str], ...]
    products: int
    goals: tuple[int, ...]

    def rows(self, rows: Sequence[KernelFacts]) -> list[KernelFacts]:
        """Of head_dim 72 on the projection's output."""
        found = {(r.provider, r.kernel): r for r in rows if (r.arch, r.head_dim, r.form) == (90, HEAD_DIM, FORM)}
        return [found[kernel] for kernel in self.kernels]

    def bounds(self, rows: Sequence[KernelFacts]) -> tuple[float, float]:
        """Useful TFLOP/s, serial and overlapped: a kernel that repeats a product gets nothing for it."""
        times = [0.0, 0.0]
        for row in self.rows(rows):
            assert row.predicted_serial is not None and row.predicted_overlapped is not None
            times[0] += row.needed_products / row.predicted_serial
            times[1] += row.needed_products / row.predicted_overlapped
        return self.products / times[0], self.products / times[1]


PORTABLE = Direction(label="forward, `triton`", kernels=(("triton", "attention_fwd"),), products=2, goals=FORWARD_GOAL)
HOPPER = Direction(
    label="forward, `triton-hopper`",
    kernels=(("triton-hopper", "attention_fwd_hopper"),),
    products=2,
    goals=FORWARD_GOAL,
)
DETERMINISTIC = Direction(
    label="backward, deterministic",
    kernels=(("triton", "attention_dkdv"), ("triton", "attention_dq")),
    products=5,
    goals=BACKWARD_GOAL,
)
ATOMIC = Direction(
    label="backward, `triton-atomic`", kernels=(("triton-atomic", "attention_dkdv"),), products=5, goals=ATOMIC_GOAL
)
DIRECTIONS = (PORTABLE, HOPPER, DETERMINISTIC, ATOMIC)


def goal_tables(rows: Sequence[KernelFacts]) -> list[str]:
    """Lines of Markdown; none without head_dim 72 on sm_90."""
    if not any((row.arch, row.head_dim, row.form) == (90, HEAD_DIM, FORM) for row in rows):
        return []
    lines = [f"Against the goals at head_dim {HEAD_DIM}, `{FORM}`, one pass of the inner loop:", ""]
    lines += [*_directions(rows), "", "Instructions of one warp in that pass:", "", *_mixes(rows)]
    peers = "; ".join(f"{name} {forward:.0f} and {backward:.0f}" for name, (forward, backward) in PEERS.items())
    lines += ["", f"Forward + backward against peers (forward and backward taken as {peers}):", "", *_both(rows)]
    lines += ["", f"{LENGTHS[1]:,} tokens beside {LENGTHS[0]:,}, {HEADS} heads, each kernel one launch:", ""]
    return [*lines, *_lengths(rows)]


def both(forward: float, backward: float) -> float:
    """TFLOP/s of two products forward and five backward."""
    return 7 / (2 / forward + 5 / backward)


def wanted(peer: str, times: float) -> float:
    """TFLOP/s of forward + backward that is so many times a peer's."""
    return times * both(*PEERS[peer])


def _directions(rows: Sequence[KernelFacts]) -> Iterator[str]:
    yield (
        "| direction | scores per pass | tensor | exponential | issue | bound by | TFLOP/s, serial to overlapped "
        "| goal / beyond | goal, % of overlapped |"
    )
    yield "|" + " --- |" * 9
    for direction in DIRECTIONS:
        found = direction.rows(rows)
        serial, overlapped = direction.bounds(rows)
        columns = [
            " and ".join(f"{r.programs_per_sm * r.groups} x 64 x {r.block_n}" for r in found),
            *(
                ", ".join(f"{getattr(r, f'{unit}_cycles'):.0f}" for r in found)
                for unit in ("tensor", "exponential", "issue")
            ),
            ", ".join(dict.fromkeys(_slowest(r) for r in found)),
            f"{serial:.0f} to {overlapped:.0f}",
            " / ".join(map(str, direction.goals)),
            f"{direction.goals[0] / overlapped:.0%}",
        ]
        yield f"| {direction.label} | {' | '.join(columns)} |"


def _slowest(row: KernelFacts) -> str:
    cycles = {"tensor cores": row.tensor_cycles, "exponentials": row.exponential_cycles, "issue": row.issue_cycles}
    return max(cycles, key=lambda unit: cycles[unit] or 0)


def _mixes(rows: Sequence[KernelFacts]) -> Iterator[str]:
    yield f"| kernel | all | {' | '.join(MIX)} |"
    yield "|" + " --- |" * (2 + len(MIX))
    for direction in DIRECTIONS:
        for row in direction.rows(rows):
            assert row.mix is not None
            counts = [sum(row.mix.values()), *(row.mix[kind] for kind in MIX)]
            yield f"| {row.kernel}, `{row.provider}` | {' | '.join(map(str, counts))} |"


def _both(rows: Sequence[KernelFacts]) -> Iterator[str]:
    titles = [f"{times:g} x {peer} = {wanted(peer, times):.0f}, % of overlapped" for peer, times in GOALS]
    yield f"| forward | backward | TFLOP/s, serial to overlapped | {' | '.join(titles)} |"
    yield "|" + " --- |" * (3 + len(GOALS))
    for forward in (PORTABLE, HOPPER):
        for backward in (DETERMINISTIC, ATOMIC):
            serial, overlapped = (both(f, b) for f, b in zip(forward.bounds(rows), backward.bounds(rows), strict=True))
            shares = [f"{wanted(peer, times) / overlapped:.0%}" for peer, times in GOALS]
            names = " | ".join(d.label.split(", ")[1] for d in (forward, backward))
            yield f"| {names} | {serial:.0f} to {overlapped:.0f} | {' | '.join(shares)} |"


def _lengths(rows: Sequence[KernelFacts]) -> Iterator[str]:
    head = f"kernel | tokens | slots for programs at work | MB streamed per head (L2: {L2_SIZE / 1e6:.0f})"
    head += f" | L2 B per cycle and SM at the goal (of {L2_BYTES:.0f})"
    yield f"| {head} | TB/s of memory at the goal, in step to not | seconds at the goal |"
    yield "|" + " --- |" * 7
    for direction in DIRECTIONS:
        for row in direction.rows(rows):
            for tokens in LENGTHS:
                columns = _length(direction, row, rows, tokens)
                yield f"| {row.kernel}, `{row.provider}` | {tokens:,} | {' | '.join(columns)} |"


def _length(direction: Direction, row: KernelFacts, rows: Sequence[KernelFacts], tokens: int) -> list[str]:
    resident = PROCESSORS * row.programs_per_sm
    programs = HEADS * math.ceil(tokens / row.owned_rows)
    share = programs / resident / math.ceil(programs / resident)
    # What a program reads of the other side, per row of it and in all.
    streamed = row.streamed_bytes / row.streamed_rows * tokens
    # At the goal all kernels of a direction are as far from their bounds as each other.
    assert row.predicted_overlapped is not None
    rate = direction.goals[0] / direction.bounds(rows)[1] * row.predicted_overlapped * 1e12
    flops = 2.0 * row.needed_products * HEADS * tokens**2 * HEAD_DIM
    seconds = flops / rate
    everything = programs * streamed / seconds
    # Programs at work together that keep step read the other side once; at best it also stays in L2 from turn to turn.
    turns = math.ceil(programs / resident) if HEADS * streamed > L2_SIZE else HEADS
    least = min(everything, turns * streamed / seconds)
    return [
        f"{share:.1%}",
        f"{streamed / 1e6:.0f}",
        f"{everything / CLOCK / PROCESSORS:.0f}",
        f"{least / 1e12:.2f} to {everything / 1e12:.1f}",
        f"{seconds:.2g}",
    ]
