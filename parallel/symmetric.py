"""Symmetric memory as the transport of exchanges: peers' buffers are read by copy engines, which leave the SMs alone.

The one file with torch.distributed._symmetric_memory, a private and alpha API: what it takes of it exists in torch
2.11 to 2.13 and is probed for. Bytes between GPUs move by cudaMemcpyAsync on a stream of their own (a copy between
two devices runs on a copy engine, not on SMs); a signal is a kernel of one warp, and a wait one that spins.
CUDA only, ranks of one node, NVLink or other peer access with atomics.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.parallel.peer_mailbox import NUM_SLOTS, Mailbox, Transport

# As long as NCCL waits for a peer by default.
TIMEOUT_MS = 600_000
# Offsets of slots suit every dtype and a copy engine.
ALIGNMENT = 512
INSTEAD = "exchange 'p2p' works everywhere"


def load_api() -> ModuleType:
    """torch.distributed._symmetric_memory.

    Raises:
        ValueError: this build of PyTorch does not have it, or not what this file needs of it.
    """
    name = "torch.distributed._symmetric_memory"
    try:
        api = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"exchange 'symmetric' needs {name}, which torch {torch.__version__} lacks; {INSTEAD}") from (
            error
        )
    memory = getattr(api, "_SymmetricMemory", None)
    wanted = ("empty_strided_p2p", "get_buffer", "put_signal", "wait_signal")
    missing = [method for method in wanted if not hasattr(memory, method)]
    missing += [function for function in ("rendezvous", "get_backend") if not hasattr(api, function)]
    if missing:
        raise ValueError(
            f"exchange 'symmetric' needs {', '.join(missing)} of {name}, which torch {torch.__version__} lacks; "
            f"{INSTEAD}"
        )
    return api


def allocator_of(device: torch.device) -> str | None:
    """What allocates symmetric memory on the device: `CUDA` is the one whose buffers peers can read."""
    found: str | None = load_api().get_backend(device)
    return found


class PeerMemory:
    """longreel.parallel.peer_mailbox.Transport over symmetric memory. All ranks of the group make one together.

    Args:
        group: name of the process group.
        device: this rank's.
        slot_bytes: of each of NUM_SLOTS slots, the same on every rank.
    """

    def __init__(self, group: str, device: torch.device, slot_bytes: int) -> None:
        api = load_api()
        self._slot_bytes = max(-(-slot_bytes // ALIGNMENT), 1) * ALIGNMENT
        # Not from the pool of torch's own `empty`, which would keep the memory of buffers that have become too small.
        self._buffer = api._SymmetricMemory.empty_strided_p2p(
            (NUM_SLOTS * self._slot_bytes,), (1,), torch.uint8, device
        )
        self._handle = api.rendezvous(self._buffer, group)
        # Signals are short and peers wait for them: they go before what else is ready to run.
        self._stream = torch.cuda.Stream(device, priority=-1)

    @property
    def slot_bytes(self) -> int:
        """See Transport."""
        return self._slot_bytes

    def after_compute(self) -> None:
        """See Transport."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def fill(self, slot: int, x: Tensor) -> None:
        """See Transport: a copy within the device."""
        self._copy(self._slot(self._handle.rank, slot, x), _bytes(x))

    def read(self, owner: int, slot: int, out: Tensor) -> None:
        """See Transport: a copy from the owner's device."""
        self._copy(_bytes(out), self._slot(owner, slot, out))

    def signal(self, peer: int, channel: int) -> None:
        """See Transport."""
        with torch.cuda.stream(self._stream):
            self._handle.put_signal(peer, channel, TIMEOUT_MS)

    def wait(self, peer: int, channel: int) -> None:
        """See Transport; after TIMEOUT_MS the kernel traps, which ends this process's use of the device."""
        with torch.cuda.stream(self._stream):
            self._handle.wait_signal(peer, channel, TIMEOUT_MS)

    def mark(self) -> torch.cuda.Event:
        """See Transport."""
        return self._stream.record_event()

    def finish(self) -> None:
        """See Transport."""
        self._stream.synchronize()

    def _slot(self, rank: int, slot: int, like: Tensor) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        assert num_bytes <= self._slot_bytes, (num_bytes, self._slot_bytes)
        slots: Tensor = self._handle.get_buffer(rank, (num_bytes,), torch.uint8, slot * self._slot_bytes)
        return slots

    def _copy(self, to: Tensor, source: Tensor) -> None:
        # Contiguous bytes of one dtype, which copy_ hands to cudaMemcpyAsync whole.
        with torch.cuda.stream(self._stream):
            to.copy_(source)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().flatten().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Mailboxes:
    """What one group exchanges through.

    Args:
        process_group: the group itself: a later group may have its name.
        gather: tensors that every rank reads. pairs: tensors of one reader each.
    """

    process_group: dist.ProcessGroup
    gather: Mailbox
    pairs: Mailbox


def open_transport(group: str, device: torch.device, slot_bytes: int) -> Transport:
    """The transport that mailboxes use."""
    return PeerMemory(group, device, slot_bytes)


# Buffers and signals outlive the ops that use them, and an op knows its group by name alone.
_open: dict[str, Mailboxes] = {}


def mailboxes(process_group: dist.ProcessGroup, device: torch.device) -> Mailboxes:
    """The mailboxes of a group, made at first use; their buffers come with the first tensor, sized for it.

    Args:
        device: of the tensors.
    """
    name = process_group.group_name
    found = _open.get(name)
    if found is None or found.process_group is not process_group:
        opener: Callable[[int], Transport] = partial(open_transport, name, device)
        found = _open[name] = Mailboxes(process_group, Mailbox(opener), Mailbox(opener))
    return found
