"""Overlapped exchanges under random delays: the same bits as without, whatever arrives when."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longreel.models.sequence import SequenceLengths
from longreel.parallel import comm
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies import build_strategy

HEADS, WIDTH = 8, 64
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options in (
        ("ulysses", {}),
        ("ulysses", {"head_chunks": 2}),
        ("ulysses", {"head_chunks": 2, "policy": "keep_attention"}),
        ("fastseq", {"fastseq_overlap": "projection"}),
        ("fastseq", {"fastseq_overlap": "attention"}),
        ("fastseq", {"policy": "keep_attention"}),
        ("ring", {}),
        ("usp", {"ulysses_degree": 2}),
    )
]


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """What comm receives into holds NaN before: a buffer read too early shows."""
    real = torch.empty_like

    def poisoned(x: Tensor, **kwargs) -> Tensor:
        return real(x, **kwargs).fill_(float("nan"))

    with mock.patch.object(torch, "empty_like", poisoned):
        yield


@contextmanager
def delays(rng: random.Random) -> Iterator[None]:
    """Up to 4 ms before each collective, and between the start of an exchange and the wait for it."""
    with ExitStack() as stack:

        def delayed(function):
            def call(*args, **kwargs):
                time.sleep(rng.choice((0, rng.uniform(0, 4e-3))))
                return function(*args, **kwargs)

            return call

        for name in ("batch_isend_irecv", "all_to_all_single"):
            stack.enter_context(mock.patch.object(dist, name, delayed(getattr(dist, name))))
        wait = comm.Exchange.wait
        stack.enter_context(mock.patch.object(comm.Exchange, "wait", delayed(wait)))
        yield


def step(sp, seed: int) -> list[Tensor]:
    """Output and gradients of one attention layer, this rank's part."""
    torch.manual_seed(seed)
    valid = 9 + seed % 4
    lengths = SequenceLengths(valid=valid, padded=-(-valid // sp.degree) * sp.degree)
    x = torch.randn(1, lengths.padded, WIDTH)
    qkv = nn.Linear(WIDTH, 3 * WIDTH)
    local = sp.shard(x, 1).detach().requires_grad_()
    out = sp.self_attention(local, qkv, num_heads=HEADS, lengths=lengths)
    out.backward(torch.randn_like(out))
    return [out.detach(), local.grad, qkv.weight.grad, qkv.bias.grad]


def differing_rounds(name: str, options: dict[str, Any], rounds: int, skipped_wait: int | None) -> int:
    """Rounds in which a delayed run differs from the undelayed one, the n-th wait of each left out if one is to be."""
    degree = dist.get_world_size()
    config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", **options)
    sp = build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=config.ulysses_degree))
    rng = random.Random(dist.get_rank())
    wait, counter = comm.Exchange.wait, itertools.count()

    def wait_or_not(exchange: comm.Exchange) -> Tensor:
        received = wait(exchange)
        if next(counter) == skipped_wait:
            # What a computation reads that does not wait, if nothing has arrived yet.
            received.fill_(float("nan"))
        return received

    differing = 0
    for seed in range(rounds):
        expected = step(sp, seed)
        with poisoned_buffers(), mock.patch.object(comm.Exchange, "wait", wait_or_not), delays(rng):
            found = step(sp, seed)
        counter = itertools.count()
        dist.barrier()
        differing += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return differing


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_delays_do_not_change_a_bit(run_distributed, name, options, rounds):
    assert run_distributed(differing_rounds, 4, name, options, rounds, None) == [0] * 4


# Waits of one forward and backward on four ranks: three per pass round the ranks, one per all-to-all.
@pytest.mark.parametrize(
    ("name", "options", "waits"),
    [
        pytest.param("ulysses", {}, 4, id="ulysses"),
        pytest.param("ulysses", {"head_chunks": 2}, 8, id="ulysses-chunks"),
        pytest.param("fastseq", {"fastseq_overlap": "projection"}, 11, id="fastseq-projection"),
        pytest.param("fastseq", {"fastseq_overlap": "attention"}, 11, id="fastseq-attention"),
        pytest.param("ring", {}, 9, id="ring"),
        pytest.param("usp", {"ulysses_degree": 2}, 7, id="usp"),
    ],
)
def test_every_wait_is_needed(run_distributed, name, options, waits):
    for skipped in range(waits):
        assert sum(run_distributed(differing_rounds, 4, name, options, 1, skipped)) > 0, f"wait {skipped}"
    # One more than there are: nothing is left out.
    assert run_distributed(differing_rounds, 4, name, options, 1, waits) == [0] * 4
