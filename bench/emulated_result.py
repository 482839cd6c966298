"""How an emulated point is run, and what a worker returns of it: data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Share of the memory below which a prediction leaves no doubt.
SURELY = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a point is run.

    Args:
        depths: blocks, ascending: one depth, which is the model's; or 1 and 2, continued to the model's; or these and
            the model's, which shows how straight the line is.
        samples: timed steps at each depth. whole_samples: at the model's, where it is the third.
        warm_up: run an untimed step of full length first; else only a shorter one.
        memory_share: predicted peak over what the target leaves the allocator. Where that leaves doubt, one sample of
            depths 1 and 2 comes first, and the others only if the model's depth fits.
        rank: of the world that is played.
    """

    depths: tuple[int, ...]
    samples: int
    whole_samples: int = 1
    warm_up: bool = True
    memory_share: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        if not (len(self.depths) == 1 or self.depths[:2] == (1, 2)) or len(self.depths) > 3:
            raise ValueError(f"depths must be one depth, 1 and 2, or 1, 2 and the model's, got {self.depths}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def warms_up(self, depth: int) -> bool:
        """Whether a step of full length goes before this depth's samples; of a third depth the others were enough."""
        return self.warm_up and depth in self.depths[:2]

    @property
    def is_doubtful(self) -> bool:
        """Whether the prediction of memory leaves doubt."""
        return self.memory_share > SURELY


@dataclass(kw_only=True, slots=True)
class DepthRun:
    """One depth. Per-sample lists are in the order taken.

    Args:
        depth: blocks. samples_s: wall clock of steps.
        phases_s: seconds of `forward`, `backward` and `optimizer`.
        waited_s: seconds that computing stood still for collectives, by part.
        memory: peak of any step: `allocated`, `reserved` and `device` bytes; on a CPU `process` and `process_before`.
        calls: `part.collective` -> calls, bytes sent and link seconds of a step.
        forward_link_s, backward_link_s, longest_link_s: of the sharding engine's collectives, and the longest one.
        telemetry: see Monitor.summarise. energy_j: of a step.
    """

    depth: int
    samples_s: list[float] = field(default_factory=list)
    phases_s: list[dict[str, float]] = field(default_factory=list)
    waited_s: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)
    forward_link_s: float = 0.0
    backward_link_s: float = 0.0
    longest_link_s: float = 0.0
    telemetry: dict[str, Any] = field(default_factory=dict)
    energy_j: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulated:
    """What a worker found.

    Args:
        runs: by depth, ascending. hw_flops: of the rank, recomputation and padding included.
        cap_bytes: what the allocator was allowed, None on a CPU.
        oom: where memory ended, in words. wrong: what is not finite. unfinished: why samples are missing.
        link: figures of the link, in words. warm_up: in words. memory_source: what the memory figures are.
    """

    runs: tuple[DepthRun, ...]
    hw_flops: float
    cap_bytes: int | None
    link: str
    warm_up: str
    memory_source: str
    oom: str | None = None
    wrong: str | None = None
    unfinished: str | None = None


def continued(one: float, two: float, depth: int) -> float:
    """A figure that is linear in depth, from depths 1 and 2."""
    return one + (two - one) * (depth - 1)


def traffic_of(run: DepthRun) -> Mapping[str, int]:
    """Bytes that the rank sends in a step, by part and collective."""
    return {name: int(counts["bytes"]) for name, counts in run.calls.items() if counts["bytes"]}
