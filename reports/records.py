"""The record: one JSON line per benchmark point, append-only, keyed by configuration, commit and environment."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

SCHEMA_VERSION = 3

Kind = Literal["measured", "emulated", "predicted"]
Regime = Literal["full", "text_only"]
Status = Literal["ok", "oom", "wrong", "error", "skipped"]
MemoryMeaning = Literal["allocated", "step", "process"]

# What says which point a record is, besides `config`; not `attention`, which is what ran, not what was asked for.
_IDENTITY = (
    "kind",
    "regime",
    "model",
    "device",
    "strategy",
    "sp_degree",
    "dp_degree",
    "engine",
    "policy",
    "seq_len",
    "batch_per_group",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One point of a sweep, whatever became of it.

    Args:
        kind: `measured` (every rank a real process on its own device), `emulated` (one rank of P for real) or
            `predicted` (no rank ran).
        regime: `full` (self-attention over all tokens) or `text_only` (text attention only).
        status: `ok`, or why there is no figure; then `reason` says it in words.
        model: name of the model. device: what it ran on or was predicted for, in words.
        strategy: sequence-parallel strategy. sp_degree, dp_degree, num_devices: P, dp and P * dp.
        engine: `fsdp2-zero2`, `fsdp2-zero3`, `ddp`, `colossalai`. policy: activation policy.
        attention: attention provider that ran or is assumed.
        seq_len: S, tokens per sample. batch_per_group: samples each SP group holds in a step.
        is_baseline: this point belongs to the one baseline every ratio refers to.
        samples_s: every step time, seconds, slowest rank; empty when nothing was timed.
        interval_s: (low, high) of the step time, seconds: p20 and p80 when measured, the model's bounds if predicted.
        step_s: median step time, seconds, or the predicted one.
        memory: bytes on the rank that holds most, by name: `allocated`, `reserved`, `device`; of a CPU rank `process`
            (peak) and `process_before` (before the timed steps: weights, optimizer, Python, libraries).
        memory_limit: bytes of the device, None when there is no limit to compare with.
        memory_usable: those of them that a step may take, which decides what fits; None when not known.
        traffic: bytes one rank sends in a step, by collective.
        flops: useful FLOPs of one step over all devices; hw_flops counts recomputation too.
        mfu, hfu: flops and hw_flops over the devices' peak for the step's time, None where no peak is known.
        error: comparison with the oracle: `loss`, `grad` (relative errors) and `tolerance`.
        comparison: with the baseline, timed in alternation: `verdict` (SAME, FAST, SLOW, AMBIGUOUS), `ratio` of
            seconds per token (below 1 is faster), `low` and `high`, and the baseline's steps beside this point's,
            `baseline_samples_s`; empty where the two were not timed so.
        energy_j: energy of one step over all devices, joules, None where it was not measured.
        breakdown: seconds that add up to step_s, by part of the step; empty where only the whole was timed.
        hidden: seconds of communication behind computation, by part; not in step_s.
        telemetry: what the devices reported during the samples (clocks, power, temperature, throttle reasons), or why
            they did not.
        config: the whole resolved configuration. provenance: commit, versions, environment, command, time, and
            `reproduce`, the command that makes this one record again, where it is not `command`.
    """

    kind: Kind
    regime: Regime
    status: Status
    model: str
    device: str
    strategy: str
    sp_degree: int
    dp_degree: int
    num_devices: int
    engine: str
    policy: str
    attention: str
    seq_len: int
    batch_per_group: int
    is_baseline: bool = False
    reason: str | None = None
    samples_s: tuple[float, ...] = ()
    step_s: float | None = None
    interval_s: tuple[float, float] | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    memory_limit: int | None = None
    memory_usable: int | None = None
    traffic: Mapping[str, int] = field(default_factory=dict)
    flops: float | None = None
    hw_flops: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    error: Mapping[str, float] = field(default_factory=dict)
    comparison: Mapping[str, Any] = field(default_factory=dict)
    energy_j: float | None = None
    breakdown: Mapping[str, float] = field(default_factory=dict)
    hidden: Mapping[str, float] = field(default_factory=dict)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("regime", Regime), ("status", Status)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a record with status {self.status!r} needs a reason")
        if self.status == "ok" and self.step_s is None:
            raise ValueError("a record with status 'ok' needs step_s")
        if self.step_s is not None and not self.step_s > 0:
            raise ValueError(f"step_s must be positive, got {self.step_s}")
        if self.sp_degree * self.dp_degree != self.num_devices:
            raise ValueError(
                f"sp_degree {self.sp_degree} * dp_degree {self.dp_degree} must be num_devices {self.num_devices}"
            )

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over all devices."""
        if self.step_s is None:
            return None
        return self.seq_len * self.batch_per_group * self.dp_degree / self.step_s

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second over all devices, the unit of the published tables."""
        return None if self.step_s is None else self.batch_per_group * self.dp_degree / self.step_s

    @property
    def peak_memory(self) -> int | None:
        """Bytes of the most telling memory figure, which `memory_meaning` names."""
        if "allocated" in self.memory:
            return self.memory["allocated"]
        process = self.memory.get("process")
        # Most of a small process is Python and its libraries, the same in every configuration.
        return None if process is None else process - self.memory.get("process_before", 0)

    @property
    def memory_meaning(self) -> MemoryMeaning:
        """What `peak_memory` is: `allocated` by the step, what the `step` adds to its process, or the `process`."""
        if "process" not in self.memory or "allocated" in self.memory:
            return "allocated"
        return "step" if "process_before" in self.memory else "process"

    @property
    def worst_error(self) -> float | None:
        """The largest relative error against the oracle, None where nothing was compared."""
        return max((value for name, value in self.error.items() if name != "tolerance"), default=None)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What says which point this is, but for details of its configuration."""
        return tuple(getattr(self, name) for name in _IDENTITY)

    @property
    def point(self) -> str:
        """The point and its configuration, whatever commit and environment the record is of."""
        return json.dumps([*self.identity, dict(self.config)], sort_keys=True, default=str)

    @cached_property
    def key(self) -> str:
        """Hash of configuration, commit and environment: two records with one key are the same point."""
        identity = {name: getattr(self, name) for name in _IDENTITY} | {
            "config": dict(self.config),
            "commit": self.provenance.get("commit"),
            "environment": self.provenance.get("environment"),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line of JSON, without a newline; an error that is not finite is written as a string ("nan", "inf").

        Raises:
            ValueError: another number is not finite.
        """
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """What the line holds; the fields' own objects, not copies of them."""
        error = {name: value if math.isfinite(value) else str(value) for name, value in self.error.items()}
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"key": self.key, "error": error}

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record of one line; ValueError for a newer schema, unknown fields or what is not a record."""
        return cls(**read_fields(cls, line, SCHEMA_VERSION))


def read_fields(record_type: type[Any], line: str, newest: int) -> dict[str, Any]:
    """The fields of a record dataclass from one line of JSON, each of its annotated type.

    Args:
        record_type: the dataclass, with `schema_version` among its fields. line: what its to_json wrote.
        newest: the highest schema version that is understood.

    Raises:
        ValueError: a newer schema, unknown or missing fields, a value of another type, or what is not a record.
    """
    data = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(data, dict):
        raise ValueError(f"a record is a JSON object, got {type(data).__name__}")
    version = data.get("schema_version")
    if not isinstance(version, int):
        raise ValueError(f"schema_version must be an integer, got {version!r}")
    if version > newest:
        raise ValueError(
            f"record has schema version {version}, this version reads up to {newest}; use a newer longreel"
        )
    data.pop("key", None)
    unknown = set(data) - {f.name for f in fields(record_type)}
    if unknown:
        raise ValueError(f"unknown fields in record: {', '.join(sorted(unknown))}")
    for f in fields(record_type):
        kind = str(f.type).removesuffix(" | None")
        if f.name not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"record lacks the field {f.name}")
        elif data[f.name] is None and str(f.type).endswith(" | None"):
            continue
        elif not _FITS[kind](data[f.name]):
            raise ValueError(f"{f.name} must be {f.type}, got {data[f.name]!r}")
        elif kind.startswith("tuple"):
            data[f.name] = tuple(data[f.name])
        elif kind == "Mapping[str, float]":
            data[f.name] = {name: float(value) for name, value in data[f.name].items()}
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_error(value: object) -> bool:
    return _is_float(value) or value in ("nan", "inf", "-inf")


def _is_map(value: object, of: Callable[[object], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(of(v) for v in value.values())


# Annotation -> whether a JSON value fits it: one bad line must be an error that names it, not a crash in a figure.
_FITS: dict[str, Callable[[Any], bool]] = {
    "Kind": lambda v: isinstance(v, str),
    "Regime": lambda v: isinstance(v, str),
    "Status": lambda v: isinstance(v, str),
    "str": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "int": _is_int,
    "float": _is_float,
    "tuple[float, ...]": lambda v: isinstance(v, list) and all(map(_is_float, v)),
    "tuple[float, float]": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_float, v)),
    "Mapping[str, int]": lambda v: _is_map(v, _is_float),
    "Mapping[str, float]": lambda v: _is_map(v, _is_error),
    "Mapping[str, Any]": _is_map,
}
