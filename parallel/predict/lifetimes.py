"""Memory of a step, by following the lifetime of every tensor storage that an op returns.

A storage counts from the op that returns it until Python and autograd let go of it, once however many views there
are. Works alike on real and on fake tensors. What an op allocates and frees inside is seen where the observer hands
over the op's body (for our Python custom ops); for other ops it is added by the observer's workspace formula.
MemTracker of torch.distributed is not used, as it over-counts non-reentrant checkpointing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class OpObserver(Protocol):
    """What is told about every op under a StorageTracker."""

    def body(self, func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """Python function to run in place of op func, its own ops tracked one by one; None runs func itself."""
        ...

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """Called after func (or its body) ran; returns bytes it held inside, beyond arguments and results."""
        ...


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors among an op's arguments or results, in lists and tuples too (pytree's walk takes ten times as long)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


@cache
def _is_composite(func: Any) -> bool:
    return func.namespace == "aten" and func._can_decompose()


class StorageTracker(TorchDispatchMode):
    """Dispatch mode that counts live bytes and their peak per phase.

    Enter it inside FakeTensorMode, or alone for real tensors. Every storage that an op returns counts, also one from
    before when an op returns a view of it; others from before are added with `track`. DTensors are followed by their
    local tensors.

    Args:
        observer: see OpObserver; None takes every op as it is, without workspace.

    Attributes:
        current: live bytes now.
        peaks: highest live bytes, with workspaces, per phase, in order of appearance.
        phase: name that peaks are filed under; assign to change it.
    """

    def __init__(self, observer: OpObserver | None = None) -> None:
        super().__init__()
        self.current = 0
        self.peaks: dict[str, int] = {}
        self._observer = observer
        self._phase = "start"
        self._live: dict[int, int] = {}
        self._plain_resize: Any = None
        self._entered = 0

    @property
    def peak(self) -> int:
        """Highest live bytes of all phases."""
        return max(self.peaks.values(), default=self.current)

    @property
    def phase(self) -> str:
        """The current phase."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        self._mark(self.current)

    def track(self, *tensors: Tensor) -> None:
        """Count the storages of these tensors from now on, where they are not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._live[key] = 0
                self._set(key, storage.nbytes())
                # torch keeps one Python object per storage, so this fires when the storage itself dies.
                weakref.finalize(storage, self._forget, key).atexit = False

    def _mark(self, live: int) -> None:
        if live > self.peaks.get(self._phase, -1):
            self.peaks[self._phase] = live

    def _set(self, key: int, size: int) -> None:
        self.current += size - self._live[key]
        self._live[key] = size
        self._mark(self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._live.pop(key)

    def __enter__(self) -> StorageTracker:
        self._entered += 1
        if self._entered == 1:
            self._follow_resize()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._entered -= 1
        if self._entered == 0:
            torch.UntypedStorage.resize_ = self._plain_resize  # type: ignore[method-assign]

    def _follow_resize(self) -> None:
        # FSDP2 frees and refills gathered parameters by resizing their storage, which no op reports.
        plain = self._plain_resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            if storage._cdata in self._live:
                self._set(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A DTensor's storage claims the global size; declined here, the op comes back with its local tensors.
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        # Fake tensors ask for their device constantly; it costs nothing and returns no tensor.
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        # Composite ops (linear, reshape ...) reach us whole inside an op's body; their parts are what allocates.
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        body = None if self._observer is None else self._observer.body(func, args)
        if body is None:
            result = func(*args, **kwargs)
        else:
            with self:
                result = body(*args, **kwargs)
        self.track(*tensors_in(result))
        if self._observer is not None:
            # Arguments and results are both live while the workspace is.
            self._mark(self.current + self._observer.ran(func, args, kwargs, result))
        return result
