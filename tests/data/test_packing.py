"""data/packing.py: every clip once per epoch, within the budget, the same for everyone, and little of it empty."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from longreel.data.packing import BucketSchedule, PackedSchedule, Schedule, pack_first_fit

# Patch grids of a mixed set: lengths, sizes and aspect ratios of usual sources, patches of 16 pixels.
GRIDS = [(t, h, w) for t in (4, 8, 16, 32) for h, w in ((11, 20), (16, 16), (17, 30), (20, 11), (30, 40), (45, 80))]


def mixed(num_clips: int, seed: int = 0) -> list[tuple[int, int, int]]:
    return random.Random(seed).choices(GRIDS, k=num_clips)


def tokens_of(grids: list[tuple[int, int, int]]) -> list[int]:
    return [t * h * w for t, h, w in grids]


def epoch_groups(schedule: Schedule, epoch: int) -> list[tuple[int, ...]]:
    """Groups of one epoch, for schedules of one group a step."""
    groups, step = [], 0
    while schedule.epoch_of(step) <= epoch:
        if schedule.epoch_of(step) == epoch:
            groups += schedule.step(step)
        step += 1
    return groups


def both(num_clips: int, budget: int, seed: int = 0, **options: int) -> list[Schedule]:
    grids = mixed(num_clips)
    return [
        PackedSchedule(tokens_of(grids), budget=budget, seed=seed, **options),
        BucketSchedule(grids, tokens_of(grids), budget=budget, seed=seed, **options),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["packed", "buckets"])
@pytest.mark.parametrize("num_clips", [1, 7, 400])
def test_every_clip_once_per_epoch_within_the_budget(kind: int, num_clips: int) -> None:
    budget, tokens = 120_000, tokens_of(mixed(num_clips))
    schedule = both(num_clips, budget)[kind]
    orders = []
    for epoch in range(3):
        groups = epoch_groups(schedule, epoch)
        assert Counter(clip for group in groups for clip in group) == Counter(range(num_clips))
        assert all(0 < sum(tokens[clip] for clip in group) <= budget for group in groups)
        assert schedule.waste(epoch) == pytest.approx(1 - sum(tokens) / (budget * len(groups)))
        orders.append(tuple(groups))
    assert num_clips < 10 or len(set(orders)) == 3


@pytest.mark.parametrize("num_clips", [300, 3000])
def test_waste_of_a_mixed_set_is_under_five_percent(num_clips: int) -> None:
    # The budget is twice the longest clip: room for little more than the large clips alone would be wasted otherwise.
    packed, buckets = both(num_clips, 2 * 32 * 45 * 80)
    assert all(packed.waste(epoch) < 0.05 for epoch in range(3))
    assert packed.waste(0) < buckets.waste(0)


def test_small_windows_waste_little_too_since_half_empty_packs_go_on() -> None:
    schedule = PackedSchedule(tokens_of(mixed(2000)), budget=2 * 32 * 45 * 80, window=128)
    assert schedule.waste(0) < 0.05


def test_buckets_hold_one_size() -> None:
    grids = mixed(200)
    schedule = BucketSchedule(grids, tokens_of(grids), budget=250_000)
    groups = epoch_groups(schedule, 0)
    assert all(len({grids[clip] for clip in group}) == 1 for group in groups)
    room = {grid: 250_000 // (grid[0] * grid[1] * grid[2]) for grid in grids}
    for grid, clips in Counter(grids).items():
        assert sum(grids[group[0]] == grid for group in groups) == -(-clips // room[grid])


@pytest.mark.parametrize("kind", [0, 1], ids=["packed", "buckets"])
def test_a_step_depends_on_seed_and_step_alone(kind: int) -> None:
    def schedule(seed: int = 5) -> Schedule:
        return both(60, 120_000, seed=seed, groups_per_step=4)[kind]

    straight = schedule()
    steps = [straight.step(step) for step in range(40)]
    assert straight.epoch_of(39) > 1
    assert all(len(groups) == 4 for groups in steps)
    # As after a resume, and backwards.
    assert schedule().step(39) == steps[39]
    assert [straight.step(step) for step in (39, 0, 20)] == [steps[39], steps[0], steps[20]]
    assert schedule(6).step(0) != steps[0]


def test_first_fit_is_first_fit() -> None:
    generator = random.Random(1)
    for _ in range(50):
        tokens = [generator.randint(1, 100) for _ in range(generator.randint(1, 40))]
        packs: list[list[int]] = []
        for clip in sorted(range(len(tokens)), key=lambda clip: -tokens[clip]):
            for pack in packs:
                if sum(tokens[other] for other in pack) + tokens[clip] <= 100:
                    pack.append(clip)
                    break
            else:
                packs.append([clip])
        assert pack_first_fit(range(len(tokens)), tokens, 100) == [tuple(pack) for pack in packs]


def test_clips_that_never_fill_a_pack_do_not_pile_up() -> None:
    schedule = PackedSchedule([60] * 5000, budget=100, window=64)
    assert len(epoch_groups(schedule, 0)) == 5000
    assert schedule.waste(0) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tokens": [5, 30, 20], "budget": 10},
            r"2 of 3 clips have more tokens than the budget 10, the longest 30 \(clip 1",
        ),
        ({"tokens": [], "budget": 10}, "tokens holds no clip"),
        ({"tokens": [3, 0], "budget": 10}, "clip 1 has 0 tokens"),
        ({"tokens": [3], "budget": 10, "groups_per_step": 0}, "groups_per_step must be at least 1"),
        ({"tokens": [3], "budget": 10, "window": 0}, "window must be at least 1"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedSchedule(**arguments)


def test_buckets_refuse_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="sizes has 1 clips, tokens 2"):
        BucketSchedule([(1, 1, 1)], [1, 1], budget=4)
    with pytest.raises(ValueError, match=r"clip 1 of size .* has 2 tokens, another of that size 1"):
        BucketSchedule([(1, 1, 1)] * 2, [1, 2], budget=4)
    with pytest.raises(ValueError, match="step must be at least 0"):
        PackedSchedule([1], budget=1).step(-1)


def test_two_threads_that_ask_one_schedule_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, inside, most = PackedSchedule([64], budget=64, groups_per_step=8), [], []
    build = PackedSchedule._build

    def slowly(this: PackedSchedule, epoch: int) -> list[tuple[int, ...]]:
        inside.append(epoch)
        most.append(len(inside))
        time.sleep(1e-3)
        inside.remove(epoch)
        return build(this, epoch)

    monkeypatch.setattr(PackedSchedule, "_build", slowly)
    with ThreadPoolExecutor(1) as thread:
        # Epochs of an eighth of a step: the one that is trained makes new ones, as the one built ahead does.
        ahead = thread.submit(lambda: [schedule.step(step) for step in range(2, 6)])
        assert [schedule.step(step) for step in range(4)] == [[(0,)] * 8] * 4
        assert ahead.result() == [[(0,)] * 8] * 4
    assert set(most) == {1}
