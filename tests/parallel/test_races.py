"""Overlapped exchanges under random delays: the same bits as without, whatever arrives when."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
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

HEADS, WIDTH, TEXT = 8, 64, 6
# Strategy, what it asks ParallelConfig for, what is attended to, and waits of one forward and backward on four ranks:
# three per pass round the ranks (one, where a ring has two), one per all-to-all. None: those of a packed sequence that
# bring tokens no query here meets are not needed.
FORMS: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    "ulysses": ("ulysses", {}, "self", 4),
    "ulysses-lean": ("ulysses", {"policy": "keep_attention"}, "self", 5),
    "ulysses-chunks": ("ulysses", {"head_chunks": 2}, "self", 8),
    "ulysses-chunks-lean": ("ulysses", {"head_chunks": 2, "policy": "keep_attention"}, "self", 10),
    "ulysses-cross": ("ulysses", {}, "cross", 6),
    "ulysses-chunks-packed": ("ulysses", {"head_chunks": 2}, "packed", 8),
    "fastseq-projection": ("fastseq", {"fastseq_overlap": "projection"}, "self", 11),
    "fastseq-attention": ("fastseq", {"fastseq_overlap": "attention"}, "self", 11),
    "fastseq-lean": ("fastseq", {"policy": "keep_attention"}, "self", 14),
    "fastseq-attention-lean": ("fastseq", {"fastseq_overlap": "attention", "policy": "keep_attention"}, "self", 14),
    "fastseq-kept": ("fastseq", {"fastseq_overlap": "attention", "fastseq_keep_gathered": True}, "self", 8),
    "fastseq-cross": ("fastseq", {}, "cross", 20),
    "fastseq-attention-packed": ("fastseq", {"fastseq_overlap": "attention"}, "packed", 11),
    "ring": ("ring", {}, "self", 9),
    "ring-cross": ("ring", {}, "cross", 9),
    "ring-packed": ("ring", {}, "packed", None),
    "usp": ("usp", {"ulysses_degree": 2}, "self", 7),
    "usp-lean": ("usp", {"ulysses_degree": 2, "policy": "keep_attention"}, "self", 8),
    "usp-chunks": ("usp", {"ulysses_degree": 2, "head_chunks": 2}, "self", 14),
    "usp-cross": ("usp", {"ulysses_degree": 2}, "cross", 9),
    "usp-chunks-packed": ("usp", {"ulysses_degree": 2, "head_chunks": 2}, "packed", None),
}


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Memory that nobody has written yet holds NaN, receive buffers among it: what is read too early shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
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


def step(sp: Any, attended: str, seed: int) -> list[Tensor]:
    """Output and gradients of one attention layer, this rank's part."""
    torch.manual_seed(seed)
    valid = 9 + seed % 4
    # Clips end inside ranks' parts.
    clips = (0, 4, 5, valid) if attended == "packed" else None
    lengths = SequenceLengths(valid=valid, padded=-(-valid // sp.degree) * sp.degree, cu_seqlens=clips)
    text_lengths = SequenceLengths(valid=TEXT, padded=-(-TEXT // sp.degree) * sp.degree)
    cross = attended == "cross"
    x, text = torch.randn(1, lengths.padded, WIDTH), torch.randn(1, text_lengths.padded, WIDTH)
    query, kv = nn.Linear(WIDTH, WIDTH if cross else 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
    local, local_text = (sp.shard(whole, 1).detach().requires_grad_() for whole in (x, text))
    if cross:
        both = {"lengths": lengths, "text_lengths": text_lengths}
        out = sp.cross_attention(local, local_text, query, kv, num_heads=HEADS, **both)
    else:
        out = sp.self_attention(local, query, num_heads=HEADS, lengths=lengths)
    out.backward(torch.randn_like(out))
    more = [local_text.grad, kv.weight.grad, kv.bias.grad] if cross else []
    return [out.detach(), local.grad, query.weight.grad, query.bias.grad, *more]


def strategy(form: str) -> Any:
    name, options, *_ = FORMS[form]
    degree = dist.get_world_size()
    config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", **options)
    return build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=config.ulysses_degree))


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def differing_rounds(form: str, rounds: int) -> int:
    """How many of so many delayed steps differ from the undelayed one."""
    sp, attended, rng = strategy(form), FORMS[form][2], random.Random(dist.get_rank())
    differing = 0
    for seed in range(rounds):
        expected = step(sp, attended, seed)
        with poisoned_buffers(), delays(rng):
            found = step(sp, attended, seed)
        dist.barrier()
        differing += differ(found, expected)
    return differing


def without_wait(sp: Any, attended: str, skipped: int) -> list[Tensor]:
    """A step whose n-th wait is left out; no delays, as what it would have waited for is lost in any case."""
    wait, counter = comm.Exchange.wait, itertools.count()

    def wait_or_not(exchange: comm.Exchange) -> Tensor:
        received = wait(exchange)
        if next(counter) == skipped:
            # What a computation reads that does not wait, if nothing has arrived yet.
            received.fill_(float("nan"))
        return received

    with poisoned_buffers(), mock.patch.object(comm.Exchange, "wait", wait_or_not):
        found = step(sp, attended, 0)
    dist.barrier()
    return found


def waits_that_matter(form: str, waits: int) -> list[bool]:
    """Of each of so many waits, whether leaving it out changes this rank's results."""
    sp, attended = strategy(form), FORMS[form][2]
    expected = step(sp, attended, 0)
    return [differ(without_wait(sp, attended, skipped), expected) for skipped in range(waits)]


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_delays_do_not_change_a_bit(run_distributed, form, rounds):
    assert run_distributed(differing_rounds, 4, form, rounds) == [0] * 4


@pytest.mark.parametrize(("form", "waits"), [(form, waits) for form, (*_, waits) in FORMS.items() if waits is not None])
def test_every_wait_is_needed(run_distributed, form, waits):
    # One more than there are: with the last, nothing is left out.
    somewhere = [any(ranks) for ranks in zip(*run_distributed(waits_that_matter, 4, form, waits + 1), strict=True)]
    assert somewhere == [True] * waits + [False]


def unwritten_buffers() -> list[bool]:
    """Whether memory is poisoned, by the way it is asked for, in this rank."""
    with poisoned_buffers():
        made = torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(2)
        return [bool(x.isnan().all()) for x in made]


def test_poison_reaches_all_memory_that_ranks_ask_for(run_distributed):
    assert run_distributed(unwritten_buffers, 2) == [[True] * 3] * 2
