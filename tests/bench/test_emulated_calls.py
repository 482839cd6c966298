"""An emulated rank against the real ranks of a gloo group: the same calls with the same bytes, and the same memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_steps import STRATEGIES, Case, steps

from longreel.parallel.workers import WorkerPool

POLICIES = ("none", "full", "keep_attention", "offload")
ENGINES = ("fsdp2-zero2", "fsdp2-zero3")
DEGREES = (2, 4, 8)
# Divisible by every degree, and not.
LENGTHS = (64, 61)
CHOICES = (tuple(STRATEGIES), DEGREES, POLICIES, ENGINES, LENGTHS)


def everything() -> list[Case]:
    return [Case(*choice) for choice in itertools.product(*CHOICES)]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    """What is chosen together in a case, two by two."""
    chosen = enumerate((case.strategy, case.degree, case.policy, case.engine, case.seq_len))
    return set(itertools.combinations(chosen, 2))


def pairwise() -> list[Case]:
    """Of everything so many cases that every two choices meet in one: each time the case with most new pairs."""
    cases = everything()
    missing = set().union(*map(pairs_of, cases))
    found: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: len(pairs_of(case) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found


def covering(degree: int) -> list[Case]:
    """Every strategy at P = 2 and at one of 4 and 8, each time with another policy, engine and length."""
    others = list(itertools.product(POLICIES, ENGINES, LENGTHS))
    first = 5 * DEGREES.index(degree)
    chosen = [
        Case(strategy, degree, *others[(first + 3 * i) % len(others)])  # type: ignore[arg-type]
        for i, strategy in enumerate(STRATEGIES)
    ]
    return {2: chosen, 4: chosen[1::2], 8: chosen[::2]}[degree]


def compare(cases: list[Case], run_distributed: Callable[..., list[Any]], *, every_end: bool = False) -> None:
    (ranks,) = {case.ranks for case in cases}
    real = run_distributed(real_steps, ranks, cases, timeout=600.0)
    # All ranks issue the same calls where lengths divide; the last one holds what padding there is.
    for rank in (0, ranks - 1) if every_end else (ranks - 1,):
        (emulated,) = run_distributed(emulated_steps, 1, cases, rank)
        for case, expected, found in zip(cases, real[rank], emulated, strict=True):
            assert found.calls == expected.calls, case
            assert len(found.calls) > 10
            assert found.loss == found.loss and abs(found.loss) < 1e3, case


def real_steps(cases: list[Case], repeats: int = 0) -> list[Any]:
    """On every rank of a worker pool, which finds functions by the file that they are in."""
    return steps(cases, repeats)


def emulated_steps(cases: list[Case], rank: int, repeats: int = 0) -> list[Any]:
    """In a worker, whose own group of one makes room."""
    torch.distributed.destroy_process_group()
    try:
        return steps(cases, repeats, rank)
    finally:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("degree", DEGREES)
def test_calls_and_bytes_equal_the_real_ranks(degree: int, run_distributed: Callable[..., list[Any]]) -> None:
    compare(covering(degree), run_distributed)


def test_calls_with_data_parallelism_and_in_the_published_layout(run_distributed: Callable[..., list[Any]]) -> None:
    compare(
        [
            Case("local", 1, "full", "fsdp2-zero2", 61, dp=4),
            Case("ulysses", 2, "full", "fsdp2-zero2", 61, dp=2, published=True),
            Case("fastseq-projection", 2, "keep_attention", "fsdp2-zero3", 61, dp=2, published=True),
        ],
        run_distributed,
    )


def test_every_two_choices_meet_in_a_case() -> None:
    found = pairwise()
    met = set().union(*map(pairs_of, found))
    sizes = [len(values) for values in CHOICES]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    # No fewer than all pairs of the two largest choices, and not many more.
    assert 24 <= len(found) <= 30


# The full grid takes minutes at each degree.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("degree", DEGREES)
def test_calls_and_bytes_equal_the_real_ranks_everywhere(degree: int, worker_pool: WorkerPool, full_grid: bool) -> None:
    cases = [case for case in (everything() if full_grid else pairwise()) if case.degree == degree]
    for start in range(0, len(cases), 12):
        compare(cases[start : start + 12], worker_pool.run, every_end=True)


def compare_memory(cases: list[Case], run_distributed: Callable[..., list[Any]]) -> None:
    """Peaks of the first and the last rank: in FastSeq's attention by chunks ranks meet other ranges.

    Of three real steps the least counts: a thread of gloo's that is late lets a step peak higher, never lower.
    """
    (ranks,) = {case.ranks for case in cases}
    # Long, and without the scores that attention's specification holds: exchange buffers are a good part of the peak.
    cases = [replace(case, seq_len=1024, attention="sdpa-flash") for case in cases]
    real = run_distributed(real_steps, ranks, cases, 3, timeout=600.0)
    for rank in (0, ranks - 1):
        (emulated,) = run_distributed(emulated_steps, 1, cases, rank, 1)
        for case, expected, found in zip(cases, real[rank], emulated, strict=True):
            needed = min(expected.peaks)
            assert needed > 1 << 20
            assert abs(found.peaks[0] / needed - 1) < 0.01, (case, rank, found.peaks, expected.peaks)


def test_peak_memory_equals_the_real_ranks(run_distributed: Callable[..., list[Any]]) -> None:
    compare_memory(
        [
            Case("ulysses-chunks", 2, "keep_attention", "fsdp2-zero2", 1024),
            Case("fastseq-attention", 2, "none", "fsdp2-zero3", 1024),
        ],
        run_distributed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("degree", DEGREES)
def test_peak_memory_equals_the_real_ranks_everywhere(degree: int, worker_pool: WorkerPool) -> None:
    compare_memory([case for case in pairwise() if case.degree == degree], worker_pool.run)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_one_emulated_rank_of_one_is_the_real_one_bit_for_bit(
    policy: str, run_distributed: Callable[..., list[Any]]
) -> None:
    cases = [Case("local", 1, policy, engine, 61) for engine in ENGINES]
    (real,) = run_distributed(real_steps, 1, cases)
    (emulated,) = run_distributed(emulated_steps, 1, cases, 0)
    for expected, found in zip(real, emulated, strict=True):
        assert found.calls == expected.calls
        assert found.loss == expected.loss
        assert found.gradients.keys() == expected.gradients.keys() != set()
        assert all(torch.equal(found.gradients[name], grad) for name, grad in expected.gradients.items())
