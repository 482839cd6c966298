"""Rates measured on a GPU, from records of single ops, and the same scaled to another GPU.

Only op records count: steps are what predictions by these rates are validated on (bench/validate.py).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from longreel.parallel.predict.hardware import GPUProfile, Rate, profile_of_device
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record

# Bytes, of a device whose memory is not known.
_NO_LIMIT = 1 << 50
# Of a rate between one run and the next, beside the spread of its samples.
_REPEATS = 0.03
# Of a rate that is scaled by vendor figures to another GPU.
_SCALED = 0.10
_ATTENTION = ("attention_packed", "attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRates:
    """Rates of one device.

    Args:
        device: in words, as the records have it. dtype: of the records. cpu: model of the processor, which tells two
            devices apart that are processors.
        matmul: FLOP/s of the fastest matrix product. memory: bytes/s of the longest copy.
        attention: (provider, head_dim, backward) -> FLOP/s by sequence length.
    """

    device: str
    dtype: str
    matmul: Rate | None
    memory: Rate | None
    attention: Mapping[tuple[str, int, bool], Mapping[int, Rate]] = field(default_factory=dict, hash=False)
    cpu: str | None = None

    def providers(self, head_dim: int) -> tuple[str, ...]:
        """Attention providers with both directions at this head_dim."""
        has = {(name, backward) for name, dim, backward in self.attention if dim == head_dim}
        return tuple(sorted(name for name in {name for name, _ in has} if {(name, False), (name, True)} <= has))

    def own_profile(self) -> GPUProfile:
        """One of the device itself, where it is no GPU that has a profile: nothing in it but what was measured.

        It has no peers, and no limit of memory is known.

        Raises:
            ValueError: products, copies or attention were not measured.
        """
        missing = [name for name in ("matmul", "memory", "attention") if not getattr(self, name)]
        if missing or self.matmul is None or self.memory is None:
            raise ValueError(f"nothing measured {', '.join(missing)} on {self.device}: it cannot be predicted")
        return GPUProfile(
            name=self.device,
            matmul_flops=self.matmul.value,
            hbm_bytes_s=self.memory.value,
            memory_bytes=_NO_LIMIT,
            link_bytes_s=1.0,
            gpus_per_node=1,
            # Never looked at: what was not measured is refused.
            flash_scale=self.matmul,
        )

    def on(self, profile: GPUProfile, provider: str) -> GPUProfile:
        """The profile with these rates in place of those it assumes, scaled by vendor figures if it is another GPU.

        Args:
            profile: of the target. provider: whose attention; `auto` is sdpa-flash. Where nothing was measured of it,
                what the profile assumes stays.

        Raises:
            ValueError: the rates are of a device without a profile, so that there is nothing to scale by.
        """
        source = profile if profile.name == self.device else profile_of_device(self.device)
        if source is None:
            raise ValueError(f"rates are of {self.device!r}, which has no profile to scale them to {profile.name} by")
        name = "sdpa-flash" if provider == "auto" else provider
        flops = profile.matmul_flops / source.matmul_flops
        bandwidth = profile.hbm_bytes_s / source.hbm_bytes_s
        same = source.name == profile.name

        def scaled(rate: Rate | None, factor: float) -> Rate | None:
            if rate is None or same:
                return rate
            note = f"{rate.source}; times {factor:.3g}, {profile.name} over {source.name} by vendor figures"
            value = rate.value * factor
            low, high = rate.low * factor * (1 - _SCALED), rate.high * factor * (1 + _SCALED)
            return Rate(value=value, low=low, high=high, provenance="assumed", source=note)

        attention = []
        for (of, head_dim, backward), by_length in self.attention.items():
            if of == name:
                rates = ((length, scaled(rate, flops)) for length, rate in sorted(by_length.items()))
                attention.append((head_dim, backward, tuple((n, rate) for n, rate in rates if rate is not None)))
        return replace(
            profile,
            measured_matmul=scaled(self.matmul, flops),
            measured_memory=scaled(self.memory, bandwidth),
            measured_attention=tuple(attention),
        )


def calibrate(records: Iterable[OpRecord], *, device: str | None = None, dtype: str = "bf16") -> MeasuredRates:
    """Rates from op records: measured ones that are right, whatever else is among them.

    Args:
        records: of single ops. device: whose, if they are of several. dtype: of the ops.

    Raises:
        ValueError: nothing among them was measured in this dtype, or they are of several devices.
    """
    found = [r for r in records if r.kind == "measured" and r.rate and r.dtype == dtype and device in (None, r.device)]
    devices = sorted({r.device for r in found})
    if len(devices) != 1:
        what = f"of several devices ({', '.join(devices)}); name one" if devices else f"none measured in {dtype}"
        raise ValueError(f"op records to calibrate on: {what}" + ("" if device is None else f" on {device!r}"))
    attention: defaultdict[tuple[str, int, bool], dict[int, list[OpRecord]]] = defaultdict(dict)
    for record in found:
        if record.op in _ATTENTION and record.direction in ("forward", "backward"):
            key = record.provider, record.shape["head_dim"], record.direction == "backward"
            attention[key].setdefault(record.shape["seq_len"], []).append(record)
    products = [r for r in found if r.op == "matmul"]
    copies = [r for r in found if r.op == "clone"]
    return MeasuredRates(
        device=devices[0],
        dtype=dtype,
        cpu=next((cpu for r in found if (cpu := cpu_of(r))), None),
        # Short ones measure the launch, which a floor stands for.
        matmul=_rate(max(products, key=lambda r: r.rate or 0)) if products else None,
        memory=_rate(max(copies, key=lambda r: r.bytes_moved or 0)) if copies else None,
        attention={
            # The projection's own layout where both were measured: it is what self-attention takes.
            key: {n: _rate(min(some, key=lambda r: _ATTENTION.index(r.op))) for n, some in by_length.items()}
            for key, by_length in attention.items()
        },
    )


def cpu_of(record: OpRecord | Record) -> str | None:
    """The processor that a record's points ran on, None on a GPU."""
    environment = record.provenance.get("environment") or {}
    return environment.get("cpu") if record.device.startswith("CPU") else None


def calibrate_each(records: Iterable[OpRecord]) -> list[MeasuredRates]:
    """The rates of every device that was measured: of a GPU in bf16, of a processor in fp32."""
    by_device: defaultdict[str, list[OpRecord]] = defaultdict(list)
    for record in records:
        if record.kind == "measured" and record.rate:
            by_device[record.device].append(record)
    found = []
    for device, some in sorted(by_device.items()):
        dtype = "fp32" if device.startswith("CPU") else "bf16"
        if any(record.dtype == dtype for record in some):
            found.append(calibrate(some, device=device, dtype=dtype))
    return found


def _rate(record: OpRecord) -> Rate:
    """The record's rate, with the spread of its samples."""
    assert record.rate is not None
    assert record.median_s is not None
    fast, slow = record.interval_s or (record.median_s, record.median_s)
    work = record.rate * record.median_s
    runs = f"{len(record.samples_s)} samples, " if record.samples_s else ""
    return Rate(
        value=record.rate,
        low=min(work / slow, record.rate) * (1 - _REPEATS),
        high=max(work / fast, record.rate) * (1 + _REPEATS),
        provenance="measured",
        source=f"{record.op} {record.direction} by {record.provider} on {record.device}, {runs}record {record.key}",
    )


def error_quantiles(errors: Iterable[float]) -> tuple[float, float, float]:
    """Median, 90th percentile and largest of |error|."""
    ordered = sorted(map(abs, errors))
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], ordered[-1]
