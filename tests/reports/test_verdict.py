"""Verdicts follow intervals."""

from __future__ import annotations

import random

import pytest

from longreel.reports.verdict import Comparison, compare


def noisy(centre: float, spread: float, count: int, seed: int) -> list[float]:
    source = random.Random(seed)
    return [centre * (1 + spread * source.uniform(-1, 1)) for _ in range(count)]


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [(1.0, "SAME"), (0.9, "FAST"), (1.1, "SLOW"), (1.004, "SAME")],
)
def test_quiet_samples_decide(candidate, verdict):
    found = compare(noisy(candidate, 0.002, 20, 0), noisy(1.0, 0.002, 20, 1))
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(candidate, abs=0.003)


def test_noise_that_hides_the_difference_is_ambiguous():
    assert compare(noisy(0.99, 0.3, 10, 0), noisy(1.0, 0.3, 10, 1)).verdict == "AMBIGUOUS"


def test_few_samples_take_the_widest_interval():
    found = compare([0.8, 0.9], [1.0, 1.2])
    assert (found.low, found.high) == (0.8 / 1.2, 0.9)
    assert found.verdict == "FAST"
    assert compare([0.8, 1.1], [1.0, 1.2]).verdict == "AMBIGUOUS"


def test_a_side_without_samples_is_refused():
    with pytest.raises(ValueError, match="got 0 and 1"):
        compare([], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.97, 1.005, "AMBIGUOUS"),
        (0.97, 1.0, "AMBIGUOUS"),
        (0.97, 0.999, "FAST"),
        (0.991, 1.009, "SAME"),
        (0.991, 0.999, "SAME"),
        (0.995, 1.03, "AMBIGUOUS"),
        (1.001, 1.03, "SLOW"),
        (0.97, 1.03, "AMBIGUOUS"),
    ],
)
def test_an_interval_that_holds_1_decides_nothing_beyond_the_margin(low, high, verdict):
    assert Comparison(ratio=(low + high) / 2, low=low, high=high).verdict == verdict
