"""Activations in host memory between forward and backward: the policy `offload`.

As under `keep_attention`, a block is recomputed in backward but for self-attention; here the block's input and what
attention's op returned leave the device after forward and come back, one block ahead of its use, in backward. On CUDA
both ways run on streams of their own, through pinned memory.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.parallel.strategies import SELF_ATTENTION_OPS

# Smaller tensors (timesteps, text, log-sum-exps of short sequences) stay: a transfer costs more than they do.
MIN_BYTES = 1 << 20


class HostTensor:
    """A tensor that was on the device, now in host memory; it comes back as it was."""

    def __init__(self, host: Any, device: torch.device, left: Any = None) -> None:
        self.host = host
        self.device = device
        # CUDA events: when the copy out is over, and the one back.
        self.left = left
        self.arrived: Any = None
        self.back: Tensor | None = None


class HostStore:
    """Host memory for the activations of one rank.

    Args:
        budget_bytes: host memory it may hold at a time; None for no limit.
        min_bytes: smallest tensor that leaves the device.

    Attributes:
        num_bytes, peak_bytes: host memory held now, and at most so far.
    """

    def __init__(self, *, budget_bytes: int | None = None, min_bytes: int = MIN_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.min_bytes = min_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        self._block = 0
        self._blocks: dict[int, list[weakref.ref[HostTensor]]] = defaultdict(list)
        # Pinned buffers by size, since pinning takes long.
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._streams: dict[tuple[torch.device, str], Any] = {}

    def next_block(self) -> None:
        """A block's forward begins: what is put from now on comes back together."""
        self._block += 1

    def put(self, tensor: Tensor) -> Tensor | tuple[HostTensor, int]:
        """Send a tensor to host memory; returns what `get` takes. Small ones and parameters are returned as they are.

        Raises:
            MemoryError: the budget does not hold it.
        """
        size = tensor.numel() * tensor.element_size()
        if size < self.min_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        if self.budget_bytes is not None and self.num_bytes + size > self.budget_bytes:
            raise MemoryError(
                f"offload: block {self._block} needs {size:,} bytes of host memory beyond the {self.num_bytes:,} held, "
                f"and the budget is {self.budget_bytes:,} per rank; raise host_memory_gib, or use policy full"
            )
        kept = self._leave(tensor)
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(kept, self._release, kept.host, size)
        self._blocks[self._block].append(weakref.ref(kept))
        return kept, self._block

    def get(self, kept: Tensor | tuple[HostTensor, int]) -> Tensor:
        """The tensor back on its device; the block before its own starts to come back too."""
        if isinstance(kept, Tensor):
            return kept
        entry, block = kept
        for over in [other for other in self._blocks if other > block]:
            del self._blocks[over]
        for near in (block, block - 1):
            for reference in self._blocks.get(near, ()):
                if (other := reference()) is not None and other.back is None:
                    self._fetch(other)
        if entry.back is None:
            self._fetch(entry)
        back, entry.back = entry.back, None
        assert back is not None
        if entry.arrived is not None:
            current = torch.cuda.current_stream(entry.device)
            current.wait_event(entry.arrived)
            back.record_stream(current)
        return back

    def _leave(self, tensor: Tensor) -> HostTensor:
        if tensor.device.type != "cuda":
            return HostTensor(tensor.detach().clone(), tensor.device)
        size = tensor.numel() * tensor.element_size()
        free = self._free[size]
        buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=True)
        host = buffer.view(tensor.dtype).view(tensor.shape)
        stream = self._stream(tensor.device, "out")
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor.detach(), non_blocking=True)
        # The allocator may hand the memory out again only after the copy.
        tensor.record_stream(stream)
        return HostTensor(host, tensor.device, stream.record_event())

    def _fetch(self, entry: HostTensor) -> None:
        if entry.device.type != "cuda":
            entry.back = entry.host.clone()
            return
        stream = self._stream(entry.device, "in")
        stream.wait_event(entry.left)
        with torch.cuda.stream(stream):
            entry.back = torch.empty_like(entry.host, device=entry.device, pin_memory=False)
            entry.back.copy_(entry.host, non_blocking=True)
        entry.arrived = stream.record_event()

    def _release(self, host: Any, size: int) -> None:
        self.num_bytes -= size
        if isinstance(host, Tensor) and host.is_pinned():
            # A copy back may still read it; copies out queue behind it on the device, but on another stream.
            for (device, name), stream in self._streams.items():
                if name == "out":
                    stream.wait_stream(self._stream(device, "in"))
            self._free[size].append(host.view(-1).view(torch.uint8))

    def _stream(self, device: torch.device, name: str) -> Any:
        if (device, name) not in self._streams:
            self._streams[device, name] = torch.cuda.Stream(device)
        return self._streams[device, name]


class _Keeping(TorchDispatchMode):
    """Forward: what self-attention's ops return goes to the store."""

    def __init__(self, store: HostStore, kept: list[Any]) -> None:
        super().__init__()
        self._store, self._kept = store, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in SELF_ATTENTION_OPS:
            self._kept.append([self._store.put(result) for result in results])
        return results


class _Returning(TorchDispatchMode):
    """Recomputation: self-attention's ops return what the store holds instead of running."""

    def __init__(self, store: HostStore, kept: list[Any]) -> None:
        super().__init__()
        self._store, self._kept = store, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SELF_ATTENTION_OPS:
            return tuple(self._store.get(one) for one in self._kept.pop(0))
        return func(*args, **(kwargs or {}))


class OffloadedBlock(CheckpointWrapper):
    """A block whose recomputation starts from host memory.

    Args:
        block: the block. store: shared by all blocks of a model.
    """

    def __init__(self, block: nn.Module, store: HostStore) -> None:
        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            kept: list[Any] = []
            return _Keeping(store, kept), _Returning(store, kept)

        super().__init__(block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False, context_fn=contexts)
        self._store = store

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; its inputs go to the store."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        self._store.next_block()
        with saved_tensors_hooks(self._store.put, self._store.get):
            return super().forward(*args, **kwargs)
