"""A world of P ranks in one process: this process is one of them, and every collective copies its bytes on the device.

What a rank would receive from its peers is made of its own data, as long and as finite: gathered rows repeat its own,
a sum over ranks runs over its own rows, a chunk that comes is a chunk that leaves. Values are those of no real run;
buffers, lengths, order, streams and the bytes copied are. The only file that uses torch.distributed's Python process
groups, an API of its tests.
"""

# PyTorch's stubs give methods overloads that its Python side never calls, and group_name a type of its own.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.bench.emulated_link import Call, CallLog, CudaLane, HostLane, Lane, Link, Work

BACKEND = "emulated"
_NO_LIMIT = timedelta(days=1)


@dataclass(slots=True)
class _World:
    """Settings that every group of the world shares. link: None takes no time beyond the copies."""

    link: Link | None
    log: CallLog
    groups: int = 0


# torch.distributed makes subgroups by itself, and hands them nothing of ours.
_world: _World | None = None


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A tensor that was sent and not yet received; finish: set when it is."""

    tensor: Tensor
    link_s: float
    finish: Callable[[], None] | None = None


class EmulatedGroup(dist.ProcessGroup):
    """One rank of a group of `size`; see the head of this file.

    Args:
        rank, size: of the group. name: its key in torch.distributed.
        part: `sharding` (the group of all ranks) or `sequence`, for the log.
        world: shared settings.
    """

    def __init__(self, rank: int, size: int, name: str, part: str, world: _World) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self._name, self._part, self._world = rank, size, name, part, world
        self._lanes: dict[torch.device, Lane] = {}
        self._outgoing: deque[_Outgoing] = deque()
        # What longreel.parallel.mesh reads of a back end.
        self.options = SimpleNamespace(_timeout=_NO_LIMIT)

    @property
    def group_name(self) -> str:
        """See torch.distributed.ProcessGroup."""
        return self._name

    def rank(self) -> int:
        """See torch.distributed.ProcessGroup."""
        return self._rank

    def size(self) -> int:
        """See torch.distributed.ProcessGroup."""
        return self._size

    def getBackendName(self) -> str:
        """See torch.distributed.ProcessGroup."""
        return BACKEND

    def _get_backend(self, device: torch.device) -> EmulatedGroup:
        return self

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Every row of the output is the input."""
        rows = output.view(self._size, -1)
        own = input.view(-1)

        def copy() -> None:
            for i, row in enumerate(rows):
                # FSDP2 hands in a row of the output.
                if i != self._rank or row.data_ptr() != own.data_ptr():
                    row.copy_(own)

        return self._run("all_gather", copy, _bytes(input) * (self._size - 1), opts, (output, input))

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Work:
        """Every output is the input."""
        (rows,), (own,) = outputs, inputs

        def copy() -> None:
            for row in rows:
                row.copy_(own)

        return self._run("all_gather", copy, _bytes(own) * (self._size - 1), opts, (*rows, own))

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """The output is the reduction of the input's rows, which all ranks' rows of that place would be."""

        def copy() -> None:
            _reduce_rows(input.view(self._size, *output.shape), output, opts)

        return self._run("reduce_scatter", copy, _bytes(output) * (self._size - 1), opts, (output, input))

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """all_gather_single of each: what DTensor calls."""
        return _all([self.all_gather_single(*both, opts) for both in zip(outputs, inputs, strict=True)])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """reduce_scatter_single of each."""
        return _all([self.reduce_scatter_single(*both, opts) for both in zip(outputs, inputs, strict=True)])

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """allreduce of each."""
        return _all([self.allreduce([tensor], opts) for tensor in tensors])

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], opts: Any = None
    ) -> Work:
        """The output is the input; where more rows come than leave, it begins again, and where none leave it is zero.

        Args:
            output_splits, input_splits: rows by rank, or empty for equal parts.
        """
        sent = _bytes(input) * (self._size - 1) // self._size
        if input_splits:
            row = _bytes(input) // len(input) if len(input) else 0
            sent = row * (sum(input_splits) - input_splits[self._rank])
        target, source = output.view(-1), input.view(-1)

        def copy() -> None:
            if not len(source):
                target.zero_()
            for part in target.split(len(source)) if len(source) else ():
                part.copy_(source[: len(part)])

        return self._run("all_to_all", copy, sent, opts, (output, input))

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """As if every rank had the same: a sum is P times as much, anything else is what it was."""
        (tensor,) = tensors

        def copy() -> None:
            tensor.mul_(self._size if _op(opts) == dist.ReduceOp.SUM else 1)

        return self._run("all_reduce", copy, 2 * _bytes(tensor) * (self._size - 1) // self._size, opts, (tensor,))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """The tensors stay what they are: the sender's data is this rank's own."""
        sends = opts is not None and opts.rootRank == self._rank
        sent = sum(_bytes(t) for t in tensors) if sends and self._size > 1 else 0
        return self._run("broadcast", lambda: None, sent, opts, tuple(tensors))

    def barrier(self, opts: Any = None) -> Work:
        """Nobody to wait for."""
        return Work(lambda: None)

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int) -> Work:
        """Leaves when it is received: a rank that sends receives as much."""
        (tensor,) = tensors
        link_s = self._log("send", _bytes(tensor), background=True)
        outgoing = _Outgoing(tensor, link_s)
        self._outgoing.append(outgoing)

        def finish() -> None:
            if outgoing.finish is not None:
                outgoing.finish()
            elif outgoing in self._outgoing:
                self._outgoing.remove(outgoing)

        return Work(finish)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> Work:
        """Receives the oldest tensor of its size that was sent and not received; zeros where there is none."""
        (tensor,) = tensors
        fitting = (o for o in self._outgoing if o.tensor.numel() == tensor.numel() and o.tensor.dtype == tensor.dtype)
        outgoing = next(fitting, None)
        if outgoing is None:
            link_s = 0.0 if self._world.link is None else self._world.link.seconds(_bytes(tensor))
            wait = self._lane(tensor.device).run(tensor.zero_, link_s, background=True)
            return Work(wait, (tensor,))
        self._outgoing.remove(outgoing)
        sent = outgoing.tensor.view(tensor.shape)
        wait = self._lane(tensor.device).run(lambda: tensor.copy_(sent), outgoing.link_s, background=True)
        # Whoever waits first waits for both, which are one transfer.
        outgoing.finish = once = _once(wait)
        return Work(once, (tensor, sent))

    def _run(self, name: str, copy: Callable[[], None], sent: int, opts: Any, buffers: tuple[Tensor, ...]) -> Work:
        background = bool(getattr(opts, "asyncOp", False))
        link_s = self._log(name, sent, background=background)
        with torch.no_grad():
            wait = self._lane(buffers[0].device).run(copy, link_s, background=background)
        return Work(wait, buffers)

    def _log(self, name: str, sent: int, *, background: bool) -> float:
        link_s = 0.0 if self._world.link is None else self._world.link.seconds(sent)
        self._world.log.calls.append(Call(self._part, name, self._size, sent, link_s, background))
        return link_s

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            log = self._world.log
            cuda = device.type == "cuda"
            self._lanes[device] = CudaLane(self._part, log, device) if cuda else HostLane(self._part, log)
        return self._lanes[device]

    # Names up to PyTorch 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _create(options: Any, backend_options: Any = None) -> EmulatedGroup:
    if _world is None:
        raise ValueError(f"groups of back end {BACKEND!r} are made inside emulated_world()")
    _world.groups += 1
    part = "sharding" if _world.groups == 1 else "sequence"
    return EmulatedGroup(options.group_rank, options.group_size, options.group_id, part, _world)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])


@contextmanager
def emulated_world(world_size: int, *, rank: int = 0, link: Link | None = None) -> Iterator[CallLog]:
    """Make this process rank `rank` of an emulated default process group, and take the group down at the end.

    Args:
        world_size: P, ranks that there would be. rank: the one that this process plays.
        link: what collectives take time on; None: as long as their copies.

    Yields:
        The log of all groups' calls. The group of all ranks is `sharding`, any other one `sequence`.

    Raises:
        ValueError: a process group is initialised already, or rank is not one of the world's.
    """
    global _world
    if dist.is_initialized():
        raise ValueError(
            f"a process group ({dist.get_backend()}, {dist.get_world_size()} ranks) is initialised: emulation needs "
            "one of its own; emulate in another process, or after destroy_process_group()"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a world of {world_size}; use 0 to {world_size - 1}")
    log = CallLog()
    _world = _World(link, log)
    try:
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
        try:
            yield log
        finally:
            dist.destroy_process_group()
    finally:
        _world = None


def _op(opts: Any) -> Any:
    return dist.ReduceOp.SUM if opts is None else opts.reduceOp


def _reduce_rows(rows: Tensor, output: Tensor, opts: Any) -> None:
    op = _op(opts)
    if op == dist.ReduceOp.SUM:
        torch.sum(rows, dim=0, out=output)
    elif op == dist.ReduceOp.AVG:
        torch.mean(rows, dim=0, out=output)
    elif op == dist.ReduceOp.MAX:
        torch.amax(rows, dim=0, out=output)
    elif op == dist.ReduceOp.MIN:
        torch.amin(rows, dim=0, out=output)
    else:
        raise ValueError(f"an emulated reduce-scatter knows SUM, AVG, MAX and MIN, got {op}")


def _all(works: Sequence[Work]) -> Work:
    """Several collectives as one."""

    def finish() -> None:
        for work in works:
            work.wait()

    return Work(finish)


def _once(call: Callable[[], None]) -> Callable[[], None]:
    """call, the first time."""
    called = False

    def wait() -> None:
        nonlocal called
        if not called:
            called = True
            call()

    return wait


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
