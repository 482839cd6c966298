"""longreel.parallel.peer_mailbox: what arrives when ranks and computations are late, and when a step is left out."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shared_slots
import torch
import torch.distributed as dist
from torch import Tensor

from longreel.parallel.peer_mailbox import Mailbox

NAN = float("nan")
# Elements of round n's tensors: buffers grow twice, and are used for less than they hold.
SIZES = (5, 3, 64, 64, 1, 300, 7)
# One of these left out stalls its peer.
SIGNALLING = ["wait-ready", "signal-ready", "wait-read", "signal-read"]
EVERY_STEP = [*SIGNALLING, "after-compute", "arrival"]


def wrong_tensors(folder: Path, rounds: int, omitted: frozenset[str], longest_s: float, late_rank: int | None) -> int:
    """Tensors that differ from what was published for this rank, in rounds like those of a backward; -1 if it stalls.

    Each rank has a compute stream of its own that is late at random, fills what is published and reads what arrives;
    before and after it writes NaN into the same memory, as later owners of freed memory would.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD.group_name
    compute = shared_slots.Stream()
    rng = random.Random(rank)
    random_delay = shared_slots.random_delays(100 + rank, longest_s)
    behaviour = shared_slots.Behaviour(
        lambda step: longest_s if rank == late_rank and step == "read" else random_delay(step),
        omitted,
        compute,
        wait_s=0.5 if len(omitted.intersection(SIGNALLING)) == 1 else 20.0,
    )
    gather, pairs = (Mailbox(shared_slots.opener(folder, group, behaviour)) for _ in range(2))
    wrong: list[int] = []

    def filled(elements: int, value: float) -> Tensor:
        x, pause = torch.full((elements,), NAN), rng.choice((0.0, rng.uniform(0, longest_s)))
        compute.add(lambda: (time.sleep(pause), x.fill_(value)))
        return x

    def blank(elements: int) -> Tensor:
        x, pause = torch.zeros(elements), rng.choice((0.0, rng.uniform(0, longest_s)))
        compute.add(lambda: (time.sleep(pause), x.fill_(NAN)))
        return x

    def check(x: Tensor, value: float) -> None:
        compute.add(lambda: wrong.append(int(not bool((x == value).all()))))
        compute.add(lambda: x.fill_(NAN))

    def exchange(n: int, step: int, number: int) -> None:
        share = filled(SIZES[n % len(SIZES)], 1000 * n + 10 * rank + number)
        received = blank(share.numel())
        publication = pairs.publish(share, [(rank + step) % size])
        sender = (rank - step) % size
        pairs.fetch(publication, sender, received).wait()
        check(received, 1000 * n + 10 * sender + number)
        compute.add(lambda: share.fill_(NAN))

    stalled, done = False, []
    try:
        for n in range(rounds):
            x = filled(SIZES[n % len(SIZES)], 7000 * n + rank)
            publication = gather.publish(x, [other for other in range(size) if other != rank])
            for step in range(1, size):
                received, owner = blank(x.numel()), (rank - step) % size
                arrival = gather.fetch(publication, owner, received)
                exchange(n, step, 0)
                arrival.wait()
                check(received, 7000 * n + owner)
            compute.add(lambda x=x: x.fill_(NAN))
            # Neighbours alone: a rank may run ahead of the one that reads its slots by more than there are.
            for number in range(1, 5):
                exchange(n, 1, number)
            done.append(compute.record())
        # Enqueued long before: a limit for the whole of it would be one for how busy the machine is.
        for event in done:
            event.wait()
        for transport in behaviour.opened:
            transport.finish()
    except RuntimeError as error:
        # A rank that stalls leaves, and gloo says so to those that wait for it.
        gone = re.search("Connection (closed|reset) by peer", str(error))
        if not isinstance(error, shared_slots.Stalled) and not gone:
            raise
        stalled = True
    finally:
        compute.end()
        shared_slots.end_streams(behaviour)
    if stalled:
        return sum(wrong) or -1
    assert len(wrong) == rounds * (2 * (size - 1) + 4)
    return sum(wrong)


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)], ids=lambda p: f"P{p}")
def test_delays_and_growing_buffers_change_nothing(run_distributed, tmp_path, size, rounds):
    assert run_distributed(wrong_tensors, size, tmp_path, rounds, frozenset(), 2e-3, None) == [0] * size


@pytest.mark.parametrize("late_rank", [0, 3])
def test_one_late_reader_changes_nothing(run_distributed, tmp_path, late_rank):
    assert run_distributed(wrong_tensors, 4, tmp_path, 3, frozenset(), 2e-2, late_rank) == [0] * 4


@pytest.mark.parametrize("omitted", EVERY_STEP)
def test_every_step_is_needed(run_distributed, tmp_path, omitted):
    found = run_distributed(wrong_tensors, 4, tmp_path, 3, frozenset([omitted]), 2e-2, 0)
    assert any(found), found
    # A wait for a signal that never comes stalls; what runs too early brings wrong numbers, or stalls what follows.
    assert omitted not in ("after-compute", "arrival") or max(found) > 0, found


def test_reads_of_memory_that_was_filled_again_bring_wrong_numbers(run_distributed, tmp_path):
    # Without the wait and the signal it is for: what is left to fail are the numbers themselves.
    found = run_distributed(wrong_tensors, 4, tmp_path, 3, frozenset(["wait-read", "signal-read"]), 2e-2, 0)
    assert max(found) > 0, found


def test_reads_of_memory_that_was_not_filled_yet_bring_wrong_numbers(run_distributed, tmp_path):
    found = run_distributed(wrong_tensors, 4, tmp_path, 3, frozenset(["wait-ready", "signal-ready"]), 2e-2, 0)
    assert max(found) > 0, found


def test_small_memory_is_given_back_before_larger_is_taken():
    alive = []

    class Slots:
        """Takes everything, and tells when it is gone."""

        def __init__(self, slot_bytes: int) -> None:
            assert not alive
            self.slot_bytes = slot_bytes
            alive.append(slot_bytes)

        def __del__(self) -> None:
            alive.remove(self.slot_bytes)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: None

    mailbox = Mailbox(Slots)
    sizes = []
    for elements in (100, 50, 101, 120, 400):
        mailbox.publish(torch.zeros(elements, dtype=torch.uint8), [])
        sizes.append(alive[0])
    # At least a quarter more at a time.
    assert sizes == [100, 100, 125, 125, 400]
