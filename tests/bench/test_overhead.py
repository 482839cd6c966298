"""bench/overhead.py: how much one layer launches, and that the host needs less than a millisecond for it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from longreel.bench import overhead
from longreel.bench.overhead import SPREADS, layer, main
from longreel.parallel.predict.fake_world import fake_world

# Attentions, merges and exchanges of one layer on 8 ranks, and at most how many ops its op asks for itself, those
# included: on a loaded machine this says more about the host's time than a clock.
LAUNCHES = {
    "ulysses": (1, 0, 2, 23),
    "ulysses, most chunks": (2, 0, 4, 44),
    "fastseq, overlap projection": (1, 0, 8, 63),
    "fastseq, overlap attention": (15, 7, 8, 155),
    # As many as where the ranks divide the tokens.
    "fastseq, attention, odd": (15, 7, 8, 163),
    "fastseq, attention, packed": (17, 9, 8, 158),
    "ring": (8, 7, 7, 66),
    "usp, ulysses_degree 2": (4, 3, 5, 49),
    "usp, ulysses_degree 2, chunks": (16, 12, 20, 180),
}
STRATEGY_OPS = ("longreel::exchange_attention", "longreel::fastseq_attention")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "overhead.py"


def rows() -> dict[str, float]:
    """Milliseconds by strategy, from a process of its own: there the kernels compute nothing any more."""
    ran = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, check=True)
    return {line[:30].strip(): float(line[30:].split()[0]) for line in ran.stdout.splitlines()[1:]}


@pytest.mark.slow
def test_a_layer_launches_within_a_millisecond_of_thread_time() -> None:
    best = rows()
    assert list(best) == list(SPREADS)
    # A machine that others use takes longer, never shorter.
    for _ in range(3):
        if max(best.values()) < 1.0:
            break
        best = {name: min(ms, best[name]) for name, ms in rows().items()}
    assert max(best.values()) < 1.0, best


def test_the_command_prints_a_row_of_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(overhead, "allocate_only"), mock.patch.object(overhead, "measure", return_value=5e-4):
        assert main([]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["P", "=", "8", "ms", "per", "layer"]
    assert [(line[:30].strip(), float(line[30:])) for line in lines] == [(name, 0.5) for name in SPREADS]


def launched(name: str, head_dim: int) -> list[FunctionEvent]:
    """What a layer's forward launches, the ops inside other ops included, in order."""
    with fake_world(8):
        run = layer(name, 8, head_dim)
        # Plans of these lengths are made once.
        run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
    return sorted(profiled.events(), key=lambda event: event.time_range.start)


@pytest.mark.parametrize("name", SPREADS)
def test_a_layer_launches_no_more_than_its_form_needs(name: str) -> None:
    events = launched(name, 8)
    attentions, merges, exchanges, most = LAUNCHES[name]
    counts = Counter(event.name for event in events)
    assert counts["longreel::attention"] == attentions
    assert counts["longreel::merge_attention"] == merges
    assert counts["c10d::alltoall_base_"] + counts["c10d::send"] == exchanges
    # Inside the op, what autograd wraps around its body.
    ((op,),) = (event.cpu_children for event in events if event.name in STRATEGY_OPS)
    assert len(op.cpu_children) <= most, Counter(child.name for child in op.cpu_children)


@pytest.mark.parametrize("name", SPREADS)
def test_what_is_launched_does_not_depend_on_the_width(name: str) -> None:
    narrow, wide = ([event.name for event in launched(name, head_dim)] for head_dim in (8, 72))
    assert narrow == wide
    assert any("attention" in op for op in narrow)


def test_a_bad_degree_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sp-degree", "3"]) == 2
    error = capsys.readouterr().err
    assert "sp_degree must be 2, 4, 8 or 16, got 3" in error
    assert len(error.splitlines()) == 1
