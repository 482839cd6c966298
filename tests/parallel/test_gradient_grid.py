"""Loss, dX and every dW of a spread DiT equal those of one device, over everything that can be combined."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import gradient_cases as cases
import pytest
import torch

from longreel.kernels.numerics import PARALLEL_TOLERANCE
from longreel.parallel.workers import WorkerPool

# What is combined. Placements: (P, samples of each dp rank), which dp ranks hold in different numbers.
STRATEGIES = ("ulysses", "ulysses-chunks", "fastseq-projection", "fastseq-attention", "ring", "usp")
CONDITIONINGS = ("adaln", "cross", "in_context")
PLACEMENTS = ((2, (2,)), (2, (2, 1)), (4, (2,)), (4, (1, 2)), (8, (2,)))
POLICIES = ("none", "full", "keep_attention", "offload")
ENGINES = ("fsdp2-zero2", "fsdp2-zero3", "ddp", "colossalai")
MISSING = "ColossalAI is not installed: make setup-colossalai"
LENGTHS = ("even", "uneven", "packed")
# 16 ranks, more than the pool of the other tests has: slow, and a covering subset only.
WIDEST = (8, (1, 2))

Case = tuple[str, str, tuple[int, tuple[int, ...]], str, str, str]
Outline = tuple[str, str, tuple[int, tuple[int, ...]]]


def everything() -> list[Case]:
    return list(itertools.product(STRATEGIES, CONDITIONINGS, PLACEMENTS, POLICIES, ENGINES, LENGTHS))


def installed() -> bool:
    """Whether cases of engine colossalai run; without it they are skipped."""
    return importlib.util.find_spec("colossalai") is not None


def covering(outlines: list[Outline], per_outline: int = 1) -> list[Case]:
    """Every outline with other choices, so that as many pairs, and then triples, occur as can."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    for fixed in outlines * per_outline:
        options = [(*fixed, *rest) for rest in itertools.product(POLICIES, ENGINES, LENGTHS)]
        best = max(options, key=lambda case: len(groups(case, 2) - seen) * 1000 + len(groups(case, 3) - seen))
        seen |= groups(best, 2) | groups(best, 3)
        chosen.append(best)
    return chosen


def outlines() -> list[Outline]:
    """Every strategy with every conditioning and placement."""
    return list(itertools.product(STRATEGIES, CONDITIONINGS, PLACEMENTS))


def groups(case: Case, size: int) -> set[tuple[Any, ...]]:
    """Combinations of `size` choices that a case has, each with the place of its axis."""
    return set(itertools.combinations(enumerate(case), size))


COVERING = covering(outlines())


def name(case: Case | Outline) -> str:
    strategy, conditioning, placement, *rest = case
    return "-".join([strategy, conditioning, placed(placement), *rest])


def arguments(case: Case) -> tuple[Any, ...]:
    """What gradient_cases.parities takes."""
    strategy, conditioning, (degree, counts), policy, engine, lengths = case
    shapes = {
        # Tokens, with the text's where that is in the sequence, that every degree divides.
        "even": (3, 4, 14, 4) if conditioning == "in_context" else (4, 4, 8, 4),
        "uneven": cases.LATENT_SHAPE,
        "packed": None,
    }
    return cases.tiny_config(conditioning), cases.fp64(strategy, degree, engine, policy), counts, shapes[lengths]


def check(run: Callable[..., list[Any]], together: list[Case], timeout: float = 120.0) -> None:
    """Hold cases of one strategy and placement, which run in one call, to the tolerance."""
    _, _, (degree, counts), *_ = together[0]
    by_rank = run(cases.parities, degree * len(counts), [arguments(case) for case in together], timeout=timeout)
    wrong = [
        f"{name(case)}: {errors}"
        for case, *of_ranks in zip(together, *by_rank, strict=True)
        for errors in of_ranks
        if not max(errors.values()) <= PARALLEL_TOLERANCE[torch.float64]
    ]
    assert not wrong, "\n".join(wrong)


def runnable(chosen: list[Case]) -> list[Case]:
    """Without the cases that need ColossalAI where it is missing."""
    return [case for case in chosen if case[4] != "colossalai" or installed()]


def placed(placement: tuple[int, tuple[int, ...]]) -> str:
    return f"P{placement[0]}-dp{len(placement[1])}"


# One call for each strategy and placement: groups of ranks are dear to build.
@pytest.mark.parametrize("placement", PLACEMENTS, ids=placed)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_equal_one_device(run_distributed, strategy, placement):
    check(run_distributed, runnable([case for case in COVERING if (case[0], case[2]) == (strategy, placement)]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("outline", outlines(), ids=name)
def test_gradients_equal_one_device_everywhere(run_distributed, outline, policy):
    together = [(*outline, policy, *rest) for rest in itertools.product(ENGINES, LENGTHS)]
    check(run_distributed, runnable(together), timeout=3000)


@pytest.fixture(scope="module")
def sixteen_workers() -> Iterator[WorkerPool]:
    with WorkerPool(16) as pool:
        yield pool


WIDE = covering([(strategy, conditioning, WIDEST) for strategy in STRATEGIES for conditioning in CONDITIONINGS], 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_two_groups_of_eight_equal_one_device(sixteen_workers, strategy):
    check(sixteen_workers.run, runnable([case for case in WIDE if case[0] == strategy]), timeout=3000)


def test_every_pair_of_choices_is_covered_by_cases_that_run_anywhere():
    # Those that need ColossalAI do not count for pairs without it: where it is missing they are skipped.
    some = COVERING, everything()
    chosen, possible = ([case for case in these if "colossalai" not in case] for these in some)
    assert pairs(chosen) == pairs(possible)


@pytest.mark.skipif(not installed(), reason=f"{MISSING}; no pair with it runs")
def test_every_pair_of_choices_with_colossalai_is_covered():
    assert pairs(COVERING) == pairs(everything())


def test_every_pair_of_choices_is_covered_on_sixteen_ranks():
    possible = itertools.product(STRATEGIES, CONDITIONINGS, [WIDEST], POLICIES, ENGINES, LENGTHS)
    assert pairs(WIDE) == pairs(list(possible))


def pairs(chosen: list[Case]) -> set[tuple[Any, ...]]:
    return {group for case in chosen for group in groups(case, 2)}
