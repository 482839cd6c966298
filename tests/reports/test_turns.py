"""longreel.reports.turns: verdicts follow intervals, and err no more often than they say."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from longreel.reports.turns import CONFIDENCE, MARGIN, MIN_DECISIVE, Comparison, compare, quantile

DRAWS = 1500
# Of DRAWS at a rate of 5 %, three standard deviations more.
MOST = 1 - CONFIDENCE + 3 * (0.05 * 0.95 / DRAWS) ** 0.5

Noise = Callable[[random.Random], float]
NOISES: dict[str, Noise] = {
    "normal": lambda source: 1 + 0.02 * source.gauss(0, 1),
    # Steps that now and then are interrupted, as on a machine that others use.
    "interrupted": lambda source: (
        1 + 0.01 * source.gauss(0, 1) + (0.5 * source.random() if source.random() < 0.2 else 0)
    ),
    "heavy-tails": lambda source: 1 + 0.01 * abs(source.gauss(0, 1) / max(abs(source.gauss(0, 1)), 0.05)),
    # A clock that knows few values: ties.
    "coarse": lambda source: 1 + 0.01 * source.randrange(4),
}


def verdicts(noise: Noise, *, factor: float, num_samples: int, drift: float = 0.0) -> dict[str, float]:
    """How often each verdict is given on a candidate that takes `factor` times as long, taken in turns A B B A.

    drift: by how much the machine gets slower from the first sample to the last.
    """
    source = random.Random(num_samples)
    found: Counter[str] = Counter()
    for _ in range(DRAWS):
        sides: tuple[list[float], list[float]] = ([], [])
        for turn in range(num_samples):
            for place, side in enumerate((0, 1) if turn % 2 == 0 else (1, 0)):
                slower = 1 + drift * (2 * turn + place) / (2 * num_samples)
                sides[side].append(slower * noise(source) * (factor if side == 0 else 1.0))
        found[compare(*sides).verdict] += 1
    return {verdict: count / DRAWS for verdict, count in found.items()}


@pytest.mark.parametrize("num_samples", [4, 5, 10])
@pytest.mark.parametrize("noise", NOISES)
def test_equal_pairs_are_called_different_at_most_one_time_in_twenty(noise, num_samples) -> None:
    found = verdicts(NOISES[noise], factor=1.0, num_samples=num_samples)
    assert found.get("FAST", 0) + found.get("SLOW", 0) <= MOST


def test_drift_does_not_make_equal_pairs_differ() -> None:
    found = verdicts(NOISES["normal"], factor=1.0, num_samples=8, drift=0.1)
    assert found.get("FAST", 0) + found.get("SLOW", 0) <= MOST


@pytest.mark.parametrize(("factor", "right", "wrong"), [(0.95, "FAST", "SLOW"), (1.05, "SLOW", "FAST")])
def test_pairs_that_differ_by_more_than_the_noise_are_found(factor, right, wrong) -> None:
    found = verdicts(NOISES["normal"], factor=factor, num_samples=10)
    assert found[right] >= 0.95
    assert wrong not in found


@pytest.mark.parametrize("factor", [1 - 1.1 * MARGIN, 1 + 1.1 * MARGIN])
def test_pairs_beyond_the_margin_are_called_the_same_at_most_one_time_in_twenty(factor) -> None:
    found = verdicts(lambda source: 1 + 0.004 * source.gauss(0, 1), factor=factor, num_samples=6)
    assert found.get("SAME", 0) <= MOST


def test_quiet_equal_pairs_are_the_same() -> None:
    found = verdicts(lambda source: 1 + 0.003 * source.gauss(0, 1), factor=1.0, num_samples=8)
    assert found["SAME"] >= 0.9


def test_noise_that_hides_the_difference_is_ambiguous() -> None:
    found = verdicts(lambda source: 1 + 0.3 * source.uniform(-1, 1), factor=0.99, num_samples=8)
    assert found["AMBIGUOUS"] >= 0.9


def test_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    source = random.Random(1)
    held = 0
    for _ in range(DRAWS):
        candidate, baseline = ([f * NOISES["heavy-tails"](source) for _ in range(7)] for f in (0.8, 1.0))
        found = compare(candidate, baseline)
        held += found.low <= 0.8 <= found.high
        assert found.low <= found.ratio <= found.high
    assert held / DRAWS >= 1 - MOST


@pytest.mark.parametrize(("few", "many"), [(4, 4), (4, 5), (5, 6), (3, 5), (2, 8), (3, 9), (6, 8)])
def test_interval_leaves_out_what_the_distribution_of_ranks_allows(few, many) -> None:
    # All ways in which the ranks of equal sides can fall, counted one by one.
    tails: Counter[int] = Counter()
    for places in itertools.combinations(range(few + many), few):
        tails[sum(place - i for i, place in enumerate(places))] += 1
    total = sum(tails.values())
    allowed = max((u for u in range(few * many) if sum(tails[v] for v in range(u + 1)) <= 0.025 * total), default=0)
    # Quotients of 2^i by 1 are all different and sorted as the exponents.
    candidate, baseline = [2.0**i for i in range(few)], [2.0 ** (few * i) for i in range(many)]
    quotients = sorted(c / b for c in candidate for b in baseline)
    found = compare(candidate, baseline)
    assert (found.low, found.high) == (quotients[allowed], quotients[-1 - allowed])


def test_many_samples_take_the_normal_distribution_without_a_jump() -> None:
    source = random.Random(0)
    samples = [1 + 0.1 * source.random() for _ in range(41)]
    exact, normal = compare(samples[:40], samples[:40]), compare(samples, samples)
    assert (normal.low, normal.high) == pytest.approx((exact.low, exact.high), rel=0.01)


def test_too_few_samples_say_nothing() -> None:
    found = compare([0.8, 0.9, 0.85], [1.0, 1.2, 1.1])
    assert (found.low, found.high) == (0.8 / 1.2, 0.9)
    assert found.verdict == "AMBIGUOUS"


def test_as_many_of_both_sides_decide_from_four_on_and_three_against_five() -> None:
    apart = [0.5 + i / 100 for i in range(5)], [1.0 + i / 100 for i in range(5)]
    found = {
        (few, many): compare(apart[0][:few], apart[1][:many]).verdict for few in range(1, 6) for many in range(1, 6)
    }
    assert {sides for sides, verdict in found.items() if verdict == "FAST"} == {
        (3, 5),
        (5, 3),
        (4, 4),
        (4, 5),
        (5, 4),
        (5, 5),
    }
    assert min(few for few in range(1, 6) if found[few, few] == "FAST") == MIN_DECISIVE


def test_a_side_without_samples_is_refused() -> None:
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
def test_an_interval_that_holds_1_decides_nothing_beyond_the_margin(low, high, verdict) -> None:
    assert Comparison(ratio=(low + high) / 2, low=low, high=high).verdict == verdict


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("samples", [(4.0,), (1.0, 2.0), (5.0, 1.0, 4.0, 2.0, 9.0)], ids=len)
def test_quantile_is_numpys(samples, q) -> None:
    assert quantile(samples, q) == pytest.approx(np.quantile(samples, q))
