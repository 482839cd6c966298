"""Loss, dX and every dW of a spread DiT equal those of one device, over everything that can be combined."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.kernels.numerics import PARALLEL_TOLERANCE


def _load_cases() -> Any:
    """gradient_cases.py beside this file, which no path leads to."""
    spec = importlib.util.spec_from_file_location("gradient_cases", Path(__file__).with_name("gradient_cases.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()

# What is combined. Placements: (P, samples of each dp rank), which dp ranks hold in different numbers. P = 8 comes with
# dp = 1 only: two of its groups would be 16 ranks, and the pool of the tests has 8.
STRATEGIES = ("ulysses", "ulysses-chunks", "fastseq-projection", "fastseq-attention", "ring", "usp")
CONDITIONINGS = ("adaln", "cross", "in_context")
PLACEMENTS = ((2, (2,)), (2, (2, 1)), (4, (2,)), (4, (1, 2)), (8, (2,)))
POLICIES = ("none", "full", "keep_attention", "offload")
ENGINES = ("fsdp2-zero2", "fsdp2-zero3", "ddp", "colossalai")
MISSING = "ColossalAI is not installed: make setup-colossalai"
LENGTHS = ("even", "uneven", "packed")

Case = tuple[str, str, tuple[int, tuple[int, ...]], str, str, str]


def everything() -> list[Case]:
    return list(itertools.product(STRATEGIES, CONDITIONINGS, PLACEMENTS, POLICIES, ENGINES, LENGTHS))


def installed() -> bool:
    """Whether cases of engine colossalai run; without it they are skipped."""
    return importlib.util.find_spec("colossalai") is not None


def covering() -> list[Case]:
    """Every strategy with every conditioning and placement; other choices so that as many triples occur as can."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    for fixed in itertools.product(STRATEGIES, CONDITIONINGS, PLACEMENTS):
        options = [(*fixed, *rest) for rest in itertools.product(POLICIES, ENGINES, LENGTHS)]
        best = max(options, key=lambda case: len(groups(case, 2) - seen) * 1000 + len(groups(case, 3) - seen))
        seen |= groups(best, 2) | groups(best, 3)
        chosen.append(best)
    return chosen


def groups(case: Case, size: int) -> set[tuple[Any, ...]]:
    """Combinations of `size` choices that a case has, each with the place of its axis."""
    return set(itertools.combinations(enumerate(case), size))


def parameters(chosen: list[Case]) -> list[Any]:
    missing = () if installed() else pytest.mark.skip(reason=MISSING)
    found = []
    for case in chosen:
        strategy, conditioning, (degree, counts), policy, engine, lengths = case
        name = f"{strategy}-{conditioning}-P{degree}-dp{len(counts)}-{policy}-{engine}-{lengths}"
        found.append(pytest.param(*case, id=name, marks=missing if engine == "colossalai" else ()))
    return found


def check(run_distributed: Any, case: Case) -> None:
    strategy, conditioning, (degree, counts), policy, engine, lengths = case
    shapes = {
        # Tokens, with the text's where that is in the sequence, that every degree divides.
        "even": (3, 4, 14, 4) if conditioning == "in_context" else (4, 4, 8, 4),
        "uneven": cases.LATENT_SHAPE,
        "packed": None,
    }
    arguments = cases.tiny_config(conditioning), cases.fp64(strategy, degree, engine, policy), counts
    world = degree * len(counts)
    for errors in run_distributed(cases.parity, world, *arguments, torch.float64, shapes[lengths]):
        assert max(errors.values()) <= PARALLEL_TOLERANCE[torch.float64], errors


AXES = ("strategy", "conditioning", "placement", "policy", "engine", "lengths")


@pytest.mark.parametrize(AXES, parameters(covering()))
def test_gradients_equal_one_device(run_distributed, strategy, conditioning, placement, policy, engine, lengths):
    check(run_distributed, (strategy, conditioning, placement, policy, engine, lengths))


@pytest.mark.slow
@pytest.mark.parametrize(AXES, parameters(everything()))
def test_gradients_equal_one_device_everywhere(
    run_distributed, strategy, conditioning, placement, policy, engine, lengths
):
    check(run_distributed, (strategy, conditioning, placement, policy, engine, lengths))


def test_every_pair_of_choices_is_covered_by_cases_that_run_anywhere():
    # Those that need ColossalAI do not count for pairs without it: where it is missing they are skipped.
    chosen, possible = ([case for case in some if "colossalai" not in case] for some in (covering(), everything()))
    assert pairs(chosen) == pairs(possible)


@pytest.mark.skipif(not installed(), reason=f"{MISSING}; no pair with it runs")
def test_every_pair_of_choices_with_colossalai_is_covered():
    assert pairs(covering()) == pairs(everything())


def pairs(chosen: list[Case]) -> set[tuple[Any, ...]]:
    return {group for case in chosen for group in groups(case, 2)}
