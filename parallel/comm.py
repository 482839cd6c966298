"""Every raw collective of the project, keyed by the name of a process group.

Groups travel by name because strategies are custom ops, and an op's arguments are tensors, numbers and strings. A name
marked by symmetric_key() is the same group, whose chunks and pairwise exchanges go through symmetric memory.
All buffers are contiguous: gloo writes wrong data into strided outputs without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from longreel.parallel import symmetric
from longreel.parallel.peer_mailbox import Arrival, Mailbox

SYMMETRIC = "symmetric:"


def _named(group: str) -> dist.ProcessGroup:
    # Newer PyTorch types the name as a NewType of str that older versions do not have.
    return _resolve_process_group(group.removeprefix(SYMMETRIC))  # type: ignore[arg-type]


def symmetric_key(group: str) -> str:
    """The named group with exchange back end `symmetric`: what an op is given to use it."""
    return SYMMETRIC + group.removeprefix(SYMMETRIC)


def _mailboxes(x: Tensor, group: str) -> symmetric.Mailboxes | None:
    """Where x is exchanged if the group says symmetric memory; a fake group moves nothing in either way."""
    if not group.startswith(SYMMETRIC) or is_fake(group):
        return None
    return symmetric.mailboxes(_named(group), x.device)


def world() -> str:
    """Name of the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return str(group.group_name)


def group_size(group: str) -> int:
    """P, ranks of the named group."""
    return _named(group).size()


def group_rank(group: str) -> int:
    """This process's rank in the named group."""
    return _named(group).rank()


def backend(group: str) -> str:
    """What runs the named group's collectives: `nccl`, `gloo`, `fake`, or several with their devices."""
    found: str = dist.get_backend(_named(group))
    return found


def takes_host_tensors(group: str) -> bool:
    """Whether the named group's collectives take tensors on the host, whatever runs them there."""
    return "cpu:" in dist.get_backend_config(_named(group))


def is_fake(group: str) -> bool:
    """Whether the named group is a fake one, whose collectives move nothing."""
    return backend(group) == "fake"


def all_to_all(x: Tensor, group: str) -> Tensor:
    """Row i of x [P, ...] goes to rank i; row j of the result [P, ...] came from rank j."""
    return start_all_to_all(x, torch.empty_like(x), group).wait()


def all_gather(x: Tensor, group: str) -> Tensor:
    """Every rank's x [...], stacked: [P, ...]."""
    assert x.is_contiguous(), x.stride()
    out = x.new_empty((group_size(group), *x.shape))
    # PyTorch 2.13 renamed the collective; 2.11 has the old name only.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out.flatten(0, 1) if x.dim() else out, x, group=_named(group))
    return out


def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """Row r of the sum over ranks of x [P, ...], on rank r: [...]."""
    assert x.is_contiguous() and x.shape[0] == group_size(group), (x.shape, x.stride())
    out = x.new_empty(x.shape[1:])
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(out, x.flatten(0, 1) if out.dim() else x, group=_named(group))
    return out


def all_reduce_sum(x: Tensor, group: str) -> Tensor:
    """Sum of x over the ranks, a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_named(group))
    return out


def start_all_reduce_sum(x: Tensor, group: str) -> Exchange:
    """Start all_reduce_sum() in the background."""
    out = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(out, group=_named(group), async_op=True)
    assert work is not None
    return Exchange(out, (work,), x)


def all_gather_objects(value: Any, group: str) -> list[Any]:
    """Every rank's value, by rank, through pickles: for what is small and rare."""
    everyone: list[Any] = [None] * group_size(group)
    dist.all_gather_object(everyone, value, group=_named(group))
    return everyone


def over_ranks(value: float, group: str, device: torch.device | str = "cpu") -> list[float]:
    """A number of every rank, by rank."""
    everyone: list[float] = (
        all_gather(torch.tensor([value], dtype=torch.float64, device=device), group).flatten().tolist()
    )
    return everyone


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange in flight; wait() returns what was received."""

    received: Tensor
    works: tuple[Arrival, ...]
    # Keeps the sent buffer alive until the transfer is over.
    sent: Tensor

    def wait(self) -> Tensor:
        """Block until all of it is done (on CUDA: until the current stream may use the result)."""
        for work in self.works:
            work.wait()
        return self.received


def start_all_to_all(send: Tensor, received: Tensor, group: str) -> Exchange:
    """Start all_to_all() of send into received, in the background; several run in the order of their starts.

    Args:
        send, received: contiguous [P, ...] of one shape on every rank.
    """
    assert send.is_contiguous() and send.shape[0] == group_size(group), (send.shape, send.stride())
    assert received.is_contiguous() and received.shape == send.shape, (received.shape, received.stride())
    work = dist.all_to_all_single(received, send, group=_named(group), async_op=True)
    assert work is not None
    return Exchange(received, (work,), send)


def start_exchange(send: Tensor, received: Tensor, *, step: int, group: str) -> Exchange:
    """Start sending to rank r + step and receiving from rank r - step (modulo P); both run in the background.

    Args:
        send, received: contiguous buffers of one shape on every rank.
        step: 1 .. P - 1, the same on every rank.
    """
    assert send.is_contiguous()
    assert received.is_contiguous()
    assert send.shape == received.shape
    pg = _named(group)
    size, rank = pg.size(), pg.rank()
    boxes = _mailboxes(send, group)
    if boxes is not None:
        publication = boxes.pairs.publish(send, [(rank + step) % size])
        return Exchange(received, (boxes.pairs.fetch(publication, (rank - step) % size, received),), send)
    operations = [
        dist.P2POp(dist.isend, send, group=pg, group_peer=(rank + step) % size),
        dist.P2POp(dist.irecv, received, group=pg, group_peer=(rank - step) % size),
    ]
    return Exchange(received, tuple(dist.batch_isend_irecv(operations)), send)


def ring_chunks(x: Tensor, group: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, chunk) of every rank's x, own chunk first, in a fixed order; the next is in flight while one is used.

    At step s rank r sends its own chunk to r + s and receives that of r - s, so every chunk travels once.
    """
    size, rank = group_size(group), group_rank(group)
    x = x.contiguous()
    boxes = _mailboxes(x, group)
    if boxes is not None:
        yield from _fetched_chunks(x, boxes.gather, size, rank)
        return
    flight: Exchange | None = None
    for step in range(size):
        chunk = x if flight is None else flight.wait()
        flight = start_exchange(x, torch.empty_like(x), step=step + 1, group=group) if step + 1 < size else None
        yield (rank - step) % size, chunk


def rotating_chunks(x: Tensor, group: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, chunk) of every rank's x, own chunk first, passed on from neighbour to neighbour while it is used.

    At step s rank r holds the chunk of r - s and sends it to r + 1: only neighbours talk to each other.
    """
    size, rank = group_size(group), group_rank(group)
    chunk = x.contiguous()
    boxes = _mailboxes(chunk, group)
    if boxes is not None:
        yield from _fetched_chunks(chunk, boxes.gather, size, rank)
        return
    for step in range(size):
        flight = start_exchange(chunk, torch.empty_like(chunk), step=1, group=group) if step + 1 < size else None
        yield (rank - step) % size, chunk
        if flight is not None:
            chunk = flight.wait()


def _fetched_chunks(x: Tensor, mailbox: Mailbox, size: int, rank: int) -> Iterator[tuple[int, Tensor]]:
    """ring_chunks() and rotating_chunks() through symmetric memory: published once, and fetched from the owner.

    The order of chunks is theirs, and so are the bytes; between the GPUs of a node every peer is a neighbour.
    """
    if size == 1:
        yield rank, x
        return
    publication = mailbox.publish(x, [(rank + step) % size for step in range(1, size)])
    flight: Exchange | None = None
    for step in range(size):
        chunk = x if flight is None else flight.wait()
        flight = None
        if step + 1 < size:
            received = torch.empty_like(x)
            flight = Exchange(received, (mailbox.fetch(publication, (rank - step - 1) % size, received),), x)
        yield (rank - step) % size, chunk
