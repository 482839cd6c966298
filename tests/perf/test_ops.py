"""Every op x provider x direction, timed by bench.timing's rules: `pytest --benchmark`.

pytest-benchmark has its own loop and clock; here the samples are taken first, on CUDA between events, and then played
back to it, so that its table, JSON and comparisons hold exactly them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from longreel.bench import op_gate
from longreel.bench.nvml import Monitor
from longreel.bench.op_run import works_of
from longreel.bench.ops import OPS, OpCase, make_inputs, work_of
from longreel.bench.providers import Unavailable, build, kernel_providers, providers_of
from longreel.bench.timing import TimingRule, Work, clock_for, measure
from longreel.reports.op_records import DIRECTIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# DiT-XL/2's width; of attention, the two heads that one rank of eight has. Without a GPU small ones.
SIZES: dict[str, Any] = (
    {"dtype": "bf16", "attention": 16_384, "tokens": 65_536, "heads": 16, "matmul": 8192}
    if DEVICE.type == "cuda"
    else {"dtype": "fp32", "attention": 256, "tokens": 1024, "heads": 4, "matmul": 512}
)
RULE = TimingRule(min_samples=5, max_samples=30, budget_s=0.05, wall_cap_s=20.0, warm_up_s=0.02)


def case_of(op: str) -> OpCase:
    """The op at the size of this machine."""
    if op == "matmul":
        return OpCase(op=op, dtype=SIZES["dtype"], seq_len=SIZES["matmul"], num_heads=1, head_dim=SIZES["matmul"])
    attends = op.startswith("attention")
    tokens, heads = SIZES["attention" if attends else "tokens"], 2 if attends else SIZES["heads"]
    batch = OPS[op].least_batch
    return OpCase(op=op, dtype=SIZES["dtype"], seq_len=tokens, num_heads=heads, head_dim=72, batch=batch)


POINTS = [
    pytest.param(op, provider, direction, id=f"{case_of(op).label()}-{provider}-{direction}")
    for op in OPS
    for provider in providers_of(op)
    for direction in (DIRECTIONS if OPS[op].differentiable else ("forward",))
]


class Playback:
    """A clock that stands still until the next sample is played."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, seconds: float) -> None:
        """Let this much time pass."""
        self._now += seconds


PLAYBACK = Playback()


# The directions of a provider follow each other: it is built, compiled and held to the oracle once.
@functools.lru_cache(maxsize=1)
def prepared(op: str, provider: str) -> tuple[Mapping[str, Work], op_gate.Verdict] | str:
    """What to time, and how wrong it is; or why there is no such provider here."""
    case = case_of(op)
    torch.compiler.reset()
    try:
        function = build(case, provider, DEVICE)
    except Unavailable as missing:
        return str(missing)
    inputs = make_inputs(case, DEVICE)
    return works_of(case, function, inputs), op_gate.check(
        case, function, inputs, is_ours=provider in kernel_providers(op)
    )


@pytest.mark.benchmark(timer=PLAYBACK)
@pytest.mark.parametrize(("op", "provider", "direction"), POINTS)
def test_op(op: str, provider: str, direction: str, benchmark: Any) -> None:
    found = prepared(op, provider)
    if isinstance(found, str):
        pytest.skip(found)
    works, verdict = found
    assert verdict.reason is None, verdict.reason
    with Monitor(DEVICE) as monitor:
        timing = measure({provider: works[direction]}, clock=clock_for(DEVICE), rule=RULE, monitor=monitor)[provider]
    case = case_of(op)
    work = {name: value for name, value in work_of(case, direction).items() if value is not None}
    benchmark.group = f"{case.label()} {direction}"
    benchmark.extra_info |= {
        "op": op,
        "provider": provider,
        "direction": direction,
        "shape": case.shape(),
        "dtype": case.dtype,
        **work,
        **{f"{name}_per_s": value / timing.median_s for name, value in work.items()},
        "error": dict(verdict.error),
        "allowed": dict(verdict.allowed),
        "clock": "CUDA events, L2 overwritten" if DEVICE.type == "cuda" else "host clock",
        "readings": dict(timing.readings),
    }
    remaining = iter(timing.samples_s)
    benchmark.pedantic(lambda: PLAYBACK.play(next(remaining)), rounds=len(timing.samples_s))
