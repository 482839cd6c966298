"""What a measured rank asks of its device: when its work is done, and how much memory a step took."""

from __future__ import annotations

from typing import Protocol

import torch

from longreel.bench.cases import DeviceType
from longreel.bench.process_memory import PeakMemory


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

    def resident(self) -> int:
        """Bytes allocated now."""
        ...

    def start_peak(self, parked: int) -> None:
        """Watch the peak from here on.

        Args:
            parked: bytes that other points hold meanwhile, which are not this one's.
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

    def resident(self) -> int:
        """Not told apart: what a step adds to its process is the figure there."""
        return 0

    def start_peak(self, parked: int) -> None:
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
        self._parked = 0

    def synchronize(self) -> None:
        """See RankDevice."""
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        """See RankDevice."""
        torch.cuda.empty_cache()

    def resident(self) -> int:
        """See RankDevice."""
        return torch.cuda.memory_allocated(self.torch_device)

    def start_peak(self, parked: int) -> None:
        """See RankDevice."""
        torch.cuda.synchronize(self.torch_device)
        # Otherwise blocks that another point reserved would count as this one's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._parked = parked

    def peak(self) -> dict[str, int]:
        """See RankDevice. `device` is what the driver says is taken, contexts and other processes included."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return {
            "allocated": torch.cuda.max_memory_allocated(self.torch_device) - self._parked,
            "reserved": torch.cuda.max_memory_reserved(self.torch_device) - self._parked,
            "device": total - free - self._parked,
        }

    @property
    def memory_source(self) -> str:
        """See RankDevice."""
        return "peaks of the caching allocator over one sample, and the driver's figure after it"


def rank_device(device_type: DeviceType, rank: int) -> RankDevice:
    """The device of a rank of one node."""
    return CudaRank(rank) if device_type == "cuda" else CpuRank()
