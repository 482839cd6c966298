"""Every call of a collective in this process, in order, as torch.distributed gets it: what two runs are compared by."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from longreel.bench.traffic import COLLECTIVES, sent_bytes


@dataclass(frozen=True, slots=True)
class Issued:
    """One call.

    Args:
        name: of the collective; `send` and `recv` are the operations of batch_isend_irecv.
        size: ranks of the group. sent: bytes that leave this rank. shapes: of its tensors.
        asynchronous: the call returns at once; point to point always does.
    """

    name: str
    size: int
    sent: int
    shapes: tuple[tuple[int, ...], ...]
    asynchronous: bool


@contextlib.contextmanager
def issued_calls() -> Iterator[list[Issued]]:
    """Note every collective that anything in this process calls inside the context.

    Yields:
        The calls so far.
    """
    calls: list[Issued] = []
    exchange = dist.batch_isend_irecv

    def noting_exchange(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            name = "send" if operation.op is dist.isend else "recv"
            tensor = operation.tensor
            sent = tensor.numel() * tensor.element_size() if name == "send" else 0
            calls.append(Issued(name, dist.get_world_size(operation.group), sent, (tuple(tensor.shape),), True))
        return exchange(operations)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", noting_exchange))
        for function, name in (*COLLECTIVES.items(), ("broadcast", "broadcast"), ("barrier", "barrier")):
            if hasattr(dist, function):
                stack.enter_context(mock.patch.object(dist, function, _noting(getattr(dist, function), name, calls)))
        yield calls


def _noting(function: Callable[..., Any], name: str, calls: list[Issued]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        size = dist.get_world_size(bound.get("group"))
        sent = 0 if name in ("broadcast", "barrier") else sent_bytes(name, bound, size)
        shapes = tuple(tuple(value.shape) for value in bound.values() if isinstance(value, Tensor))
        calls.append(Issued(name, size, sent, shapes, bool(bound.get("async_op", False))))
        return function(*args, **kwargs)

    return call
