"""Bytes that one rank sends, counted where they leave: at torch.distributed's own collectives."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from longreel.models.config import DiTConfig
from longreel.models.sequence import AttentionShape, SequenceParallel
from longreel.parallel import comm


def sent_bytes(name: str, arguments: dict[str, Any], size: int) -> int:
    """Bytes that one of `size` ranks sends in a collective; an all-reduce counts as a ring."""
    if name == "all_gather":
        return _bytes(arguments["input_tensor"]) * (size - 1)
    if name == "reduce_scatter":
        return _bytes(arguments["output"]) * (size - 1)
    if name == "all_to_all":
        return _bytes(arguments["input"]) * (size - 1) // size
    return 2 * _bytes(arguments["tensor"]) * (size - 1) // size


# Function of torch.distributed -> what it is; newer releases give two of them new names.
COLLECTIVES = {
    "all_to_all_single": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "all_reduce": "all_reduce",
}


class _Counting:
    """torch.distributed, counting into `sent` under the name of a part what its collectives send."""

    def __init__(self, part: str, sent: Counter[str]) -> None:
        self._part = part
        self._sent = sent
        self.batch_isend_irecv = self._counting_exchange(dist.batch_isend_irecv)
        for function, name in COLLECTIVES.items():
            if hasattr(dist, function):
                setattr(self, function, self._counting(getattr(dist, function), name))

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def _counting(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            tensors = [value for value in bound.values() if isinstance(value, Tensor)]
            if not all(tensor.is_floating_point() for tensor in tensors):
                # Sizes that ranks compare, not a layer's traffic.
                return function(*args, **kwargs)
            self._sent[f"{self._part}.{name}"] += sent_bytes(name, bound, dist.get_world_size(bound.get("group")))
            return function(*args, **kwargs)

        return call

    def _counting_exchange(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(operations: list[dist.P2POp]) -> Any:
            for operation in operations:
                if operation.op is dist.isend:
                    self._sent[f"{self._part}.send"] += _bytes(operation.tensor)
            return function(operations)

        return call


@contextlib.contextmanager
def counted_traffic() -> Iterator[Counter[str]]:
    """Count what this rank sends inside the context.

    Strategies send through longreel.parallel.comm, the sharding engine calls torch.distributed itself: that, not the
    group, tells them apart, since an SP group of all ranks may be the engine's group too.

    Yields:
        Bytes by `sequence.<collective>` and `sharding.<collective>`; `send` is point to point.
    """
    sent: Counter[str] = Counter()
    sequence, sharding = _Counting("sequence", sent), _Counting("sharding", sent)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(comm, "dist", sequence))
        for function in ("batch_isend_irecv", *COLLECTIVES):
            if hasattr(dist, function):
                stack.enter_context(mock.patch.object(dist, function, getattr(sharding, function)))
        yield sent


def formula(
    strategy: SequenceParallel, model: DiTConfig, *, batch: int, seq_len: int, element_size: int, policy: str
) -> dict[str, int]:
    """Bytes one rank sends in a training step, by the strategy's own formula; recomputation repeats forward.

    Args:
        strategy: whose formula. model: its attention layers. policy: activation policy.
        batch: samples of an SP group. seq_len: video tokens of each. element_size: bytes of an activation's element.
    """
    in_sequence = model.max_text_tokens if model.conditioning == "in_context" else 0
    shape = AttentionShape(
        batch=batch,
        seq_len=in_sequence + seq_len,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        element_size=element_size,
    )
    layers = [] if model.text_only else [shape]
    if model.cross_layout == "published":
        layers.append(replace(shape, kv_len=model.max_text_tokens))
    total: Counter[str] = Counter()
    for layer in layers:
        traffic = strategy.traffic(layer)
        repeats = model.depth * (2 if policy == "full" else 1)
        total.update({name: repeats * sent for name, sent in traffic.forward.items()})
        total.update({name: model.depth * sent for name, sent in traffic.backward.items()})
    return dict(total)


def disagreement(counted: dict[str, int], expected: dict[str, int]) -> str | None:
    """In words where counted sequence traffic differs from the formula, None where it does not.

    All-gathers and reduce-scatters of the formula may run as point-to-point exchanges.
    """
    seen: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for name, sent in counted.items():
        part, _, collective = name.partition(".")
        if part == "sequence":
            seen["all_to_all" if collective == "all_to_all" else "gather and scatter"] += sent
    for collective, sent in expected.items():
        wanted["all_to_all" if collective == "all_to_all" else "gather and scatter"] += sent
    wrong = [f"{name}: sent {seen[name]:,} bytes, formula {wanted[name]:,}" for name in sorted({*seen, *wanted})]
    return "; ".join(wrong) if +seen != +wanted else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
