"""Activations in host memory between forward and backward: the policy `offload`.

As under `keep_attention`, a block is recomputed in backward but for self-attention; here the block's input and what
attention's op returned leave the device after forward and come back, one block ahead of its use, in backward. On CUDA
both ways run on streams of their own, through pinned memory (longreel.parallel.host_slabs).
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.parallel.host_slabs import SLAB_BYTES, HostSlabs, Span
from longreel.parallel.strategies import SELF_ATTENTION_OPS

# Smaller tensors (timesteps, text, log-sum-exps of short sequences) stay: a transfer costs more than they do.
MIN_BYTES = 1 << 20


class HostTensor:
    """A tensor that was on the device, now in host memory; it comes back as it was."""

    def __init__(self, tensor: Tensor, spans: list[Span]) -> None:
        self.spans = spans
        self.dtype, self.device = tensor.dtype, tensor.device
        # Dims from the outermost in memory on, so that a transposed tensor returns with its strides.
        self.order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        self.shape = [tensor.shape[dim] for dim in self.order]
        # CUDA events: when the copy out is over, and the one back.
        self.left: Any = None
        self.arrived: Any = None
        self.fetched = False
        self.back: Tensor | None = None

    def flat(self, tensor: Tensor) -> Tensor:
        """The bytes of the tensor as they lie in memory."""
        return tensor.detach().permute(self.order).contiguous().view(-1).view(torch.uint8)

    def shaped(self, flat: Tensor) -> Tensor:
        """The tensor that has these bytes."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view(self.dtype).view(self.shape).permute(inverse)


class _Block:
    """What one block's forward put, and the block before: they come back together, one ahead."""

    def __init__(self, index: int, before: _Block | None) -> None:
        self.index = index
        self.entries: list[weakref.ref[HostTensor]] = []
        # Blocks live as long as what they put.
        self.before = None if before is None else weakref.ref(before)


class HostStore:
    """Host memory for the activations of one rank, which are on one device.

    Args:
        budget_bytes: host memory it may take, whole slabs; None for no limit.
        min_bytes: smallest tensor that leaves the device.
        slab_bytes: size of a slab, a power of two.

    Attributes:
        min_bytes: as given.

    Raises:
        ValueError: slab_bytes is no power of two.
    """

    def __init__(
        self, *, budget_bytes: int | None = None, min_bytes: int = MIN_BYTES, slab_bytes: int = SLAB_BYTES
    ) -> None:
        self.min_bytes = min_bytes
        self._slabs = HostSlabs(slab_bytes=slab_bytes, limit_bytes=budget_bytes, allocate=self._slab)
        self._block = _Block(0, None)
        # Ranges of tensors that are gone. Garbage collection may run at any point of this code, so that it only notes.
        self._returned: deque[list[Span]] = deque()
        # Of copies out and of copies back, on CUDA.
        self._streams: tuple[Any, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors held now, each rounded up to longreel.parallel.host_slabs.ALIGNMENT."""
        self._reclaim()
        return self._slabs.num_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes of the tensors held at most so far."""
        return self._slabs.peak_bytes

    @property
    def pinned_bytes(self) -> int:
        """Memory taken from the host, what the budget limits: whole slabs, which stay for reuse."""
        return self._slabs.pinned_bytes

    def next_block(self) -> None:
        """A block's forward begins: what is put from now on comes back together."""
        self._block = _Block(self._block.index + 1, self._block)

    def put(self, tensor: Tensor) -> Tensor | tuple[HostTensor, _Block]:
        """Send a tensor to host memory; returns what `get` takes. Small ones and parameters are returned as they are.

        Raises:
            MemoryError: the budget does not hold it.
        """
        size = tensor.numel() * tensor.element_size()
        if size < self.min_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        self._reclaim()
        if on_streams(tensor.device) and self._streams is None:
            self._streams = torch.cuda.Stream(tensor.device), torch.cuda.Stream(tensor.device)
        try:
            spans = self._slabs.take(size)
        except MemoryError as error:
            raise MemoryError(
                f"offload: block {self._block.index} needs {error}, and the budget is {self._slabs.limit_bytes:,} per "
                "rank; raise host_memory_gib, or use policy full"
            ) from None
        entry = HostTensor(tensor, spans)
        weakref.finalize(entry, self._returned.append, spans)
        self._leave(entry, tensor)
        self._block.entries.append(weakref.ref(entry))
        return entry, self._block

    def get(self, kept: Tensor | tuple[HostTensor, _Block]) -> Tensor:
        """The tensor back on its device; the block before its own starts to come back too."""
        if isinstance(kept, Tensor):
            return kept
        entry, block = kept
        before = block.before() if block.before is not None else None
        for reference in block.entries + (before.entries if before is not None else []):
            # Once: an entry that was given back already lives on until autograd is done with the block.
            if (other := reference()) is not None and not other.fetched:
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

    def _leave(self, entry: HostTensor, tensor: Tensor) -> None:
        flat = entry.flat(tensor)
        if self._streams is None:
            self._copy(entry, flat, out=True)
            return
        stream, _ = self._streams
        stream.wait_stream(torch.cuda.current_stream(entry.device))
        with torch.cuda.stream(stream):
            self._copy(entry, flat, out=True)
        # The allocator may hand the memory out again only after the copy.
        flat.record_stream(stream)
        entry.left = stream.record_event()

    def _fetch(self, entry: HostTensor) -> None:
        entry.fetched = True
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if self._streams is None:
            flat = torch.empty(size, dtype=torch.uint8, device=entry.device)
            self._copy(entry, flat, out=False)
        else:
            _, stream = self._streams
            stream.wait_event(entry.left)
            with torch.cuda.stream(stream):
                flat = torch.empty(size, dtype=torch.uint8, device=entry.device)
                self._copy(entry, flat, out=False)
            entry.arrived = stream.record_event()
        entry.back = entry.shaped(flat)

    def _copy(self, entry: HostTensor, flat: Tensor, *, out: bool) -> None:
        start = 0
        for piece in self._slabs.pieces(entry.spans):
            # Ranges are rounded up: the last piece may be longer than what is left.
            part = flat[start : start + len(piece)]
            host = piece[: len(part)]
            start += len(part)
            if out:
                host.copy_(part, non_blocking=True)
            else:
                part.copy_(host, non_blocking=True)

    def _reclaim(self) -> None:
        """The ranges of tensors that are gone are free again."""
        if self._returned and self._streams is not None:
            # Copies back may still read them; what is copied out over them next is on another stream.
            leaving, returning = self._streams
            leaving.wait_stream(returning)
        while self._returned:
            self._slabs.give_back(self._returned.popleft())

    def _slab(self, num_bytes: int) -> Any:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._streams is not None)


def on_streams(device: torch.device) -> bool:
    """Whether copies to and from the device run beside its compute."""
    return device.type == "cuda"


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
