"""What a measured rank asks of its device: when its work is done, and how much memory a step took."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from longreel.bench.cases import DeviceType
from longreel.bench.process_memory import PeakMemory


class Held(NamedTuple):
    """Bytes of a device that are taken: allocated, and reserved by the caching allocator with what lies between."""

    allocated: int = 0
    reserved: int = 0


class RankDevice(Protocol):
    """The device of one rank. limit: bytes of it, None where ranks share what there is."""

    torch_device: torch.device
    limit: int | None

    def synchronize(self) -> None:
        """Wait until everything launched so far is done."""
        ...

    def release(self) -> None:
        """Hand back what earlier points left in caches."""
        ...

    def resident(self) -> Held:
        """Taken now, caches handed back."""
        ...

    def start_peak(self, parked: Held) -> None:
        """Watch the peak from here on.

        Args:
            parked: what other points hold meanwhile, which is not this one's.
        """
        ...

    def peak(self) -> dict[str, int]:
        """Peak since start_peak, by the names of Record.memory."""
        ...

    @property
    def memory_source(self) -> str:
        """What these figures are, in words."""
        ...


class CpuRank:
    """A process with memory of its own."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.limit: int | None = None
        self._watched: PeakMemory | None = None

    def synchronize(self) -> None:
        """Nothing is queued."""

    def release(self) -> None:
        """PeakMemory hands freed memory back."""

    def resident(self) -> Held:
        """Not told apart: what a step adds to its process is the figure there."""
        return Held()

    def start_peak(self, parked: Held) -> None:
        """See RankDevice."""
        self._watched = PeakMemory()

    def peak(self) -> dict[str, int]:
        """See RankDevice."""
        assert self._watched is not None
        before = self._watched.before
        return {"process": self._watched.read()} | ({} if before is None else {"process_before": before})

    @property
    def memory_source(self) -> str:
        """See RankDevice."""
        return "" if self._watched is None else self._watched.source


class CudaRank:
    """One GPU of this machine."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.limit: int | None = torch.cuda.get_device_properties(self.torch_device).total_memory
        self._parked = Held()

    def synchronize(self) -> None:
        """See RankDevice."""
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        """See RankDevice."""
        torch.cuda.empty_cache()

    def resident(self) -> Held:
        """See RankDevice."""
        torch.cuda.empty_cache()
        device = self.torch_device
        return Held(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))

    def start_peak(self, parked: Held) -> None:
        """See RankDevice."""
        torch.cuda.synchronize(self.torch_device)
        # Otherwise blocks that another point reserved would count as this one's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._parked = parked

    def peak(self) -> dict[str, int]:
        """See RankDevice. `device` is what the driver says is taken, contexts and other processes included."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allocated = torch.cuda.max_memory_allocated(self.torch_device) - self._parked.allocated
        # A point may lie in gaps of the blocks that others reserved: what it allocated is its own all the same.
        reserved = max(allocated, torch.cuda.max_memory_reserved(self.torch_device) - self._parked.reserved)
        return {"allocated": allocated, "reserved": reserved, "device": total - free - self._parked.reserved}

    @property
    def memory_source(self) -> str:
        """See RankDevice."""
        return "peaks of the caching allocator over one sample, and the driver's figure after it"


def rank_device(device_type: DeviceType, rank: int) -> RankDevice:
    """The device of a rank of one node."""
    return CudaRank(rank) if device_type == "cuda" else CpuRank()
