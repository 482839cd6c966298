"""The record of one op at one shape with one provider: one JSON line, append-only, keyed like a step's record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from longreel.reports.records import Kind, Status, read_fields

OP_SCHEMA_VERSION = 1
DIRECTIONS = ("forward", "backward", "both")

# What says which point a record is, besides `config`.
_IDENTITY = ("kind", "op", "direction", "provider", "dtype", "device", "shape")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRecord:
    """One op, direction, shape and provider, whatever became of it.

    Args:
        kind: `measured` on a device, or `predicted`.
        status: `ok`, or why there is no figure; then `reason` says it in words.
        op: the op, or a roofline's: `clone`, `matmul`. direction: `forward`, `backward` or `both`.
        provider: the implementation that ran, by name. is_ours: it is this project's kernel, not a peer.
        dtype: bf16, fp16 or fp32. device: what it ran on, in words. shape: sizes by name.
        run: records of one run were measured together; only these are compared.
        samples_s: every time, seconds, in the order measured. median_s, interval_s: their median, p20 and p80.
        host_s: median time the host took to launch it, seconds.
        flops: useful FLOPs of one call of a compute-bound op; head_dim counts as it is, not padded.
        bytes_moved: fewest bytes one call of a memory-bound op must move.
        error: relative error of outputs and gradients against the oracle. allowed: the bar of each.
        comparison: with the best peer of the run: `provider`, `verdict`, `ratio` of times (below 1 is faster), `low`
            and `high`; empty for peers.
        readings: SM clock, power, temperature and throttle reasons beside the samples, or `unavailable` and why.
        memory: bytes by name: `allocated` is the peak of forward and backward beside the `inputs`; `reserved` by the
            allocator, and `device`, everything in use there.
        energy_j: joules of one call, only from windows of more than two seconds.
        config: timing rule, tile constants, pass. provenance: commit, versions, environment, command, time.
    """

    kind: Kind
    status: Status
    op: str
    direction: str
    provider: str
    dtype: str
    device: str
    shape: Mapping[str, int]
    run: str
    is_ours: bool = False
    reason: str | None = None
    samples_s: tuple[float, ...] = ()
    median_s: float | None = None
    interval_s: tuple[float, float] | None = None
    host_s: float | None = None
    flops: float | None = None
    bytes_moved: float | None = None
    error: Mapping[str, float] = field(default_factory=dict)
    allowed: Mapping[str, float] = field(default_factory=dict)
    comparison: Mapping[str, Any] = field(default_factory=dict)
    readings: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    energy_j: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = OP_SCHEMA_VERSION

    def __post_init__(self) -> None:
        allowed = {"kind": get_args(Kind), "status": get_args(Status), "direction": DIRECTIONS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a record with status {self.status!r} needs a reason")
        if self.status == "ok" and not (self.median_s is not None and self.median_s > 0):
            raise ValueError(f"a record with status 'ok' needs a positive median_s, got {self.median_s}")
        if (self.flops is None) == (self.bytes_moved is None):
            raise ValueError(f"an op has flops or bytes_moved, one of them; got {self.flops} and {self.bytes_moved}")

    @property
    def is_compute_bound(self) -> bool:
        """Whether the rate is FLOP/s, not bytes/s."""
        return self.flops is not None

    @property
    def rate(self) -> float | None:
        """Useful FLOP/s, or bytes/s, at the median; None without a valid figure."""
        if self.status != "ok" or self.median_s is None:
            return None
        work = self.flops if self.flops is not None else self.bytes_moved
        return None if work is None else work / self.median_s

    @property
    def worst_error(self) -> float | None:
        """The largest relative error, None where nothing was compared."""
        return max(self.error.values(), default=None)

    @property
    def key(self) -> str:
        """Hash of point, configuration, commit, source and environment: two records with one key are one point."""
        origin = {name: self.provenance.get(name) for name in ("commit", "source", "environment")}
        identity = {name: getattr(self, name) for name in _IDENTITY}
        identity |= {"shape": dict(self.shape), "config": dict(self.config)} | origin
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line of JSON, without a newline; an error that is not finite is written as a string ("nan", "inf").

        Raises:
            ValueError: another number is not finite.
        """
        error = {name: value if math.isfinite(value) else str(value) for name, value in self.error.items()}
        return json.dumps(asdict(self) | {"key": self.key, "error": error}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> OpRecord:
        """The record of one line; ValueError for a newer schema, unknown fields or what is not a record."""
        return cls(**read_fields(cls, line, OP_SCHEMA_VERSION))
